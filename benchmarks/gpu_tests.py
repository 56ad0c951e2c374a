"""Correctness on the device, beside the compiling cases: the Triton kernels' tests and the op search, as processes."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEARCHED = ("gated_prefix", "gated_prefix_attention", "prefix_attention", "bottleneck")
OPS = (*SEARCHED, "prefix_merge")
# A test prints its stacks after, and is given up after so many seconds; it may compile a lot beside others.
STACK_SECONDS, TEST_SECONDS = 60, 100
# What pytest needs to print its failures when it is interrupted.
LAST_WORDS = 8
XDIST = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S.*?)\s*$", re.MULTILINE)
PLAIN = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*$", re.MULTILINE)
UNCOLLECTED = re.compile(r"^ERROR (tests/[\w/]+\.py)(?: - .*)?$", re.MULTILINE)
SELECTED = re.compile(
    r"\d+ workers? \[(\d+) items?\]|collected .*?(\d+) selected|collected (\d+) items?$", re.MULTILINE
)


@dataclass
class Tests:
    """A process that judges; ``workers`` is how many cores it uses."""

    name: str
    process: subprocess.Popen
    log: Path
    workers: int
    interrupted: bool = False


@dataclass
class Outcome:
    """What is known of every op when its timings start."""

    commit: str = ""
    passed: int = 0
    skipped: int = 0
    selected: int = 0
    failed: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)  # of failed tests, a line each
    searched: dict[str, int] = field(default_factory=dict)
    search_failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def red(self) -> list[str]:
        tests = (f"{name}: {self.reasons[name]}" if name in self.reasons else name for name in self.failed)
        return [*tests, *(f"search of {op}: {what}" for op, what in self.search_failures.items())]

    def red_by_op(self) -> dict[str, int]:
        """How many failures concern each op."""
        found = Counter(op for name in self.failed for op in ops_of(name))
        found.update(op for name in self.search_failures for op in ops_of(name))
        return dict(found)

    def words(self) -> str:
        parts = []
        if self.selected or self.passed or self.failed:
            open_ = self.selected - self.passed - self.skipped - len(self.failed)
            parts.append(f"tests: {self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped")
            parts[0] += f", {open_} NOT REACHED in time" if open_ > 0 else ""
        parts += [f"search of {op}: {count} cases" for op, count in self.searched.items()]
        parts += [f"search of {op}: FAILED" for op in self.search_failures]
        return "; ".join([*parts, *self.notes]) or "no tests"


def ops_of(test: str) -> tuple[str, ...]:
    """The ops whose figures a failure of this test puts in doubt; all where its name says nothing.

    >>> ops_of("tests/test_bottleneck_triton.py::test_rows[gelu]")
    ('bottleneck',)
    """
    if "bottleneck" in test:
        return ("bottleneck",)
    attention = ("gated_prefix_attention", "prefix_attention", "prefix_merge")
    rest, found = test, set()
    for word, ops in (
        ("gated_prefix_attention", ("gated_prefix_attention",)),
        ("gated_prefix", ("gated_prefix", "gated_prefix_attention")),
        ("prefix_attention", ("prefix_attention", "prefix_merge")),
        ("prefix_merge", ("prefix_attention", "prefix_merge")),
    ):
        if word in rest:
            found.update(ops)
            rest = rest.replace(word, "")
    if not found and re.search("attention|decode|merge", rest):
        found.update(attention)
    return tuple(op for op in OPS if op in found) or OPS


def start(wanted: Sequence[str], folder: Path, seconds: float, cores: int, dry: bool) -> list[Tests]:
    """Start what is wanted of ``tests`` and ``search``; without the tests' folder, nothing."""
    started: list[Tests] = []
    if not (ROOT / "tests").is_dir():
        return started
    if "search" in wanted and importlib.util.find_spec("hypothesis"):
        for op in SEARCHED[:1] if dry else SEARCHED:
            count = ["--examples", "1", "--triton", "0"] if dry else ["--examples", "0", "--triton", "100000"]
            # the start of a process counts, and so do last words
            limit = max(5.0, seconds - 40)
            command = ["-m", "tests.search", "--ops", op, *count, "--seconds", f"{limit:.0f}"]
            started.append(_start(f"search {op}", command, folder, 1))
    if "tests" in wanted and importlib.util.find_spec("pytest"):
        about = re.compile(
            "gated_prefix.*triton" if dry else "triton|prefix|attention|bottleneck|decode|merge"
        )
        files = [
            path for path in sorted((ROOT / "tests").glob("test_*.py"))
            if about.search(path.stem) and "triton" in path.read_text(encoding="utf-8")
        ]  # fmt: skip
        files.append(ROOT / "tests/search/test_search.py")
        workers = max(1, cores - len(started))
        options = [
            "-v",
            "--tb=short",
            "-k",
            "triton",
            "-p",
            "no:cacheprovider",
            "-p",
            f"{__package__}.gpu_pytest",
            "-o",
            f"faulthandler_timeout={STACK_SECONDS}",
        ]
        if importlib.util.find_spec("pytest_timeout"):
            options += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
        if dry:
            started.append(
                _start("tests", ["-m", "pytest", *options, "--collect-only", *map(str, files)], folder, 1)
            )
        elif importlib.util.find_spec("xdist"):
            options += ["-n", str(workers), "--dist", "worksteal"]
            started.append(_start("tests", ["-m", "pytest", *options, *map(str, files)], folder, workers))
        else:
            for index in range(min(workers, len(files))):
                mine = map(str, files[index::workers])
                started.append(_start(f"tests {index}", ["-m", "pytest", *options, *mine], folder, 1))
    return started


