"""Correctness and timings on a GPU: ``python3 -m benchmarks.gpu [--part 1|2] [--only CASE,CASE] [--dry-run]``.

Part 1 is correctness (the Triton kernels' tests and the op search on the device) and single ops, part 2 whole training
steps and decoding; each fits into six minutes on a machine where nothing is compiled yet. Every case is a process with
a limit of its own (docs/gpu.md): all are run once side by side, which compiles, then each is timed alone. Rows are
appended to ``benchmarks/results/gpu.jsonl`` as cases end; a hang is killed and named by its stack. Six files at most
go to the folder of ``--out``, and a summary of at most 10,000 characters is printed last. ``--dry-run`` walks through
all of it on a CPU with tiny sizes and stores no row. Exit status: 1 when something is red, 2 without a GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import gpu_tests
from .gpu_process import Process, first_stack, kill, side_by_side
from .gpu_summary import summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# A walk-through shares its cores with whatever else runs.
DRY_SECONDS = 120.0
# A case that has less is not started.
LAST_SECONDS = 6.0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Part:
    """Which modules hold its cases, and the seconds that one of them may take: to compile, to be timed."""

    modules: tuple[str, ...]
    warm_seconds: float
    case_seconds: float


PARTS = {
    1: Part(("gpu_attention", "gpu_bottleneck"), 110, 25),
    2: Part(("gpu_models", "gpu_recipes"), 150, 75),
}


@dataclass
class Run:
    """What is known so far."""

    part: int
    deadline: float
    out: Path
    dry: bool
    names: list[str]
    bench: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)  # of every case
    hung: set[str] = field(default_factory=set)
    tests: gpu_tests.Outcome | None = None
    problems: list[str] = field(default_factory=list)  # red: ours is wrong, failed, or hangs
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastadapter bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=PARTS, help="correctness and ops, or whole models (both)")
    parser.add_argument(
        "--only", help="names, separated by commas: cases, `tests`, `search` (all of the part); in this order"
    )
    parser.add_argument(
        "--seconds", type=float, default=345, help="time for a part; cases past it are left out"
    )
    parser.add_argument(
        "--test-seconds", type=float, default=150, help="of which for tests and search at most"
    )
    parser.add_argument("--case-seconds", type=float, help="limit of a case while it is timed")
    parser.add_argument(
        "--rounds", type=int, default=15, help="samples of every variant, twice as many of GPU time"
    )
    parser.add_argument(
        "--compile", action="store_true", help="peers by torch.compile too: minutes to compile"
    )
    parser.add_argument("--dry-run", action="store_true", help="walk through on a CPU, tiny, no row stored")
    parser.add_argument("--out", type=Path, help="folder for logs, rows and summary ($OUT, else outputs/gpu)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    in_checkout = (ROOT / "pyproject.toml").is_file()
    default = (ROOT / "outputs" if in_checkout else Path.cwd() / "fastadapter-results") / "gpu"
    out = args.out or Path(os.environ.get("OUT") or default)
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    for part in [args.part] if args.part else PARTS:
        status = max(status, run_part(part, args, out.resolve()))
        if status == 2:
            break
    return status


def run_part(number: int, args: argparse.Namespace, out: Path) -> int:
    start = time.monotonic()
    run = Run(number, start + args.seconds, out, args.dry_run, args.only.split(",") if args.only else [])
    answer = probe(PARTS[number].modules, run)
    if answer["error"]:
        print(f"benchmarks.gpu: {answer['error']}; nothing was run", file=sys.stderr)
        return 2
    run.notes += answer["absent"]
    run.bench = {**answer["bench"], "dry": args.dry_run, "compile": args.compile, "rounds": args.rounds}
    every = {name: module for module, found in answer["cases"].items() for name in found}
    unknown = set(run.names) - set(every) - {"tests", "search"}
    if unknown:
        print(f"benchmarks.gpu: no case {', '.join(sorted(unknown))} in part {number}", file=sys.stderr)
        run.names = [name for name in run.names if name not in unknown]
        if not run.names:
            return 1
    run.modules = {name: every[name] for name in run.names or every if name in every}
    say(
        start, f"part {number}: {run.bench['environment']['device']}, {len(run.modules)} cases, {CORES} cores"
    )
    compile_and_test(run, args, start)
    time_alone(run, args, start)
    text = summary(run)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return 1 if run.problems or (run.tests and run.tests.red) else 0


def say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:.0f} s] {text}", file=sys.stderr, flush=True)


def probe(modules: tuple[str, ...], run: Run) -> dict[str, Any]:
    """Ask a process of its own: this one never touches the card."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        process = Process("probe", modules, Path(folder, "log"))
        process.begin({"dry": run.dry, "answer": str(answer)}, 120)
        process.wait()
        if not answer.exists():
            return {"error": f"the first look at the card failed:\n{process.text()[-3000:]}"}
        return json.loads(answer.read_text(encoding="utf-8"))


