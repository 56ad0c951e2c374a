"""Attention plus the gated prefix term of LLaMA-Adapter (arXiv:2303.16199, eq. 6-8), as one operation.

    base = softmax(c(softmax_scale * Q K^T) + mask) V        c, mask: reference/attention.py
    O    = base + f(gate_h) * softmax(softmax_scale * Q Kp^T) Vp

Mask, window and soft cap are the base's alone. Gradients: those of the base attention and of ``gated_prefix``, which
share ``dO``; ``dQ`` is their sum. Derivation: docs/maths.md.
"""

from typing import Any

import torch
from torch import Tensor

from fastadapter.reference.attention import (
    default_compute_dtype,
    mask_scores,
    per_query_head,
    probabilities,
    scores_of,
    sequences,
    softmax,
    softmax_gradients,
    sum_heads,
    tokens,
)
from fastadapter.reference.gated_prefix import gated_prefix, prefix_gradients, prefix_scores


def gated_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor,
    *,
    softmax_scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    gate_fn: str = "tanh",
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention with a gated prefix, and what its backward needs.

    Args:
        query: ``(batch, num_heads, q_len, head_dim)``; key, value: ``(batch, num_kv_heads, kv_len, head_dim)``.
        prefix_key, prefix_value: ``(num_prefixes, num_kv_heads, prefix_len, head_dim)``; gate: ``(num_prefixes,
            num_heads)``, raw.
        attn_mask: bool (True: attend) or float (added), broadcastable to ``(batch, num_heads, q_len, kv_len)``.
        cu_seqlens: int32 ``(num_seqs + 1,)`` for a packed batch of one; ``row_ids`` then has an id per sequence.
        window: with ``is_causal``, how many keys up to its own position a query sees.
        softcap: bound of the base's scores.
        compute_dtype: precision of every intermediate; fp32, or fp64 for fp64 inputs, unless given.
    Returns: ``out, base, lse, prefix_lse``: both outputs like ``query``, ``base`` unrounded in ``compute_dtype``;
        ``lse (batch, num_heads, q_len)`` of the base's softmax (-inf where nothing is visible) and of the prefix's
        (-inf in rows without an adapter).
    """
    compute = compute_dtype or default_compute_dtype(query)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "window": window,
        "softcap": softcap,
        "gate_fn": gate_fn,
        "compute_dtype": compute,
    }
    if cu_seqlens is not None:
        out, base = torch.empty_like(query), torch.empty_like(query, dtype=compute)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(compute, torch.float32))
        prefix_lse = torch.empty_like(lse)
        for span, own_id in sequences(cu_seqlens, row_ids):
            own = [tokens(x, span) for x in (query, key, value)]
            operands: Any = (*own, prefix_key, prefix_value, gate)
            results = gated_prefix_attention(*operands, is_causal=is_causal, row_ids=own_id, **options)
            for whole, part in zip((out, base, lse, prefix_lse), results):
                whole[:, :, span] = part
        return out, base, lse, prefix_lse

    num_heads = query.shape[1]
    q, keys, values = (x.to(compute) for x in (query, key, value))
    keys, values = per_query_head(keys, num_heads), per_query_head(values, num_heads)
    scores, _ = scores_of(q, keys, softmax_scale, softcap)
    probs, lse = softmax(mask_scores(scores, attn_mask, is_causal, window))
    base = torch.einsum("bhts,bhsd->bhtd", probs, values)
    out = gated_prefix(
        base,
        q,
        prefix_key,
        prefix_value,
        gate,
        softmax_scale=softmax_scale,
        gate_fn=gate_fn,
        row_ids=row_ids,
        compute_dtype=compute,
    )
    _, prefix_lse = softmax(prefix_scores(query, prefix_key, softmax_scale, row_ids, compute))
    if row_ids is not None:
        prefix_lse = torch.where((row_ids >= 0)[:, None, None], prefix_lse, float("-inf"))
    wide = torch.empty_like(query, dtype=compute)
    return torch.empty_like(query).copy_(out), wide.copy_(base), lse, prefix_lse


def gated_prefix_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor,
    base: Tensor,
    lse: Tensor,
    prefix_lse: Tensor,
    *,
    softmax_scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    gate_fn: str = "tanh",
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`gated_prefix_attention` from ``base``, ``lse`` and ``prefix_lse`` that it returned.

    Returns: ``grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_gate``, each in the shape and
    dtype of its input.
    """
    compute = compute_dtype or default_compute_dtype(query)
    inputs = (query, key, value, prefix_key, prefix_value, gate)
    grad, q, k, v, *adapter = (x.to(compute) for x in (grad_out, *inputs))
    options = (softmax_scale, is_causal, attn_mask, window, softcap, gate_fn)
    if cu_seqlens is None:
        grads = _gradients((grad, q, k, v), adapter, (base, lse, prefix_lse), row_ids, options)
    else:
        grads = [torch.zeros_like(x) for x in (q, k, v, *adapter)]
        for span, own_id in sequences(cu_seqlens, row_ids):
            packed = [tokens(x, span) for x in (grad, q, k, v)]
            kept = [tokens(x, span) for x in (base, lse, prefix_lse)]
            parts = _gradients(packed, adapter, kept, own_id, options)
            for whole, part in zip(grads[:3], parts[:3]):
                whole[:, :, span] = part
            for whole, part in zip(grads[3:], parts[3:]):
                whole += part
    activations = [torch.empty_like(x).copy_(grad) for x, grad in zip(inputs[:3], grads[:3])]
    banks = [grad.to(x.dtype).contiguous() for x, grad in zip(inputs[3:], grads[3:])]
    return (*activations, *banks)


def _gradients(activations, adapter, kept, row_ids, options) -> list[Tensor]:
    """The gradients of one unpacked batch in the dtype of the operands, unrounded."""
    grad_out, query, key, value = activations
    prefix_key, prefix_value, gate = adapter
    base, lse, prefix_lse = kept
    softmax_scale, is_causal, attn_mask, window, softcap, gate_fn = options
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    keys, values = per_query_head(key, num_heads), per_query_head(value, num_heads)
    scores, slope = scores_of(query, keys, softmax_scale, softcap)
    probs = probabilities(mask_scores(scores, attn_mask, is_causal, window), lse)
    delta = (grad_out * base.to(query.dtype)).sum(-1, keepdim=True)
    grad_query, grad_keys, grad_values = softmax_gradients(
        grad_out, query, keys, values, probs, slope, delta, softmax_scale
    )
    on_prefix = prefix_scores(query, prefix_key, softmax_scale, row_ids, query.dtype)
    from_prefix, *grad_banks = prefix_gradients(
        grad_out,
        query,
        prefix_key,
        prefix_value,
        gate,
        probabilities(on_prefix, prefix_lse),
        softmax_scale,
        gate_fn,
        row_ids,
    )
    return [
        grad_query + from_prefix,
        sum_heads(grad_keys, num_kv_heads),
        sum_heads(grad_values, num_kv_heads),
        *grad_banks,
    ]
