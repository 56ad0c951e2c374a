"""The tests marked slow, a process per file; ``--output`` keeps its entries of other files and words.

python scripts/slow_tests.py tests/test_build.py tests/search --output benchmarks/results/slow_tests.json
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(file, words):
    """Counts of one file."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", f"--junitxml={report}", file]
        status = subprocess.run([*command, *(["-k", words] if words else [])], cwd=ROOT).returncode
        if not report.exists():
            raise SystemExit(f"pytest {file} ended with status {status} and wrote no report")
        suite = ElementTree.parse(report).getroot()[0].attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    return {
        "file": file,
        "words": words,
        "passed": counts["tests"] - bad - counts["skipped"],
        "failed": bad,
        "skipped": counts["skipped"],
        "seconds": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
        ).strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("-k", default="", metavar="WORDS", help="as pytest's")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    failed = 0
    for file in options.files:
        row = run(file, options.k)
        failed += row["failed"]
        rows = [old for old in rows if (old["file"], old["words"]) != (file, options.k)] + [row]
        versions = {"python": platform.python_version()} | {n: version(n) for n in ("torch", "triton")}
        summary = {"versions": versions, "rows": sorted(rows, key=lambda row: (row["file"], row["words"]))}
        options.output.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
