"""Stored results: one JSON object per line under ``benchmarks/results``, each complete in itself.

``ratio`` is cost relative to the floor of the same run, measured side by side: below 1 is cheaper, also where
``median`` is a rate such as tokens per second.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import quiet

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def destination(name: str) -> Path:
    """Where new rows go: with the stored ones in a checkout, to the current folder where only a package is installed.

    >>> destination("cpu.jsonl").name
    'cpu.jsonl'
    """
    in_checkout = (ROOT / "pyproject.toml").is_file()
    return (RESULTS if in_checkout else Path.cwd() / "fastadapter-results") / name


@dataclass(frozen=True)
class Row:
    """What was measured, on what, with what."""

    entry: str  # op or recipe
    shape: str
    variant: str
    backend: str
    dtype: str
    unit: str
    median: float
    p20: float
    p80: float
    samples: int
    floor: str  # name of the variant that the ratios refer to
    ratio: float
    ratio_p20: float
    ratio_p80: float
    extra: dict[str, float]  # gb_per_s, percent_of_copy, total_mib; quiet.py's marks; parts of a step
    device: str
    driver: str  # empty on a CPU
    clocks: str  # read, never set; empty on a CPU
    threads: int
    torch: str
    triton: str
    transformers: str
    peft: str
    fastadapter: str
    commit: str
    date: str


def environment(device: str = "cpu") -> dict[str, Any]:
    """The fields of a row that are the same for a whole run."""
    packages = ("torch", "triton", "transformers", "peft", "fastadapter")
    card, driver, clocks = describe_gpu() if device == "cuda" else (cpu_model(), "", "")
    return {
        "device": card,
        "driver": driver,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in packages},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_gpu() -> tuple[str, str, str]:
    """Card, driver version and current clocks of the first GPU."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    name = torch.cuda.get_device_name(0)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        driver, sm, memory, maximum = answer.split(", ")
    except (
        OSError,
        subprocess.CalledProcessError,
        ValueError,
    ):  # a container may lack the tool, MIG the clocks
        return name, "unknown", "unknown"
    return name, driver, f"sm {sm} of {maximum}, memory {memory}"


def commit() -> str:
    """Abbreviated commit, marked where tracked files differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    # the results themselves change with every run
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    status = subprocess.run([*git, *changed], capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("-modified" if status.stdout else "")


def append(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(*paths: Path) -> list[Row]:
    """Rows of the files, by default all under ``benchmarks/results``.

    Raises: ValueError: a line that is no row, with file and line number.
    """
    names = {field.name for field in fields(Row)}
    rows = []
    for path in paths or sorted(RESULTS.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(values, dict) or set(values) != names:
                odd = sorted(names ^ set(values)) if isinstance(values, dict) else type(values).__name__
                raise ValueError(f"{path}:{number}: not a row: fields that are missing or unknown: {odd}")
            rows.append(Row(**values))
    return rows


def published(rows: list[Row]) -> list[Row]:
    """Without the runs of a busy machine: an entry of a run is shown whole or not at all."""
    busy = {_run(row) for row in rows if row.extra.get(quiet.MARK)}
    return [row for row in rows if _run(row) not in busy]


def _run(row: Row) -> tuple[str, str, int, str]:
    return row.entry, row.device, row.threads, row.date


def latest(rows: list[Row]) -> list[Row]:
    """Of every entry, the rows of its last run on every device."""
    last: dict[tuple, str] = {}
    for row in rows:
        key = (row.entry, row.device, row.threads)
        last[key] = max(last.get(key, ""), row.date)
    return [row for row in rows if row.date == last[row.entry, row.device, row.threads]]
