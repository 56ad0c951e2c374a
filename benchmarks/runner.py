"""One way to measure everything: variants interleaved in one process, and ratios taken within a round.

A shared or virtual machine drifts by more than the differences of interest, so no two numbers from different
moments are compared: every round runs every variant once, in a fresh random order, and a ratio is the median over
rounds of (variant / floor) in the same round. Medians come with the 20th and 80th percentile.

Memory is touched before anything is timed, and the allocator must keep what it was given: page faults otherwise
cost tens of per cent of a step and differ from call to call. :func:`keep_memory` therefore restarts the process
once with glibc told never to return memory. ``MALLOC_MMAP_THRESHOLD_`` alone cannot do it: glibc ignores values above
32 MiB, and a step's logits are larger, so ``MALLOC_MMAP_MAX_=0`` turns mapping off instead.
"""

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import rows

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}
# seconds -> value; tokens/s needs the case's tokens as well
UNITS: dict[str, Callable[[float, int], float]] = {
    "us": lambda seconds, tokens: 1e6 * seconds,
    "ms": lambda seconds, tokens: 1e3 * seconds,
    "tokens/s": lambda seconds, tokens: tokens / seconds,
}

Meter = Callable[[Callable[[Any], Any], Any, int], float]


@dataclass(frozen=True)
class Variant:
    """One way of doing what a case measures; ``prepare`` makes what ``run`` gets, once a sample and untimed."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    backend: str = ""
    flops: int = 0  # where they differ from the case's
    bytes_moved: int = 0


@dataclass(frozen=True)
class Case:
    """One line of comparison: the same work by several variants, one of which is the floor.

    ``sample_seconds`` above zero repeats ``run`` within a sample until it lasts about that long, for work too short
    to time once. ``bytes_moved`` adds GB/s, and the share of the copy bandwidth where the floor is a copy of as
    many bytes; ``flops`` (a multiplication and an addition are two) adds GFLOP/s.
    """

    entry: str
    shape: str
    floor: str
    variants: Sequence[Variant]
    dtype: str = "float32"
    unit: str = "ms"
    tokens: int = 0
    bytes_moved: int = 0
    flops: int = 0
    sample_seconds: float = 0.0
    warmup: int = 2


@dataclass(frozen=True)
class Settings:
    """How much to measure. ``quick`` is for smoke tests: small models, few rounds, nothing to be quoted."""

    rounds: int = 15
    quick: bool = False
    device: str = "cpu"
    environment: Mapping[str, Any] = field(default_factory=dict)
    # of single entries: sizes of the recipe
    options: Mapping[str, Any] = field(default_factory=dict)
    # takes the samples; another one lets rounds wait for those of another process (versions.py)
    interleave: Callable[["Case", int, Meter], dict[str, list[float]]] = field(
        default_factory=lambda: interleave
    )


def keep_memory() -> None:
    """Restart this process, once, with an allocator that returns nothing to the system; see the module."""
    if any(name not in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def touch_memory(mebibytes: int) -> None:
    """Have the system back this much of the heap with real pages before anything is timed."""
    torch.empty(mebibytes * 2**18).fill_(1.0)


def wall_meter(clock: Callable[[], float] = time.perf_counter) -> Meter:
    """Seconds per call by ``clock``, which synchronises first where work is asynchronous."""

    def meter(run, state, calls):
        gc.collect()
        gc.disable()
        try:
            start = clock()
            for _ in range(calls):
                run(state)
            return (clock() - start) / calls
        finally:
            gc.enable()

    return meter


class Progress:
    """A line on stderr whenever more than a second has passed since the last one."""

    def __init__(self, title: str, total: int):
        self.title, self.total = title, total
        self.start = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last > 1 or (done == self.total and now - self.start > 1):
            self.last = now
            print(f"{self.title}: {done}/{self.total}, {now - self.start:.0f} s", file=sys.stderr, flush=True)


def rounds_of(case: Case, meter: Meter) -> Iterator[dict[str, float]]:
    """Seconds of every variant by name, a round at a time and without end, after the warm-up."""
    names = [variant.name for variant in case.variants]
    if case.floor not in names or len(set(names)) < len(names):
        raise ValueError(
            f"{case.entry}: variants {names} must have distinct names, one of them {case.floor!r}"
        )
    calls = {}
    for variant in case.variants:
        for _ in range(case.warmup):
            meter(variant.run, variant.prepare(), 1)
        seconds = meter(variant.run, variant.prepare(), 1) if case.sample_seconds else 0.0
        calls[variant.name] = max(1, round(case.sample_seconds / seconds)) if seconds > 0 else 1
    order, shuffle = list(case.variants), random.Random(0).shuffle
    while True:
        shuffle(order)
        yield {variant.name: meter(variant.run, variant.prepare(), calls[variant.name]) for variant in order}


def interleave(case: Case, rounds: int, meter: Meter) -> dict[str, list[float]]:
    """Seconds of every variant in every round, by name."""
    turns = rounds_of(case, meter)
    samples: dict[str, list[float]] = {variant.name: [] for variant in case.variants}
    progress = Progress(f"{case.entry}, {case.shape}", rounds)
    for done in range(1, rounds + 1):
        for name, seconds in next(turns).items():
            samples[name].append(seconds)
        progress(done)
    return samples


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def measure(case: Case, settings: Settings, meter: Meter | None = None) -> list[rows.Row]:
    """Run ``case`` and describe every variant by a row."""
    samples = settings.interleave(case, settings.rounds, meter or wall_meter())
    return describe(case, samples, settings.environment)


def describe(
    case: Case, samples: Mapping[str, list[float]], environment: Mapping[str, Any]
) -> list[rows.Row]:
    """Rows of a case whose samples are in; in seconds, or as they are where the unit is none of :data:`UNITS`."""
    convert = UNITS.get(case.unit, lambda value, tokens: value)
    found = []
    for variant in case.variants:
        raw = samples[variant.name]
        median, p20, p80 = spread([convert(value, case.tokens) for value in raw])
        # of what was sampled, so that for a rate too a larger ratio means a higher cost
        ratios = spread([mine / floor for mine, floor in zip(raw, samples[case.floor], strict=True)])
        extra = {}
        if flops := variant.flops or case.flops:
            extra["gflop_per_s"] = flops / statistics.median(raw) / 1e9
        if moved := variant.bytes_moved or case.bytes_moved:
            extra["gb_per_s"] = moved / statistics.median(raw) / 1e9
            if case.floor == "copy":
                extra["percent_of_copy"] = 100 / ratios[0]
        measured = {"median": median, "p20": p20, "p80": p80, "extra": extra, "samples": len(raw)}
        against = {"floor": case.floor, "ratio": ratios[0], "ratio_p20": ratios[1], "ratio_p80": ratios[2]}
        what = {"entry": case.entry, "shape": case.shape, "dtype": case.dtype, "unit": case.unit}
        of = {"variant": variant.name, "backend": variant.backend}
        found.append(rows.Row(**what, **of, **measured, **against, **environment))
    return found
