"""Draw Markdown tables from stored rows, between the markers of a document.

    python -m benchmarks.table README.md           # rewrite every table
    python -m benchmarks.table README.md --check   # exit status 1 if one is out of date

A table stands between ``<!-- benchmark: NAME, NAME -->`` and ``<!-- end -->``; the names are entries. Tables of stored
comparisons have markers of their own (``benchmarks/comparisons.py``), pictures and lost rows others
(``benchmarks/report.py``).
"""

import argparse
import re
import sys
from pathlib import Path

from . import comparisons, rows
from .rows import Row

KINDS = "|".join(["benchmark", "measured", "recipe-short", "where-we-lose", *comparisons.DRAW])
MARKED = re.compile(rf"(<!-- ({KINDS}): ([\w, -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
EXTRA = {
    "gflop_per_s": "GFLOP/s",
    "gb_per_s": "GB/s",
    "percent_of_roof": "% of roof",
    "epoch_tokens_per_s": "over the whole epoch",
    "accuracy": "accuracy",
    "percent_of_copy": "% of copy",
    "percent_of_floor": "% of floor",
    "eager_us": "from Python, us",
    "error": "error",
    "total_mib": "total, MiB",
}


def number(value: float) -> str:
    """Three significant digits, and never an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else "< 0.001"


def table(found: list[Row]) -> str:
    """Rows as one aligned Markdown table; losing rows too."""
    extra = [name for name in EXTRA if any(name in row.extra for row in found)]
    head = [
        "what",
        "variant",
        "median (p20 to p80)",
        "relative to the floor",
        *(EXTRA[name] for name in extra),
    ]
    lines = [head]
    previous = None
    for row in found:
        what = f"{row.entry}, {row.shape}, {row.dtype}"
        variant = row.variant + (f" ({row.backend})" if row.backend not in row.variant else "")
        median = f"{number(row.median)} {row.unit} ({number(row.p20)} to {number(row.p80)})"
        if row.extra.get("red_tests"):
            ratio = "tests are red"
        elif row.variant == row.floor:
            ratio = "floor"
        else:
            ratio = f"{row.ratio:.3f} ({row.ratio_p20:.3f} to {row.ratio_p80:.3f})"
        values = [number(row.extra[name]) if name in row.extra else "" for name in extra]
        lines.append([what if what != previous else "", variant, median, ratio, *values])
        previous = what
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)


def caption(row: Row) -> str:
    """The machine and the versions behind a table."""
    driver = f", driver {row.driver}" if row.driver else ""
    used = ("torch", "triton", "transformers", "peft", "fastadapter")
    packages = ", ".join(f"{name} {getattr(row, name)}" for name in used)
    return f"{row.device}{driver}, {row.threads} threads; {packages}; commit {row.commit}, {row.date[:10]}."


def render(names: list[str], stored: list[Row]) -> str:
    """One table per device of the named entries.

    Raises: ValueError: nothing is stored for a name.
    """
    shown = rows.latest(rows.published(stored))
    chosen = [row for name in names for row in shown if row.entry == name]
    missing = [name for name in names if not any(row.entry == name for row in chosen)]
    if missing:
        known = ", ".join(sorted({row.entry for row in shown})) or "none"
        busy = sorted({row.entry for row in stored} & set(missing))
        also = f"; of a busy machine alone, not shown: {', '.join(busy)}" if busy else ""
        raise ValueError(f"no stored rows of {', '.join(missing)}{also}; stored: {known}")
    machines = list(dict.fromkeys((row.device, row.threads) for row in chosen))
    parts = []
    for machine in machines:
        found = [row for row in chosen if (row.device, row.threads) == machine]
        captions = dict.fromkeys(caption(row) for row in found)
        parts.append(table(found) + "\n\n" + "\n".join(captions))
    return "\n\n".join(parts)


def block(kind: str, names: list[str], stored: list[Row]) -> str:
    """What stands in a block of this kind."""
    if kind == "benchmark":
        return render(names, stored)
    if kind in comparisons.DRAW:
        return comparisons.DRAW[kind](names)
    from . import lost, report  # they draw with this module's tables

    draw = {"measured": report.measured, "recipe-short": report.recipe_short, "where-we-lose": lost.block}
    return draw[kind](names, stored)


def rewrite(text: str, stored: list[Row]) -> str:
    """``text`` with every marked table drawn anew."""

    def draw(match: re.Match) -> str:
        names = [name.strip() for name in match[3].split(",")]
        return f"{match[1]}{block(match[2], names, stored)}\n{match[4]}"

    drawn, count = MARKED.subn(draw, text)
    if not count:
        raise ValueError("no <!-- benchmark: NAME --> ... <!-- end --> in the document")
    return drawn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is out of date")
    args = parser.parse_args(argv)
    text = args.document.read_text(encoding="utf-8")
    drawn = rewrite(text, rows.load())
    if args.check:
        if drawn != text:
            print(f"{args.document}: tables are out of date; run python -m benchmarks.table", file=sys.stderr)
        return int(drawn != text)
    args.document.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
