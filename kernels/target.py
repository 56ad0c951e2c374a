"""Which GPU architecture a launch is for: the key of every table of tiles.

The launchers ask here instead of asking the driver, so that the audit can compile what they would launch on a GPU
that is not there, and tests can run every route in the interpreter:

    >>> with assume("sm_90"):
    ...     arch(torch.empty(1, device="meta"))
    'sm_90'
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# What the interpreter and a device without a driver stand for.
DEFAULT = "sm_80"
_assumed: list[str] = []


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Launch for architecture ``name`` ("sm_80", "sm_90", "sm_100", "gfx942", ...) inside the block."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()


def assumed() -> str | None:
    """The innermost :func:`assume`, if any: part of the key of whatever is kept by device."""
    return _assumed[-1] if _assumed else None


def arch(tensor: Tensor | torch.device) -> str:
    """The architecture of a device, or of the device of a tensor."""
    if _assumed:
        return _assumed[-1]
    device = tensor if isinstance(tensor, torch.device) else tensor.device
    return _of_device(device) if device.type == "cuda" else DEFAULT


@functools.cache
def _of_device(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
