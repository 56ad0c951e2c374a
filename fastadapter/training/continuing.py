"""Going on with a run: longer than it was meant to be, or with the state of an earlier version."""

from collections.abc import Mapping
from typing import Any

from fastadapter.training.config import LENGTH_FIELDS, TrainingConfig, UserError
from fastadapter.training.state import Progress


def settings_of(saved: Mapping[str, Any]) -> TrainingConfig | None:
    """The settings in the identity of a saved run; ``None``: this version cannot read them, so they are others."""
    try:
        return TrainingConfig.from_dict(saved["training"])
    except (KeyError, TypeError, ValueError):
        return None


def change_length(
    old: TrainingConfig, new: TrainingConfig, progress: Progress, steps_per_epoch: int, restart_schedule: bool
) -> TrainingConfig:
    """The settings that a state must have been saved with, for a run that goes on with ``new``.

    What has been trained must be the beginning of the run that is asked for: every step so far had the learning rate
    that it would have there. That is so with a constant schedule and a warm-up in steps. Any other schedule has to be
    begun anew, knowingly: ``progress.schedule_start`` becomes the step that was reached.

    Raises: UserError: the learning rates differ, or more steps have been taken than are asked for.
    """
    before = {name: getattr(old, name) for name in LENGTH_FIELDS}
    shorter = TrainingConfig.from_dict({**new.to_dict(), **before})
    # Where more than the length is another, loading names each difference.
    if new.to_dict() == old.to_dict() or shorter.to_dict() != old.to_dict():
        return new
    totals = [each.total_steps(steps_per_epoch) for each in (old, new)]
    if totals[1] < progress.step:
        raise UserError(
            f"the run has taken {progress.step} steps, more than the {totals[1]} that are asked for"
        )
    if totals[0] != totals[1]:
        start = progress.schedule_start
        same = all(
            old.learning_rate_at(step, totals[0] - start) == new.learning_rate_at(step, totals[1] - start)
            for step in range(progress.step - start)
        )
        if restart_schedule:
            progress.schedule_start = progress.step
        elif not same:
            raise UserError(
                f"the first {progress.step} steps of a run of {totals[1]} would have had other learning rates than "
                f"those of this run of {totals[0]} (lr_scheduler_type {old.lr_scheduler_type}); restart_schedule "
                "begins the schedule anew for the steps that are left; only a constant one with warmup_steps just "
                "goes on"
            )
    return shorter


def fill_in(progress: Progress, steps_per_epoch: int) -> None:
    """Complete the record of a run of an earlier version, which evaluated after epochs alone."""
    if progress.evaluations or progress.best is None or "step" in progress.best:
        return
    progress.best["step"] = progress.best["epoch"] * steps_per_epoch
    progress.evaluations = [
        {"step": number * steps_per_epoch, "loss": epoch["eval_loss"], "accuracy": epoch["eval_accuracy"]}
        for number, epoch in enumerate(progress.epochs, 1)
    ]
