"""Attention in which learned prefix positions and keys share one softmax: prefix tuning (Li & Liang,
arXiv:2101.00190), and the merge of a prefix into an attention that was computed before.

    S  = c(softmax_scale * Q [Kp; K]^T) + [0; mask]        c, mask: reference/attention.py
    p  = softmax(S),   O = p [Vp; V]

The mask, the window and causality never hide the prefix; the soft cap applies to it like to every key. Merging two
parts of one softmax by their outputs and ``lse``:

    lse = log(exp(lse_a) + exp(lse_b)),   O = w_a O_a + w_b O_b,   w_a = exp(lse_a - lse)
    dO_a = w_a dO,   dlse_a = w_a * (rowsum(dO * O_a) - delta + dlse),   delta = rowsum(dO * O)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapter.reference.attention import (
    NEVER,
    default_compute_dtype,
    has_adapter,
    mask_scores,
    per_query_head,
    probabilities,
    rows_of,
    scores_of,
    sequences,
    softmax,
    softmax_gradients,
    sum_heads,
    sum_rows,
    tokens,
)


class _Joined(NamedTuple):
    """Prefix and keys side by side, per query head."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    slope: Tensor


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    softmax_scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over a prefix and the keys.

    Args: as :func:`fastadapter.reference.gated_prefix_attention`; ``kv_len`` may be 0.
    Returns: ``out`` like ``query`` and ``lse (batch, num_heads, q_len)``, 0 and -inf where nothing is visible; then
        ``out`` unrounded in ``compute_dtype``, for backward.
    """
    compute = compute_dtype or default_compute_dtype(query)
    options = (compute, softmax_scale, is_causal, window, softcap)
    if cu_seqlens is not None:
        wide_out = torch.empty_like(query, dtype=compute)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(compute, torch.float32))
        for span, own_id in sequences(cu_seqlens, row_ids):
            q, k, v = (tokens(x, span) for x in (query, key, value))
            joined = _join(q, k, v, prefix_key, prefix_value, None, own_id, options)
            probs, lse[:, :, span] = softmax(joined.scores)
            wide_out[:, :, span] = torch.einsum("bhts,bhsd->bhtd", probs, joined.values)
        return torch.empty_like(query).copy_(wide_out), lse, wide_out
    joined = _join(query, key, value, prefix_key, prefix_value, attn_mask, row_ids, options)
    probs, lse = softmax(joined.scores)
    out = torch.einsum("bhts,bhsd->bhtd", probs, joined.values)
    wide_out = torch.empty_like(query, dtype=compute).copy_(out)
    return torch.empty_like(query).copy_(out), lse, wide_out


def prefix_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`prefix_attention` from its unrounded ``out`` and its ``lse``.

    With no keys (``kv_len`` 0) and the ``out, lse`` of a merge it gives the prefix's part of the merged gradient.
    Returns: ``grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value``, each in the shape and dtype of
    its input.
    """
    compute = compute_dtype or default_compute_dtype(query)
    inputs = (query, key, value, prefix_key, prefix_value)
    options = (compute, softmax_scale, is_causal, window, softcap)
    if cu_seqlens is None:
        grads = _gradients(grad_out, *inputs, out, lse, attn_mask, row_ids, options)
    else:
        grads = [torch.zeros_like(x, dtype=compute) for x in inputs]
        for span, own_id in sequences(cu_seqlens, row_ids):
            grad, q, k, v, o, stats = (tokens(x, span) for x in (grad_out, query, key, value, out, lse))
            parts = _gradients(grad, q, k, v, prefix_key, prefix_value, o, stats, None, own_id, options)
            for whole, part in zip(grads[:3], parts[:3]):
                whole[:, :, span] = part
            for whole, part in zip(grads[3:], parts[3:]):
                whole += part
    activations = [torch.empty_like(x).copy_(grad) for x, grad in zip(inputs[:3], grads[:3])]
    banks = [grad.to(x.dtype).contiguous() for x, grad in zip(inputs[3:], grads[3:])]
    return (*activations, *banks)


