"""Estimates held to measurement: ``python -m benchmarks.audit.calibrate`` prints the table of ``docs/audit.md``.

``benchmarks/results/estimate_features.ndjson`` has a row per measured call: its time on an H200 (2026-11-27, commit
d9a2e4b, torch 2.11.0, triton 3.6.0; shapes of Llama-3-8B, 4 x 2048 tokens) and the features of its launches, extracted
from what that same Triton compiled at that commit. Most of those kernels are gone; the rows stay.
"""

import csv
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..rows import RESULTS
from .estimate import CARDS, Constants, Estimate, Features, time_of

FEATURES = RESULTS / "estimate_features.ndjson"
PREDICTIONS = RESULTS / "estimates.csv"
MEASURED = RESULTS / "estimates_measured.csv"
CARD = CARDS["H200"]
# What is tried for the three fitted constants.
GRID = {
    "launch_us": (2.0, 3.0, 4.0), "cache_terabytes_per_s": (7.0, 9.0, 11.0), "overlap": (3.0, 4.0, 6.0),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A measured call. ``how``: replays of a CUDA graph, or events around eager calls (the host's time too)."""

    case: str
    us: float
    how: str
    launches: tuple[Features, ...]

    def estimate(self, constants: Constants) -> Estimate:
        parts = [time_of(launch, CARD, constants) for launch in self.launches]
        return Estimate(sum(part.us for part in parts), parts, list(self.launches))

    def error(self, constants: Constants) -> float:
        """Of the estimate, relative to what was measured."""
        return self.estimate(constants).us / self.us - 1


def measured(path: Path = FEATURES) -> list[Measured]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Measured(
            row["case"], row["measured_us"], row["how"], tuple(Features(**one) for one in row["launches"])
        )
        for row in rows
    ]


def fit(rows: Sequence[Measured]) -> Constants:
    """The constants of the grid with the least mean of |log(estimate / measured)|: one odd row does not rule."""
    candidates = [Constants(*values) for values in itertools.product(*GRID.values())]

    def loss(constants: Constants) -> float:
        return sum(abs(math.log1p(row.error(constants))) for row in rows)

    return min(candidates, key=loss)


def left_out(rows: Sequence[Measured]) -> list[float]:
    """The error of each row by constants that are fitted to the others."""
    return [row.error(fit([other for other in rows if other is not row])) for row in rows]


def table(rows: Sequence[Measured]) -> list[list[str]]:
    lines = [
        ["call", "measured by", "measured, us", "estimated, us", "error, %", "left out, %", "launches, us"]
    ]
    for row, out in zip(rows, left_out(rows)):
        found = row.estimate(Constants())
        launches = " + ".join(f"{part.us:.0f}" for part in found.parts)
        lines.append(
            [row.case, row.how, f"{row.us:g}", f"{found.us:.1f}", f"{100 * row.error(Constants()):+.0f}",
             f"{100 * out:+.0f}", launches]
        )  # fmt: skip
    return lines


def summary(rows: Sequence[Measured]) -> str:
    errors = [abs(row.error(Constants())) for row in rows]
    out = [abs(error) for error in left_out(rows)]
    return (
        f"Median error {100 * statistics.median(errors):.0f} %, left out {100 * statistics.median(out):.0f} %; "
        f"largest {100 * max(errors):.0f} %."
    )


@dataclass(frozen=True)
class Prediction:
    """The estimate of one audited call, made before any card measured it."""

    op: str
    direction: str
    dtype: str
    case: str
    launches: int
    h200_us: float
    h100_us: float
    slowest: str  # launch
    by: str  # what that launch spends its time on
    triton: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.direction, self.dtype, self.case


def predict(case) -> Prediction:
    import triton

    from . import cases
    from .case import Maker
    from .estimate import features

    found = features(lambda: cases.run(case, Maker(case)))
    times = {name: [time_of(step, card, Constants()) for step in found] for name, card in CARDS.items()}
    slowest = max(times["H200"], key=lambda part: part.us)
    by = max(("processors", "cache", "memory"), key=lambda name: getattr(slowest, name))
    return Prediction(
        case.op, case.direction, case.dtype, str(case), len(found),
        *(round(sum(part.us for part in times[name]), 1) for name in ("H200", "H100")),
        slowest.kernel.removesuffix("_kernel"), by, triton.__version__,
    )  # fmt: skip


def chosen() -> list:
    """The cases that have a stored prediction: every pass of the calls in :data:`MEASURED`."""
    from . import cases

    calls = {(row["op"], row["dtype"], row["case"]) for row in _held(MEASURED)}
    return [case for case in cases.all_cases() if (case.op, case.dtype, str(case)) in calls]


def _held(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def store(path: Path, rows: Iterable[Prediction]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Prediction)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def update(path: Path, rows: Iterable[Prediction]) -> None:
    """Replace the stored predictions of the same cases; those of cases that no longer exist go."""
    known = {row.key: row for row in (load(path) if path.exists() else [])} | {row.key: row for row in rows}
    order = [(case.op, case.direction, case.dtype, str(case)) for case in chosen()]
    store(path, [known[key] for key in order if key in known])


def load(path: Path = PREDICTIONS) -> list[Prediction]:
    kinds = {field.name: field.type if field.type in (int, float) else str for field in fields(Prediction)}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Prediction(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def predictions_table(rows: Iterable[Prediction]) -> list[list[str]]:
    lines = [["op", "pass", "case", "launches", "H200, us", "H100, us", "slowest launch", "its time is in"]]
    for row in rows:
        lines.append(
            [row.op, row.direction, row.case, str(row.launches), f"{row.h200_us:g}", f"{row.h100_us:g}", row.slowest,
             row.by]
        )  # fmt: skip
    return lines


def held_table(rows: Iterable[Prediction], path: Path = MEASURED) -> list[list[str]]:
    """Predictions of calls that a card has measured since; a forward and its backward are measured as one call.

    Raises: KeyError: a measured call without a prediction.
    """
    known = {row.key: row for row in rows}
    lines = [["op", "pass", "case", "predicted, us", "measured, us", "error, %", "measured"]]
    for row in _held(path):
        passes = row["direction"].split(" + ")
        us = sum(known[row["op"], each, row["dtype"], row["case"]].h200_us for each in passes)
        error = f"{100 * (us / float(row['us']) - 1):+.0f}"
        lines.append([row["op"], row["direction"], row["case"], f"{us:.1f}", row["us"], error, row["note"]])
    return lines


def main() -> int:
    from .draw import aligned

    rows = measured()
    print(aligned(table(rows)))
    print(summary(rows), "Fitted:", fit(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
