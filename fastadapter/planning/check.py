"""Every stored row against its prediction, with the error, and what is outside the stated range."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapter.planning.factors import NO_ROWS_OF_THE_CARD, Factor, Range, fit, stored
from fastadapter.planning.rows import Measured, Unplanned, stored_rows


@dataclass(frozen=True)
class Checked:
    """A row and what is predicted for it.

    Attributes:
        others: the range that the other runs alone would give; ``None``: there are none.
    """

    row: Measured
    predicted: Range
    others: Range | None

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted.mid / self.row.value - 1

    @property
    def inside(self) -> bool:
        return self.predicted.holds(self.row.value)

    def to_dict(self) -> dict[str, Any]:
        row = self.row
        return {
            "kind": row.kind,
            "source": row.source,
            "what": row.what,
            "unit": row.unit,
            "measured": row.value,
            "predicted": self.predicted.mid,
            "low": self.predicted.low,
            "high": self.predicted.high,
            "error": self.error,
            "inside": self.inside,
            "inside_without_its_run": None if self.others is None else self.others.holds(row.value),
            "fitted": row.fitted,
        }


def check(folder: Path | None = None) -> tuple[list[Checked], list[Unplanned]]:
    """All stored rows: those with a prediction, and those that none is for."""
    found = list(stored_rows(folder))
    measured = [row for row in found if isinstance(row, Measured)]
    factors = stored()
    kinds: dict[str, list[Measured]] = defaultdict(list)
    for row in measured:
        kinds[row.kind].append(row)
    checked = []
    unplanned = [row for row in found if isinstance(row, Unplanned)]
    without: dict[tuple[str, str], dict[str, Factor]] = {}
    for row in measured:
        if row.kind not in factors:
            unplanned.append(Unplanned(row.source, row.what, "no factor for its kind yet: --fit"))
            continue
        key = row.kind, row.run
        if key not in without:
            without[key] = fit(other for other in kinds[row.kind] if other.run != row.run)
        others = without[key].get(row.kind)
        checked.append(
            Checked(
                row,
                _predicted(row, factors[row.kind]),
                None if others is None else _predicted(row, others),
            )
        )
    return checked, unplanned


def _predicted(row: Measured, factor: Factor) -> Range:
    found = factor.range
    if row.device not in factor.devices:
        found = found.widened(NO_ROWS_OF_THE_CARD)
    return found * (row.blocks if row.kind.startswith("Python") else row.floor)


def table(checked: Sequence[Checked], unplanned: Sequence[Unplanned]) -> str:
    """Side by side, class by class; what is outside again at the end, then what is not planned, by reason.

    ``!``: outside; ``=``: no other run is of this class, so the factor was made from this one.
    """
    kinds: dict[str, list[Checked]] = defaultdict(list)
    for each in checked:
        kinds[each.row.kind].append(each)
    lines = []
    for kind, rows in sorted(kinds.items()):
        inside = sum(each.inside for each in rows)
        lines += [
            f"{kind}: {inside} of {len(rows)} inside",
            "  measured   predicted        range            error  row",
            *(_line(each) for each in rows),
            "",
        ]
    outside = [each for each in checked if not each.inside]
    alone = [each for each in checked if each.others is not None]
    held = sum(each.others.holds(each.row.value) for each in alone if each.others is not None)
    lines += [
        f"{len(checked) - len(outside)} of {len(checked)} rows are inside the stated range; {held} of {len(alone)} "
        f"inside the range that other runs alone give; {len(checked) - len(alone)} have no other run "
        "(=).",
        "",
        f"outside, {len(outside)}:",
        *(_line(each) for each in outside),
        "",
        f"not planned, {len(unplanned)}:",
    ]
    reasons = Counter(each.reason for each in unplanned)
    lines += [f"  {count:4d}  {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def _line(each: Checked) -> str:
    row, predicted = each.row, each.predicted
    mark = "!" if not each.inside else "=" if each.others is None and row.fitted else " "
    return (
        f"{mark} {row.value:9.4g}  {predicted.mid:9.4g} {row.unit:3}  {predicted.low:7.4g} to {predicted.high:7.4g}  "
        f"{each.error:+6.0%}  {row.what} [{row.source}]"
    )
