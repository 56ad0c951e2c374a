"""Packing: the rows of a forward pass as one row of tokens, none of which sees another's, instead of padded rows.

Which rows make a step does not depend on it, nor do the loss and its gradient, but for rounding. What a step holds
beyond ``pack_length`` tokens goes into further forward passes.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.heads import find_heads
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.packed import packed_path
from fastadapter.integrations.passes.training import evaluating
from fastadapter.training.batching import Batch, to_device
from fastadapter.training.class_tokens import sparing_unread
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Encoded
from fastadapter.training.trunk.cached import Trunk, beginning

# Of a pack, where pack_length says nothing. The model's context is no bound, since positions begin again in each row;
# but a mask of the whole row has the square of its tokens.
MOST_TOKENS = 8192
# How far logits may be from those of a row alone, as a share of their norm. In 30 layers of SmolLM2 rounding makes 2e-6
# in fp32 and 0.02 in bf16, tokens of a neighbour 0.3 and more.
_ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-4}
_ALLOWED_IN_HALF = 0.1


def pack(examples: Sequence[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Put examples one behind the other into one row, with positions that begin again at 0 in each.

    Args:
        device: of the batch.
    Raises: ValueError: no example is given.

    >>> batch = pack([Encoded((5, 6, 7), 1), Encoded((8, 9), 1)])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.positions.tolist(), batch.targets.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]], [0, 1, 3], [6, 7, 9])
    """
    if not examples:
        raise ValueError("examples must hold at least one, got none")
    input_ids: list[int] = []
    position_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    starts = [0]
    for number, example in enumerate(examples):
        supervised = example.supervised
        positions += [starts[-1] + at - 1 for at in supervised]
        targets += [example.input_ids[at] for at in supervised]
        rows += [number] * len(supervised)
        input_ids += example.input_ids
        position_ids += range(len(example.input_ids))
        starts.append(len(input_ids))
    made = [
        torch.tensor(each, dtype=torch.int64, device="cpu")
        for each in (input_ids, position_ids, positions, targets, starts)
    ]
    ids, places, at, tokens, offsets = to_device(made, device)
    return Batch(
        input_ids=ids[None],
        attention_mask=None,
        position_ids=places[None],
        positions=at,
        targets=tokens,
        rows=torch.tensor(rows, dtype=torch.int64, device="cpu"),
        num_examples=len(examples),
        places=tuple((0, start, len(each.input_ids)) for start, each in zip(starts, examples, strict=False)),
        cu_seqlens=offsets.int(),
    )


