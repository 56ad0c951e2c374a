"""Proof that the tests would notice: plant one mistake at a time and see the tests fail.

The tree is copied to a temporary folder with an extension of its own. Each mutation of scripts/mutations.py replaces
one text in one file, rebuilds what that touches, and runs the tests that should notice with ``-x``. A test that
fails, a crash or a time-out kills the mutation; the exit status is 1 if any survives. A text that is not found
exactly once is an error, so the list cannot rot.

    python scripts/mutate.py                 # all, about half an hour
    python scripts/mutate.py -k cpp --list   # which are there
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import pytest
import torch
import triton  # noqa: F401  (imported once, for all forks)

sys.path.insert(0, str(Path(__file__).parent))
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fastadapter", "kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml")
AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def run(command, cwd, **options):
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, **options)


class Tree:
    """The copy: files, the extension, and the commands that built it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        files = run(["git", "ls-files", "-co", "--exclude-standard", *COPIED], ROOT, check=True).stdout
        for name in files.splitlines():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
        for extension in (ROOT / "fastadapter").glob("_C.*"):  # enough for what is not C++
            shutil.copy2(extension, self.folder / "fastadapter")
        (self.folder / "fastadapter/kernels").symlink_to("../kernels")  # where an installation puts them
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutation of the same length within a second would meet a stale one
            "FASTADAPTER_BUILD": "1",
        }
        self.compiles, self.link, self.saved = [], [], {}

    def build(self):
        """The extension once, for one instruction set; the commands are kept: flags stay in setup.py.

        Less optimised, but not so little that products and sums round in another way.
        """
        setup = self.folder / "setup.py"
        text = setup.read_text(encoding="utf-8")
        native = re.search(r'ISAS\["isa_avx2"\] = (\[.*?\])', text)[1] if AVX2 else "[]"
        for old, new in (
            (re.search("^X86 = .*$", text, re.MULTILINE)[0], "X86 = False"),
            ('ISAS = {"isa_default": []}', f'ISAS = {{"isa_default": {native}}}'),
            ('"-O3"', '"-O2"'),
        ):
            text = text.replace(old, new)
        setup.write_text(text, encoding="utf-8")
        command = [sys.executable, "setup.py", "--verbose", "build_ext", "--inplace"]
        done = run(command, self.folder, env=self.environment)
        if done.returncode:
            raise SystemExit(f"the extension does not build:\n{done.stdout}{done.stderr}")
        commands = [
            shlex.split(line) for line in done.stdout.splitlines() if " csrc/" in line or "-shared" in line
        ]
        self.compiles = [words for words in commands if "-c" in words]
        self.link = next(words for words in commands if "-shared" in words)
        self.link[self.link.index("-o") + 1] = "fastadapter/_C.abi3.so"  # setup.py copies it there

    def rebuild(self, changed):
        """What ``changed`` touches."""
        if not changed.startswith("csrc/"):
            return
        for words in self.compiles:
            if changed in self.inputs(words[words.index("-c") + 1]):
                self.must(words)
        self.must(self.link)

    def outcome_of(self, mutation, timeout):
        path = self.folder / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(plant(text, mutation), encoding="utf-8")
        try:
            self.rebuild(mutation.file)
            return self.test(mutation.tests, timeout)
        finally:
            path.write_text(text, encoding="utf-8")
            self.restore()

    def restore(self):
        """The extension as it was before :meth:`rebuild`."""
        for path, content in self.saved.items():
            path.write_bytes(content)
        self.saved.clear()

    def inputs(self, source):
        """``source`` and the headers of ours it includes, directly or not."""
        found, todo = set(), [source]
        while todo:
            name = todo.pop()
            if name in found or not (self.folder / name).is_file():
                continue
            found.add(name)
            text = (self.folder / name).read_text(encoding="utf-8")
            todo += [f"csrc/{header}" for header in re.findall(r'#include "([\w.]+)"', text)]
        return found

    def must(self, words):
        output = self.folder / words[words.index("-o") + 1]
        self.saved[output] = output.read_bytes()
        output.unlink()  # a new file: one that a process has loaded must not change under it
        done = run(words, self.folder)
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)}\n{done.stderr}")

    def test(self, selection, timeout):
        """Outcome of a pytest selection: passed, or what noticed.

        In a fork, since importing torch and triton anew takes longer than most selections.
        """
        log = self.folder / "pytest.log"
        child = os.fork()
        if child == 0:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(self.environment)
            os.chdir(self.folder)
            sys.path.insert(0, str(self.folder))
            sys.dont_write_bytecode = True
            options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-rf"]
            os._exit(pytest.main([*options, *shlex.split(selection)]))
        end = time.monotonic() + timeout
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "time-out"
            time.sleep(0.05)
        output = log.read_text(encoding="utf-8")
        status = os.waitstatus_to_exitcode(done[1])
        if status == 0:
            return "passed"
        if status < 0:
            return f"crash (signal {-status})"
        if status == 1 and (found := re.search(r"^FAILED (?:\S*/)?(\S+)", output, re.MULTILINE)):
            return found[1]
        raise SystemExit(f"pytest {selection} did not run:\n{output}")


