"""Argument checks shared by the ops; every message names the op, the argument, what was expected and what came."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Layouts remembered per op: lengths of prompts differ without end.
_LIMIT = 4096
GATE_FUNCTIONS = ("tanh", "identity")
# Kernels take scalars in fp32: beyond these they would be Inf, or a zero that means something else.
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def once(tensors: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the decorated checks once per shapes, dtypes, devices and layouts of their first ``tensors`` arguments and
    values of all others; what they raise is raised every time. For checks that look at nothing else, values least of
    all: ``row_ids`` on a CPU need :func:`require_row_ids_in_range` at every call.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        passed: set[tuple] = set()

        @functools.wraps(check)
        def call(*args: Any) -> None:
            if torch.compiler.is_compiling():
                return check(*args)
            try:
                layouts = [
                    None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in args[:tensors]
                ]
                key = (*layouts, *args[tensors:])
                if key in passed:
                    return None
            except (
                AttributeError,
                TypeError,
                RuntimeError,
            ):  # no tensor, a nested one, or sizes that are symbols
                return check(*args)
            check(*args)
            if len(passed) >= _LIMIT:
                passed.clear()
            passed.add(key)
            return None

        return call

    return decorate


def require_tensor(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout)
            raise TypeError(f"{op}: {name} must be a dense tensor (torch.strided), got a {kind} one")


def require_finite(op: str, name: str, value: float, kind: str = "a float") -> float:
    """A number that fp32 can hold, as a float."""
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value  # what nearly every call has
    _require_number(op, name, value, kind)
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{op}: {name} must be finite in fp32, got {value}")
    return float(value)


def require_positive(op: str, name: str, value: float, kind: str = "a float") -> float:
    """A number above zero that fp32 can hold, as a float."""
    _require_number(op, name, value, kind)
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{op}: {name} must be positive and finite in fp32, got {value}")
    return float(value)


def _require_number(op: str, name: str, value: float, kind: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}")


def require_dims(op: str, name: str, tensor: Tensor, axes: str) -> None:
    """Four dimensions, ``axes`` in words."""
    if tensor.dim() != 4:
        raise ValueError(f"{op}: {name} must have 4 dims {axes}, got {tuple(tensor.shape)}")


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


def require_prefix_dtype(op: str, dtype: torch.dtype, prefix_key: Tensor, prefix_value: Tensor) -> None:
    """The activations' ``dtype``, or fp32 masters beside half-precision ones."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    require_dtype(op, "prefix_key", prefix_key, (dtype, master))
    require_dtype(op, "prefix_value", prefix_value, (prefix_key.dtype,))


def require_gate(op: str, gate: Tensor, dtype: torch.dtype, num_prefixes: int, num_heads: int) -> None:
    if gate.dim() != 2 or gate.shape[0] != num_prefixes or gate.shape[1] != num_heads:
        require_shape(op, "gate", gate, "(num_prefixes, num_heads)", (num_prefixes, num_heads))
    require_dtype(op, "gate", gate, (torch.float64 if dtype == torch.float64 else torch.float32,))


def scale_or_default(op: str, softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return float(head_dim**-0.5)
    return require_finite(op, "softmax_scale", softmax_scale, "a float or None")


def softcap_or_zero(op: str, softcap: float | None) -> float:
    return 0.0 if softcap is None else require_positive(op, "softcap", softcap, "a float or None")


def require_gate_fn(op: str, gate_fn: str) -> None:
    if gate_fn not in GATE_FUNCTIONS:
        raise ValueError(f"{op}: gate_fn must be one of {', '.join(GATE_FUNCTIONS)}, got {gate_fn!r}")


def require_row_ids(
    op: str, row_ids: Tensor | None, batch: int, num_prefixes: int, axes: str = "(batch,)"
) -> None:
    if row_ids is None:
        if num_prefixes != 1:
            raise ValueError(
                f"{op}: a bank of {num_prefixes} entries needs row_ids (which entry each row uses)"
            )
        return
    require_tensor(op, row_ids=row_ids)
    require_dtype(op, "row_ids", row_ids, (torch.int32,))
    require_shape(op, "row_ids", row_ids, axes, (batch,))
    require_row_ids_in_range(op, row_ids, num_prefixes)


def require_row_ids_in_range(op: str, row_ids: Tensor | None, num_prefixes: int) -> None:
    """The part of :func:`require_row_ids` that looks at values, for calls whose layout was checked before."""
    if row_ids is None:
        return
    # On a GPU the values live on the device and reading them would stall it; the kernels bound them themselves.
    if row_ids.is_cpu and row_ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in row_ids.aminmax())
        if low < -1 or high >= num_prefixes:
            raise ValueError(
                f"{op}: row_ids must be in [-1, {num_prefixes}), got values from {low} to {high}"
            )


def is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
