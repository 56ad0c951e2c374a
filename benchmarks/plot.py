"""Draw stored ratios as bars: ``python -m benchmarks.plot OUT.png [ENTRY ...]``, or ``--overview OUT.png``."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import overview, rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("entry", nargs="*", help="entries to draw; all of them unless named")
    parser.add_argument(
        "--overview",
        action="store_true",
        help="the picture of the README: steps and decoding, ours beside others",
    )
    args = parser.parse_args(argv)
    if args.overview:
        if args.entry:
            parser.error("--overview chooses its entries itself")
        overview.draw(args.out, rows.load())
        return 0
    found = [
        row for row in rows.latest(rows.published(rows.load())) if not args.entry or row.entry in args.entry
    ]
    if not found:
        raise SystemExit(f"no stored rows of {', '.join(args.entry) or 'any entry'}")
    panels = list(dict.fromkeys((row.entry, row.shape, row.device) for row in found))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7, 1.8 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels):
        bars = [row for row in found if (row.entry, row.shape, row.device) == panel]
        ratios = [row.ratio for row in bars]
        low = [max(0.0, row.ratio - row.ratio_p20) for row in bars]
        high = [max(0.0, row.ratio_p80 - row.ratio) for row in bars]
        axis.barh([row.variant for row in bars], ratios, xerr=[low, high])
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(", ".join(panel), fontsize=8)
    axes[-1, 0].set_xlabel("cost relative to the floor (bars: p20 to p80)")
    figure.savefig(args.out, dpi=120)
    return 0


if __name__ == "__main__":
    main()
