"""Held-out rows: predictions of all of them in one table, whatever process made them, and what they are worth."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Tick = Callable[[float], None]  # told after each forward pass which share of the work is done


class HeldOut(Protocol):
    """Rows that a model is judged by.

    Attributes:
        rows: how many there are.
        width: numbers that a prediction has.
        by_accuracy: of two evaluations the better is that of the higher accuracy; otherwise that of the lower loss.
    """

    @property
    def rows(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def by_accuracy(self) -> bool: ...

    def sequences(self) -> list[tuple[int, ...]]:
        """The tokens of all passes that predictions are made with."""

    def predict(self, model: nn.Module, rows: Sequence[int], batch_size: int, tick: Tick | None) -> Tensor:
        """Predictions of some rows, fp64 ``(len(rows), width)`` on the CPU, in eval mode."""

    def measure(self, table: Tensor) -> dict[str, Any]:
        """The metrics of the predictions of all rows, ``loss`` among them; that alone where it is not finite."""


def measure(
    held_out: HeldOut, model: nn.Module, batch_size: int, tick: Tick | None = None, accelerator: Any = None
) -> dict[str, Any]:
    """The metrics of a model; every process predicts its share of the rows and gets the metrics of all."""
    processes = accelerator.num_processes if accelerator is not None else 1
    mine = range(accelerator.process_index if accelerator is not None else 0, held_out.rows, processes)
    table = torch.zeros(held_out.rows, held_out.width, dtype=torch.float64, device="cpu")
    if mine:
        table[list(mine)] = held_out.predict(model, mine, batch_size, tick)
    if processes > 1:
        # Every row is zero but in one process, so the sum is exact.
        table = accelerator.reduce(table.to(accelerator.device), "sum").cpu()
    return held_out.measure(table)


def rank(held_out: HeldOut, result: dict[str, Any]) -> tuple[float, ...]:
    """What is greater for the better of two evaluations."""
    by = (result.get("accuracy", 0.0), -result["loss"])
    return by if held_out.by_accuracy else by[::-1]
