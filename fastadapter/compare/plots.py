"""Three plots of a comparison: accuracy against parameters, against time, and how both come about.

Every method has its colour and every family its marker, the same in all plots. Names stand beside their points.
"""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_Box = Sequence[float]  # left, bottom, right, top, in pixels
# Colour by method; the marker is its family's.
_FAMILIES = {
    "s": {"features": "#000000", "last-layers": "#8c8c8c", "last-blocks": "#b8860b", "all-layers": "#7b3f00"},
    "^": {"houlsby": "#d62728", "pfeiffer": "#ff7f0e", "parallel": "#e377c2"},
    "D": {"prefix-tuning": "#1f4fb4", "soft-prompt": "#17becf"},
    "o": {"llama-adapter": "#2ca02c", "llama-adapter-v2": "#8e44ad"},
    "*": {"in-context": "#00008b"},
}
_STYLES = {name: (marker, colour) for marker, names in _FAMILIES.items() for name, colour in names.items()}
_OTHERS = ("#9acd32", "#ff1493", "#556b2f")  # of methods that this table does not know yet
_MARKER_SIZE = 7  # points
_FONT = 9
# Where a name may stand, seen from its point: in units of one marker, and how the text is aligned there.
_SIDES = [
    (x * step, y * step, "left" if x > 0 else "right" if x < 0 else "center")
    for step in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0)
    for x, y in ((1, 0), (-1, 0), (0, 1.3), (0, -1.3), (1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0.5), (-1, 0.5),
                 (1, -0.5), (-1, -0.5), (0.4, 1.4), (-0.4, 1.4), (0.4, -1.4), (-0.4, -1.4))
]  # fmt: skip


def style(method: str) -> tuple[str, str]:
    """Marker and colour of a method.

    >>> style("houlsby") != style("pfeiffer") and style("houlsby")[0] == style("pfeiffer")[0]
    True
    """
    return _STYLES.get(method) or ("P", _OTHERS[sum(map(ord, method)) % len(_OTHERS)])


def draw(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    *,
    title: str,
    subtitle: str,
    chance: float | None = None,
) -> list[Path]:
    """Write the plots that the results allow.

    Args:
        rows: of :func:`fastadapter.compare.summarise`; ``results``: the runs behind them.
        subtitle: how many records and seeds stand behind a point, and what chance makes of them.
        chance: accuracy of the most frequent class; ``None`` where it is not known.
    Returns: their files.
    """
    import matplotlib

    matplotlib.use("Agg")

    shown = [row for row in rows if "accuracy" in row]
    if not shown:
        return []
    words: dict[str, Any] = {"title": title, "subtitle": subtitle, "chance": chance}
    files = [
        _scatter(folder / "accuracy_parameters.png", shown, "trainable_parameters", **words),
        _scatter(folder / "accuracy_time.png", shown, "seconds", **words),
    ]
    trained = [result for result in results if result.get("epochs")]
    if trained:
        names = [row["method"] for row in shown]
        files.append(_curves(folder / "learning_curves.png", trained, names, **words))
    return files


