"""The states of a trunk by the tokens that they are of."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapter.training.batching import lay_out
from fastadapter.training.trunk.start import starting_from


class Trunk:
    """Hidden states of the sequences that passes will be made over."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def add(self, sequences: Sequence[tuple[int, ...]], states: Tensor) -> None:
        """Take the states ``(tokens, width)`` of some sequences, one behind another."""
        start = 0
        for ids in sequences:
            self._found.setdefault(ids, (states, start))
            start += len(ids)

    def lay_out(
        self,
        shape: tuple[int, int],
        places: Sequence[tuple[int, int, int]],
        sequences: Sequence[tuple[int, ...]],
        device: torch.device | str,
    ) -> Tensor:
        """The states to begin a pass with, ``(batch, seq, width)``, as its batch lays its examples out.

        Args:
            shape: ``(batch, seq)`` of the batch.
            places: where each example's tokens lie, as of :class:`fastadapter.training.batching.Batch`.
            sequences: the tokens of each example.
        """
        states = []
        for ids in sequences:
            found, start = self._found[ids]
            states.append(found[start : start + len(ids)])
        laid = lay_out(shape, places, states)
        if torch.device(device).type == "cuda":
            laid = laid.pin_memory()
        return laid.to(device, non_blocking=True)


@contextlib.contextmanager
def beginning(
    trunk: Trunk | None,
    input_ids: Tensor,
    places: Sequence[tuple[int, int, int]],
    sequences: Sequence[tuple[int, ...]],
) -> Iterator[None]:
    """Let the one forward pass in the context begin behind the trunk; ``None``: with the tokens.

    Args:
        input_ids: of the pass, ``(batch, seq)``, on the model's device.
        places, sequences: of :meth:`Trunk.lay_out`.
    """
    if trunk is None:
        yield
        return
    rows, seq = input_ids.shape
    with starting_from(trunk.lay_out((rows, seq), places, sequences, input_ids.device)):
        yield


def give(task: Any, trunk: Trunk | None) -> None:
    """Let the passes of a task begin behind the trunk; ``None``: at the first block, as ever."""
    task.trunk = trunk
    if task.held_out is not None:
        task.held_out = dataclasses.replace(task.held_out, trunk=trunk)
