"""Three plots of a comparison: accuracy against parameters, against time, and how both come about."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MARKS = {"features": "s", "last-layers": "s", "last-blocks": "s", "all-layers": "s"}


def draw(folder: Path, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the plots that the results allow; returns their files."""
    import matplotlib

    matplotlib.use("Agg")

    shown = [row for row in rows if "accuracy" in row]
    if not shown:
        return []
    colours = {row["method"]: f"C{number % 10}" for number, row in enumerate(shown)}
    files = [
        _scatter(
            folder / "accuracy_parameters.png",
            shown,
            colours,
            "trainable_parameters",
            "trainable parameters",
        ),
        _scatter(folder / "accuracy_time.png", shown, colours, "seconds", "training time, s"),
    ]
    trained = [result for result in results if result.get("epochs")]
    return [*files, _curves(folder / "learning_curves.png", trained, colours)] if trained else files


def _scatter(
    path: Path, rows: Sequence[dict[str, Any]], colours: dict[str, str], key: str, label: str
) -> Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        middle = 100 * row["accuracy"]
        # the mean of equal accuracies can be an ulp off them
        below, above = middle - 100 * row["accuracy_min"], 100 * row["accuracy_max"] - middle
        spread = [[max(below, 0.0)], [max(above, 0.0)]]
        axis.errorbar(
            row[key],
            middle,
            yerr=spread,
            fmt=_MARKS.get(row["method"], "o"),
            color=colours[row["method"]],
            capsize=3,
            label=row["method"],
        )
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("test accuracy, %")
    axis.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _curves(path: Path, results: Sequence[dict[str, Any]], colours: dict[str, str]) -> Path:
    import matplotlib.pyplot as plt

    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in colours:
        mine = [result for result in results if result["method"] == name]
        if not mine:
            continue
        steps_loss = _means([result["losses"] for result in mine])
        window = max(1, len(steps_loss) // 20)
        steps = range(window, len(steps_loss) + 1)
        smooth = [sum(steps_loss[step - window : step]) / window for step in steps]
        losses.plot(steps, smooth, color=colours[name], linewidth=0.9)
        values = _means(
            [
                [result["accuracy_before"], *(epoch["eval_accuracy"] for epoch in result["epochs"])]
                for result in mine
            ]
        )
        accuracies.plot(
            range(len(values)),
            [100 * value for value in values],
            "o-",
            color=colours[name],
            markersize=3,
            label=name,
        )
    losses.set_xlabel("step")
    losses.set_ylabel("training loss, running mean (of all seeds)")
    accuracies.set_xlabel("epoch")
    accuracies.set_ylabel("test accuracy, %")
    accuracies.xaxis.get_major_locator().set_params(integer=True)
    for axis in (losses, accuracies):
        axis.grid(True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    """Over the seeds, step by step; as far as all of them go."""
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]