def frontier(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that no other beats: none costs at most as much and is better, or costs less and is as good.

    >>> rows = [{"accuracy": a, "cost": c} for a, c in ((0.8, 1), (0.7, 2), (0.9, 3), (0.9, 4))]
    >>> [row["cost"] for row in frontier(rows, "cost")]
    [1, 3]
    """
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[key], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best


def _scatter(
    path: Path,
    rows: Sequence[dict[str, Any]],
    key: str,
    *,
    title: str,
    subtitle: str,
    chance: float | None,
) -> Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    axis.set_xscale("log")
    # A logarithm has no place for what trains nothing: it stands at the left, and its name says so.
    least = min((row[key] for row in rows if row[key] > 0), default=1.0) / 4
    named = {row["method"]: row["method"] + ("" if row[key] > 0 else " (0)") for row in rows}
    steps = [(row[key] or least, 100 * row["accuracy"]) for row in frontier(rows, key)]
    corners = [(right, y) for (_, y), (right, _) in itertools.pairwise(steps)]
    axis.plot(
        *zip(*sorted([*steps, *corners]), strict=True),
        color="0.6",
        linewidth=1.2,
        zorder=1,
        label="frontier: nothing is both cheaper and better",
    )
    points = []
    for row in rows:
        middle = 100 * row["accuracy"]
        # the mean of equal accuracies can be an ulp off them
        below, above = middle - 100 * row["accuracy_min"], 100 * row["accuracy_max"] - middle
        points.append((row["method"], row[key] or least, middle, max(below, 0.0), max(above, 0.0)))
    low, high = min(x for _, x, *_ in points), max(x for _, x, *_ in points)
    room = (high / low) ** 0.12 if high > low else 2.0
    axis.set_xlim(low / room, high * room)
    _log_ticks(axis.xaxis, high / low)
    axis.set_xlabel(
        "trainable parameters" if key == "trainable_parameters" else "training time, s (mean of the seeds)"
    )
    axis.set_ylabel("test accuracy, %")
    axis.grid(True, which="major", alpha=0.25)
    _reference_lines(axis, rows, chance)
    heights = [y for _, _, y, below, above in points for y in (y - below, y + above)]
    heights += [] if chance is None else [100 * chance]
    margin = 0.08 * (max(heights) - min(heights)) or 1.0
    axis.set_ylim(min(heights) - margin, max(heights) + margin)
    _headings(figure, title, f"{subtitle}; bars: lowest to highest")
    figure.legend(loc="outside lower center", ncols=3, fontsize=_FONT - 1, frameon=False)
    figure.canvas.draw()  # limits and sizes are settled before pixels are asked for
    shifts = _apart([axis.transData.transform((x, y)) for _, x, y, *_ in points], figure)
    placed = []
    for (name, x, y, below, above), shift in zip(points, shifts, strict=True):
        pixel = axis.transData.transform((x, y))
        beside = float(axis.transData.inverted().transform((pixel[0] + shift, pixel[1]))[0])
        marker, colour = style(name)
        axis.errorbar(
            beside,
            y,
            yerr=[[below], [above]],
            fmt=marker,
            color=colour,
            markersize=_MARKER_SIZE,
            markeredgecolor="white",
            capsize=2.5,
            linewidth=1,
            zorder=3,
        )
        placed.append((name, beside, y, below, above))
    _names(axis, placed, named)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _reference_lines(axis: Any, rows: Sequence[dict[str, Any]], chance: float | None) -> None:
    """What guessing gives, and what training everything gives: between them lies all that a method can add."""
    everything = next((row["accuracy"] for row in rows if row["method"] == "all-layers"), None)
    if everything is not None:
        _, colour = style("all-layers")
        axis.axhline(
            100 * everything,
            color=colour,
            linewidth=1,
            linestyle="--",
            zorder=0,
            label=f"all layers trained: {100 * everything:.1f} %",
        )
    if chance is not None:
        axis.axhline(
            100 * chance,
            color="0.4",
            linewidth=1,
            linestyle=":",
            zorder=0,
            label=f"chance (the most frequent class): {100 * chance:.1f} %",
        )


def _log_ticks(axis: Any, span: float) -> None:
    """Plain numbers; between powers of ten too where the axis has few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 300 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """
    >>> [short_number(value) for value in (0.5, 150, 1000, 2.5e6, 1e8)]
    ['0.5', '150', '1k', '2.5M', '100M']
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _apart(pixels: Sequence[Any], figure: Any) -> list[float]:
    """Sideways shifts, in pixels, that put equal points side by side."""
    width = _MARKER_SIZE * figure.dpi / 72
    groups: list[list[int]] = []
    for number, (x, y) in enumerate(pixels):
        for group in groups:
            if abs(pixels[group[0]][0] - x) < width / 2 and abs(pixels[group[0]][1] - y) < width / 2:
                group.append(number)
                break
        else:
            groups.append([number])
    shifts = [0.0] * len(pixels)
    for group in groups:
        for place, number in enumerate(group):
            shifts[number] = (place - (len(group) - 1) / 2) * width
    return shifts


def _names(
    axis: Any, points: Sequence[tuple[str, float, float, float, float]], named: dict[str, str]
) -> None:
    """The name of each point on the side where it covers least; a thin line leads to those that stand far away."""
    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    unit = _MARKER_SIZE * figure.dpi / 72
    frame = axis.get_window_extent(renderer).extents.tolist()
    marks: dict[str, _Box] = {}
    for name, x, y, below, above in points:
        left, top = axis.transData.transform((x, y + above))
        _, bottom = axis.transData.transform((x, y - below))
        marks[name] = (left - 0.6 * unit, bottom - 0.6 * unit, left + 0.6 * unit, top + 0.6 * unit)
    lines = [box for line in axis.lines for box in _boxes(line, frame)]
    sizes = {}
    for name in marks:
        text = axis.annotate(named[name], (0, 0), xycoords="figure pixels", fontsize=_FONT)
        extent = text.get_window_extent(renderer)
        sizes[name] = extent.width + 3, extent.height + 3
        text.remove()
    chosen: dict[str, Any] = {}
    for name, x, y, *_ in sorted(points, key=lambda point: point[1]) * 3:  # again, now that the others stand
        here = axis.transData.transform((x, y))
        others = [place[-1] for other, place in chosen.items() if other != name]
        others += [box for other, box in marks.items() if other != name]
        width, height = sizes[name]
        places: list[tuple[Any, ...]] = []
        for dx, dy, side in _SIDES:
            left = here[0] + unit * dx - {"left": 0.0, "center": width / 2, "right": width}[side]
            middle = here[1] + unit * dy
            box = (left, middle - height / 2, left + width, middle + height / 2)
            cover = sum(_overlap(box, other) for other in (*others, marks[name]))
            cover += 0.5 * sum(_overlap(box, line) for line in lines) + width * height - _overlap(box, frame)
            # A leader through another name is as bad as a name on it, and a near name is found sooner.
            ahead = left + width / 2 - here[0], middle - here[1]
            for part in (0.2, 0.4, 0.6, 0.8):
                at_x, at_y = here[0] + ahead[0] * part, here[1] + ahead[1] * part
                cover += 300 * sum(x0 < at_x < x1 and y0 < at_y < y1 for x0, y0, x1, y1 in others)
            places.append((cover + 20 * (dx * dx + dy * dy) ** 0.5, len(places), dx, dy, side, box))
        chosen[name] = min(places)
    for name, x, y, *_ in points:
        *_, dx, dy, side, _box = chosen[name]
        colour = style(name)[1]
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axis.annotate(
            named[name],
            (x, y),
            xytext=(dx * _MARKER_SIZE, dy * _MARKER_SIZE),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=_FONT,
            color=colour,
            arrowprops=leader if max(abs(dx), abs(dy)) > 2 else None,
            zorder=4,
        )


def _boxes(line: Any, frame: _Box) -> list[_Box]:
    """The straight pieces of a line without markers, two pixels thick; no name should stand on one."""
    if line.get_linestyle() == "None" or line.get_marker() not in ("None", None, ""):
        return []
    points = line.get_transform().transform(line.get_xydata())
    return [
        (
            max(min(x0, x1) - 1, frame[0]),
            max(min(y0, y1) - 1, frame[1]),
            min(max(x0, x1) + 1, frame[2]),
            min(max(y0, y1) + 1, frame[3]),
        )
        for (x0, y0), (x1, y1) in itertools.pairwise(points)
    ]


def _overlap(one: _Box, other: _Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _headings(figure: Any, title: str, subtitle: str) -> None:
    """The title and what stands behind the points, above everything else; the layout leaves room for them."""
    lines = textwrap.wrap(subtitle, int(13.5 * figure.get_figwidth()))
    line = 0.2 / figure.get_figheight()  # of 0.2 inches
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - (1.6 + len(lines)) * line))
    figure.text(0.015, 1 - 0.3 * line, title, fontsize=12, va="top")
    figure.text(0.015, 1 - 1.5 * line, "\n".join(lines), fontsize=_FONT, color="0.35", va="top")


def _curves(
    path: Path,
    results: Sequence[dict[str, Any]],
    names: Sequence[str],
    *,
    title: str,
    subtitle: str,
    chance: float | None,
) -> Path:
    import matplotlib.pyplot as plt

    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    trained = [name for name in names if any(result["method"] == name for result in results)]
    ends = []
    for number, name in enumerate(trained):
        marker, colour = style(name)
        mine = [result for result in results if result["method"] == name]
        steps_loss = _means([result["losses"] for result in mine])
        window = max(1, len(steps_loss) // 20)
        steps = range(window, len(steps_loss) + 1)
        smooth = [sum(steps_loss[step - window : step]) / window for step in steps]
        losses.plot(steps, smooth, color=colour, linewidth=1)
        # runs of earlier versions were also evaluated before the first step
        before = _means(
            [[result["accuracy_before"]] if "accuracy_before" in result else [] for result in mine]
        )
        values = before + _means([[epoch["eval_accuracy"] for epoch in result["epochs"]] for result in mine])
        # side by side, so that equal ones can be told apart
        aside = 0.012 * (number - (len(trained) - 1) / 2) * max(len(values) - 1, 1)
        places = [epoch + aside for epoch in range(1 - len(before), 1 - len(before) + len(values))]
        percent = [100 * value for value in values]
        accuracies.plot(places, percent, color=colour, marker=marker, markersize=4.5, linewidth=1)
        ends.append((name, places[-1], percent[-1]))
    everything = [
        {"method": "all-layers", "accuracy": y / 100} for name, _, y in ends if name == "all-layers"
    ]
    _reference_lines(accuracies, everything, chance)
    losses.set_xlabel("step")
    losses.set_ylabel("training loss, running mean (of all seeds)")
    accuracies.set_xlabel("epoch")
    accuracies.set_ylabel("test accuracy, %")
    accuracies.xaxis.get_major_locator().set_params(integer=True)
    for axis in (losses, accuracies):
        axis.grid(True, alpha=0.25)
    if accuracies.get_legend_handles_labels()[0]:
        accuracies.legend(loc="lower center", fontsize=_FONT - 1, frameon=False)
    _headings(figure, title, f"{subtitle}; means of the seeds")
    _end_names(accuracies, ends)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _end_names(axis: Any, ends: Sequence[tuple[str, float, float]]) -> None:
    """Names beside the last points, in the order of their values and pushed apart until each can be read."""
    last = max(x for _, x, _ in ends)
    first = min(*axis.dataLim.intervalx, last - 1.0)  # of a single epoch, the one before it
    axis.set_xlim(first - 0.05 * (last - first), last + 0.42 * (last - first))
    axis.figure.canvas.draw()
    low, high = axis.get_ylim()
    line = 1.4 * _FONT * axis.figure.dpi / 72 * (high - low) / axis.get_window_extent().height
    ordered = sorted(ends, key=lambda end: end[2])
    heights = [y for _, _, y in ordered]
    for _ in range(200):  # neighbours that are too near push each other, half the way each
        for lower in range(len(heights) - 1):
            lacking = line - (heights[lower + 1] - heights[lower])
            if lacking > 1e-9:
                heights[lower] -= lacking / 2
                heights[lower + 1] += lacking / 2
    axis.set_ylim(min(low, heights[0] - line), max(high, heights[-1] + line))
    for (name, x, y), height in zip(ordered, heights, strict=True):
        axis.annotate(
            name,
            (x, y),
            xytext=(last + 0.08 * (last - first), height),
            va="center",
            fontsize=_FONT,
            color=style(name)[1],
            arrowprops={"arrowstyle": "-", "color": style(name)[1], "linewidth": 0.5, "shrinkA": 1},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
        )


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    """Over the seeds, step by step; as far as all of them go."""
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]
