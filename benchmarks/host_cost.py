"""``python -m benchmarks.host_cost``: what a call costs on the host, with the launch itself left out. Needs no GPU.

Ops take their GPU route on CPU tensors: validation, choice of backend, autograd, allocation and everything up to the
call of the launcher that Triton compiled, which is replaced by one that returns at once. ``floor`` is what PyTorch
itself costs: an autograd Function with as many arguments that only allocates its results.

A GPU hides this time only while it has work queued that takes longer.
"""

import argparse
import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastadapter.kernels import launch, target
from torch import Tensor
from triton.runtime import jit

import fastadapter as fa
from fastadapter.ops import self_check
from fastadapter.ops.backends import GPU_TYPES

CHAIN = 20
CALLS = 300  # in a sample
SAMPLES = 20
KERNELS = Path(target.__file__).parent


class Row(NamedTuple):
    op: str
    what: str
    microseconds: float  # the least of the samples: another process can only add to it
    calls: float  # of functions, Python's and C's, which no other process changes


@contextlib.contextmanager
def nothing_launched(arch: str = "sm_90") -> Iterator[None]:
    """Inside the block ops on CPU tensors run as on a checked GPU, and launches return at once."""

    class Compiled:
        function = packed_metadata = None

        @staticmethod
        def run(*args: Any) -> None:
            return None

    compiled = Compiled()
    modules = [importlib.import_module(f"fastadapter.kernels.{file.stem}") for file in KERNELS.glob("*.py")]
    checks = [(module, module.check) for module in modules if hasattr(module, "check")]
    for module, _ in checks:
        module.check = lambda *args: None  # they refuse a CPU, once per layout
    old = launch._can_be_direct, launch._current_device, launch._current_stream, jit.JITFunction.run
    launch._can_be_direct = lambda _: True
    launch._current_device, launch._current_stream = lambda: -1, lambda _: 0
    jit.JITFunction.run = lambda *args, **options: compiled
    passed = {(op, torch.device("cpu"), dtype) for op in self_check.PROBES for dtype in self_check.FLOOR_ULP}
    self_check._passed |= passed
    GPU_TYPES.add("cpu")
    try:
        with target.assume(arch):
            yield
    finally:
        GPU_TYPES.discard("cpu")
        self_check._passed -= passed
        launch._can_be_direct, launch._current_device, launch._current_stream, jit.JITFunction.run = old
        for module, check in checks:
            module.check = check
        launch.forget()


def cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor | None]]]:
    """A call by op, and its tensors: small, since their memory is a CPU's and takes other time than a GPU's."""

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu")

    query = make(2, 8, 4, 16).transpose(1, 2)
    bank = [make(1, 2, 10, 16, dtype=torch.float32) for _ in range(2)]
    gate = make(1, 4, dtype=torch.float32)
    lse = make(2, 4, 8, dtype=torch.float32)
    x = make(2, 8, 64)
    weights = [make(16, 64, dtype=torch.float32), make(64, 16, dtype=torch.float32)]
    return {
        "gated_prefix": (fa.ops.gated_prefix, [query.clone(), query, *bank, gate]),
        "prefix_merge": (lambda *args: fa.ops.prefix_merge(*args)[0], [query.clone(), lse, query, *bank]),
        "bottleneck": (lambda x, down, up: fa.ops.bottleneck(x, down, up, residual=x), [x, *weights]),
    }


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args)
        return torch.empty_like(args[0])

    @staticmethod
    def backward(ctx, grad_out):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def microseconds(call: Callable[[], Any], calls: int) -> float:
    samples = []
    gc.disable()  # as timeit does
    try:
        for _ in range(SAMPLES):
            start = time.thread_time()
            for _ in range(calls):
                call()
            samples.append((time.thread_time() - start) / calls * 1e6)
    finally:
        gc.enable()
    return min(samples)


def measure(ops: list[str], calls: int = CALLS) -> Iterator[Row]:
    with nothing_launched():
        for op in ops:
            call, tensors = cases()[op]
            with torch.no_grad():
                yield _row(op, "forward, no gradients", partial(call, *tensors), calls)
                yield _row(op, "floor of it", partial(torch.empty_like, tensors[0]), calls)
            for name, run in (("forward + backward", call), ("floor of it", _Nothing.apply)):
                yield _row(op, name, partial(_chain, run, tensors), calls, CHAIN)


def _row(op: str, what: str, call: Callable[[], Any], calls: int, of: int = 1) -> Row:
    """A row of a ``call`` that makes ``of`` calls of the op."""
    return Row(op, what, microseconds(call, max(1, calls // of)) / of, count(call) / of)


def count(call: Callable[[], Any]) -> int:
    """How many functions ``call`` calls, after a first time."""
    call()
    seen = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def _chain(call: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Forward and backward of :data:`CHAIN` calls, each on the result of the one before: as in a model, one start of
    autograd's engine, which costs as much as several calls, serves them all."""
    out, leaves = tensors[0].detach().requires_grad_(), []
    for _ in range(CHAIN):
        own = [x.detach().requires_grad_() for x in tensors[1:]]
        out = call(out, *own)
        leaves += own
    torch.autograd.grad(out, leaves, tensors[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=CALLS, help="calls in each of the samples")
    parser.add_argument("--op", nargs="*", choices=list(cases()), help="all unless given")
    args = parser.parse_args()
    for row in measure(args.op or list(cases()), args.calls):
        print(f"{row.op:<14} {row.what:<24} {row.microseconds:7.1f} us {row.calls:6.0f} calls", flush=True)


if __name__ == "__main__":
    main()
