"""Two versions of the library beside each other: ``python -m benchmarks.versions BASE [--only NAME ...]``.

BASE is any commit. It gets a git worktree and an environment of its own in a temporary folder, with its extension
built against the same torch; both versions then run the benchmarks of this tree, each in a process of its own, one
round in turn, in random order, and a ratio is that of two rounds side by side. Of an entry that BASE cannot run, the
reason is said. Nothing is stored: what counts is the table at the end.

    make bench BASE=HEAD~1 ARGS='--only gated_prefix training-step'
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import quiet, runner
from .rows import ROOT
from .table import number

# What is timed in rounds within a process; recipes and memory have processes of their own.
ENTRIES = ("gated_prefix", "gated_prefix_attention", "prefix_attention", "bottleneck", "training-step", "method-step",
           "prefix-length", "batch", "decode", "mixed-decode", "generate")  # fmt: skip


class Side:
    """One version at work: ``benchmarks/serve.py`` in its environment."""

    def __init__(self, name: str, python: Path | str, folder: Path, entry: str, options: Sequence[str]):
        self.name = name
        self.messages = tempfile.TemporaryFile("w+")
        clean = {key: value for key, value in os.environ.items() if key not in runner.ALLOCATOR}
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.serve", entry, *options],
            cwd=folder,
            env={**clean, **runner.ALLOCATOR, "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        """Its next line; of a process that ended without one, what it said last as ``error``."""
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.messages.seek(0)
        lines = self.messages.read().strip().splitlines()
        return {"error": lines[-1] if lines else f"status {self.process.returncode}"}

    def ask(self) -> dict[str, Any]:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended; the reason is in its messages
        return self.hear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.messages.close()


def environment_of(commit: str, folder: Path) -> Path:
    """The interpreter of a new environment in which the library is that of ``commit``.

    Raises: subprocess.CalledProcessError: git, venv or pip failed; SystemExit: there is no such commit.
    """
    known = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if known.returncode:
        raise SystemExit(f"BASE must be a commit of this repository, got {commit!r}")
    tree = folder / "tree"
    subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(tree), known.stdout.strip()],
        check=True,
    )
    print(f"building {commit} ({known.stdout[:9]})", file=sys.stderr, flush=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*/site-packages"))
    # the packages of this environment, save for this library, which comes from the tree alone
    (site / "shared.pth").write_text("".join(f"{each}\n" for each in package_folders()))
    (site / "tree.pth").write_text(f"{tree}\n")
    build = [str(python), "setup.py", "-q", "build_ext", "--inplace"]
    environ = {
        **os.environ,
        "FASTADAPTER_BUILD": "1",
        "FASTADAPTER_TORCH": str(package_folder("torch") / "torch"),
    }
    subprocess.run(build, cwd=tree, env=environ, check=True, stdout=sys.stderr)
    return python


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return Path(found.origin).parents[1]


def package_folders() -> list[str]:
    """Where this environment has its packages: what both versions share."""
    return list(
        dict.fromkeys(str(package_folder(name)) for name in ("torch", "transformers", "peft", "setuptools"))
    )


@contextlib.contextmanager
def base_version(commit: str) -> Iterator[tuple[Path, Path]]:
    """Interpreter of BASE, and a folder with this tree's benchmarks; both are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastadapter-base-") as name:
        folder = Path(name)
        try:
            python = environment_of(commit, folder)
            (folder / "run").mkdir()
            shutil.copytree(
                Path(__file__).parent,
                folder / "run" / "benchmarks",
                ignore=shutil.ignore_patterns("__pycache__", "results"),
            )
            yield python, folder / "run"
        finally:
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "remove", "--force", str(folder / "tree")], capture_output=True)
            subprocess.run([*git, "prune"], capture_output=True)


def compare(sides: Sequence[Side], rounds: int) -> Iterator[dict[str, Any]]:
    """Every case of an entry with the seconds of each side's variants, round by round; or why there is none."""
    shuffle = random.Random(0).shuffle
    versions = {side.name: side.hear() for side in sides}
    failed = {name: said["error"] for name, said in versions.items() if "error" in said}
    failed |= {
        name: f"its extension does not work: {said['extension']}"
        for name, said in versions.items()
        if said.get("extension", "works") != "works"
    }
    if not failed and len({said["library"] for said in versions.values()}) < len(versions):
        failed = {name: f"both sides run {said['library']}" for name, said in versions.items()}
    if failed:
        yield {"failed": failed}
        return
    while True:
        heads = {side.name: side.hear() for side in sides}
        failed = {name: head["error"] for name, head in heads.items() if "error" in head}
        if failed or any("end" in head for head in heads.values()):
            if failed:
                yield {"failed": failed}
            return  # the same cases on both sides, to the end of both
        case = next(iter(heads.values()))
        if any((head["entry"], head["shape"]) != (case["entry"], case["shape"]) for head in heads.values()):
            yield {"failed": {name: f"another case: {head['shape']}" for name, head in heads.items()}}
            return
        samples: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        order = list(sides)
        for _ in range(rounds):
            shuffle(order)
            for side in order:
                answer = side.ask()
                if "error" in answer:
                    yield {"failed": {side.name: answer["error"]}}
                    return
                samples[side.name].append(answer["seconds"])
        yield {**case, "samples": samples}


def lines_of(case: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each variant of ours: medians of both, and the ratio of rounds side by side."""
    base, here = case["samples"]["base"], case["samples"]["here"]
    for variant in here[0]:
        if variant not in base[0]:
            continue
        ratios = runner.spread([mine[variant] / its[variant] for mine, its in zip(here, base, strict=True)])
        medians = [1e3 * runner.spread([each[variant] for each in side])[0] for side in (base, here)]
        what = f"{case['entry']}, {case['shape']}"
        spread = f"{ratios[0]:.3f} ({ratios[1]:.3f} to {ratios[2]:.3f})"
        yield [what, variant, *(f"{number(each)} ms" for each in medians), spread]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--quick", action="store_true", help="small models, few rounds")
    parser.add_argument("--rounds", type=int, help="of every case (15, or 2 with --quick)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    rounds = args.rounds if args.rounds is not None else (2 if args.quick else 15)
    if rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options = ["--threads", str(args.threads), "--rounds", str(rounds), *(["--quick"] if args.quick else [])]
    # so that a run that is ended from outside takes its worktree along
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    watch, lines = quiet.Watch(), [["what", "variant", args.base, "this tree", "this tree / " + args.base]]
    with base_version(args.base) as (python, folder):
        for entry in args.only:
            with contextlib.ExitStack() as stack:
                sides = []
                for name, program, where in (("base", python, folder), ("here", sys.executable, ROOT)):
                    sides.append(Side(name, program, where, entry, options))
                    stack.callback(sides[-1].close)
                for case in compare(sides, rounds):
                    if "failed" in case:
                        for name, why in case["failed"].items():
                            print(
                                f"{entry}: {args.base if name == 'base' else 'this tree'}: {why}",
                                file=sys.stderr,
                            )
                    else:
                        found = list(lines_of(case))
                        lines += found
                        print(*(" | ".join(line) for line in found), sep="\n", file=sys.stderr, flush=True)
    print("\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * 5, *lines[1:]]))
    marks = watch.marks()
    if marks.get(quiet.MARK):
        print(
            f"The machine was busy: {quiet.why(marks)}. These ratios are not to be quoted.", file=sys.stderr
        )
    return 0 if len(lines) > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
