"""A pass that begins behind a trunk must give what the whole pass gives: loss and gradients of a few real rows."""

from typing import Any

import torch
from torch import Tensor

from fastadapter.training.trunk.start import NoTrunk

# Of the gradient's norm, and of the loss: round-off of batches of other shapes, by the dtype of the hidden states.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROWS = 4


def probe_rows(lengths: list[int]) -> list[int]:
    """A few training rows of different lengths: padding is then seen to change nothing."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return sorted({order[(len(order) - 1) * part // (_ROWS - 1)] for part in range(_ROWS)})


def loss_and_gradient(run: Any, rows: list[int]) -> tuple[float, Tensor]:
    """Of some training rows, as a step of the run would compute them; gradients of the run are left alone."""
    with run.accelerator.autocast():
        loss = run.task.loss(run.model, rows, run.accelerator.device)
    parameters = [parameter for _, parameter in run.parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    flat = [(torch.zeros_like(p) if g is None else g).detach().flatten().double().cpu() for g, p in pairs]
    return float(loss.detach()), torch.cat(flat)


def require_same(whole: tuple[float, Tensor], begun: tuple[float, Tensor], dtype: torch.dtype) -> None:
    """Raises: NoTrunk: loss or gradient differ by more than round-off."""
    tolerance = TOLERANCE[dtype]
    loss = abs(begun[0] - whole[0]) / max(abs(whole[0]), 1e-30)
    gradient = float((begun[1] - whole[1]).norm() / whole[1].norm().clamp(min=1e-30))
    if not (loss <= tolerance and gradient <= tolerance):
        raise NoTrunk(
            f"a pass that begins behind it differs from a whole one by {loss:.1e} in the loss and {gradient:.1e} in "
            f"the gradient (at most {tolerance:.0e}): the blocks above it need more than its hidden states"
        )
