"""Compile the GPU kernels and check them before the first real call needs them."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapter import ops as _ops
from fastadapter.ops import self_check
from fastadapter.ops.backends import GPU_TYPES, triton_error

# One token, a short prompt, a long one: forward and backward take other routes for each.
_LENGTHS = (1, 128, 2048)


class Warmed(NamedTuple):
    """What was made ready: ``size`` is a head_dim, or (hidden_size, bottleneck_size); ``checked``: just now."""

    op: str
    dtype: torch.dtype
    size: int | tuple[int, int] | None
    checked: bool
    seconds: float


def warmup(
    ops: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    head_dims: Iterable[int] = (64, 128),
    device: torch.device | str | None = None,
    *,
    prefix_len: int = 10,
    bottlenecks: Iterable[tuple[int, int]] = (),
) -> list[Warmed]:
    """Compile the shipped configurations and compare them with fp64, so that no later call waits for it.

    Needed before a CUDA graph is captured; otherwise a convenience: a first call costs seconds instead of
    microseconds. Forward and backward run on small inputs, with fp32 weights and with weights in ``dtype``. Triton
    keeps what it compiled on disk, and a check that passed is noted, so a second process is quick.

    Args:
        ops: names as in ``fastadapter.ops``; all unless given.
        dtypes: of activations: fp32, bf16, fp16.
        head_dims: for the attention ops.
        device: a GPU; the current one unless given.
        prefix_len: kernels of prefixes of other lengths can be others.
        bottlenecks: pairs (hidden_size, bottleneck_size), which the kernels of ``bottleneck`` are compiled for; with
            none that op is only checked.
    Returns: what was made ready, with seconds of wall time.
    Raises:
        RuntimeError: no GPU here, no Triton, or kernels that give wrong results (``fastadapter.ops.self_check``).
        ValueError: an unknown op, or a device that is no GPU.
        TypeError: a dtype the kernels do not have.

    >>> warmup(["gated_prefix"], head_dims=[128])  # doctest: +SKIP
    [Warmed(op='gated_prefix', dtype=torch.bfloat16, size=128, checked=True, seconds=9.3)]
    """
    names = list(self_check.PROBES if ops is None else ops)
    if unknown := [name for name in names if name not in self_check.PROBES]:
        raise ValueError(
            f"warmup: ops must be among {', '.join(self_check.PROBES)}, got {', '.join(unknown)}"
        )
    wanted = list(dtypes)
    for dtype in wanted:
        if dtype not in self_check.FLOOR_ULP:
            raise TypeError(f"warmup: dtypes must be fp32, bf16 or fp16, got {dtype}")
    place = _gpu(device)
    sizes, pairs = list(head_dims), list(bottlenecks)
    done = []
    for name in names:
        for dtype in wanted:
            start = time.perf_counter()
            checked = self_check.check(name, place, dtype)
            for size in (pairs if name == "bottleneck" else sizes) or [None]:
                if size is not None:
                    _exercise(name, place, dtype, size, prefix_len, "triton")
                torch.cuda.synchronize(place)
                done.append(Warmed(name, dtype, size, checked, time.perf_counter() - start))
                start, checked = time.perf_counter(), False
    return done


def _gpu(device: torch.device | str | None) -> torch.device:
    place = torch.device("cuda" if device is None else device)
    if place.type not in GPU_TYPES:
        raise ValueError(f"warmup: device must be a GPU, got {place}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"warmup: there is no GPU that torch {torch.__version__} can use; kernels are compiled for the GPU they "
            "run on (`fastadapter bench audit` compiles them without one)"
        )
    if error := triton_error(place.type):
        raise RuntimeError(f"warmup: {error}")
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def _exercise(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    size: int | tuple[int, int],
    prefix_len: int,
    backend: str,
) -> None:
    """Forward with and without a graph, and backward, over lengths and dtypes of weights."""
    for trained in dict.fromkeys((dtype, torch.float32)):
        for length in _LENGTHS:

            def make(*shape: int, of: torch.dtype = dtype) -> Tensor:
                return torch.ones(shape, device=device, dtype=of)

            if isinstance(size, tuple):
                hidden, inner = size
                x = make(1, length, hidden)
                operands = [x, make(1, inner, hidden, of=trained), make(1, hidden, inner, of=trained)]
            else:
                query, keys = (
                    make(1, length, 2, size).transpose(1, 2),
                    make(1, length, 1, size).transpose(1, 2),
                )
                prefix = [make(1, 1, prefix_len, size, of=trained) for _ in range(2)]
                gate, lse = make(1, 2, of=torch.float32), make(1, 2, length, of=torch.float32)
                operands = {
                    "gated_prefix": [query.clone(), query, *prefix, gate],
                    "gated_prefix_attention": [query, keys, keys.clone(), *prefix, gate],
                    "prefix_attention": [query, keys, keys.clone(), *prefix],
                    "prefix_merge": [query.clone(), lse, query, *prefix],
                }[op]
            call: Callable[..., Any] = getattr(_ops, op)
            options = {"is_causal": True} if op.endswith("_attention") else {}
            with torch.inference_mode(False):
                with torch.no_grad():
                    call(*operands, **options, backend=backend)
                with torch.enable_grad():
                    leaves = [x.detach().requires_grad_() for x in operands]
                    answer = call(*leaves, **options, backend=backend)
                    out = answer[0] if isinstance(answer, tuple) else answer
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
