"""Attention with prefixes in its softmax, called with what transformers gives its attention functions."""

from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.passes.dtypes import attention_dtype, prefix_in
from fastadapter.integrations.passes.options import require_known
from fastadapter.integrations.passes.packed import PACKED, Sequences
from fastadapter.integrations.passes.widths import widened
from fastadapter.ops import prefix_attention
from fastadapter.ops.composed import joined_keys

BASES = ("sdpa", "eager")


def causality(attention: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether the attention is causal by itself: sdpa without a mask; eager attention is always given what it needs."""
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(attention, "is_causal", True)
    return (
        attention.config._attn_implementation == "sdpa"
        and mask is None
        and query.shape[2] > 1
        and bool(is_causal)
    )


def attend_shared(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    row_ids: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """``(batch, q_len, num_heads, head_dim)``: softmax over a bank of prefixes and the keys.

    Replaces the model's own attention, so it has to mean what that means: its mask (boolean or additive, made for the
    keys alone), causality where it was given none, position bias, soft cap and scale.

    Raises: ValueError: an attention implementation or an option whose meaning is not known here.
    """
    if key.shape[3] != value.shape[3]:
        width, scale = max(key.shape[3], value.shape[3]), options.get("scaling") or key.shape[3] ** -0.5
        query, key, prefix_key = (widened(each, width) for each in (query, key, prefix_key))
        out = attend_shared(
            attention,
            query,
            key,
            widened(value, width),
            mask,
            prefix_key,
            widened(prefix_value, width),
            row_ids,
            {**options, "scaling": scale},
        )
        return out[..., : value.shape[3]]
    base = attention.config._attn_implementation
    if base not in BASES:
        raise ValueError(
            f"attn_implementation must be {' or '.join(BASES)} under a prefix or soft prompt, got {base!r}: "
            "it takes the place of the model's attention"
        )
    require_known(options)
    if options.get("output_attentions"):
        raise ValueError("output_attentions: a prefix or soft prompt leaves no attention weights to return")
    dtype = attention_dtype(value)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    prefix_key, prefix_value = prefix_in(dtype, prefix_key, prefix_value)
    sequences: Sequences | None = options.get(PACKED)
    if sequences is not None:
        return prefix_attention(
            query, key, value, prefix_key, prefix_value, is_causal=True, softmax_scale=options.get("scaling"),
            window=sequences.window, cu_seqlens=sequences.cu_seqlens,
            row_ids=None if row_ids is None else row_ids.repeat(len(sequences.cu_seqlens) - 1),
        ).transpose(1, 2)  # fmt: skip
    is_causal = causality(attention, query, mask, options)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    bias = options.get("position_bias")
    if bias is not None:
        mask = _with_bias(bias, mask, is_causal, query.shape[2], key.shape[2])
        is_causal = False
    softmax_scale, softcap = options.get("scaling"), options.get("softcap")
    dropout = (options.get("dropout") or 0.0) if attention.training else 0.0
    # A position bias can be trained, and asks for a gradient behind re-entrant checkpointing even where it is frozen.
    bias_gradient = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if dropout or bias_gradient:
        # torch's attention drops weights and differentiates its mask; the op does neither
        return _concatenated(
            query,
            key,
            value,
            mask,
            is_causal,
            prefix_key,
            prefix_value,
            row_ids,
            softmax_scale,
            softcap,
            dropout,
        ).transpose(1, 2)
    return prefix_attention(
        query, key, value, prefix_key, prefix_value,
        is_causal=is_causal, attn_mask=mask, softmax_scale=softmax_scale, softcap=softcap, row_ids=row_ids,
    ).transpose(1, 2)  # fmt: skip


def _with_bias(bias: Tensor, mask: Tensor | None, is_causal: bool, q_len: int, kv_len: int) -> Tensor:
    """Position bias and mask as one additive mask."""
    if mask is None:
        if not is_causal:
            return bias
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=bias.device).tril()
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


def _concatenated(
    query, key, value, mask, is_causal, prefix_key, prefix_value, row_ids, softmax_scale, softcap, dropout
) -> Tensor:
    """The same attention by torch's own on joined keys: with dropout of its weights, and a gradient for the mask."""
    if softcap is not None:
        raise ValueError(
            "softcap goes neither with attention dropout nor with a trained position bias under a prefix or soft prompt"
        )
    if mask is None and is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    keys, values, mask = joined_keys(key, value, prefix_key, prefix_value, row_ids, mask)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        dropout_p=dropout,
        scale=softmax_scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
