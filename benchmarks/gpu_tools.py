"""What the GPU cases share: what a run knows, meters, checked comparisons.

A case is a name and a function ``case(bench) -> Iterator[Row]`` in the dictionary ``CASES`` of one of the modules that
``benchmarks/gpu.py`` lists. It runs in a process of its own, twice: first with ``bench.warm``, beside other cases, to
compile (everything runs once, nothing is timed, no row comes out), then alone, to be timed. Both are what
:func:`compare` (ops) and :meth:`Bench.measure` (any other ``runner.Case``) do by themselves. A case that dies or hangs
costs no other case, and rows that it has yielded are kept.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import runner
from .rows import Row
from .runner import Case, Meter, Settings, Variant

# Cycles the GPU idles for while the host enqueues a sample, so that no launch gap falls into the window.
HEAD_START = 2_000_000
# More than the L2 cache of any current card.
FLUSH_BYTES = 256 * 2**20
Rows = Iterator[Row]
Flat = list[Tensor]


@dataclass(frozen=True)
class Bench:
    """One run: the device, how it is measured, and what the card reached at its start."""

    device: str  # "cuda", or "cpu" for a walk-through
    dry: bool  # tiny sizes, one sample: nothing to be quoted
    warm: bool = False  # compile and run once, time nothing
    compile: bool = False  # torch.compile'd peers too: slow to compile
    rounds: int = 15
    copy_bytes_per_s: float = 1e12
    flops_per_s: float = 1e14
    red: Mapping[str, int] = field(default_factory=dict)  # failed tests by op
    environment: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # wrong results and failures of our own forms

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def settings(self) -> Settings:
        """For the CPU benchmarks' own cases."""
        return Settings(
            rounds=1 if self.dry else self.rounds,
            quick=self.dry,
            device=self.device,
            environment=self.environment,
        )

    def draw(
        self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False, scale: float = 1.0
    ) -> Tensor:
        """Random, not zeros: multiplying zeros takes less power, so clocks are higher."""
        x = torch.randn(shape, device=self.device, dtype=torch.float32) * scale
        return x.to(dtype or self.dtype).requires_grad_(grad)

    def floor_seconds(self, bytes_moved: float, flops: float) -> float:
        return max(bytes_moved / self.copy_bytes_per_s, flops / self.flops_per_s)

    def measure(self, case: Case, meter: Meter | None = None) -> list[Row]:
        """Rows of ``case`` by the synchronised clock (or ``meter``); while warming up, none."""
        if self.warm:
            for variant in case.variants:
                start = time.perf_counter()
                variant.run(variant.prepare())
                synchronize(self.device)
                log(f"warm {case.entry}, {case.shape}: {variant.name} {time.perf_counter() - start:.1f} s")
            return []
        if meter is None:
            meter = dry_meter if self.dry else runner.wall_meter(synchronized_clock)
        return self.marked(runner.measure(case, self.settings, meter))

    def marked(self, found: list[Row]) -> list[Row]:
        """Rows that say how many tests of their op are red, so that no table draws a speedup from them."""
        for row in found:
            op = row.entry.split(" ")[0]
            red = self.red[op] if op in self.red else sum(self.red.values()) * (op not in OPS)
            if red:
                row.extra["red_tests"] = red
        return found


OPS = ("gated_prefix", "gated_prefix_attention", "prefix_attention", "prefix_merge", "bottleneck")


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def dry_meter(run, state, calls) -> float:
    """Runs once; the time is nothing to be quoted."""
    start = time.perf_counter()
    run(state)
    return max(time.perf_counter() - start, 1e-9)


