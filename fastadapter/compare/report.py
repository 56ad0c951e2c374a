"""The table of a comparison, as Markdown and JSON, and what was measured where."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapter.checkpoints.files import write_atomically
from fastadapter.compare.methods import METHODS_TO_COMPARE
from fastadapter.compare.plots import draw
from fastadapter.training import write_json

# What the movie reviews that come as a package are called, the data that is most like the article's.
REVIEWS = "reviews"
ARTICLE = (
    "The article's own figures are those of DistilBERT (67 M parameters) on 50,000 IMDb movie reviews; another model "
    "and other data, for the order of the methods, not for their values."
)


def summarise(
    results: Sequence[dict[str, Any]], settings: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row per method: means over its seeds, and the spread of the accuracy.

    Args:
        settings: of the comparison. The article's figures, which are of movie reviews, stand beside those of other
            data only where it is not given.
    """
    rows = []
    like_the_article = settings is None or settings["data"] == REVIEWS
    for name in METHODS_TO_COMPARE:
        mine = [result for result in results if result["method"] == name]
        if not mine:
            continue
        article = METHODS_TO_COMPARE[name].article if like_the_article else None
        row: dict[str, Any] = {
            "method": name,
            "seeds": [result["seed"] for result in mine],
            "article": article,
        }
        undefined = next((result["not_defined"] for result in mine if "not_defined" in result), None)
        if undefined is not None:
            rows.append({**row, "not_defined": undefined})
            continue
        accuracies = [result["accuracy"] for result in mine]
        mean = sum(accuracies) / len(accuracies)
        trainable = mine[0]["trainable_parameters"]
        rows.append(
            {
                **row,
                "accuracy": mean,
                "accuracy_sd": _deviation(accuracies),
                "accuracy_min": min(accuracies),
                "accuracy_max": max(accuracies),
                "trainable_parameters": trainable,
                "trainable_share": trainable / mine[0]["model_parameters"],
                "seconds_per_epoch": _mean(mine, "seconds_per_epoch"),
                "seconds": _mean(mine, "seconds"),
                "peak_memory_bytes": max(result["peak_memory_bytes"] for result in mine),
                "file_bytes": mine[0]["file_bytes"],
                "learning_rate": mine[0]["learning_rate"],
                "head_learning_rate": mine[0].get("head_learning_rate"),
            }
        )
    return rows