class Layout:
    """How the rows of a forward pass lie: padded to the longest of them, or packed.

    Attributes:
        pack_length: most tokens of a packed row; ``None``: rows are padded.
        reason: why rows are padded although packing was asked for.

    Args:
        lengths: tokens of every training row.
        sources: where each was read.
    Raises: UserError: naming the record: it is longer than a pack.
    """

    def __init__(self, lengths: Sequence[int], sources: Sequence[str], config: TrainingConfig):
        self.lengths = lengths
        self.asked = config.packing
        self.pack_length: int | None = None
        self.reason: str | None = None
        self.path = ""
        if not config.packing:
            return
        longest = max(lengths)
        self.pack_length = config.pack_length or max(MOST_TOKENS, longest)
        if longest > self.pack_length:
            source = sources[list(lengths).index(longest)]
            raise UserError(
                f"{source}: the record has {longest} tokens, a pack at most {self.pack_length}; raise pack_length, or "
                "cut records with max_length and truncation"
            )

    @property
    def packed(self) -> bool:
        return self.pack_length is not None

    def passes(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of each forward pass, in their order; none of no rows."""
        if not rows:
            return []
        if self.pack_length is None:
            return [list(rows)]
        found: list[list[int]] = [[]]
        tokens = 0
        for row in rows:
            tokens += self.lengths[row]
            if tokens > self.pack_length:
                found.append([])
                tokens = self.lengths[row]
            found[-1].append(row)
        return found

    def computed(self, rows: Sequence[int]) -> int:
        """Tokens that the forward pass of some rows computes, those of padding among them."""
        lengths = [self.lengths[row] for row in rows]
        return sum(lengths) if self.packed else len(lengths) * max(lengths)

    def utilisation(self, parts: Sequence[Sequence[int]]) -> float:
        """Share of the tokens that are computed for some parts of steps which are tokens of rows."""
        passes = [rows for part in parts for rows in self.passes(part)]
        real = sum(self.lengths[row] for rows in passes for row in rows)
        return real / sum(self.computed(rows) for rows in passes)

    def settle(self, model: nn.Module, logits: Callable[[list[int], bool], list[Tensor]]) -> None:
        """Look whether the model gives in a packed row what it gives for each row alone; where not, pad.

        Args:
            logits: of each of some rows, that make one forward pass, packed or padded.
        """
        if not self.packed:
            return
        by_length = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        # The longest sees as far back as any; what follows it is what could see it.
        rows = [by_length[-1], by_length[0], by_length[len(by_length) // 2]]
        self.reason = _difference(model, logits, rows)
        if self.reason is not None:
            self.pack_length = None
            return
        first = next(model.parameters())
        self.path = packed_path(unwrap(model).config, first.device, first.dtype)

    def line(self) -> str | None:
        """What the run says of it at its start."""
        if not self.asked:
            return None
        if not self.packed:
            return f"packing: batches are grouped by length instead: {self.reason}"
        return f"packing: up to {self.pack_length:,} tokens in a forward pass, attention {self.path}"

    def describe(self) -> dict[str, object]:
        """The same for ``run.json``."""
        return {"packed": self.packed, "pack_length": self.pack_length, "reason": self.reason}


@torch.no_grad()
def _difference(
    model: nn.Module, logits: Callable[[list[int], bool], list[Tensor]], rows: list[int]
) -> str | None:
    """Why a model cannot be given packed rows; ``None``: it gives the same for some ``rows`` as for each alone."""
    inner = unwrap(model)
    name = type(inner).__name__
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{name} takes no position_ids"
    with evaluating(model):
        try:
            packed = logits(rows, True)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{name} does not take a packed row: {error}"
        alone = [logits([row], False)[0] for row in rows]
    allowed = _ALLOWED.get(next(model.parameters()).dtype, _ALLOWED_IN_HALF)
    size = max(float(each.norm()) for each in alone)
    found = max(float((one - two).norm()) for one, two in zip(packed, alone, strict=True)) / size
    if found <= allowed:
        return None
    return (
        f"{name} gives other logits in a packed row than for its texts alone, by {found:.1g} of their norm, where "
        f"rounding makes less than {allowed:.1g}"
    )


def packed_outputs(
    model: nn.Module,
    texts: Sequence[tuple[int, ...]],
    pad_token_id: int,
    device: torch.device,
    trunk: Trunk | None = None,
) -> Tensor:
    """What a classification head says of every text of a packed row, ``(texts, outputs)``.

    Of the last token that is no padding, as in transformers; in an encoder of the first one; if it reads that of the
    row alone, :meth:`Layout.settle` sees it.

    Args:
        trunk: states of the texts to begin with; ``None``: the pass begins with the tokens.
    Raises: TypeError: the head was not called once on all tokens.
    """
    batch = pack([Encoded(ids, len(ids)) for ids in texts], device)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_tensor(output) and output.shape[:-1] == batch.input_ids.shape:
            found.append(output)

    ids = batch.input_ids
    with (
        beginning(trunk, ids, batch.places, texts),
        sparing_unread(model, ids, batch.places, texts, pad_token_id) as read,
        ExitStack() as stack,
    ):
        for head in find_heads(unwrap(model)).modules.values():
            stack.callback(head.register_forward_hook(keep).remove)
        model(**batch.model_inputs(), use_cache=False)
    if len(found) != 1:
        raise TypeError(f"the classification head was called {len(found)} times on all tokens, expected once")
    return found[0][0].index_select(0, read)
