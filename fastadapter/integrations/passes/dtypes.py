"""In which dtype a pass computes where the tensors that meet have different ones."""

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives products on a device; ``None``: it is off there."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def attention_dtype(value: Tensor) -> torch.dtype:
    """What torch's attention computes in: the values' dtype, or autocast's."""
    return autocast_dtype(value.device) or value.dtype


def prefix_in(dtype: torch.dtype, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix keys and values for attention in ``dtype``: fp32 masters as they are, since the op rounds them itself.

    A model's own keys and values need not agree: under autocast a rotary embedding leaves keys in fp32.
    """
    if key.dtype == value.dtype and key.dtype in (dtype, torch.float32):
        return key, value
    return key.to(dtype), value.to(dtype)
