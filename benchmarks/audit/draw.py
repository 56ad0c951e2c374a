"""The audit as Markdown: every row as a table, and the short document in ``docs/``."""

import itertools
from collections.abc import Iterable, Sequence

from . import calibrate, cases
from .chips import CHIPS
from .report import Row, faults
from .traffic import Count

HEAD = (
    "op", "pass", "dtype", "case", "arch", "kernel", "tile", "warps", "regs", "spills", "shared KiB",
    "occupancy", "matrix", "load bits", "compile s", "floor us",
)  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """One line per row, aligned."""
    lines = [list(HEAD)]
    for row in rows:
        lines.append(
            [
                row.op, row.direction, row.dtype, row.case, row.arch, row.kernel, row.tile, str(row.num_warps),
                str(row.registers), str(row.spills), f"{row.shared / 1024:.3g}", f"{100 * row.occupancy:.0f} %",
                f"{row.matrix} x{row.matrix_count}" if row.matrix else "none",
                f"{row.widest_load}" + (" + TMA" if row.bulk_copies else ""), f"{row.compile_seconds:.1f}",
                f"{row.floor_us:.3g}",
            ]
        )  # fmt: skip
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)


def traffic_table(counts: Iterable[Count]) -> str:
    """Counted bytes beside those of the formula."""
    lines = [["op", "pass", "dtype", "case", "arch", "formula", "touched", "ratio", "moved", "requested"]]
    for count in counts:
        sizes = [
            f"{count.ratio:.3f}",
            f"{count.moved / count.bytes:.2f}",
            f"{count.requested / count.bytes:.2f}",
        ]
        what = [count.op, count.direction, count.dtype, count.case, count.arch]
        lines.append([*what, str(count.bytes), str(count.touched), *sizes])
    return aligned(lines)


INTRODUCTION = """# Kernel audit

What the Triton kernels compile to and move, known without a GPU. Drawn by `fastadapter bench audit --draw
docs/audit.md` from `benchmarks/results/`: `audit.csv` (a row per launch, case and architecture), `traffic.csv`,
`estimates.csv`, `estimates_measured.csv` and `estimate_features.ndjson`; tests compile a sample again and compare.
Times on a GPU are measured only where it says so.

"""


def document(
    rows: Sequence[Row],
    counts: Sequence[Count],
    measured: Sequence[calibrate.Measured],
    predictions: Sequence[calibrate.Prediction],
) -> str:
    """The short document: kernels by architecture, floors by chip, counted bytes, estimated times."""
    versions = [f"triton {name}" for name in sorted({row.triton for row in rows})]
    versions += [f"ptxas {name}" for name in sorted({row.ptxas for row in rows} - {""})]
    unsound = sorted({(row.kernel, row.arch, fault) for row in rows for fault in faults(row)})
    found = f"{len(rows)} rows; {', '.join(versions)}. "
    found += "Faults: " + ("none." if not unsound else f"{len(unsound)}, listed below.")
    parts = [INTRODUCTION + found, "## Kernels\n\n" + KERNELS + "\n\n" + _kernels(rows)]
    if unsound:
        lines = [["kernel", "architecture", "fault"], *map(list, unsound)]
        parts.append("## Faults\n\n" + aligned(lines))
    parts.append("## Floors\n\n" + FLOORS + "\n\n" + _floors(rows))
    parts.append("## Bytes\n\n" + BYTES + "\n\n" + _bytes(counts))
    parts.append("## Estimates\n\n" + ESTIMATES + "\n\n" + aligned(calibrate.predictions_table(predictions)))
    since = aligned(calibrate.held_table(predictions))
    parts.append("## Predictions against measurements\n\n" + HELD + "\n\n" + since)
    held = f"{CALIBRATION}\n\n{calibrate.summary(measured)}"
    parts.append("## Estimates against measurements\n\n" + held + "\n\n" + aligned(calibrate.table(measured)))
    return "\n\n".join(parts) + "\n"


KERNELS = """Over all cases of an op and pass: the most registers of a thread, spills of all cases together, the most
shared memory, the range of the share of a multiprocessor's warps that can be resident, the matrix instructions, the
widest load in bits, and the longest compile in seconds of processor time (the cost of a cold start)."""

FLOORS = """Bytes the call has to move, operations of its matrix products, and the time below which it cannot go by the
chips' published rates, in microseconds (sources: `benchmarks/audit/chips.py`). In parentheses: by what an H100 was seen
to reach, 3.0 TB/s and 790 TFLOP/s. First case of each op, pass and dtype."""

