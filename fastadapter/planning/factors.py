"""How much longer than its floor a step takes: from stored rows, as ranges, kept in ``factors.json``."""

import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources

from fastadapter.planning.cost import Job
from fastadapter.planning.hardware import Device
from fastadapter.planning.rows import Measured, host_kind, step_kind
from fastadapter.training.config import UserError

FILE = "factors.json"
# Few rows say little about other sizes: a range reaches at least so far, as a factor, both ways. Assumptions.
LEAST = {"times": 1.1, "memory": 1.05}
ONE_RUN = 1.15
ONE_ROW = 1.2
NO_ROWS_OF_THE_CARD = 1.15
# Python takes about a third of a block's time in forward.
FORWARD_SHARE = 0.35
# V2 has no row on a card: it calls more than two bottlenecks a block do, but each call does less.
V2_HOST = (0.8, 1.0, 2.0)


@dataclass(frozen=True)
class Range:
    """A number and how far it may be off."""

    low: float
    mid: float
    high: float

    def __mul__(self, factor: float) -> "Range":
        return Range(self.low * factor, self.mid * factor, self.high * factor)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def widened(self, factor: float) -> "Range":
        return Range(self.low / factor, self.mid, self.high * factor)

    def reaching(self, factor: float) -> "Range":
        """Wide enough for ``factor`` both ways."""
        return Range(min(self.low, self.mid / factor), self.mid, max(self.high, self.mid * factor))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    @classmethod
    def larger(cls, one: "Range", other: "Range") -> "Range":
        return cls(max(one.low, other.low), max(one.mid, other.mid), max(one.high, other.high))


@dataclass(frozen=True)
class Factor:
    """Measured over floor in one class of rows; of Python, milliseconds of a block.

    Attributes:
        rows: how many there are.
        runs: in how many runs they were measured.
        devices: on what.
    """

    range: Range
    rows: int
    runs: int
    devices: tuple[str, ...] = ()


def ratio(row: Measured) -> float:
    """What a factor is made of."""
    return row.value / row.blocks if row.kind.startswith("Python") else row.value / row.floor


def fit(rows: Iterable[Measured]) -> dict[str, Factor]:
    """The median of every class, with a range that holds nine in ten of its rows, or all where they are few."""
    classes: dict[str, list[Measured]] = defaultdict(list)
    for row in rows:
        if row.fitted:
            classes[row.kind].append(row)
    return {kind: _factor(kind, found) for kind, found in sorted(classes.items())}


def _factor(kind: str, rows: list[Measured]) -> Factor:
    ratios = sorted(ratio(row) for row in rows)
    low, high = ratios[0], ratios[-1]
    if len(ratios) >= 20:
        low, *_, high = statistics.quantiles(ratios, n=20, method="inclusive")
    least = LEAST["memory" if kind.startswith("memory") else "times"]
    runs = len({row.run for row in rows})
    if runs == 1:
        least = ONE_ROW if len(ratios) == 1 else ONE_RUN
    found = Range(low, statistics.median(ratios), high).reaching(least)
    devices = tuple(sorted({row.device for row in rows}))
    return Factor(found, len(rows), runs, devices)


def to_json(factors: dict[str, Factor], until: str) -> str:
    """The text of ``factors.json``; ``until``: the date of the newest row."""
    rounded = {
        kind: {
            **asdict(factor),
            "range": {
                "low": _outwards(factor.range.low, down=True),
                "mid": float(f"{factor.range.mid:.4g}"),
                "high": _outwards(factor.range.high, down=False),
            },
        }
        for kind, factor in factors.items()
    }
    return json.dumps({"until": until, "factors": rounded}, indent=1) + "\n"


def _outwards(value: float, *, down: bool) -> float:
    """Four digits, such that a range still holds the row at its edge."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{(math.floor if down else math.ceil)(value / unit) * unit:.4g}")


@functools.cache
def stored() -> dict[str, Factor]:
    """The factors that come with the package."""
    text = (resources.files(__package__) / FILE).read_text(encoding="utf-8")
    return {
        kind: Factor(Range(**factor["range"]), factor["rows"], factor["runs"], tuple(factor["devices"]))
        for kind, factor in json.loads(text)["factors"].items()
    }


def step_factor(job: Job, device: Device) -> tuple[Range, str]:
    """Of a step that the device itself bounds, and where it is from."""
    kind = step_kind(job, device)
    factor = _of(stored(), kind)
    said = f"{_times(factor)} over the floor: {_rows(factor)}"
    if device.rows_name in factor.devices:
        return factor.range, said
    return factor.range.widened(
        NO_ROWS_OF_THE_CARD
    ), f"{said} of other devices; no row of this one: range widened by {NO_ROWS_OF_THE_CARD:g} (assumption)"


def host_milliseconds(job: Job) -> tuple[Range, str]:
    """What Python takes for the blocks of one pass on a card, forward and backward; and where it is from."""
    block, said = _block_milliseconds(job)
    above = job.shape.num_hidden_layers - job.lowest
    below = 0 if job.trunk_cache else job.lowest
    again = above if job.gradient_checkpointing else 0
    frozen = _of(stored(), "Python, frozen model").range
    return block * (above + FORWARD_SHARE * again) + frozen * (FORWARD_SHARE * below), said


def _block_milliseconds(job: Job) -> tuple[Range, str]:
    factors = stored()
    frozen = _of(factors, "Python, frozen model")
    kind = host_kind(job)
    if job.config.method == "llama-adapter-v2":
        houlsby = _of(factors, "Python, fastadapter, bottleneck").range.mid
        low, mid, high = V2_HOST
        return Range(low * houlsby, mid * houlsby, high * houlsby), (
            "Python: no row of llama-adapter-v2; taken as of two bottlenecks a block, up to twice that (assumption)"
        )
    factor = _of(factors, kind)
    found = factor.range
    if job.form in ("pfeiffer", "parallel"):  # the rows are of two bottlenecks a block
        share = (frozen.range.mid + (found.mid - frozen.range.mid) / 2) / found.mid
        found = found * share
    return found, (
        f"Python: {found.mid:.2f} ms a block ({found.low:.2f} to {found.high:.2f}): {_rows(factor)}, 30 blocks on a "
        "virtual machine with an H200; other hosts differ"
    )


def memory_factor(*, cpu: bool) -> tuple[Range, str]:
    """Of what a step holds above the model, and where it is from."""
    factor = _of(stored(), "memory of a process" if cpu else "memory of a step")
    return factor.range, (f"memory {_times(factor)} of what is counted: {_rows(factor)}")


def _of(factors: dict[str, Factor], kind: str) -> Factor:
    if kind not in factors:
        raise UserError(f"no stored row is of the kind {kind!r}, so nothing can be predicted from it")
    return factors[kind]


def _times(factor: Factor) -> str:
    return f"x{factor.range.mid:.2f} ({factor.range.low:.2f} to {factor.range.high:.2f})"


def _rows(factor: Factor) -> str:
    return f"{factor.rows} row{'s' * (factor.rows > 1)} of {factor.runs} run{'s' * (factor.runs > 1)}"