def compile_and_test(run: Run, args: argparse.Namespace, start: float) -> None:
    """Correctness (part 1) and one untimed run of every case, at the same time, on all cores."""
    until = start + min(args.test_seconds, args.seconds - 10)
    wanted = [name for name in ("tests", "search") if run.part == 1 and (not run.names or name in run.names)]
    commit = run.bench["environment"]["commit"]
    with tempfile.TemporaryDirectory() as folder:
        tests = gpu_tests.start(
            wanted, Path(folder), until - time.monotonic(), max(1, CORES * 5 // 8), run.dry
        )
        free = max(1, CORES - sum(test.workers for test in tests))
        job = {"bench": {**run.bench, "warm": True}, "rows": []}
        limit = PARTS[run.part].warm_seconds
        cases = [*run.modules.items()]
        ended = side_by_side(cases, job, free, limit, until - time.monotonic(), Path(folder))
        say(start, f"{len(ended)} of {len(cases)} cases ran once")
        for process in ended:
            append(run.out / "warm.log", process)
            if process.hung:
                run.hung.add(process.name)
                run.problems.append(f"{process.name} hangs while it compiles: {first_stack(process.text())}")
            elif process.late:
                run.notes.append(f"{process.name} did not compile in the time that was left")
            elif process.status:
                run.problems += process.complaints()
        if wanted:
            run.tests = gpu_tests.finish(tests, run.out, commit, until)
            say(start, run.tests.words())
        else:
            run.tests = gpu_tests.stored(run.out, commit)
    if late := set(run.modules) - {process.name for process in ended}:
        run.notes.append(f"not compiled beforehand, for want of time: {', '.join(sorted(late))}")


def time_alone(run: Run, args: argparse.Namespace, start: float) -> None:
    """One case after another; the next process imports what it needs while one is timed."""
    limit = args.case_seconds or (DRY_SECONDS if run.dry else PARTS[run.part].case_seconds)
    job = {
        "bench": {**run.bench, "red": run.tests.red_by_op() if run.tests else {}},
        "rows": [str(path) for path in destinations(run)],
    }
    waiting = [name for name in run.modules if name not in run.hung]
    with tempfile.TemporaryDirectory() as folder:

        def following() -> Process | None:
            return Process(name := waiting[0], (run.modules[name],), Path(folder, name)) if waiting else None

        process = following()
        while process is not None and run.left > LAST_SECONDS:
            waiting.pop(0)
            process.begin(job, limit, run.deadline)
            coming = following()
            process.wait()
            append(run.out / "cases.log", process)
            say(start, f"{process.name}: {process.outcome()}")
            if process.hung:
                run.hung.add(process.name)
                stack = first_stack(process.text())
                run.problems.append(f"{process.name} hangs (killed after {limit:.0f} s): {stack}")
            elif process.late:
                run.notes.append(f"{process.name} did not end in the time that was left")
            elif process.status:
                run.problems += [line for line in process.complaints() if line not in run.problems]
            process = coming
        if process is not None:
            kill(process)
    if waiting:
        run.notes.append(f"no time left for {', '.join(waiting)}")


def append(log: Path, process: Process) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {process.name}: {process.outcome()}\n{process.text()}\n")


def destinations(run: Run) -> list[Path]:
    """Where rows go: the folder, and in a checkout the stored results; no row of a walk-through is stored."""
    found = [run.out / "gpu.jsonl"]
    results = HERE / "results/gpu.jsonl"
    if not run.dry and (ROOT / "pyproject.toml").is_file():
        found.append(results)
    return found


if __name__ == "__main__":
    sys.exit(main())
