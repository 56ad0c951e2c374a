"""The states of a trunk by the tokens that they are of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapter.training.batching import Batch, lay_out
from fastadapter.training.data import Encoded


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


def begin_at(trunk: Trunk | None, batch: Batch, examples: Sequence[Encoded]) -> Batch:
    """The batch of some examples, to begin behind the trunk; ``None``: as it is."""
    if trunk is None:
        return batch
    rows, seq = batch.input_ids.shape
    sequences = [example.input_ids for example in examples]
    states = trunk.lay_out((rows, seq), batch.places, sequences, batch.input_ids.device)
    return dataclasses.replace(batch, trunk=states)


def give(task: Any, trunk: Trunk | None) -> None:
    """Let the passes of a task begin behind the trunk; ``None``: at the first block, as ever."""
    task.trunk = trunk
    if task.held_out is not None:
        task.held_out = dataclasses.replace(task.held_out, trunk=trunk)
