"""The folder of one run: nobody else's while the run lasts, and it tells what the run is and what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastadapter.checkpoints.about import FIELDS, annotate
from fastadapter.checkpoints.fingerprint import portable_name
from fastadapter.training import report, state
from fastadapter.training.card import write_card
from fastadapter.training.config import UserError
from fastadapter.training.lock import FolderLock
from fastadapter.training.run_record import DETAILS, RUN_FILE, describe_run, write_run
from fastadapter.training.targets import AdapterTarget, ParameterTarget


class RunFolder:
    """Every process has one; the first locks and writes.

    Args:
        details: what the caller knows of the run (:data:`DETAILS`).
    Raises: UserError: there is no such detail.
    """

    def __init__(self, path: str | Path, accelerator: Any, details: Mapping[str, Any] | None = None):
        self.path, self.accelerator, self.details = Path(path), accelerator, dict(details or {})
        self.lock = FolderLock(self.path)
        self.record: dict[str, Any] = {}
        if unknown := sorted(self.details.keys() - set(DETAILS)):
            raise UserError(f"details: expected some of {', '.join(DETAILS)}, got {unknown[0]!r}")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def claim(self, resume: bool) -> None:
        """Make the folder and lock it. Every process must call this; where one raises, all do.

        Raises: UserError: it holds a run that is not to be resumed, or cannot be; another run is at work there; or
            nothing can be written.
        """
        error: UserError | None = None
        try:
            require_fresh_or_resume(self.path, resume)
            if self.accelerator.is_main_process:
                report.require_writable(self.path)
                self.lock.acquire()
                require_fresh_or_resume(self.path, resume)  # a run may have come and gone in between
        except UserError as raised:
            error = raised
        failed = torch.tensor([float(error is not None)], device=self.accelerator.device)
        if float(self.accelerator.gather(failed).sum()):
            raise error or UserError(f"output_dir {self.path}: another process of this run cannot use it")

    def begin(self, target: Any, identity: Mapping[str, Any]) -> None:
        """Find out what ``run.json`` will say, and what the files of the adapter will."""
        self.record = describe_run(target.model, identity, self.details)
        if isinstance(target, AdapterTarget):
            facts = {key: each for key, each in self.record.items() if key in FIELDS}
            name = self.record["base"]["name"]
            annotate(target.model, target.name, {**facts, "base_name": name and portable_name(name)})

    def update(
        self, epochs: list[dict[str, Any]], outcome: Mapping[str, Any], finished: bool = False
    ) -> None:
        """Write how far the run is; at its end the model card too."""
        self.record |= {"epochs": epochs, "eval": dict(outcome), "finished": finished}
        if self.accelerator.is_main_process:
            write_run(self.path, self.record)
            if finished and self.record["method"] != "parameters":
                write_card(self.path, self.record)


def require_fresh_or_resume(output_dir: str | Path, resume: bool) -> None:
    """Raise UserError if ``output_dir`` holds a run that is not to be resumed, or cannot be: its state is gone.

    Where nothing of a run is, ``resume`` starts one, so that a command may be repeated until it is through. The first
    state is written before ``run.json``: where that is without a state, the state was lost.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is not a folder")
    adapter, parameters = Path(AdapterTarget.file), Path(ParameterTarget.file)
    results = {
        adapter: "an adapter",
        parameters: "trained parameters",
        "best" / adapter: "an adapter",
        "best" / parameters: "trained parameters",
        Path(RUN_FILE): f"{RUN_FILE} of a run",
    }
    holds = [file for file in (state.STATE_FILE, *results) if (output_dir / file).exists()]
    if holds and not resume:
        raise UserError(f"{output_dir} holds a run ({holds[0]}); resume it, or choose another output_dir")
    if holds and holds[0] != state.STATE_FILE:
        raise UserError(
            f"{output_dir} holds {results[holds[0]]} but no {state.STATE_FILE} to resume from: its state is gone; "
            "choose another output_dir to start anew"
        )
