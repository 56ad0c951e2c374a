"""How near each op comes to what the machine can do: its rate of arithmetic and of bytes against measured peaks.

The peaks are the library's own, sampled in the same rounds as the op: a product of two 1024 x 1024 matrices and a
triad (``a + s * b`` into a third array, larger than the caches), the best of all rounds. ``percent_of_roof`` is the
time that the slower of both peaks would need, in per cent of the op's median; bytes are those that have to move once,
operations those of matrix products. Everything is warm, so what fits into the caches can exceed the triad's rate.

    python -m benchmarks.run --only roofline
"""

import functools
from collections.abc import Callable, Iterator

import torch

from . import (
    bench_bottleneck,
    bench_gated_prefix,
    bench_gated_prefix_attention,
    bench_prefix_attention,
    runner,
)
from .audit import cases as audit_cases
from .audit.case import Case as AuditCase
from .rows import Row
from .runner import Case, Meter, Settings, Variant

ENTRY = "roofline"
GEMM, TRIAD = "gemm peak", "triad peak"
OURS = "fastadapter-cpp"
# Ours beside the plain form and the best one of the library: all forms are in the op's own entry.
SHOWN = {
    "gated_prefix": (OURS, "eager", "eager-compiled"),
    "bottleneck": (OURS, "eager", "eager-compiled"),
    "prefix_attention": (OURS, "sdpa"),
    "gated_prefix_attention": (OURS, "sdpa+sdpa"),
}


def peaks(quick: bool) -> list[Variant]:
    """The two peaks, as variants of every case."""
    size, length = (128, 2**18) if quick else (1024, 2**24)
    a, b, out = (torch.randn(size, size) for _ in range(3))
    x, y, z = (torch.randn(length) for _ in range(3))
    return [
        Variant(GEMM, lambda _: torch.mm(a, b, out=out), flops=2 * size**3, bytes_moved=3 * 4 * size**2),
        Variant(
            TRIAD, lambda _: torch.add(x, y, alpha=0.5, out=z), flops=2 * length, bytes_moved=12 * length
        ),
    ]


def flops_of(op: str, direction: str, sizes: dict[str, int]) -> int:
    """Of matrix products, by the formulas of the kernel audit; ``direction`` as in the ops' entries."""
    passes = ("forward",) if direction == "forward" else ("forward", "backward")
    return sum(audit_cases.flops_of(AuditCase(op, each, "fp32", sizes)) for each in passes)