def event_meter(head_start: int = HEAD_START) -> Meter:
    """Seconds between events around a call, caches cold (the L2 cache is overwritten before each).

    With a head start that is GPU time alone. Without one the call also waits for its own Python, as a user's does.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def meter(run, state, calls):
        pairs = []
        for _ in range(calls):
            flush.zero_()
            if head_start:
                torch.cuda._sleep(head_start)
            else:
                torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(state)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3

    return meter


def ceilings(device: str, dry: bool) -> dict[str, float]:
    """Bandwidth of a large copy and rate of a large matrix product, the best of many."""
    size, length = (2**16, 64) if dry else (2**28, 8192)
    bench = Bench(device, dry)
    meter = dry_meter if dry else event_meter()
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (bench.draw(length, length) for _ in range(2))
    copying = min(meter(lambda _: target.copy_(source), None, 1) for _ in range(10))
    multiplying = min(meter(lambda _: a @ b, None, 1) for _ in range(10))
    return {"copy_bytes_per_s": 2 * size / copying, "flops_per_s": 2 * length**3 / multiplying}


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures: the nodes of leaves that several forms share remember the stream they were made on."""
    return torch.cuda.Stream()


def graphed(variant: Variant) -> Callable[[Any], Any]:
    """A replay of ``variant`` as a CUDA graph, which ignores what ``prepare`` made for the sample.

    ``prepare`` runs once, on the stream of the capture: autograd runs a backward where its forward ran.
    """
    side = capture_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        state = variant.prepare()
        for _ in range(3):
            variant.run(state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = variant.run(state)
    # a replay writes where state and result are, so they have to live as long as it
    return lambda _, keep=(state, result): graph.replay()


def compiled(fn: Callable, bench: Bench) -> Callable:
    """torch.compile at its best, every shape its own graph; the walk-through only traces."""
    if bench.dry:
        return torch.compile(fn, backend="eager", dynamic=False, fullgraph=True)
    return torch.compile(fn, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)


def attention_backend(name: str, dry: bool) -> AbstractContextManager:
    """``cudnn`` or ``flash`` alone, so that a row says which it was; on a CPU there is only one."""
    if dry:
        return nullcontext()
    return sdpa_kernel({"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}[name])


def error_of(found: Flat, exact: Flat) -> float:
    """Largest error over the results, each relative to its largest value; ``exact`` may hold the first rows alone."""
    worst = 0.0
    for mine, right in zip(found, exact, strict=True):
        distance = (mine.detach()[: right.shape[0]].double() - right).abs().max() / right.abs().max()
        worst = max(worst, distance.item()) if distance == distance else float("inf")
    return worst


def compare(
    bench: Bench, entry: str, shape: str, forms: Mapping[str, Any], *, bytes_moved: float = 0.0, flops: float = 0.0,
    exact: Callable[[], Any] | None = None, floor: str = "copy", backend: str = "", dtype: torch.dtype | None = None,
    tolerance: float = 0.05,
) -> Rows:  # fmt: skip
    """Rows of the forms that run here and agree with ``exact``, each with its GPU time and its time from Python.

    ``median`` is GPU time alone: replays of a CUDA graph, or where that cannot be captured (``extra["graphed"]`` is 0)
    events with a head start. ``extra["eager_us"]`` is a call from Python, ``extra["error"]`` the distance from
    ``exact`` relative to the largest value, ``percent_of_floor`` the share of what the card itself reached in this
    run for ``bytes_moved`` and ``flops``.

    A form is a function, or a pair of one that prepares (a forward pass) and one that takes what that made, any number
    of times. Names in brackets are parts of the work, shown for scale and not compared with ``exact``. ``floor`` names
    a form, or is a copy of ``bytes_moved`` where that is absent. A peer that cannot run or is wrong is left out and
    named; one of ours is a problem of the run as well.
    """
    wanted = _flat(exact()) if exact is not None and not bench.warm else None
    usable: list[Variant] = []
    errors: dict[str, float] = {}
    for name, form in forms.items():
        prepare, run = form if isinstance(form, tuple) else (_nothing, lambda _, form=form: form())
        start = time.perf_counter()
        try:
            found = _flat(run(prepare()))
            synchronize(bench.device)
            if wanted is not None and not name.startswith("("):
                errors[name] = error_of(found, wanted)
                if not errors[name] <= tolerance:
                    raise RuntimeError(f"off by {errors[name]:.2g} of the largest value")
            usable.append(Variant(name, run, prepare, backend if name.startswith("fastadapter") else ""))
        except Exception as error:
            what = f"{entry}, {shape}: {name} is left out: {type(error).__name__}: {str(error).strip()[:300]}"
            log(what)
            if name.startswith("fastadapter"):
                bench.problems.append(what)
        if bench.warm:
            log(f"warm {entry}, {shape}: {name} {time.perf_counter() - start:.1f} s")
    if bench.warm or not usable:
        return
    if floor not in [variant.name for variant in usable]:
        floor = "copy"
        source = torch.randn(max(1, int(bytes_moved) // 8), device=bench.device)
        target = torch.empty_like(source)
        usable.insert(0, Variant("copy", lambda _: target.copy_(source)))
    case = Case(entry, shape, floor, usable, str(dtype or bench.dtype).removeprefix("torch."), "us")
    found = _timed(bench, case, int(bytes_moved))
    for row in found:
        if row.variant in errors:
            row.extra["error"] = errors[row.variant]
        if floor_seconds := bench.floor_seconds(bytes_moved, flops):
            row.extra["percent_of_floor"] = 100 * floor_seconds / (row.median * 1e-6)
    yield from bench.marked(found)


def _timed(bench: Bench, case: Case, bytes_moved: int) -> list[Row]:
    """GPU time as the rows' median, the time from Python beside it."""
    if bench.dry:
        return runner.measure(case, bench.settings, dry_meter)
    alone, captured = [], set()
    for variant in case.variants:
        try:
            alone.append(Variant(variant.name, graphed(variant), backend=variant.backend))
            captured.add(variant.name)
        except Exception as error:
            torch.cuda.synchronize()
            log(f"{case.entry}: {variant.name} is not captured: {str(error).strip()[:200]}")
            alone.append(_prepared(variant))
    many = dataclasses.replace(bench.settings, rounds=2 * bench.rounds)
    timed = dataclasses.replace(case, variants=alone, bytes_moved=bytes_moved)
    found = runner.measure(timed, many, event_meter())
    # Only now, and with the graphs gone: autograd's nodes of the operands belong to the stream they were made on.
    del timed
    alone.clear()
    plain = dataclasses.replace(case, variants=[_prepared(variant) for variant in case.variants])
    calls = runner.interleave(plain, bench.rounds, event_meter(0))
    for row in found:
        row.extra["eager_us"] = 1e6 * statistics.median(calls[row.variant])
        row.extra["graphed"] = float(row.variant in captured)
    return found


def _prepared(variant: Variant) -> Variant:
    """With one state for all samples: forwards in between would double the time of the run."""
    return Variant(
        variant.name, functools.partial(_ignoring, variant.run, variant.prepare()), backend=variant.backend
    )


def _ignoring(run: Callable, state: Any, _: Any) -> Any:
    return run(state)


def _nothing() -> None:
    return None


def _flat(result: Any) -> Flat:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def doubled(operands: Sequence[Tensor], first: int | None = None) -> Flat:
    """fp64 copies that need a gradient where the originals do; ``first``: that many rows of those of several."""
    kept = [x[:first] if first and x.shape[0] > 1 else x for x in operands]
    return [x.detach().double().requires_grad_(x.requires_grad) for x in kept]


def gradients(fn: Callable, operands: Sequence[Tensor], grad_out: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the gradients of those operands that need one; ``None`` for one that ``fn`` ignores."""
    wanted = [x for x in operands if x.requires_grad]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(fn(*operands), wanted, grad_out, allow_unused=True)

    return run


def backward(fn: Callable, operands: Sequence[Tensor], grad_outs: Any) -> tuple[Callable, Callable]:
    """Backward alone, as a form: on a graph that is kept, any number of times."""
    wanted = [x for x in operands if x.requires_grad]

    def prepare() -> Any:
        with torch.enable_grad():
            return fn(*operands)

    return prepare, lambda out: torch.autograd.grad(out, wanted, grad_outs, retain_graph=True)
