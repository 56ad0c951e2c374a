"""Which implementation an op runs on, decided by device and dtype alone, and the reason in words.

``auto`` means: the compiled C++ extension on a CPU, Triton on a GPU, and the reference where that one is not
available. A backend that is named and cannot run raises; nothing falls back in silence.
"""

import importlib.util
import os

import torch

from fastadapter._source_tree import EXTENSION, extension_folder

BACKENDS = ("auto", "triton", "cpp", "reference")
# Types of device whose tensors the GPU kernels take. Tests add "cpu": kernels then run in Triton's interpreter, and all
# that surrounds them as on a GPU.
GPU_TYPES = {"cuda"}
ATTENTION_OPS = ("gated_prefix", "gated_prefix_attention", "prefix_attention", "prefix_merge")
OPS = (*ATTENTION_OPS, "bottleneck")
# More does not fit a GPU's registers; decided here, so that auto takes the reference instead of an error at launch.
MAX_HEAD_DIM = 256
# fp32 products are made of three bf16 parts of each operand: beyond this, registers spill by the hundred.
MAX_FP32_HEAD_DIM = 128


class _Permission(str):
    """Equal to the backend it names; told apart by identity."""


# "triton" as the self-check names it: its own calls must not ask for the verdict that they are to find. The value goes
# where the backend goes, from an op's forward to its backward on autograd's thread, and to no other call.
UNCHECKED = _Permission("triton")

library = torch.library.Library("fastadapter", "DEF")


def _load_extension() -> str | None:
    if os.environ.get("FASTADAPTER_DISABLE_EXTENSION") == "1":
        return "switched off by FASTADAPTER_DISABLE_EXTENSION=1"
    folder, reason = extension_folder()
    if reason:
        return reason
    try:
        torch.ops.load_library(str(folder / EXTENSION))
    except OSError as error:
        return f"it was built for another torch and does not load: {error}"
    return None


# Settled once, at import: a compiled graph must not ask the file system.
_EXTENSION_ERROR = _load_extension()
# An extension that was built before an op was added has no kernel for it.
_COMPILED = (
    frozenset()
    if _EXTENSION_ERROR
    else frozenset(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LACKING: dict[tuple[str | None, str], str] = {}


def lack(op: str, backend: str, reason: str) -> None:
    """Note, while ``op`` is registered, that ``backend`` has no kernel for a part of it."""
    _LACKING[op, backend] = reason


def extension_error(op: str | None = None) -> str | None:
    """``None`` when the compiled extension is loaded (and has ``op``), otherwise why it cannot be used."""
    if _EXTENSION_ERROR is None and op is not None and f"fastadapter::{op}" not in _COMPILED:
        return f"it was built without {op}; install the package again"
    return _EXTENSION_ERROR


def triton_error(device_type: str) -> str | None:
    """``None`` when the Triton kernels can run on this kind of device, otherwise why they cannot."""
    if not _HAS_TRITON:
        return 'triton is not installed (pip install "fastadapter[triton]")'
    if device_type in GPU_TYPES:
        return None
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton has no {device_type} device here (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"


def _cpp_limit(device_type: str, op: str | None) -> str | None:
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    return extension_error(op) or _LACKING.get((op, "cpp"))


def _triton_limit(device_type: str, dtype: torch.dtype, op: str | None, head_dim: int) -> str | None:
    error = _LACKING.get((op, "triton")) or triton_error(device_type)
    if error is None and dtype == torch.float64:
        error = "the Triton kernels have no fp64"
    if error is None and op in ATTENTION_OPS:
        if head_dim > MAX_HEAD_DIM:
            error = f"the Triton kernels have no head_dim above {MAX_HEAD_DIM}, got {head_dim}"
        elif head_dim > MAX_FP32_HEAD_DIM and dtype == torch.float32 and device_type in GPU_TYPES:
            error = f"the Triton kernels have no head_dim above {MAX_FP32_HEAD_DIM} in fp32, got {head_dim}"
    return error


def automatic_backend(
    device_type: str, dtype: torch.dtype, op: str | None = None, head_dim: int = 0
) -> tuple[str, str]:
    """The backend ``auto`` takes, and why. ``head_dim``: the last size of the call's tensors, 0 when none is meant."""
    if device_type in GPU_TYPES:
        error = _triton_limit(device_type, dtype, op, head_dim)
        return ("reference", error) if error else ("triton", "GPU kernel")
    if device_type == "cpu":
        error = _cpp_limit(device_type, op)
        return ("reference", f"no C++ extension: {error}") if error else ("cpp", "compiled extension")
    return "reference", f"no kernel for device type {device_type}"


def choose_backend(
    backend: str, device_type: str, dtype: torch.dtype, op: str | None = None, head_dim: int = 0
) -> str:
    """Resolve ``backend`` for one call of ``op``.

    Raises:
        ValueError: unknown name, or a named backend that cannot run this call, with the reason.
    """
    if backend == "auto":
        return automatic_backend(device_type, dtype, op, head_dim)[0]
    if backend == "reference":
        return backend
    if backend == "cpp":
        error = _cpp_limit(device_type, op)
    elif backend == "triton":
        error = _triton_limit(device_type, dtype, op, head_dim)
    else:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if error:
        raise ValueError(f"backend={backend!r} cannot run here: {error}")
    return backend


def backends() -> list[dict[str, str]]:
    """The backend every op takes on this machine, per device, and why; what ``fastadapter doctor`` prints.

    >>> all(row["backend"] in ("cpp", "reference") for row in backends() if row["device"] == "cpu")
    True
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in OPS:
        for device in devices:
            name, reason = automatic_backend(device, torch.float32, op)
            if name == "triton":
                reason += "; the reference for fp64"
                if op in ATTENTION_OPS:
                    reason += f" and head_dim above {MAX_HEAD_DIM} ({MAX_FP32_HEAD_DIM} in fp32)"
            rows.append({"op": op, "device": device, "backend": name, "reason": reason})
    return rows
