"""One picture for each entry of the report, drawn from its stored rows alone.

    python -m benchmarks.report            # all of them, and the tables of the documents

A picture shows the rows of one device: those of the last run that was not on a busy machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import recipe, rows, stack
from .roofline import GEMM, TRIAD
from .rows import Row
from .table import number

FOLDER = "pictures"  # beside the page that shows them
COLOURS = {
    "fastadapter": "#1b7f4b",
    "fastadapter-cpp": "#1b7f4b",
    "fastadapter, packed": "#5aae61",
    "fastadapter, packed, trunk cached": "#2166ac",
    "PEFT": "#e08214",
    "litgpt 0.5.13": "#8073ac",
    "adapters 1.3.0": "#b2182b",
    "frozen model": "#8c8c8c",
}
OTHER = ("#e08214", "#8c8c8c", "#b2182b", "#2166ac", "#c7a76c")
PARTS = {
    "gemm": ("products of the base", "#4d4d4d"),
    "attention": ("attention", "#2166ac"),
    "adapter": ("adapter ops", "#1b7f4b"),
    "head": ("head and loss", "#b2182b"),
    "optimizer": ("optimiser", "#8073ac"),
    "rest": ("rest", "#d9d9d9"),
}


def colour(variant: str, place: int = 0) -> str:
    return COLOURS.get(variant) or OTHER[place % len(OTHER)]


def caption(found: Sequence[Row]) -> str:
    """The machine, under every picture."""
    row = found[0]
    return (
        f"{row.device}, {row.threads} threads; {row.dtype}; torch {row.torch}; {row.commit}, {row.date[:10]}"
    )


def _figure(panels: int, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = -(-panels // columns)
    size = (7.6 * columns, height * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:panels])


def _save(figure: Any, path: Path, found: Sequence[Row]) -> None:
    import matplotlib.pyplot as plt

    figure.supxlabel(caption(found), fontsize=7.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_shape(found: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(row.shape, []).append(row)
    return groups


def roofline(path: Path, found: Sequence[Row]) -> None:
    """GFLOP/s over operations per byte, under the roof that was measured in the same rounds."""
    figure, (axis,) = _figure(1, 5.6)
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    ops = [row for row in found if row.variant not in (GEMM, TRIAD)]
    arithmetic = max(row.extra["peak_gflop_per_s"] for row in ops)
    bandwidth = max(row.extra["peak_gb_per_s"] for row in ops)
    intensity = {id(row): row.extra["gflop_per_s"] / row.extra["gb_per_s"] for row in ops}
    low, high = min(intensity.values()) / 4, max(*intensity.values(), arithmetic / bandwidth) * 8
    ridge = arithmetic / bandwidth
    axis.plot([low, ridge, high], [low * bandwidth, arithmetic, arithmetic], color="black", linewidth=1.4)
    roof = f"roof: {number(arithmetic)} GFLOP/s of products, {number(bandwidth)} GB/s of a triad"
    marks = dict(zip(dict.fromkeys(row.shape.split(",")[0] for row in ops), "osD^v<"))
    seen = dict.fromkeys(row.variant for row in ops)
    others = {variant: colour(variant, place) for place, variant in enumerate(seen)}
    for row in ops:
        op, direction = row.shape.split(", ")[0], row.shape.split(", ")[1].split(" ")[0]
        filled = direction == "forward"
        axis.plot(
            intensity[id(row)],
            row.extra["gflop_per_s"],
            marks[op],
            color=others[row.variant],
            markerfacecolor=others[row.variant] if filled else "none",
            markersize=7,
            linestyle="",
        )
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter("")
    axis.set_xlabel("operations in products per byte that has to move")
    axis.set_ylabel("GFLOP/s")
    axis.grid(True, which="both", alpha=0.2)
    axis.set_title(roof, fontsize=9.5, loc="left")
    line = plt.Line2D
    legend = [line([], [], marker=mark, color="black", linestyle="", label=op) for op, mark in marks.items()]
    legend += [
        line([], [], marker="s", color=each, linestyle="", label=name) for name, each in others.items()
    ]
    legend += [
        line([], [], marker="o", color="#777777", linestyle="", label="forward"),
        line(
            [], [], marker="o", color="#777777", markerfacecolor="none", linestyle="", label="with backward"
        ),
    ]
    figure.legend(handles=legend, loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, path, found)


def step_stack(path: Path, found: Sequence[Row]) -> None:
    """Milliseconds of the parts of a step, a bar for every variant."""
    groups = _by_shape(found)
    figure, axes = _figure(len(groups), 1.55)
    for axis, (shape, group) in zip(axes, groups.items()):
        for place, row in enumerate(group):
            left = 0.0
            for part in stack.PARTS:
                value = row.extra[f"{part}_ms"]
                axis.barh(place, value, left=left, color=PARTS[part][1], height=0.68)
                if value > 0.08 * sum(row.extra[f"{each}_ms"] for each in stack.PARTS):
                    white = "black" if part == "rest" else "white"
                    axis.text(
                        left + value / 2,
                        place,
                        number(value),
                        ha="center",
                        va="center",
                        color=white,
                        fontsize=7.5,
                    )
                left += value
            rate = f"{number(row.extra['gflop_per_s'])} GFLOP/s of {number(row.extra['peak_gflop_per_s'])}"
            axis.text(left, place, f"  {number(left)} ms; {rate}", va="center", fontsize=7.5)
        longest = max(sum(row.extra[f"{part}_ms"] for part in stack.PARTS) for row in group)
        axis.set_xlim(0, 1.42 * longest)
        axis.set_yticks(range(len(group)), [row.variant for row in group], fontsize=8.5)
        axis.invert_yaxis()
        axis.set_title(shape, fontsize=9.5, loc="left")
    axes[-1].set_xlabel(
        "milliseconds of the profiled step; behind the bar the rate of the base's products, and the peak"
    )
    import matplotlib.pyplot as plt

    patches = [plt.Rectangle((0, 0), 1, 1, color=shade, label=name) for name, shade in PARTS.values()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), fontsize=8, frameon=False)
    _save(figure, path, found)


def _curves(
    path: Path, found: Sequence[Row], key: str, labels: tuple[str, str], values: str, log: bool
) -> None:
    """``values`` of every variant over the number ``key`` of ``extra``, with its spread."""
    figure, (axis,) = _figure(1, 4.2)
    for place, variant in enumerate(dict.fromkeys(row.variant for row in found)):
        mine = sorted((row for row in found if row.variant == variant), key=lambda row: row.extra[key])
        at = [row.extra[key] for row in mine]
        middle = [getattr(row, values) for row in mine]
        # of a rate p20 and p80 are in the order of the rate; either way they are the spread's ends
        ends = ("ratio_p20", "ratio_p80") if values == "ratio" else ("p20", "p80")
        low, high = ([getattr(row, end) for row in mine] for end in ends)
        axis.plot(at, middle, "o-", color=colour(variant, place), label=variant, markersize=4.5)
        axis.fill_between(at, low, high, color=colour(variant, place), alpha=0.15, linewidth=0)
    if log:
        axis.set_xscale("log")
    ticks = sorted({row.extra[key] for row in found})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_ylim(bottom=0 if values == "median" else None)
    axis.grid(True, alpha=0.25)
    axis.legend(frameon=False, fontsize=8.5)
    _save(figure, path, found)


def prefix_length(path: Path, found: Sequence[Row]) -> None:
    labels = ("prefix length", "cost of a step over the frozen model")
    _curves(path, found, "prefix_len", labels, "ratio", log=True)


def batch(path: Path, found: Sequence[Row]) -> None:
    labels = ("rows in a batch (32 tokens each)", "tokens per second")
    _curves(path, found, "batch", labels, "median", log=True)


def bars(path: Path, found: Sequence[Row]) -> None:
    """Medians as bars, with what each is of the floor."""
    groups = _by_shape(found)
    most = max(map(len, groups.values()))
    figure, axes = _figure(len(groups), 0.55 + 0.3 * most, columns=2)
    for axis, (shape, group) in zip(axes, groups.items()):
        for place, row in enumerate(group):
            axis.barh(place, row.median, color=colour(row.variant, place), height=0.7)
            axis.plot([row.p20, row.p80], [place, place], color="black", linewidth=0.9)
            # cost is turned round where more is better
            rate = row.unit.endswith("/s")
            times = 1 / row.ratio if rate else row.ratio
            beside = "" if row.variant == row.floor else f" ({times:.2f} x)"
            end = max(row.median, row.p80)
            axis.text(end, place, f"  {number(row.median)} {row.unit}{beside}", va="center", fontsize=8)
        axis.set_xlim(0, 1.35 * max(max(row.median, row.p80) for row in group))
        axis.set_yticks(range(len(group)), [row.variant for row in group], fontsize=8.5)
        axis.invert_yaxis()
        axis.set_title(shape, fontsize=9.5, loc="left")
        axis.set_xlabel(group[0].unit)
    _save(figure, path, found)


def time_to_accuracy(path: Path, found: Sequence[Row]) -> None:
    """Held-out accuracy at the end of every epoch over the seconds spent, preparations included."""
    curves = [row for row in found if ", after epoch " in row.shape]
    titles = dict.fromkeys(row.shape.split(", after epoch ")[0] for row in curves)
    figure, axes = _figure(len(titles), 3.4)
    for axis, title in zip(axes, titles):
        mine = [row for row in curves if row.shape.startswith(f"{title}, after epoch ")]
        for place, variant in enumerate(dict.fromkeys(row.variant for row in mine)):
            of = sorted((row for row in mine if row.variant == variant), key=lambda row: row.extra["epoch"])
            axis.plot(
                [row.median for row in of],
                [100 * row.extra["accuracy"] for row in of],
                "o-",
                color=colour(variant, place),
                label=variant,
                markersize=5,
            )
        floor = max((row for row in mine if row.variant == row.floor), key=lambda row: row.extra["epoch"])
        goal = 100 * floor.extra["accuracy"]
        axis.axhline(goal, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(left=0)
        axis.set_title(f"{title}; dashed: {floor.variant} at its end", fontsize=9.5, loc="left")
        axis.set_ylabel("held-out accuracy, %")
        axis.grid(True, alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("seconds of training; a mark for every epoch")
    _save(figure, path, found)


@dataclass(frozen=True)
class Picture:
    """Drawn from the rows of some entries, which measure the same in several cases."""

    words: str
    entries: tuple[str, ...]
    draw: Callable[[Path, Sequence[Row]], None]


def _of_recipes(what: str) -> tuple[str, ...]:
    return tuple(entry for entry in recipe.ENTRIES if entry.startswith(what))


PICTURES = {
    "recipe": Picture("real tokens per second of each party in each epoch",
                      tuple(f"recipe-{each.name}" for each in recipe.RECIPES), bars),
    "time-to-accuracy": Picture("accuracy on held-out reviews over seconds of training",
                                _of_recipes("time-to-accuracy-"), time_to_accuracy),
    "recipe-memory": Picture("peak memory of the recipe", ("recipe-memory",), bars),
    "step-stack": Picture("where the time of a step goes", ("step-stack",), step_stack),
    "roofline": Picture("rates of the ops under the machine's measured peaks", ("roofline",), roofline),
    "prefix-length": Picture("cost of a step over the length of the prefix", ("prefix-length",), prefix_length),
    "batch": Picture("tokens per second over the batch", ("batch",), batch),
}  # fmt: skip


def shown(name: str, stored: Sequence[Row]) -> list[Row]:
    """The rows of a picture: of each of its entries the last run, all on one device, the one that ran last."""
    entries = PICTURES[name].entries
    found = [row for row in rows.latest(rows.published(list(stored))) if row.entry in entries]
    if not found:
        return []
    last = max(found, key=lambda row: row.date)
    machine = (last.device, last.threads)
    found = [row for row in found if (row.device, row.threads) == machine]
    return sorted(found, key=lambda row: entries.index(row.entry))


def draw_all(folder: Path, stored: Sequence[Row]) -> list[Path]:
    """Every picture whose rows are stored."""
    drawn = []
    for name, picture in PICTURES.items():
        if found := shown(name, stored):
            drawn.append(folder / f"{name}.png")
            picture.draw(drawn[-1], found)
    return drawn
