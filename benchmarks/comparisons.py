"""Tables of the comparisons stored by ``scripts/store_comparison.py``, for the documents.

Their markers: ``<!-- comparison: FOLDER -->`` every column of one comparison, ``<!-- comparison-short: FOLDER, FOLDER
-->`` accuracies and shares side by side, ``<!-- comparison-peft: FOLDER -->`` what ``scripts/compare_peft.py`` found.
"""

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapter.compare import METHODS_TO_COMPARE, summarise
from fastadapter.compare.report import accuracy, table
from fastadapter.compare.worker import RESULT

ROOT = Path(__file__).parent / "results"


def rows(folder: str) -> list[dict[str, Any]]:
    """One summary per method of a stored comparison.

    Raises: ValueError: nothing is stored there.
    """
    files = sorted((ROOT / folder).glob(f"runs/*/*/{RESULT}"))
    if not files:
        raise ValueError(f"no stored comparison in benchmarks/results/{folder}")
    return summarise([json.loads(file.read_text(encoding="utf-8")) for file in files])


def full(folders: Sequence[str]) -> str:
    return "\n\n".join("\n".join(table(rows(folder))) for folder in folders)


def short(folders: Sequence[str]) -> str:
    """Accuracy, trained share and time per epoch of each method, the folders side by side."""
    found = {folder: {row["method"]: row for row in rows(folder)} for folder in folders}
    models = [folder.removeprefix("compare_") for folder in folders]
    head = [
        "method",
        *(f"{model}: {what}" for model in models for what in ("accuracy", "trained", "s per epoch")),
    ]
    lines = [head, ["---", *["---", "---:", "---:"] * len(models)]]
    for method in METHODS_TO_COMPARE:
        mine = [found[folder].get(method) for folder in folders]
        if any(mine):
            lines.append([method, *(cell for row in mine for cell in _cells(row))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peft(folders: Sequence[str]) -> str:
    """What ``scripts/compare_peft.py`` stored in these folders."""
    files = [ROOT / folder / "peft.json" for folder in folders]
    return peft_table([row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]])


def peft_table(stored: Sequence[dict[str, Any]]) -> str:
    """Accuracies of PEFT beside ours, of the seeds that both were trained with."""
    lines = [
        "| method | PEFT's start | PEFT's rate | seeds | fastadapter | PEFT |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    kind = operator.itemgetter("method", "start", "learning_rate")
    for method, start, rate in dict.fromkeys(map(kind, stored)):
        mine = [row for row in stored if kind(row) == (method, start, rate)]
        seeds = [row["seed"] for row in mine]
        cells = [method, start, f"{rate:g}", ", ".join(map(str, seeds))]
        for key in ("fastadapter_accuracy", "accuracy"):
            values = [row[key] for row in mine]
            figures = {
                "accuracy": sum(values) / len(values),
                "accuracy_min": min(values),
                "accuracy_max": max(values),
            }
            cells.append(accuracy({**figures, "seeds": seeds}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


DRAW = {"comparison": full, "comparison-short": short, "comparison-peft": peft}


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None or "not_defined" in row:
        return ["", "", ""]
    return [accuracy(row), f"{row['trainable_share']:.3%}", f"{row['seconds_per_epoch']:.0f}"]