def attention_work(shape: bench_prefix_attention.Shape, direction: str) -> tuple[int, int]:
    """Operations and bytes of an attention op: over the keys as over a prefix of their number, half of it if causal."""
    sizes = {
        "b": shape.batch,
        "h": shape.num_heads,
        "kv": shape.num_kv_heads,
        "q": shape.q_len,
        "d": shape.head_dim,
        "n": 0,
    }
    keys = flops_of("gated_prefix", direction, sizes | {"p": shape.kv_len})
    prefix = flops_of("gated_prefix", direction, sizes | {"p": shape.prefix_len})
    queries = shape.batch * shape.num_heads * shape.q_len * shape.head_dim
    keys_values = 2 * shape.batch * shape.num_kv_heads * shape.kv_len * shape.head_dim
    # forward reads query, keys and values and writes out; backward reads those, out and its gradient, and writes three
    moved = 2 * queries + keys_values
    if direction != "forward":
        moved += 4 * queries + 2 * keys_values
    return (keys // 2 if shape.is_causal else keys) + prefix, 4 * moved


def cases(settings: Settings) -> Iterator[Case]:
    """Every op, forward and with backward, in fp32 on the CPU."""
    both = [Work(settings, direction) for direction in ("forward", "forward+backward")]
    for make in (
        _gated_prefix,
        _bottleneck,
        *map(_attention, ("prefix_attention", "gated_prefix_attention")),
    ):
        for work in both:
            yield make(work)


class Work:
    """What all cases of one direction share."""

    def __init__(self, settings: Settings, direction: str):
        self.quick, self.direction = settings.quick, direction

    def case(
        self, op: str, shape: object, forms: dict[str, Callable[[], object]], flops: int, moved: int
    ) -> Case:
        variants = [
            Variant(name, lambda _, run=run: run(), flops=flops, bytes_moved=moved)
            for name, run in forms.items()
        ]
        return Case(
            ENTRY,
            f"{op}, {self.direction} {shape}",
            floor=SHOWN[op][1],  # what a user would write
            variants=[*peaks(self.quick), *variants],
            unit="us",
            sample_seconds=0.0 if self.quick else 0.02,
            warmup=1 if self.quick else 3,
        )


def _gated_prefix(work: Work) -> Case:
    op, at = bench_gated_prefix, bench_gated_prefix.TRAINING
    inputs = op.make_inputs(at, torch.float32, "cpu", grad=work.direction != "forward")
    forms = op.usable_forms(at, torch.float32, "cpu", work.direction, inputs, SHOWN["gated_prefix"])
    sizes = {
        "b": at.batch, "h": at.num_heads, "kv": at.num_kv_heads, "q": at.q_len, "d": at.head_dim,
        "p": at.prefix_len, "n": 0,
    }  # fmt: skip
    runs = {name: functools.partial(op.PASSES[work.direction], fn, inputs) for name, fn in forms.items()}
    moved = op.bytes_moved(at, torch.float32, work.direction)
    return work.case("gated_prefix", at, runs, flops_of("gated_prefix", work.direction, sizes), moved)


def _bottleneck(work: Work) -> Case:
    op = bench_bottleneck
    at = op.NARROW if work.quick else op.WIDE
    inputs = op.make_inputs(at, torch.float32, "cpu", grad=work.direction != "forward")
    forms = op.usable_forms(at, work.direction, inputs, SHOWN["bottleneck"])
    sizes = {"b": at.batch, "q": at.q_len, "c": at.hidden, "r": at.size, "n": 0}
    runs = {name: functools.partial(op.PASSES[work.direction], fn, inputs) for name, fn in forms.items()}
    moved = op.bytes_moved(at, torch.float32, work.direction)
    return work.case("bottleneck", at, runs, flops_of("bottleneck", work.direction, sizes), moved)


def _attention(name: str) -> Callable[[Work], Case]:
    def make(work: Work) -> Case:
        op = bench_prefix_attention if name == "prefix_attention" else bench_gated_prefix_attention
        at = bench_prefix_attention.QUICK[0] if work.quick else bench_prefix_attention.SHAPES[0]
        operands = bench_prefix_attention.make_operands(at)
        grad_out = torch.randn(operands["query"].shape, generator=torch.Generator().manual_seed(1))
        found = op.forms(at, operands, bench_prefix_attention.DIRECTIONS[work.direction])
        bench_prefix_attention.require_agreement(name, found, grad_out, SHOWN[name])
        runs = {form: functools.partial(found[form], grad_out) for form in SHOWN[name]}
        return work.case(name, at, runs, *attention_work(at, work.direction))

    return make


def with_roof(found: list[Row]) -> list[Row]:
    """The rows of one case, each with the peaks of its run and its share of the roof over it."""
    best = {row.variant: row for row in found if row.variant in (GEMM, TRIAD)}
    arithmetic = best[GEMM].extra["gflop_per_s"] * best[GEMM].median / best[GEMM].extra["best_us"]
    bandwidth = best[TRIAD].extra["gb_per_s"] * best[TRIAD].median / best[TRIAD].extra["best_us"]
    for row in found:
        extra = row.extra
        extra |= {"peak_gflop_per_s": arithmetic, "peak_gb_per_s": bandwidth}
        extra["percent_of_roof"] = 100 * max(extra["gflop_per_s"] / arithmetic, extra["gb_per_s"] / bandwidth)
    return found


def entry(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    for case in cases(settings):
        samples = settings.interleave(case, settings.rounds, meter or runner.wall_meter())
        found = runner.describe(case, samples, settings.environment)
        for row in found:
            row.extra["best_us"] = 1e6 * min(samples[row.variant])
        yield with_roof(found)