BYTES = """Counted in the interpreter, address by address, on small shapes; relative to the formula behind the floor.
Touched: the caller's tensors, once per call. Moved: everything, scratch memory too, once per launch. Requested: once
per tile that asks. The spread is over dtypes, cases and architectures."""


ESTIMATES = """Not measured: by `benchmarks/audit/estimate.py` from the machine
code for sm_90, in microseconds of GPU time, launches included. The last columns name the launch that takes longest and
what takes most of its time: its multiprocessors (instructions, latencies, waves), the cache, or memory."""

HELD = """Calls of the table above that an H200 has measured, too (2026-11-27, replays of a CUDA graph, torch 2.11.0,
triton 3.6.0, heads inside; the estimate is of what triton 3.9.0 compiles, heads outside). The estimates were made
after the measurements, by a model that was not fitted to them."""

CALIBRATION = """The same estimates for calls that an H200 has measured (2026-11-27, commit d9a2e4b, torch 2.11.0,
triton 3.6.0; 4 x 2048 tokens, 32 heads, 8 kv heads, head_dim 128, prefix 10, bf16; most of these kernels are gone
since). Three constants are fitted to these rows: the cost of a launch, the bandwidth of the cache, and how far memory
and multiprocessors overlap. "Left out" is the error of a row by constants that are fitted to the others. Events around
eager calls see the host's time where it is longer than the GPU's. The bottleneck with r 64 is what the model does not
explain: few warps, rows read 64 to 128 bytes at a time with a stride of 8 KB, and a backward of several launches from
Python; a tile that the model calls fast there needs a card to say so."""


def _span(values: Iterable[float], form: str) -> str:
    ordered = sorted(values)
    low, high = form.format(ordered[0]), form.format(ordered[-1])
    return low if low == high else f"{low} to {high}"


def _kernels(rows: Sequence[Row]) -> str:
    lines = [
        ["op", "pass", "kernel", "architecture", "rows", "registers", "spills", "shared, KiB", "occupancy, %",
         "matrix", "load", "compile, s"]
    ]  # fmt: skip
    ordered = sorted(rows, key=_kernel)
    for (op, direction, kernel, arch), group in itertools.groupby(ordered, key=_kernel):
        mine = list(group)
        matrix = ", ".join(sorted({row.matrix for row in mine} - {""})) or "none"
        lines.append(
            [
                op, direction, kernel.removesuffix("_kernel"), arch, str(len(mine)),
                str(max(row.registers for row in mine)), str(sum(row.spills for row in mine)),
                f"{max(row.shared for row in mine) / 1024:.3g}", _span((100 * row.occupancy for row in mine), "{:.0f}"),
                matrix, str(max(row.widest_load for row in mine)), f"{max(row.compile_seconds for row in mine):.1f}",
            ]
        )  # fmt: skip
    return aligned(lines)


def _kernel(row: Row) -> tuple[str, str, str, str]:
    return row.op, row.direction, row.kernel, row.arch


def _floors(rows: Sequence[Row]) -> str:
    lines = [["op", "pass", "dtype", "case", "MB", "GFLOP", *(chip.name for chip in CHIPS.values())]]
    shown = set()
    by_case = {(row.op, row.direction, row.dtype, row.case, row.arch): row for row in rows}
    for case in cases.all_cases():
        what = (case.op, case.direction, case.dtype)
        mine = [by_case.get((*what, str(case), arch)) for arch in CHIPS]
        known = [row for row in mine if row is not None]
        if what in shown or not known:
            continue
        shown.add(what)
        floors = []
        for row in mine:
            reached = f" ({row.reached_floor_us:.3g})" if row and row.reached_floor_us != row.floor_us else ""
            floors.append(f"{row.floor_us:.3g}{reached}" if row else "")
        lines.append(
            [*what, str(case), f"{known[0].bytes / 1e6:.3g}", f"{known[0].flops / 1e9:.3g}", *floors]
        )
    return aligned(lines)


def _bytes(counts: Sequence[Count]) -> str:
    lines = [["op", "pass", "counts", "touched", "moved", "requested"]]
    groups = itertools.groupby(counts, key=lambda count: (count.op, count.direction))
    for (op, direction), group in groups:
        mine = list(group)
        spans = [
            _span((getattr(count, name) / count.bytes for count in mine), "{:.2f}")
            for name in ("touched", "moved", "requested")
        ]
        lines.append([op, direction, str(len(mine)), *spans])
    return aligned(lines)
