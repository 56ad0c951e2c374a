"""Which token's states a classification head reads: a decoder's last one that is no padding, an encoder's first."""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.discovery import looks_back_only
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.training.batching import to_device
from fastadapter.training.last_feed_forward import Probe, sparing

# By model: whether it is the last one.
_last: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def last_token(ids: Sequence[int], pad_token_id: int) -> int:
    """The last one that is no padding, as transformers finds it."""
    return max((at for at, token in enumerate(ids) if token != pad_token_id), default=0)


@contextlib.contextmanager
def sparing_unread(
    model: nn.Module,
    input_ids: Tensor,
    places: Sequence[tuple[int, int, int]],
    texts: Sequence[Sequence[int]],
    pad_token_id: int,
) -> Iterator[Tensor]:
    """Let the last feed-forward of a training pass see what the head reads alone, where that is the same.

    Not of others: a model that answers several threads is to be called without a change to its hooks.

    Args:
        input_ids: of the pass, ``(batch, seq)``.
        places: where the tokens of each text lie: row, first column, number of tokens.
    Yields: the positions that a head reads, of the flattened tokens, by text.
    """
    owner: Any = unwrap(model)
    if owner not in _last:
        _last[owner] = looks_back_only(owner)
    last, seq = _last[owner], input_ids.shape[1]
    read = [
        row * seq + start + (last_token(ids, pad_token_id) if last else 0)
        for (row, start, _), ids in zip(places, texts, strict=True)
    ]
    (positions,) = to_device([torch.tensor(read, device="cpu")], input_ids.device)
    if not torch.is_grad_enabled():
        yield positions
        return
    probe = functools.partial(_probe, owner, last, pad_token_id)
    with sparing(model, owner, tuple(input_ids.shape), positions, probe, joined=not last):
        yield positions


def _probe(owner: Any, last: bool, pad_token_id: int) -> Probe:
    rows, seq = 2, 8
    ids = torch.arange(rows * seq, device="cpu").view(rows, seq) + pad_token_id + 1
    inputs: dict[str, Any] = {"input_ids": ids % owner.config.get_text_config().vocab_size}
    inputs |= {"use_cache": False} if last else {"attention_mask": torch.ones_like(ids)}
    read = [row * seq + (seq - 1 if last else 0) for row in range(rows)]
    return Probe(inputs, read, lambda output: output[0])
