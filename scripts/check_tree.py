"""Rules about the tree that no linter knows: file length, machine paths, the package list. Reads only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".hpp", ".md", ".toml", ".yaml", ".yml", ".sh", ".cfg", ".in"}
# Folders that exist on one person's machine. System folders such as /usr or /proc mean the same everywhere.
MACHINE_PATH = re.compile(r"(?<![\w.~$}<-])/(?:home|Users|root|work|mnt|tmp)/[\w.-]+")


def tracked_files() -> list[Path]:
    """Tracked files and new ones that are not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = sorted({ROOT / line for line in listing.stdout.splitlines()})
    return [path for path in paths if path.is_file()]


def check_text(path: Path) -> list[str]:
    name = path.relative_to(ROOT)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    problems = []
    if len(lines) > MAX_LINES:
        problems.append(f"{name}: {len(lines)} lines, at most {MAX_LINES}: split it")
    if text and not text.endswith("\n"):
        problems.append(f"{name}: no newline at the end")
    for number, line in enumerate(lines, 1):
        if found := MACHINE_PATH.search(line):
            problems.append(f"{name}:{number}: path of one machine: {found.group()}")
    return problems


def check_packages() -> list[str]:
    """The package list of pyproject.toml names exactly the packages on disk."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(
        ast.literal_eval(re.search(r"^packages = (\[.*?\])", text, re.DOTALL | re.MULTILINE).group(1))
    )
    present = set()
    for top, prefix in (("fastadapter", ()), ("benchmarks", ("fastadapter",)), ("kernels", ("fastadapter",))):
        folders = {path.parent for path in (ROOT / top).rglob("__init__.py")}
        present |= {".".join((*prefix, *folder.relative_to(ROOT).parts)) for folder in folders}
    problems = [f"pyproject.toml: package {name} is not listed" for name in sorted(present - listed)]
    return problems + [
        f"pyproject.toml: package {name} has no __init__.py" for name in sorted(listed - present)
    ]


def main() -> int:
    problems = check_packages()
    for path in tracked_files():
        if path.suffix in SOURCE_SUFFIXES or path.name == "Makefile":
            problems += check_text(path)
    print("\n".join(problems) if problems else "tree: ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
