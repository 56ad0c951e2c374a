"""Gated prefix: the adapter term of LLaMA-Adapter's zero-init attention (arXiv:2303.16199, eq. 6-8).

    S  = softmax_scale * Q Kp^T           (q_len, prefix_len) per head
    p  = softmax(S) over the prefix only
    Op = p Vp
    O  = base + f(gate_h) * Op            f = tanh or identity

    delta = rowsum(p * (dO Vp^T)),        dgate_h = f'(gate_h) * sum delta
    dS  = f(gate_h) * p * (dO Vp^T - delta)
    dQ  = softmax_scale * dS Kp,  dKp = softmax_scale * dS^T Q,  dVp = f(gate_h) * p^T dO

Derivation: docs/maths.md. A head whose factor is exactly zero, and a row without an adapter, return ``base``
itself, so a prefix that holds Inf or NaN cannot reach them.
"""

import torch
from torch import Tensor

from fastadapter.reference.attention import (
    default_compute_dtype,
    has_adapter,
    per_query_head,
    rows_of,
    scores_of,
    sum_heads,
    sum_rows,
)


def gated_prefix(
    base: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor,
    *,
    softmax_scale: float,
    gate_fn: str = "tanh",
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Add gated attention over a learned prefix to ``base``.

    Args:
        base, query: ``(batch, num_heads, q_len, head_dim)``.
        prefix_key, prefix_value: ``(num_prefixes, num_kv_heads, prefix_len, head_dim)``.
        gate: ``(num_prefixes, num_heads)``, raw (before ``gate_fn``).
        row_ids: int32 ``(batch,)``, which bank entry each row uses; -1 is none. ``None``: entry 0 for all rows.
        compute_dtype: precision of every intermediate; fp32, or fp64 for fp64 inputs, unless given.
    Returns: ``(batch, num_heads, q_len, head_dim)``, dtype and strides of ``base``.
    """
    compute = compute_dtype or default_compute_dtype(query)
    batch, num_heads = query.shape[:2]
    factor, _ = _gate_factor(rows_of(gate, row_ids, batch).to(compute), gate_fn)  # (batch, num_heads)
    probs = prefix_scores(query, prefix_key, softmax_scale, row_ids, compute).softmax(-1)
    values = per_query_head(rows_of(prefix_value, row_ids, batch).to(compute), num_heads)
    term = factor[:, :, None, None] * torch.einsum("bhtp,bhpd->bhtd", probs, values)
    adapted = (factor != 0) & has_adapter(row_ids, batch, query.device)[:, None]  # (batch, num_heads)
    summed = (base.to(compute) + term).to(base.dtype)
    return torch.empty_like(base).copy_(torch.where(adapted[:, :, None, None], summed, base))


def gated_prefix_backward(
    grad_out: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor,
    *,
    softmax_scale: float,
    gate_fn: str = "tanh",
    row_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_prefix`; that of ``base`` is ``grad_out`` itself.

    Returns: ``grad_query, grad_prefix_key, grad_prefix_value, grad_gate``, each in the shape and dtype of its input.
    """
    compute = compute_dtype or default_compute_dtype(query)
    probs = prefix_scores(query, prefix_key, softmax_scale, row_ids, compute).softmax(-1)
    grad, q, keys, values, gates = (x.to(compute) for x in (grad_out, query, prefix_key, prefix_value, gate))
    grad_query, grad_key, grad_value, grad_gate = prefix_gradients(
        grad, q, keys, values, gates, probs, softmax_scale, gate_fn, row_ids
    )
    return (
        torch.empty_like(query).copy_(grad_query),
        grad_key.to(prefix_key.dtype),
        grad_value.to(prefix_value.dtype),
        grad_gate.to(gate.dtype),
    )


def prefix_scores(query, prefix_key, softmax_scale, row_ids, compute) -> Tensor:
    """Scaled scores ``(batch, num_heads, q_len, prefix_len)`` in ``compute``."""
    batch, num_heads = query.shape[:2]
    keys = per_query_head(rows_of(prefix_key, row_ids, batch).to(compute), num_heads)
    return scores_of(query.to(compute), keys, softmax_scale)[0]


def prefix_gradients(
    grad_out, query, prefix_key, prefix_value, gate, probs, softmax_scale, gate_fn, row_ids
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the term, from its probabilities; everything in one dtype, unrounded."""
    batch, num_heads = query.shape[:2]
    num_prefixes, num_kv_heads = prefix_key.shape[:2]
    factor, slope = _gate_factor(rows_of(gate, row_ids, batch), gate_fn)
    keys = per_query_head(rows_of(prefix_key, row_ids, batch), num_heads)
    values = per_query_head(rows_of(prefix_value, row_ids, batch), num_heads)
    factor = factor[:, :, None, None]
    contributes = has_adapter(row_ids, batch, query.device)[:, None, None, None] & (factor != 0)

    grad_probs = torch.einsum("bhtd,bhpd->bhtp", grad_out, values)
    delta = (probs * grad_probs).sum(-1, keepdim=True)  # (batch, num_heads, q_len, 1)
    # where, not multiplication: 0 * NaN would carry a poisoned prefix into rows that do not use it
    grad_scores = torch.where(contributes, factor * probs * (grad_probs - delta), 0)
    weights = torch.where(contributes, factor * probs, 0)
    grad_query = softmax_scale * torch.einsum("bhtp,bhpd->bhtd", grad_scores, keys)
    grad_keys = softmax_scale * torch.einsum("bhtp,bhtd->bhpd", grad_scores, query)
    grad_values = torch.einsum("bhtp,bhtd->bhpd", weights, grad_out)

    def into_bank(x: Tensor) -> Tensor:
        return sum_rows(sum_heads(torch.where(contributes, x, 0), num_kv_heads), row_ids, num_prefixes)

    return (
        torch.where(contributes, grad_query, 0),
        into_bank(grad_keys),
        into_bank(grad_values),
        sum_rows(slope * delta.sum((2, 3)), row_ids, num_prefixes),
    )


def _gate_factor(gate: Tensor, gate_fn: str) -> tuple[Tensor, Tensor]:
    """The factor ``f(gate)`` and its derivative."""
    if gate_fn == "identity":
        return gate, torch.ones_like(gate)
    factor = gate.tanh()
    return factor, 1 - factor * factor
