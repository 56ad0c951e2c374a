"""Batches: which rows make a step, and the tensors of one forward pass."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapter.integrations.passes.packed import PACKED
from fastadapter.training.data import Encoded

WINDOW = 32  # batches sorted by length together: little padding, still close to random


@dataclass(frozen=True)
class Batch:
    """One forward pass. Rows are padded on the right, or packed into one row with ``cu_seqlens``.

    Attributes:
        input_ids: int64 ``(batch, seq)``.
        attention_mask: int64 ``(batch, seq)``, 1 for real tokens; ``None``: all are, or the batch is packed, or no
            real token can see one that is not.
        position_ids: int64 ``(batch, seq)``; ``None``: counted from 0 in every row.
        positions: int64 ``(num_supervised,)``, into the flattened ``(batch * seq)`` hidden states, of the
            states that predict ``targets``.
        targets: int64 ``(num_supervised,)``, the tokens to predict.
        rows: int64 ``(num_supervised,)``, the example each of them belongs to; always on the CPU.
        num_examples: examples in the batch.
        places: where each example's tokens lie: row, first column, number of tokens.
        cu_seqlens: int32 ``(num_examples + 1,)``, offsets of packed examples.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    positions: Tensor
    targets: Tensor
    rows: Tensor
    num_examples: int
    places: tuple[tuple[int, int, int], ...]
    cu_seqlens: Tensor | None = None

    @property
    def num_supervised(self) -> int:
        return self.targets.numel()

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward."""
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        if self.cu_seqlens is not None:
            given |= sequence_arguments(self.cu_seqlens, max(length for _, _, length in self.places))
        return given


def sequence_arguments(cu_seqlens: Tensor, longest: int) -> dict[str, Any]:
    """What tells a model's attention where the sequences of a packed row are.

    Flash attention reads transformers' names; ours reads its own, since under theirs the bits would no longer be those
    of the model without an adapter. Other attention goes by the positions.

    Args:
        cu_seqlens: int32 ``(num_seqs + 1,)``.
        longest: tokens of the longest sequence.
    """
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, **lengths, PACKED: cu_seqlens}


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of one dtype from the CPU on a device, in one copy that the host does not wait for."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def collate(
    examples: Sequence[Encoded], device: torch.device | str = "cpu", *, causal: bool = False
) -> Batch:
    """Pad examples on the right to the longest.

    The padding token is 0, and its own states are not used.

    Args:
        device: of the batch.
        causal: the model's attention shows no token what stands behind it, and so no real token any padding: a mask
            would only cost, and attention with a mask is slower.

    >>> batch = collate([Encoded((5, 6, 7), 1), Encoded((8, 9), 1)])
    >>> batch.input_ids.tolist(), batch.positions.tolist(), batch.targets.tolist(), batch.rows.tolist()
    ([[5, 6, 7], [8, 9, 0]], [0, 1, 3], [6, 7, 9], [0, 0, 1])
    """
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64, device="cpu")
    lengths = [len(example.input_ids) for example in examples]
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :length] = torch.tensor(example.input_ids, device="cpu")
        supervised = example.supervised
        positions += [row * width + at - 1 for at in supervised]
        targets += [example.input_ids[at] for at in supervised]
        rows += [row] * len(supervised)
    moved = [
        input_ids,
        *(torch.tensor(each, dtype=torch.int64, device="cpu") for each in (positions, targets)),
    ]
    if not causal and min(lengths) < width:
        columns, ends = torch.arange(width, device="cpu"), torch.tensor(lengths, device="cpu")
        moved.append((columns < ends[:, None]).long())
    input_ids, at, tokens, *mask = to_device(moved, device)
    return Batch(
        input_ids=input_ids,
        attention_mask=mask[0] if mask else None,
        position_ids=None,
        positions=at,
        targets=tokens,
        rows=torch.tensor(rows, dtype=torch.int64, device="cpu"),
        num_examples=len(examples),
        places=tuple((row, 0, length) for row, length in enumerate(lengths)),
    )


def lay_out(
    shape: tuple[int, int], places: Sequence[tuple[int, int, int]], states: Sequence[Tensor]
) -> Tensor:
    """One vector per token of each example, where the batch has that token; zeros elsewhere.

    Args:
        shape: ``(batch, seq)`` of the batch.
        places: of the batch.
        states: of each example, ``(num_tokens, width)``, of one dtype and device.
    Returns: ``(batch, seq, width)``.

    >>> lay_out((1, 3), [(0, 0, 2)], [torch.ones(2, 1)]).flatten().tolist()
    [1.0, 1.0, 0.0]
    """
    out = states[0].new_zeros(*shape, states[0].shape[1])
    for (row, start, length), each in zip(places, states, strict=True):
        out[row, start : start + length] = each
    return out


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of every step of an epoch, decided by ``seed`` and ``epoch`` alone.

    Rows are shuffled, sorted by length inside windows of ``WINDOW`` batches, cut into batches of
    ``batch_size`` (the last may be smaller), and the batches shuffled. Every row occurs once.
    """
    # A string seed goes through SHA-512: the order does not depend on the Python version or platform.
    generator = random.Random(f"order-{seed}-{epoch}")
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    window = WINDOW * batch_size
    rows = [
        row
        for start in range(0, len(rows), window)
        for row in sorted(rows[start : start + window], key=lengths.__getitem__)
    ]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    generator.shuffle(batches)
    return batches


def share(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Cut the rows of a step into ``parts`` neighbouring pieces of equal size, give or take one."""
    bounds = [len(rows) * part // parts for part in range(parts + 1)]
    return [list(rows[low:high]) for low, high in itertools.pairwise(bounds)]
