"""What the GPU benchmarks share: meters, ceilings of the card, peers at their best settings, checked comparisons."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .runner import Case, Meter, Variant, wall_meter

# Cycles the GPU idles for while the host enqueues a sample, so that no launch gap falls into the window.
HEAD_START = 2_000_000
# More than the L2 cache of any current card.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Bench:
    """One run: the device, whether it is a walk-through on a CPU, and what the card reached at the start."""

    device: str
    dry: bool
    copy_bytes_per_s: float
    flops_per_s: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def draw(
        self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False, scale: float = 1.0
    ) -> Tensor:
        """Random, not zeros: multiplying zeros takes less power, so clocks are higher."""
        x = torch.randn(shape, device=self.device, dtype=torch.float32) * scale
        return x.to(dtype or self.dtype).requires_grad_(grad)

    def floor_seconds(self, bytes_moved: float, flops: float) -> float:
        return max(bytes_moved / self.copy_bytes_per_s, flops / self.flops_per_s)

    def event_meter(self) -> Meter:
        return dry_meter if self.dry else event_meter()

    def wall_meter(self) -> Meter:
        return dry_meter if self.dry else wall_meter(synchronized_clock)


def dry_meter(run, state, calls) -> float:
    """Runs once; the time is nothing to be quoted."""
    start = time.perf_counter()
    run(state)
    return max(time.perf_counter() - start, 1e-9)


def event_meter() -> Meter:
    """Seconds of GPU time per call, caches cold: events around each call, the L2 cache overwritten before it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def meter(run, state, calls):
        pairs = []
        for _ in range(calls):
            flush.zero_()
            torch.cuda._sleep(HEAD_START)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(state)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3

    return meter


def synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def ceilings(device: str, dry: bool) -> Bench:
    """Bandwidth of a large copy and rate of a large matrix product, the best of many."""
    size, length = (2**16, 64) if dry else (2**28, 8192)
    blank = Bench(device, dry, 1.0, 1.0)
    meter = blank.event_meter()
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (blank.draw(length, length) for _ in range(2))
    copying = min(meter(lambda _: target.copy_(source), None, 1) for _ in range(10))
    multiplying = min(meter(lambda _: a @ b, None, 1) for _ in range(10))
    return Bench(device, dry, 2 * size / copying, 2 * length**3 / multiplying)


class Graphed:
    """A function without arguments, replayed as a CUDA graph; on a CPU, or where capture fails, it raises or runs."""

    def __init__(self, fn: Callable[[], Any], device: str):
        self.fn = fn
        self.replay = fn
        if device != "cuda":
            return
        # ops check themselves and compile on their first call, which a capture cannot take
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = fn()
        self.replay = self.graph.replay

    def __call__(self, _: Any = None) -> Any:
        return self.replay()


def compiled(fn: Callable, dry: bool) -> Callable:
    """torch.compile at its best, every shape its own graph; the walk-through only traces."""
    if dry:
        return torch.compile(fn, backend="eager", dynamic=False, fullgraph=True)
    return torch.compile(fn, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)


def attention_backend(name: str, dry: bool) -> AbstractContextManager:
    """``cudnn`` or ``flash`` alone, so that a row says which it was; on a CPU there is only one."""
    if dry:
        return nullcontext()
    return sdpa_kernel({"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}[name])


def comparison(
    bench: Bench, goal: str, what: str, forms: Mapping[str, Any], *, floor: str,
    bytes_moved: float = 0.0, flops: float = 0.0, exact: Callable[[], Any] | None = None, graph: bool = False,
    unit: str = "us", tolerance: float = 0.05,
) -> tuple[Case, float]:  # fmt: skip
    """A case of the forms that run here and agree with ``exact``, and its floor in seconds (0: none is known).

    A form is a function, or a pair of one that prepares a sample, untimed, and one that takes what that made.

    A peer that cannot run or is wrong is left out and named on stderr; ours raises. ``floor`` names a form, or is
    "copy": a copy of ``bytes_moved``. ``exact`` is not compared with forms whose names start with "(": those are
    parts of the work, shown for scale.
    """
    wanted = _flat(exact()) if exact else None
    usable: list[Variant] = []
    for name, form in forms.items():
        try:
            prepare, run = form if isinstance(form, tuple) else (lambda: None, lambda _, form=form: form())
            found = _flat(run(prepare()))
            if wanted is not None and not name.startswith("("):
                for mine, right in zip(found, wanted, strict=True):
                    distance = (mine.double() - right).abs().max() / right.abs().max()
                    if not distance <= tolerance:
                        raise RuntimeError(f"off by {distance:.2g} of the largest value")
            usable.append(Variant(name, Graphed(form, bench.device) if graph else run, prepare))
        except Exception as error:
            if name.startswith("fastadapter"):
                raise
            print(f"{goal}, {what}: {name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    if floor == "copy":
        source = torch.randn(max(1, int(bytes_moved) // 8), device=bench.device)
        target = torch.empty_like(source)
        usable.insert(0, Variant("copy", lambda _: target.copy_(source)))
    if floor not in [variant.name for variant in usable]:
        raise RuntimeError(f"{goal}, {what}: the floor {floor!r} cannot run here")
    case = Case(
        entry=f"{goal}", shape=what, floor=floor, dtype=str(bench.dtype).removeprefix("torch."), unit=unit,
        variants=usable, bytes_moved=int(bytes_moved),
        warmup=1 if bench.dry else 5,
    )  # fmt: skip
    return case, bench.floor_seconds(bytes_moved, flops) if bytes_moved or flops else 0.0


def _flat(results: Any) -> Sequence[Tensor]:
    return (
        [results.detach()] if isinstance(results, Tensor) else [x.detach() for x in results if x is not None]
    )


def gradients(
    call: Callable[..., Tensor], operands: Sequence[Tensor], grad_out: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """Forward and backward of ``call`` as one function."""

    def run() -> Sequence[Tensor]:
        out = call(*operands)
        return (out, *torch.autograd.grad(out, list(operands), grad_out))

    return run


def doubled(operands: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in operands]


Cases = Iterator[tuple[Case, float]]
