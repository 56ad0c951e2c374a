"""Whether a trunk is worth its cache: decided by sizes alone, so that the same run is always decided the same way."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastadapter.training.trunk.start import NotWorth

# Arithmetic that costs about as long as reading the weights for their digest and proving the trunk.
_LEAST = {"cpu": 1e12}
_LEAST_ELSEWHERE = 5e14
_LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Work:
    """Tokens that passes have: of training, which go back again, and of evaluations, which do not."""

    trained: float
    evaluated: float

    @classmethod
    def of(cls, run: Any, runs: int) -> "Work":
        """Of ``runs`` runs like this one."""
        config, held = run.config, run.task.held_out
        epochs = run.total_steps / run.steps_per_epoch
        evaluations = 0
        if held is not None:
            every = {"epoch": run.steps_per_epoch, "steps": config.eval_steps}.get(config.eval_strategy)
            evaluations = config.eval_on_start + (1 if every is None else math.ceil(run.total_steps / every))
        once = 0 if held is None else sum(map(len, held.sequences()))
        return cls(runs * epochs * sum(run.task.lengths), runs * evaluations * once)


def require_large(blocks: list[nn.Module], work: Work, device: str) -> None:
    """Raises: NotWorth: even a trunk of all blocks, found in its folder, would save less than looking for it costs."""
    if 2 * sum(map(_size, blocks)) * (work.trained + work.evaluated) < _LEAST.get(device, _LEAST_ELSEWHERE):
        raise NotWorth("the run is too small for it to pay")


@dataclass(frozen=True)
class Saving:
    """Multiplications by weights that a run need not do, and their share of all that it does."""

    count: float
    share: float


def saving(blocks: list[nn.Module], size: int, work: Work, missing: int) -> Saving:
    """What a trunk of ``size`` blocks saves.

    Args:
        missing: tokens whose states are still to be computed.
    """
    sizes = [_size(block) for block in blocks]
    below, above = sum(sizes[:size]), sum(sizes[size:])
    saved = (work.trained + work.evaluated - missing) * below
    # A block above goes forward and hands the gradient back; those below only go forward.
    total = work.trained * (below + 2 * above) + work.evaluated * (below + above)
    return Saving(saved, saved / max(total, 1))


def require_saving(saved: Saving, device: str) -> None:
    """Raises: NotWorth: it does not pay."""
    if 2 * saved.count < _LEAST.get(device, _LEAST_ELSEWHERE) or saved.share < _LEAST_SHARE:
        raise NotWorth(f"it does not pay: {max(saved.share, 0):.0%} of the run's arithmetic would be saved")


def _size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())
