"""Processes that do runs, some of them at a time, and end together."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastadapter.compare.worker import RESULT
from fastadapter.training import TrainingInterrupted, UserError
from fastadapter.training.config import STOP_SIGNALS
from fastadapter.training.step import StopSignals

# What libraries read that do not ask PyTorch how many threads they may start.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass
class Run:
    """One method with one seed.

    Attributes:
        folder: has ``job.json``, and its result when the run is finished.
        job: what is to be done there.
    """

    method: str
    seed: int
    folder: Path
    job: dict[str, Any]
    finished: bool = False

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / RESULT).read_text(encoding="utf-8"))


def run_all(
    runs: Sequence[Run],
    command: Sequence[str],
    jobs: int,
    ended: Callable[[Run], None],
    progress: bool = True,
) -> None:
    """Do ``runs`` in their order, ``jobs`` at a time.

    A failure, or a signal to this process, stops those that are under way; each saves first.

    Args:
        command: starts a process that does the job in the folder given as last word.
        ended: told of each run when its result is there.
    Raises: UserError: a run failed; TrainingInterrupted: a signal came.
    """
    waiting = list(runs)
    active: list[tuple[Run, subprocess.Popen]] = []
    why: TrainingInterrupted | UserError | None = None
    told = False
    began = time.perf_counter()

    def interrupted(number: int, where: Sequence[Run]) -> TrainingInterrupted:
        names = "; ".join(map(str, where))
        return TrainingInterrupted(number, f"stopped in {names}; the same command goes on from there")

    bar = tqdm(total=len(runs), desc="runs", unit="run", disable=None if progress and jobs > 1 else True)
    with bar, StopSignals() as signals, contextlib.ExitStack() as stack:
        stack.callback(_kill, active)
        while active or (waiting and why is None):
            while why is None and waiting and len(active) < jobs:
                run = waiting.pop(0)
                if progress:
                    clock = time.strftime("%H:%M:%S", time.gmtime(time.perf_counter() - began))
                    bar.write(f"[{len(runs) - len(waiting)}/{len(runs)}, {clock}] {run}", file=sys.stderr)
                active.append((run, start([*command, str(run.folder)], run.job["threads"])))
                if signals.received:
                    break
            if why is None and signals.received:
                why = interrupted(signals.received, [run for run, _ in active])
            if why is not None and not told:
                # A terminal sends SIGINT to all; a second one would end them before they have saved.
                for _, process in active:
                    process.terminate()
                told = True
            for run, process in [each for each in active if each[1].poll() is not None]:
                active.remove((run, process))
                number = process.returncode - 128
                if process.returncode == 0:
                    ended(run)
                    bar.update()
                elif why is None and number in STOP_SIGNALS:
                    why = interrupted(number, [run, *(other for other, _ in active)])
                elif why is None:
                    why = UserError(f"{run}: its process ended with status {process.returncode}")
            if active:
                time.sleep(0.1)
    if why is not None:
        raise why


def start(command: Sequence[str], threads: int | None) -> subprocess.Popen:
    """A process of as many threads, with nothing to read."""
    limits = {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **limits})


def _kill(active: Sequence[tuple[Run, subprocess.Popen]]) -> None:
    for _, process in active:
        process.kill()
        process.wait()
