"""Argument checks shared by the ops; every message names the op, the argument, what was expected and what came."""

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def require_shape(op: str, name: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    """``axes`` spells the expected shape in words, ``expected`` in numbers."""
    if tensor.dim() != len(expected):
        raise ValueError(
            f"{op}: {name} must have {len(expected)} dims {axes}, got {tensor.dim()} dims {tuple(tensor.shape)}"
        )
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {axes} = {expected}, got {tuple(tensor.shape)}")


def require_same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like query, got {value.device}")


def require_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        words = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {name} must be {words}, got {tensor.dtype}")


def require_row_ids(op: str, row_ids: Tensor | None, batch: int, num_prefixes: int) -> None:
    if row_ids is None:
        if num_prefixes != 1:
            raise ValueError(
                f"{op}: a bank of {num_prefixes} entries needs row_ids (which entry each row uses)"
            )
        return
    require_tensor(op, row_ids=row_ids)
    require_dtype(op, "row_ids", row_ids, (torch.int32,))
    require_shape(op, "row_ids", row_ids, "(batch,)", (batch,))
    # On a GPU the values live on the device and reading them would stall it; the kernels bound them themselves.
    if batch and row_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in row_ids.aminmax())
        if low < -1 or high >= num_prefixes:
            raise ValueError(
                f"{op}: row_ids must be in [-1, {num_prefixes}), got values from {low} to {high}"
            )
