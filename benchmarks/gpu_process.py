"""Processes of a GPU run: started early, given a job, killed with all they started when their time is over."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Part of its time after which a process prints its stacks.
STACK_AT = 0.8
# For imports, which count separately: they are slow where nothing is in the file cache.
IMPORT_SECONDS = 120.0


class Process:
    """A case in a process. It imports what it needs at once and waits for :meth:`begin`."""

    def __init__(self, name: str, modules: Sequence[str], log: Path):
        self.name, self.log = name, log
        self.status: int | None = None
        self.hung = self.late = self.ready = (
            False  # killed for its own limit, or at the end of the time of all
        )
        self.start = self.seconds = self.limit = 0.0
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", f"{__package__}.gpu_case", name, *modules],
                cwd=ROOT if (ROOT / "pyproject.toml").is_file() else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # a byte when it is ready; what it prints goes to stderr
                stderr=file,
                start_new_session=True,  # so that what it starts can be killed with it
            )
        os.set_blocking(self.process.stdout.fileno(), False)

    def begin(self, job: dict[str, Any], limit: float, until: float = float("inf")) -> None:
        """Send the job. ``limit`` counts from when it is ready, ``until`` is on the clock of ``time.monotonic``."""
        self.limit, self.until, self.start = limit, until, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died: wait() says how
            self.process.stdin.write(json.dumps({**job, "stack_after": STACK_AT * limit}).encode() + b"\n")
            self.process.stdin.close()

    def over(self) -> bool:
        """Whether it has ended; kills it when its time is up."""
        if self.status is not None:
            return True
        now = time.monotonic()
        if not self.ready:
            with contextlib.suppress(BlockingIOError):
                self.ready = bool(os.read(self.process.stdout.fileno(), 1))
            self.start = now if self.ready else self.start
        self.status, self.seconds = self.process.poll(), now - self.start
        self.hung = self.status is None and self.seconds > (self.limit if self.ready else IMPORT_SECONDS)
        self.late = self.status is None and not self.hung and now > self.until
        if self.hung or self.late:
            kill(self)
        return self.status is not None

    def wait(self) -> None:
        while not self.over():
            time.sleep(0.02)

    def outcome(self) -> str:
        if self.hung or self.late:
            return f"killed after {self.seconds:.0f} s"
        return f"{self.seconds:.0f} s" + (f", exit status {self.status}" if self.status else "")

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def complaints(self) -> list[str]:
        """What went wrong, in a line each."""
        named = re.findall(r"^PROBLEM (.*)$", self.text(), re.MULTILINE)
        if named:
            return named
        last = [line for line in self.text().splitlines() if line.strip()][-1:]
        return [f"{self.name} failed (exit status {self.status}): {' '.join(last)[:300]}"]


def kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.process.pid, signal.SIGKILL)
    process.status = process.process.wait()
    process.process.stdout.close()


def side_by_side(
    cases: Sequence[tuple[str, str]],
    job: dict[str, Any],
    slots: int,
    limit: float,
    seconds: float,
    folder: Path,
) -> list[Process]:
    """Run as many at a time as there are slots, for so many seconds in all; returns those that were started."""
    deadline, waiting, running, ended = time.monotonic() + seconds, list(cases), [], []
    while waiting or running:
        for process in [process for process in running if process.over()]:
            running.remove(process)
            ended.append(process)
        while waiting and len(running) < slots and time.monotonic() < deadline:
            name, module = waiting.pop(0)
            running.append(Process(name, (module,), folder / f"warm.{name}"))
            running[-1].begin(job, limit, deadline)
        if not running:
            break
        time.sleep(0.05)
    return ended


def first_stack(text: str) -> str:
    """Where it hangs: the innermost frames of what ``faulthandler`` printed last, ours first."""
    dumps = text.split("Timeout (")
    if len(dumps) < 2:
        return "no stack was printed"
    threads = re.split(r"^(?:Current t|T)hread .*$", dumps[-1], flags=re.MULTILINE)[1:]
    found = []
    for thread in threads:
        frames = re.findall(r'File "(.*?)", line (\d+) in (\S+)', thread)
        ours = [frame for frame in frames if re.search(r"/(fastadapter|kernels|benchmarks)/", frame[0])]
        if frames and ours and not ours[0][0].endswith("gpu_process.py"):
            shown = dict.fromkeys([frames[0], *ours[:3]])
            found.append(
                " < ".join(f"{'/'.join(file.split('/')[-2:])}:{line} {name}" for file, line, name in shown)
            )
    return " | ".join(found[:3]) or "; ".join(dumps[-1].splitlines()[1:4])
