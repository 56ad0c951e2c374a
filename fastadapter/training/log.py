"""What a run leaves in files and trackers while it goes on: a line of JSON for every step and every evaluation."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapter.checkpoints import CheckpointError
from fastadapter.training.config import UserError

LOG_FILE = "log.jsonl"


class RunLog:
    """``log.jsonl`` of a run and the trackers of its accelerator.

    A line of a step holds ``step``, ``epoch``, ``loss``, ``learning_rate``, ``grad_norm`` before clipping and
    ``tokens_per_second``, and ``head_learning_rate`` where there is one; one of an evaluation ``step``, ``epoch`` and
    its metrics as ``eval_loss`` and so on. A run that is resumed goes on behind the step it was saved at: lines of
    later steps, which will be taken again, are dropped. Trackers cannot drop anything: they get such steps twice.

    Args:
        folder: of the run.
        step: the one that the run goes on from.
        evaluated: steps after which there was an evaluation.
        accelerator: its trackers are told, too.
        settings: of the run, for the trackers.
    Raises: CheckpointError: the file cannot be read or written.
    """

    def __init__(
        self, folder: Path, step: int, evaluated: set[int], accelerator: Any, settings: dict[str, Any]
    ):
        self.path = folder / LOG_FILE
        self._tell_file(lambda: self._open(step, evaluated))
        self._accelerator = accelerator
        if accelerator.log_with:
            accelerator.init_trackers("fastadapter", config=_flat(settings))

    def _open(self, step: int, evaluated: set[int]) -> None:
        if self.path.exists():
            # What comes after the step was written after it: the end of the file, which is cut off.
            with self.path.open("r+b") as file:
                kept = 0
                for line in file:
                    if not _is_past(line, step, evaluated):
                        break
                    kept += len(line)
                file.truncate(kept)
        # Line by line, so that what a run did can be read while it goes on and after it was killed.
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def step(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Add the line of a step, or of an evaluation."""
        record = {"step": step, "epoch": round(epoch, 4), **values}
        # JSON knows no infinity: a step that was skipped has no norm.
        known = {key: None if _unknown(value) else value for key, value in record.items()}
        self._tell_file(lambda: self._file.write(json.dumps(known, allow_nan=False) + "\n"))
        if self._accelerator.trackers:
            shown = {key: value for key, value in known.items() if value is not None and key != "step"}
            self._accelerator.log(shown, step=step)

    def evaluation(self, step: int, epoch: float, result: dict[str, Any]) -> None:
        self.step(step, epoch, {f"eval_{key}": value for key, value in result.items() if key != "step"})

    def close(self) -> None:
        self._file.close()
        # Not accelerator.end_training, which would take the processes apart as well.
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []

    def _tell_file(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def require_trackers(names: Sequence[str]) -> list[str]:
    """The trackers of accelerate that are asked for.

    Raises: UserError: one that accelerate does not know, or whose package is not installed: it would be left out
        without a word.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = [str(getattr(each, "value", each)) for each in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"report_to must be among {', '.join(known)}, got {name!r}")
        if name not in available:
            package = {"comet_ml": "comet-ml"}.get(name, name)
            raise UserError(f"report_to: {name} is not installed: pip install {package}")
    return list(names)


def _is_past(line: bytes, step: int, evaluated: set[int]) -> bool:
    """Whether a line is whole and of what the run has behind it."""
    try:
        record = json.loads(line)
        at = record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    if not line.endswith(b"\n") or not isinstance(at, int):
        return False
    return at in evaluated if "eval_loss" in record else at <= step


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as the trackers of accelerate want them: names to numbers and strings."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
