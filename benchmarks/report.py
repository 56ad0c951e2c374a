"""Draw every picture and every table anew from the stored rows: ``python -m benchmarks.report``.

    python -m benchmarks.report            # docs/pictures and the documents' tables
    python -m benchmarks.report --check    # exit status 1 if a table is out of date; draws nothing

Blocks of a document, besides those of ``benchmarks.table``: ``<!-- measured: NAME -->`` a picture and the table of its
entries, or how to measure them where no row is stored; ``<!-- recipe-short: RECIPE -->`` tokens per second alone;
``<!-- where-we-lose: cpu, gpu -->`` every lost row.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import pictures, recipe, rows, table
from .rows import ROOT, Row

DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/recipe.md", "docs/comparison.md")


def measured(names: Sequence[str], stored: Sequence[Row]) -> str:
    """Picture and table of each name. Raises: ValueError: there is no such picture."""
    parts = []
    for name in names:
        if name not in pictures.PICTURES:
            raise ValueError(f"measured: {name} is none of {', '.join(pictures.PICTURES)}")
        picture = pictures.PICTURES[name]
        kept = {row.entry for row in rows.published(list(stored))}
        entries = [entry for entry in picture.entries if entry in kept]
        if entries:
            parts.append(f"![{picture.words}]({pictures.FOLDER}/{name}.png)")
            parts.append(table.render(entries, list(stored)))
        if absent := [entry for entry in picture.entries if entry not in entries]:
            parts.append(f"Not stored yet: `python -m benchmarks.run --only {' '.join(absent)}` measures it.")
    return "\n\n".join(parts)


def recipe_short(names: Sequence[str], stored: Sequence[Row]) -> str:
    """Real tokens per second of each party, epochs side by side; ``names`` are those of recipes.

    Raises: ValueError: there is no such recipe.
    """
    known = {each.name: each for each in recipe.RECIPES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"recipe-short: {', '.join(unknown)} is none of {', '.join(known)}")
    shown = rows.latest(rows.published(list(stored)))
    lines, captions = [], {}
    for name in names:
        found = [row for row in shown if row.entry == f"recipe-{name}"]
        epochs = sorted({row.extra["epoch"] for row in found})
        for variant in dict.fromkeys(row.variant for row in found):
            mine = {row.extra["epoch"]: row for row in found if row.variant == variant}
            cells = [f"{table.number(mine[at].median)} ({1 / mine[at].ratio:.2f} x)" for at in epochs[:2]]
            lines.append(f"| {known[name].title} | {variant} | {' | '.join(cells)} |")
        captions |= dict.fromkeys(table.caption(row) for row in found)
    if not lines:
        return (
            "No run on a quiet machine is stored yet; [docs/recipe.md](docs/recipe.md) says how to make one."
        )
    head = "| recipe | by | tokens/s, first epoch | second epoch |\n| --- | --- | ---: | ---: |"
    return "\n".join([head, *lines, "", *captions])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is out of date")
    args = parser.parse_args(argv)
    if not (ROOT / "pyproject.toml").is_file():
        parser.error("pictures and documents are those of a checkout: run it in one")
    if not args.check:
        draw(ROOT, rows.load())
    return max(table.main([str(ROOT / name), *(["--check"] if args.check else [])]) for name in DOCUMENTS)


def draw(root: Path, stored: Sequence[Row]) -> None:
    """The pictures that the documents under ``root`` show."""
    for path in pictures.draw_all(root / "docs" / pictures.FOLDER, stored):
        print(f"drawn: {path.relative_to(root)}")


if __name__ == "__main__":
    sys.exit(main())
