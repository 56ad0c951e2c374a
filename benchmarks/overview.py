"""What the library is for, in one picture: cost of a step and of a token over the frozen model, ours beside others.

    python -m benchmarks.plot --overview docs/overview.png

Only stored rows are drawn, and those that we lose with the others. A device gets a panel once rows of it are stored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import rows
from .rows import Row
from .table import number

# Entry and what its shapes are called here.
ENTRIES = {
    "training-step": "step, LLaMA-Adapter, {shape}",
    "method-step": "step, {shape}",
    "decode": "decode, LLaMA-Adapter, {shape}",
    "8B-shape step, LLaMA-Adapter": "step, LLaMA-Adapter, Llama-3-8B's shape, {shape}",
    "SmolLM2-shape step, LLaMA-Adapter": "step, LLaMA-Adapter, {shape}",
    "SmolLM2-shape step": "step, {shape}",
}
FLOORS = ("frozen model", "bare model")
# Who it is, and which variants of the rows those are.
PARTIES = {
    "fastadapter": ("#1b7f4b", ("fastadapter",)),
    "PEFT": ("#e08214", ("PEFT",)),
    "eager PyTorch": ("#8c8c8c", ("fastadapter, reference op", "eager modules")),
}


def panels(stored: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """By device (CPUs first), by what was measured: its rows, ours first.

    Rows of a run in which tests of the same op were red are no result.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    known = {variant for _, variants in PARTIES.values() for variant in variants}
    chosen = [
        row
        for row in rows.latest(rows.published(list(stored)))
        if row.entry in ENTRIES and row.variant in known
    ]
    for row in sorted(chosen, key=lambda row: row.driver != ""):
        if row.extra.get("red_tests"):
            continue
        what = ENTRIES[row.entry].format(shape=row.shape)
        if row.floor not in FLOORS:
            what += f" (over: {row.floor})"
        found.setdefault(row.device, {}).setdefault(what, []).append(row)
    return found


def draw(path: Path, stored: Sequence[Row]) -> None:
    """Raises: ValueError: nothing that belongs into the picture is stored."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = panels(stored)
    if not found:
        raise ValueError(f"no stored rows of {', '.join(ENTRIES)}")
    most = max(map(len, found.values()))
    figure, axes = plt.subplots(
        1, len(found), figsize=(7.2 * len(found), 1.5 + 0.62 * most), squeeze=False, layout="constrained"
    )
    for axis, (device, groups) in zip(axes[0], found.items(), strict=True):
        _panel(axis, groups)
        row = next(iter(groups.values()))[0]
        kind = f"GPU: {device}" if row.driver else f"CPU: {device}, {row.threads} threads"
        days = sorted({row.date[:10] for group in groups.values() for row in group})
        axis.set_title(f"{kind}; {row.dtype}; {' and '.join(days)}", fontsize=10, loc="left")
    figure.suptitle(
        "What an adapter costs over the frozen model (left is cheaper; SmolLM2-135M's shape unless named)",
        fontsize=12,
    )
    marks = [plt.Line2D([], [], color=colour, linewidth=5) for colour, _ in PARTIES.values()]
    figure.legend(marks, PARTIES, loc="outside lower center", ncols=len(PARTIES), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, groups: dict[str, list[Row]]) -> None:
    """A bar for each row from 1, the frozen model, to its ratio; thin: from p20 to p80."""
    height = 0.8 / len(PARTIES)
    ends = []
    for place, group in enumerate(groups.values()):
        parties = [
            (colour, row) for colour, variants in PARTIES.values() for row in group if row.variant in variants
        ]
        for line, (colour, row) in enumerate(parties):
            y = place + height * (line - (len(parties) - 1) / 2)
            axis.barh(y, row.ratio - 1, left=1, height=0.85 * height, color=colour)
            axis.plot(row.ratio, y, "o", color=colour, markersize=4.5)  # a bar of nothing would not be seen
            axis.plot([row.ratio_p20, row.ratio_p80], [y, y], color="black", linewidth=0.8, alpha=0.6)
            end = max(row.ratio, row.ratio_p80, 1.0)
            axis.annotate(
                f"{row.ratio:.2f}  ({number(row.median)} {row.unit})",
                (end, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
            ends += [min(row.ratio_p20, row.ratio), end]
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlim(min(ends) - 0.03 * (max(ends) - min(ends)), max(ends) + 0.42 * (max(ends) - min(ends)))
    axis.set_yticks(range(len(groups)), [_two_lines(what) for what in groups], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlabel("cost relative to the frozen model")
    axis.grid(True, axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _two_lines(text: str) -> str:
    """Broken at the comma nearest to the middle.

    >>> _two_lines("step, LLaMA-Adapter, all 30 layers")
    'step, LLaMA-Adapter,\\nall 30 layers'
    """
    places = [place for place in range(len(text)) if text.startswith(", ", place)]
    if not places:
        return text
    place = min(places, key=lambda place: abs(place - len(text) / 2))
    return f"{text[: place + 1]}\n{text[place + 2 :]}"
