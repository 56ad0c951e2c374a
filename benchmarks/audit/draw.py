"""The audit as Markdown: a line per kernel, with the architectures side by side where they agree on the tile."""

from collections.abc import Iterable

from .report import Row
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
