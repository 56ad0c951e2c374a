"""How a party of the recipe takes its turns: a job in a file, lines of JSON on stdout, a line on stdin for each turn.

A party trains a few steps, says how many tokens and seconds they were, and waits, without using a processor, until it
is told to go on: so several processes, even of different environments, are interleaved, and only the one whose turn
it is runs. Standard library only, since every environment has that.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_job(path: str) -> dict[str, Any]:
    """The settings and the tokens; see ``recipe.Job``."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


class Pacer:
    """Counts the steps of a party and waits between its turns.

    Args:
        job: ``turn_steps``, ``batch_size``, ``num_train_epochs``, ``train`` and ``measure_memory`` of it are used.
        judge: the accuracy on held-out rows, asked for after each epoch, outside the time; ``None``: not asked for.
    """

    def __init__(self, job: dict[str, Any], judge: Callable[[], float] | None = None):
        self.job, self.judge = job, judge
        # libraries print to stdout as they please; the parent must see our lines alone
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.steps_per_epoch = -(-len(job["train"]) // job["batch_size"])
        self.total = self.steps_per_epoch * job["num_train_epochs"]
        self.done = self.steps = self.tokens = 0
        self.setup = self.start = 0.0

    def ready(self, loss: float, trainable_parameters: int, version: str) -> None:
        """Everything is loaded; ``loss`` of the first rows says whether the work is that of the others."""
        told = {"trainable_parameters": trainable_parameters, "version": version}
        self._say("ready", loss=loss, judged=self.judge is not None, **told)
        self._wait()

    def first_step(self, seconds: float | None = None) -> None:
        """Training proper begins, or its first step took so many seconds: what went before was preparation."""
        self.setup = time.perf_counter() - self.start - (seconds or 0.0)

    def step(self, tokens: int, loss: float) -> bool:
        """A step is over, with so many real tokens; ``False`` after the last one."""
        self.done += 1
        self.steps += 1
        self.tokens += tokens
        ended = self.done % self.steps_per_epoch == 0
        if self.steps < self.job["turn_steps"] and not ended:
            return True
        seconds = time.perf_counter() - self.start - self.setup
        epoch = -(-self.done // self.steps_per_epoch)
        counted = {"epoch": epoch, "steps": self.steps, "tokens": self.tokens, "loss": loss}
        ends = {"ends_epoch": ended, "ends_run": self.done == self.total}
        self._say("turn", **counted, **ends, seconds=seconds, setup=self.setup)
        if ended and self.judge is not None:
            self._say("accuracy", epoch=epoch, accuracy=self.judge())
        self.steps = self.tokens = 0
        self.setup = 0.0
        if self.done == self.total:
            return False
        self._wait()
        return True

    def finish(self) -> None:
        """Say what memory the run took, where that was asked for, and that it is over."""
        if self.job["measure_memory"]:
            self._say("memory", resident_mib=self.resident, peak_mib=status_mib("VmHWM"))
        self._say("done")

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the run that this party belongs to has ended")
        if self.done == 0 and self.job["measure_memory"]:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
            self.resident = status_mib("VmRSS")
        self.start = time.perf_counter()

    def _say(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=self.out, flush=True)


def status_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024
