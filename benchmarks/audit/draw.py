"""The audit as Markdown: a line per kernel, with the architectures side by side where they agree on the tile."""

from collections.abc import Iterable

from .report import Row

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
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)
