"""Was the machine quiet while something was timed? A run beside other work is marked, stored and not published.

Four things are looked at, each of which sees what the others miss: processor time of processes that are not ours, time
that the hypervisor took (steal), a short calculation timed before and after, and, where Linux's counters cannot be
read, the load average.

    extra of a row: load_average, others_percent, steal_percent, calibration_change_percent, and busy (1.0)
"""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# Per cent: of all processors, and of the calculation's time. Rounds differ by a tenth on a quiet virtual machine.
MOST_OTHERS, MOST_STEAL, MOST_CHANGE = 8.0, 3.0, 25.0
MARK = "busy"
MARKS = ("load_average", "others_percent", "steal_percent", "calibration_change_percent")


@dataclass(frozen=True)
class Look:
    """The machine's counters at one moment, in seconds; ``None`` where they cannot be read."""

    clock: float
    all_work: float | None
    steal: float | None
    own: float | None
    calibration: float


class Watch:
    """From its making to :meth:`marks`: what else the machine did."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.before = look()

    def marks(self) -> dict[str, float]:
        """For ``extra`` of the rows that were measured meanwhile."""
        return judge(self.before, look(), self.load, os.cpu_count() or 1)


def look() -> Look:
    work, steal = _machine()
    return Look(time.monotonic(), work, steal, _ours(), calibrate())


def judge(before: Look, after: Look, load: float, cores: int) -> dict[str, float]:
    """The marks; ``busy`` is there only where one of them is past its bound."""
    change = 100 * abs(after.calibration / before.calibration - 1)
    found = {"load_average": load, "calibration_change_percent": change}
    busy = change > MOST_CHANGE
    have = (before.all_work, before.steal, before.own, after.all_work, after.steal, after.own)
    if None in have:
        busy |= load > cores / 2
    else:
        all_before, steal_before, own_before, all_after, steal_after, own_after = have
        capacity = cores * max(after.clock - before.clock, 1 / TICKS)
        # the counters tick: a moment of nothing may come out a little below zero
        others = max(0.0, all_after - all_before - (own_after - own_before))
        found["others_percent"] = 100 * others / capacity
        found["steal_percent"] = 100 * (steal_after - steal_before) / capacity
        busy |= found["others_percent"] > MOST_OTHERS or found["steal_percent"] > MOST_STEAL
    return found | ({MARK: 1.0} if busy else {})


def why(marks: dict[str, float]) -> str:
    """The marks in words.

    >>> why({"load_average": 2.5, "others_percent": 51.0})
    'load average 2.5, others percent 51'
    """
    return ", ".join(f"{name.replace('_', ' ')} {marks[name]:.3g}" for name in MARKS if name in marks)


def calibrate(repeats: int = 15, tries: int = 3) -> float:
    """Median seconds of a product that takes every thread a few milliseconds, of a few tries the least: what holds up
    one of them for a moment was not there during a run of minutes.
    """
    a = torch.ones(384, 384)
    medians = []
    for _ in range(tries):
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, a)
            samples.append(time.perf_counter() - start)
        medians.append(statistics.median(samples))
        time.sleep(0.1)
    return min(medians)


def _machine() -> tuple[float | None, float | None]:
    """Seconds of work of all processors since the start of the machine, and of steal."""
    try:
        fields = (PROC / "stat").read_text().splitlines()[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(each) / TICKS for each in fields[1:9])
    except (OSError, ValueError, IndexError):
        return None, None
    return user + nice + system + irq + softirq, steal


def _ours() -> float | None:
    """Processor seconds of this process, its living descendants and those that have ended."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    try:
        folders = [each for each in PROC.iterdir() if each.name.isdigit()]
    except OSError:
        return None
    for folder in folders:
        try:
            # the command in brackets may itself hold blanks and brackets
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = sum(int(each) for each in fields[11:15]) / TICKS
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(seconds.get(pid, 0.0) for pid in mine)
