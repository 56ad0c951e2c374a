"""Attention over a packed row: several sequences one after the other, none of which sees another.

transformers finds such a row by its positions, which begin again at 0, and makes a mask of the whole row for it. Under
that mask torch's attention still computes every pair of tokens of the row. Where the model's caller says where the
sequences are (``PACKED``), and the mask says the same, each of them is computed by itself, with a prefix or without: by
the C++ op on a CPU, by torch's flash attention on a GPU. Everywhere else the mask decides, as in any other call: what
is right does not depend on this.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastadapter.integrations.passes.choice import may_keep
from fastadapter.integrations.passes.dtypes import attention_dtype
from fastadapter.integrations.passes.options import is_plain
from fastadapter.ops import prefix_attention
from fastadapter.ops.backends import automatic_backend
from fastadapter.ops.base_attention import note_longest, packed_attention, packed_limit

# Keyword under which the model's caller passes the offsets of a row's sequences down to its attention: int32
# (num_seqs + 1,). A name of our own: under transformers' `cu_seq_lens_q` the model would keep its bits with torch's
# attention, whether an adapter is attached or not.
PACKED = "fa_cu_seqlens"


class Sequences(NamedTuple):
    """Where a row's sequences begin and end, and how far back a token sees; ``window`` ``None``: to the first."""

    cu_seqlens: Tensor
    window: int | None


class _Comparison(NamedTuple):
    """A mask beside offsets and a window: whether no sequence sees another, and whether it says just what they say."""

    cu_seqlens: Tensor
    window: int | None
    apart: bool
    same: bool


# Of masks that passes are using.
_compared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def sequences_in(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Sequences | None:
    """The sequences of a packed row, where attention can run over each by itself; ``None``: it runs under the mask.

    Args:
        attention: the module, query and the others as in :meth:`PrefixHost.attend`.
        options: the keyword arguments of the attention, ``PACKED`` among them.
    Raises: ValueError: the row holds several sequences, and the model's mask does not keep them apart.
    """
    cu_seqlens = options.get(PACKED)
    if cu_seqlens is None:
        return None
    base, window = attention.config._attn_implementation, options.get("sliding_window")
    if base not in ("sdpa", "eager") or not may_keep(query.device):
        return None
    compared = None if mask is None else _compare(mask, cu_seqlens, window)
    if len(cu_seqlens) > 2 and (compared is None or not compared.apart):
        raise ValueError(
            f"{PACKED}: {type(attention).__name__} was given {len(cu_seqlens) - 1} sequences in one row, and no mask "
            "that keeps them apart (position_ids have to begin again at 0 in each, without attention_mask and cache)"
        )
    if base != "sdpa" or compared is None or not compared.same:
        return None
    dropout = (options.get("dropout") or 0.0) if attention.training else 0.0
    if dropout or not is_plain(options):
        return None
    if reason_for_mask(query.device, attention_dtype(value), query.shape[3]) is not None:
        return None
    one_row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    return Sequences(cu_seqlens, window) if one_row and key.shape[3] == value.shape[3] else None


def reason_for_mask(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why sequences of a packed row are attended under the mask of the row; ``None``: they are not."""
    backend, reason = automatic_backend(device.type, dtype, "prefix_attention", head_dim)
    if backend == "triton":
        return packed_limit(device, dtype, head_dim)
    return None if backend == "cpp" else reason


def packed_path(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """How attention runs over the sequences of a packed row, in words.

    Args:
        config: of the model, or of an attention of it.
    """
    implementation = getattr(config, "_attn_implementation", None)
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads and width else 0)
    if implementation is not None and "flash" in implementation:
        return "by sequence (flash)"
    if implementation == "sdpa" and reason_for_mask(device, dtype, head_dim) is None:
        return f"by sequence ({'cpp' if device.type == 'cpu' else 'flash'})"
    return "under a mask of the row"


def by_sequences(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float | None
) -> tuple[Tensor, None]:
    """What the model's attention returns: on a CPU by the op with a prefix that nobody uses."""
    dtype = attention_dtype(value)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    if query.device.type != "cpu":
        out = packed_attention(query, key, value, *sequences, scale)
        return out.transpose(1, 2).contiguous(), None
    nobody = query.new_full((len(sequences.cu_seqlens) - 1,), -1, dtype=torch.int32)
    prefix = query.new_zeros(1, key.shape[1], 1, key.shape[3])
    out = prefix_attention(
        query, key, value, prefix, prefix, is_causal=True, softmax_scale=scale, row_ids=nobody,
        window=sequences.window, cu_seqlens=sequences.cu_seqlens,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _compare(mask: Tensor, cu_seqlens: Tensor, window: int | None) -> _Comparison:
    """Looked at once in a pass: all layers that share a mask share what it says."""
    known = _compared.get(mask)
    if known is None or known.cu_seqlens is not cu_seqlens or known.window != window:
        known = _compared[mask] = _Comparison(cu_seqlens, window, *_said(mask, cu_seqlens, window))
    return known


def _said(mask: Tensor, cu_seqlens: Tensor, window: int | None) -> tuple[bool, bool]:
    length = mask.shape[-1]
    if mask.dim() != 4 or mask.shape[2] != length or int(cu_seqlens[-1]) != length:
        return False, False
    if cu_seqlens.device.type != "cpu":
        note_longest(cu_seqlens, int(cu_seqlens.diff().max()))
    tokens = torch.arange(length, dtype=torch.int32, device=mask.device)
    number = torch.bucketize(tokens, cu_seqlens[1:-1], right=True)
    together = number[:, None] == number
    opened = mask if mask.dtype == torch.bool else mask == 0
    if bool((opened & ~together).any()):
        return False, False
    visible = together.tril_()
    if window is not None:
        visible = visible.triu_(1 - window)
    return True, mask.dtype == torch.bool and torch.equal(opened, visible.expand(*mask.shape[:2], -1, -1))


class _AsLongAsPacking(nn.Module):
    """Stands for a model without an adapter among those that need the hook."""


@contextlib.contextmanager
def attending_packed() -> Iterator[None]:
    """Let attention see ``PACKED`` in models without an adapter, too, while the context lasts."""
    from fastadapter.integrations.passes import attention as hook

    reason = _AsLongAsPacking()
    hook.install_hook()
    hook.keep_hook_for(reason)
    try:
        yield
    finally:
        hook.release_hook_for(reason)
        hook.remove_hook_if_unused()
