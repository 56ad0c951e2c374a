"""Run methods and seeds, each in a process of its own, and keep what is finished."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastadapter.checkpoints.fingerprint import differences
from fastadapter.compare.methods import Method
from fastadapter.compare.processes import Run, run_all
from fastadapter.compare.worker import RESULT
from fastadapter.training import TrunkCache, UserError, write_json
from fastadapter.training.data import Example
from fastadapter.training.report import require_writable

SETTINGS = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """A folder with its settings: what every run in it shares.

    Attributes:
        folder: gets ``data/``, ``runs/METHOD/seed-N/`` and the report.
        settings: model, data, counts and training options; another comparison may not be put into the folder.
        model: folder or hub name to load.
    """

    folder: Path
    settings: dict[str, Any]
    model: str


def prepare(
    folder: Path,
    model: str,
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    names: dict[str, str],
    training: dict[str, Any],
    gguf_file: str | None = None,
    dtype: str = "fp32",
    template: str = "{text}",
) -> Comparison:
    """Write the records that every run reads, once, and the settings; or find that they are there.

    Args:
        names: ``model`` and ``data`` as a reader of the table shall see them.
        training: fields of ``TrainingConfig`` that every run shares.
    Raises: UserError: the folder holds a comparison with other settings (each difference is named), or other files.
    """
    texts = {"train": _records(train), "test": _records(test)}
    settings = {
        **names,
        "gguf_file": gguf_file,
        "dtype": dtype,
        "template": template,
        "training": training,
        "rows": {"train": len(train), "test": len(test)},
        "data_sha256": {part: hashlib.sha256(text.encode()).hexdigest() for part, text in texts.items()},
        "test_labels": dict(sorted(Counter(str(example.label) for example in test).items())),
    }
    path = folder / SETTINGS
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        # the digests stand for the labels, which older folders do not count
        compared = [key for key in settings if key != "test_labels"]
        different = _differences(found, settings, compared)
        if different:
            raise UserError(f"{folder} holds another comparison: {different}; choose another output folder")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files, but no comparison; choose another output folder")
    require_writable(folder / "data")
    for part, text in texts.items():
        (folder / "data" / f"{part}.jsonl").write_text(text, encoding="utf-8")
    write_json(path, {"settings": settings})
    return Comparison(folder, settings, model)


def compare(
    comparison: Comparison,
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    command: Sequence[str],
    learning_rates: dict[str, float] | None = None,
    head_learning_rates: dict[str, float] | None = None,
    jobs: int = 1,
    threads: int | None = None,
    device: str = "auto",
    save_steps: int = 200,
    trunk_cache: TrunkCache | bool | None = None,
    progress: bool = True,
    after_run: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Every method with every seed; those that are finished are read back. What no seed changes is done once.

    Args:
        command: starts a process that does the job in the folder given as last word.
        learning_rates, head_learning_rates: of methods, in place of the table's.
        jobs: runs at a time. With the same ``threads`` their results do not depend on it, their seconds do.
        threads: of every process; ``None``: PyTorch's choice, of which each of several ``jobs`` gets its share.
        trunk_cache: of every run, as of :func:`fastadapter.training.finetune`; not required, since not every method
            can have one.
        after_run: called with the results so far whenever a run ends, and with all of them.
    Returns: the results, method by method, seed by seed.
    Raises:
        UserError: a run failed (its own message is on stderr), or was made with another learning rate or options; runs
            beside it are stopped and saved.
        TrainingInterrupted: a signal came; the same call goes on from there.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise UserError(f"jobs must be an int, at least 1, got {jobs!r}")
    if threads is None and jobs > 1:
        threads = max(1, torch.get_num_threads() // jobs)
    runs: list[Run] = []
    for method in methods:
        for seed in seeds if method.learning_rates else seeds[:1]:
            folder = comparison.folder / "runs" / method.name / f"seed-{seed}"
            job = _job(comparison, method, seed, (learning_rates or {}).get(method.name), threads, device)
            head_rate = (head_learning_rates or {}).get(method.name)
            # of runs without a rate of their own for the head nothing is kept, as before there was one
            job |= {"head_learning_rate": head_rate} if head_rate else {}
            job |= (
                {"default_head_learning_rates": dict(method.head_learning_rates)}
                if method.head_learning_rates
                else {}
            )
            runs.append(Run(method.name, seed, folder, job, _prepare_run(folder, job)))
    pending = [run for run in runs if not run.finished]
    jobs = min(jobs, max(1, len(pending)))

    def results() -> list[dict[str, Any]]:
        return [run.result() for run in runs if run.finished]

    def ended(run: Run) -> None:
        run.finished = True
        if after_run is not None:
            after_run(results())

    for run in pending:
        # Bars of several runs would write over each other.
        free: dict[str, Any] = {"save_steps": save_steps, "progress": progress and jobs == 1, "jobs": jobs}
        free["trunk_cache"] = _trunk_cache(trunk_cache)
        write_json(run.folder / "job.json", {**run.job, **free})
    run_all(pending, command, jobs, ended, progress)
    if after_run is not None and not pending:
        after_run(results())
    return results()


def _job(
    comparison: Comparison, method: Method, seed: int, rate: float | None, threads: int | None, device: str
) -> dict[str, Any]:
    settings = comparison.settings
    return {
        "method": method.name,
        "options": dict(method.options),
        "seed": seed,
        "learning_rate": rate,
        "default_learning_rates": dict(method.learning_rates),
        "model": comparison.model,
        "gguf_file": settings["gguf_file"],
        "dtype": settings["dtype"],
        "template": settings["template"],
        "training": settings["training"],
        "train": str((comparison.folder / "data" / "train.jsonl").resolve()),
        "test": str((comparison.folder / "data" / "test.jsonl").resolve()),
        "threads": threads,
        "device": device,
    }


def _trunk_cache(asked: TrunkCache | bool | None) -> dict[str, Any] | bool | None:
    """What a job says of it, as JSON."""
    if not isinstance(asked, TrunkCache):
        return asked
    folder = None if asked.folder is None else str(Path(asked.folder).resolve())
    return {**asdict(asked), "folder": folder}


# Where the files are and who computes does not decide the numbers' meaning; a moved folder is still the same one.
_FREE = ("model", "train", "test", "threads", "device", "save_steps", "progress", "jobs", "trunk_cache")


def _prepare_run(folder: Path, job: dict[str, Any]) -> bool:
    """Whether the run is finished; raises UserError if the folder holds a run of another job."""
    file = folder / "job.json"
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        different = [key for key in {**old, **job} if key not in _FREE and old.get(key) != job.get(key)]
        if (folder / RESULT).exists():
            # of a finished run it is known which kind of model it had: the other kind's rate is nothing to it
            kind = json.loads((folder / RESULT).read_text(encoding="utf-8"))["model_kind"]
            rates = "default_learning_rates"
            if rates in different and old[rates].get(kind) == job[rates].get(kind):
                different.remove(rates)
        if different:
            what = _differences(old, job, different)
            raise UserError(f"{folder} holds a run with other settings: {what}; remove it to run it again")
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / RESULT).exists()


def _differences(found: dict[str, Any], wanted: dict[str, Any], keys: Sequence[str]) -> str:
    """Each setting among ``keys`` that differs, also within tables, with both values; empty: none does."""
    old, new = ({key: settings[key] for key in keys if key in settings} for settings in (found, wanted))
    return "; ".join(differences(old, json.loads(json.dumps(new))))


def _records(examples: Sequence[Example]) -> str:
    rows = ({"text": example.prompt, "label": example.label} for example in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