def prefix_merge(
    base: Tensor,
    base_lse: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    softmax_scale: float,
    softcap: float | None = None,
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge a prefix into ``base``, the output of an attention whose natural ``lse`` is ``base_lse``.

    Args:
        base, query: ``(batch, num_heads, q_len, head_dim)``; base_lse: ``(batch, num_heads, q_len)``, -inf where the
            base saw no key.
    Returns: merged ``out`` like ``base``, and its ``lse``. A row without an adapter keeps the bits of both.
    """
    compute = compute_dtype or default_compute_dtype(query)
    batch, num_heads = query.shape[:2]
    adapted = has_adapter(row_ids, batch, query.device)[:, None, None]
    prefix = rows_of(prefix_key, row_ids, batch), rows_of(prefix_value, row_ids, batch)
    keys, values = (per_query_head(x.to(compute), num_heads) for x in prefix)
    scores, _ = scores_of(query.to(compute), keys, softmax_scale, softcap)
    probs, prefix_lse = softmax(scores)
    part = torch.einsum("bhtp,bhpd->bhtd", probs, values)
    lse = torch.logaddexp(base_lse.to(prefix_lse.dtype), prefix_lse)
    # where: the output of a base that saw no key is no part of the result, whatever it holds
    kept = torch.where((base_lse == NEVER)[..., None], 0, base.to(compute))
    on_base, on_prefix = (_share(x, lse).to(compute)[..., None] for x in (base_lse, prefix_lse))
    out = on_base * kept + on_prefix * part
    out = torch.where(adapted[..., None], out.to(base.dtype), base)
    return torch.empty_like(base).copy_(out), torch.where(adapted, lse.to(base_lse.dtype), base_lse)


def prefix_merge_base_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    base: Tensor,
    base_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`prefix_merge` for ``base`` and ``base_lse`` from ``out`` and ``lse`` that it returned.

    Those of the query and the prefix are :func:`prefix_attention_backward` without keys.
    Args:
        grad_lse: gradient of the merged ``lse``; ``None`` is zero.
    """
    compute = compute_dtype or default_compute_dtype(out)
    adapted = has_adapter(row_ids, out.shape[0], out.device)[:, None, None]
    share = torch.where(adapted, _share(base_lse, lse), 1).to(compute)
    grad = grad_out.to(compute)
    seen = torch.where((base_lse == NEVER)[..., None], 0, base.to(compute))
    through = torch.zeros_like(share) if grad_lse is None else grad_lse.to(compute)
    grad_base_lse = share * ((grad * seen).sum(-1) - (grad * out.to(compute)).sum(-1) + through)
    # A row without an adapter passes its lse through; a base that saw no key has no share.
    grad_base_lse = torch.where(adapted, torch.where(share == 0, 0, grad_base_lse), through)
    grad_base = torch.empty_like(base).copy_(share[..., None] * grad)
    return grad_base, grad_base_lse.to(base_lse.dtype)


def _share(part_lse: Tensor, lse: Tensor) -> Tensor:
    """The weight of a part in the merged softmax, ``(batch, num_heads, q_len)``."""
    return torch.where(part_lse == NEVER, 0, (part_lse - lse).exp())


def _join(query, key, value, prefix_key, prefix_value, attn_mask, row_ids, options) -> _Joined:
    compute, softmax_scale, is_causal, window, softcap = options
    batch, num_heads = query.shape[:2]
    adapted = has_adapter(row_ids, batch, query.device)[:, None, None, None]
    # where: entry 0 stands in for rows without an adapter, and may hold NaN
    prefix = [
        torch.where(adapted, rows_of(x, row_ids, batch).to(compute), 0) for x in (prefix_key, prefix_value)
    ]
    own = [x.to(compute) for x in (key, value)]
    keys, values = (per_query_head(torch.cat(pair, dim=2), num_heads) for pair in zip(prefix, own))
    scores, slope = scores_of(query.to(compute), keys, softmax_scale, softcap)
    prefix_len = prefix_key.shape[2]
    on_prefix = torch.where(adapted, scores[..., :prefix_len], NEVER)
    on_keys = mask_scores(scores[..., prefix_len:], attn_mask, is_causal, window)
    return _Joined(keys, values, torch.cat([on_prefix, on_keys], dim=-1), slope)


def _gradients(
    grad_out, query, key, value, prefix_key, prefix_value, out, lse, attn_mask, row_ids, options
) -> list[Tensor]:
    """The gradients of one unpacked batch, unrounded."""
    compute, softmax_scale, *_ = options
    num_kv_heads = key.shape[1]
    num_prefixes, _, prefix_len, _ = prefix_key.shape
    grad, q, saved = (x.to(compute) for x in (grad_out, query, out))
    joined = _join(query, key, value, prefix_key, prefix_value, attn_mask, row_ids, options)
    probs = probabilities(joined.scores, lse)
    delta = (grad * saved).sum(-1, keepdim=True)
    grad_query, grad_keys, grad_values = softmax_gradients(
        grad, q, joined.keys, joined.values, probs, joined.slope, delta, softmax_scale
    )
    grad_keys, grad_values = sum_heads(grad_keys, num_kv_heads), sum_heads(grad_values, num_kv_heads)
    return [
        grad_query,
        grad_keys[:, :, prefix_len:],
        grad_values[:, :, prefix_len:],
        sum_rows(grad_keys[:, :, :prefix_len], row_ids, num_prefixes),
        sum_rows(grad_values[:, :, :prefix_len], row_ids, num_prefixes),
    ]