def _start(name: str, command: list[str], folder: Path, workers: int) -> Tests:
    log = folder / f"tests.{name.replace(' ', '.')}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    return Tests(name, process, log, workers)


def finish(started: list[Tests], out: Path, commit: str, deadline: float) -> Outcome:
    """Wait until the deadline, interrupt what still runs, read what all printed, and keep it in ``out``."""
    while any(test.process.poll() is None for test in started) and time.monotonic() < deadline - LAST_WORDS:
        time.sleep(0.1)
    for test in started:
        if test.process.poll() is None:
            test.interrupted = True
            test.process.send_signal(signal.SIGINT)
    for test in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            test.process.wait(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):  # its workers too
            os.killpg(test.process.pid, signal.SIGKILL)
        test.process.wait()
    outcome = Outcome(commit)
    with (out / "tests.log").open("a", encoding="utf-8") as log:
        for test in started:
            text = test.log.read_text(encoding="utf-8", errors="replace")
            log.write(f"== {test.name}: exit status {test.process.returncode}\n{text}\n")
            if test.name.startswith("search"):
                read_search(test.name.split(" ")[1], text, test.process.returncode, outcome)
            else:
                read_tests(text, outcome, test.interrupted)
    if not started:
        outcome.notes.append(
            "neither tests nor the packages that they need are here: each op checks itself at its first call"
        )
    (out / "tests.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    return outcome


def read_search(op: str, text: str, status: int, outcome: Outcome) -> None:
    """Add what a search printed. Without a line of its own it has not searched: that is a note."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"op"')]
    outcome.searched[op] = sum(row.get("examples", 0) for row in found)
    for row in found:
        if row["failures"]:
            outcome.search_failures[op] = row["what"]
    if not found:
        outcome.notes.append(f"search of {op} ended with {status}: {_last(text)}")


def read_tests(text: str, outcome: Outcome, interrupted: bool = False) -> None:
    """Add what pytest printed, whether it ended or was interrupted."""
    results = [(name, word) for word, name in XDIST.findall(text)] or PLAIN.findall(text)
    words = Counter(word for _, word in results)
    outcome.passed += words["PASSED"]
    outcome.skipped += words["SKIPPED"] + words["XFAIL"]
    failed = {name for name, word in results if word in ("FAILED", "ERROR")}
    outcome.failed += sorted(failed | set(UNCOLLECTED.findall(text)))
    for name, block in re.findall(r"^-- (tests/.*)\n((?:.*\n)*?)--$", text, re.MULTILINE):
        if lines := re.findall(r"^E +(.*)$", block, re.MULTILINE):
            outcome.reasons[name] = lines[0][:200]
    if selected := SELECTED.findall(text):
        outcome.selected += int(next(filter(None, selected[-1])))
    elif interrupted:
        outcome.notes.append("tests: NONE REACHED in time")
    else:
        outcome.failed.append(f"pytest itself: {_last(text)}")


def _last(text: str) -> str:
    return " ".join([line for line in text.splitlines() if line.strip()][-1:])[:300]


def stored(out: Path, commit: str) -> Outcome | None:
    """What part 1 found of the same commit, where its folder is here."""
    path = out / "tests.json"
    if not path.is_file():
        return None
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return outcome if outcome.commit == commit else None