def write_report(folder: Path, settings: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[Path]:
    """``results.json`` and the page with its plots in ``folder``.

    Returns: the files written.
    """
    record = {"settings": settings, "rows": summarise(results, settings), "runs": list(results)}
    write_json(folder / "results.json", record)
    return [folder / "results.json", *write_page(folder, settings, results)]


def write_page(folder: Path, settings: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[Path]:
    """``comparison.md`` and three plots in ``folder``.

    Returns: the files written.
    """
    rows = summarise(results, settings)
    test = settings["rows"]["test"]
    labels = settings.get("test_labels")  # absent in folders of before they were counted
    plots = draw(
        folder,
        # nothing trained is nowhere on the plots' axes
        [row for row in rows if row.get("trainable_parameters") != 0],
        results,
        title=f"{settings['model']} on {settings['data']}",
        subtitle=(
            f"{settings['rows']['train']:,} training and {test:,} test records, one standard error "
            f"±{100 * _chance(rows, test):.1f} points; {_seeds(rows)}"
        ),
        chance=max(labels.values()) / test if labels else None,
    )
    text = markdown(settings, rows, results, [path.name for path in plots])
    write_atomically(folder / "comparison.md", text.encode())
    return [folder / "comparison.md", *plots]


def markdown(
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    plots: Sequence[str] = (),
) -> str:
    """The report as a page."""
    counts, training = settings["rows"], settings["training"]
    epochs = training["num_train_epochs"]
    template = json.dumps(settings["template"], ensure_ascii=False)
    lines = [
        f"# {settings['model']} on {settings['data']}",
        "",
        f"{counts['train']:,} training and {counts['test']:,} test records, the same for every method; "
        f"{epochs} {'epoch' if epochs == 1 else 'epochs'}, batches of {training['batch_size']}; "
        f"texts put into `{template}`; {_seeds(rows)}. {_starts(results)}{_where(results)}",
        "",
        *table(rows),
        "",
        f"Accuracy is that of the weights after the last epoch on the test records: mean over the seeds, in brackets "
        f"the lowest and the highest. By chance alone, {counts['test']:,} test records make "
        f"±{100 * _chance(rows, counts['test']):.1f} points (one standard error). Seconds are those of the training "
        "steps, without evaluation; of features, those of embedding the training records once and of fitting. Peak "
        "memory is the largest resident memory of the process that did nothing but this run, model and libraries "
        "included (on a GPU: the largest allocation). The file is what has to be kept beside the frozen model.",
    ]
    if _beside_the_article(rows):
        lines += ["", ARTICLE]
    undefined = [row for row in rows if "not_defined" in row]
    lines += [line for row in undefined for line in ("", f"{row['method']}: {row['not_defined']}.")]
    lines += [line for name in plots for line in ("", f"![{name.removesuffix('.png')}]({name})")]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table; with the article's accuracies if there are any."""
    beside = _beside_the_article(rows)
    lines = [
        "| method | test accuracy | trainable parameters | share | s per epoch | training, s | peak memory | file "
        "| learning rate |" + (" the article's accuracy |" if beside else ""),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + (" ---: |" if beside else ""),
    ]
    for row in rows:
        article = [f"{row['article']:.0%}" if row["article"] is not None else ""] if beside else []
        if "not_defined" in row:
            cells = ["not defined for this model", *[""] * 7]
        else:
            cells = [
                accuracy(row),
                f"{row['trainable_parameters']:,}",
                f"{row['trainable_share']:.3%}",
                f"{row['seconds_per_epoch']:.1f}",
                f"{row['seconds']:.1f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
                _size(row["file_bytes"]),
                _rates(row),
            ]
        lines.append(f"| {' | '.join([row['method'], *cells, *article])} |")
    return lines


def _beside_the_article(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["article"] is not None for row in rows)


def _rates(row: dict[str, Any]) -> str:
    if not row["learning_rate"]:
        return ""
    head = row["head_learning_rate"]
    return f"{row['learning_rate']:g}" + (f", head {head:g}" if head else "")


def accuracy(row: dict[str, Any]) -> str:
    """The mean over the seeds; of several, also the lowest and the highest."""
    text = f"{100 * row['accuracy']:.1f} %"
    if len(row["seeds"]) > 1:
        text += f" ({100 * row['accuracy_min']:.1f} to {100 * row['accuracy_max']:.1f})"
    return text


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    """Which seeds the figures are of, and which rows have others."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        if row["method"] not in ("features", "in-context"):  # whose result no seed changes
            methods.setdefault(", ".join(map(str, row["seeds"])), []).append(row["method"])
    most = max(methods, key=lambda seeds: len(methods[seeds]), default="none")
    others = [f"{seeds} of {', '.join(names)}" for seeds, names in methods.items() if seeds != most]
    return "; ".join([f"seeds {most}", *others])


def _starts(results: Sequence[dict[str, Any]]) -> str:
    """Where prompts and prefixes start, if not at random; of runs stored before there was a choice nothing is said."""
    methods: dict[str, list[str]] = {}
    for result in results:
        text = result.get("options", {}).get("init_text")
        names = methods.setdefault(json.dumps(text, ensure_ascii=False), []) if text else []
        if result["method"] not in names:
            names.append(result["method"])
    return "".join(f"From the text `{text}`: {', '.join(names)}. " for text, names in methods.items())


def _where(results: Sequence[dict[str, Any]]) -> str:
    places = []
    for result in results:
        machine, device = result["machine"], result["device"]
        what = machine["cpu"] if device == "cpu" else device
        place = (
            f"{what}, {result['threads']} of {machine['cores']} cores{_beside(result)}, PyTorch {machine['torch']}, "
            f"transformers {machine['transformers']}, {result['date']}"
        )
        if place not in places:
            places.append(place)
    return f"Measured on: {'; '.join(places)}." if places else ""


def _beside(result: dict[str, Any]) -> str:
    """How many runs shared the machine; of runs stored before there was a choice nothing is known."""
    jobs = result.get("jobs", 1)
    return f" each of {jobs} runs at a time" if jobs > 1 else ""


def _chance(rows: Sequence[dict[str, Any]], count: int) -> float:
    accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
    middle = sum(accuracies) / len(accuracies) if accuracies else 0.5
    return math.sqrt(middle * (1 - middle) / count)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def _mean(results: Sequence[dict[str, Any]], key: str) -> float:
    return sum(result[key] for result in results) / len(results)


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