def plant(text, mutation: Mutation):
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.file} holds this text {text.count(mutation.old)} times, once expected; "
            f"bring scripts/mutations.py up to date:\n{mutation.old}"
        )
    return text.replace(mutation.old, mutation.new)


def digest(mutation):
    """Of the mutated file, and so of the text it was made from."""
    text = plant((ROOT / mutation.file).read_text(encoding="utf-8"), mutation)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions():
    found = {"python": platform.python_version()}
    for name in ("fastadapter", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="WORD", help="only mutations whose name or file has it")
    parser.add_argument("--sound", action="store_true", help="the tests have just passed: only run mutations")
    parser.add_argument("--list", action="store_true", help="check the texts, print the names, run nothing")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one selection of tests")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --output already has of the same texts"
    )
    parser.add_argument("--output", type=Path, help="store the summary as JSON")
    options = parser.parse_args()
    seen = Counter()
    order = {m.name: (m.file.startswith("csrc/"), seen.update([m.file]) or seen[m.file]) for m in MUTATIONS}
    # every file in turn, C++ last: an interrupted run has looked everywhere
    chosen = sorted((m for m in MUTATIONS if options.k in f"{m.name} {m.file}"), key=lambda m: order[m.name])
    digests = {mutation.name: digest(mutation) for mutation in chosen}
    if options.list:
        print("\n".join(f"{m.name:44} {m.file}" for m in chosen))
        return 0

    rows = kept_rows(options.output) if options.resume else {}
    broken = set()  # selections that fail without any mutation prove nothing
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(folder)
        sound = set()
        for mutation in (m for m in chosen if m.name not in rows):
            if mutation.file.startswith("csrc/") and not tree.compiles:
                tree.build()
            if not options.sound and mutation.tests not in sound | broken:
                outcome = tree.test(mutation.tests, options.timeout)
                (sound if outcome == "passed" else broken).add(mutation.tests)
                if outcome != "passed":
                    print(f"ERROR    without a mutation: pytest {mutation.tests}: {outcome}", flush=True)
            if mutation.tests in broken:
                print(f"NOT RUN  {mutation.name}", flush=True)
                continue
            start = time.monotonic()
            outcome = tree.outcome_of(mutation, options.timeout)
            survived = outcome == "passed"
            rows[mutation.name] = {
                "name": mutation.name,
                "file": mutation.file,
                "digest": digests[mutation.name],
                "noticed_by": None if survived else outcome,
            }
            verdict = "SURVIVED" if survived else "killed"
            print(f"{verdict:8} {mutation.name:60} {time.monotonic() - start:5.0f} s  {outcome}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(summary_of(rows), indent=1) + "\n", encoding="utf-8")
    killed = sum(bool(rows.get(mutation.name, {}).get("noticed_by")) for mutation in chosen)
    print(f"{killed} of {len(chosen)} mutations killed ({100 * killed / len(chosen):.0f} %)")
    return 0 if killed == len(chosen) else 1


def kept_rows(output):
    """What an earlier run killed, of files that did not change since."""
    rows = {}
    if output.exists():
        rows = {row["name"]: row for row in json.loads(output.read_text(encoding="utf-8"))["rows"]}
    return {
        mutation.name: row
        for mutation in MUTATIONS
        if (row := rows.get(mutation.name)) and row["noticed_by"] and row["digest"] == digest(mutation)
    }


def summary_of(rows):
    killed = sum(row["noticed_by"] is not None for row in rows.values())
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "listed": len(MUTATIONS),
        "run": len(rows),
        "killed": killed,
        "kill_rate": killed / len(rows),
        "rows": list(rows.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
