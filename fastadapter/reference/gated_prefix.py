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
    compute = compute_dtype or _compute_dtype(query)
    batch = query.shape[0]
    factor, _ = _gate_factor(_rows_of(gate, row_ids, batch).to(compute), gate_fn)  # (batch, num_heads)
    probs, values = _attend(query, prefix_key, prefix_value, softmax_scale, row_ids, compute)
    term = factor[:, :, None, None] * torch.einsum("bhtp,bhpd->bhtd", probs, values)
    adapted = (factor != 0) & _has_adapter(row_ids, batch, query.device)[:, None]  # (batch, num_heads)
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
    compute = compute_dtype or _compute_dtype(query)
    batch, num_heads, q_len, head_dim = query.shape
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    factor, slope = _gate_factor(_rows_of(gate, row_ids, batch).to(compute), gate_fn)
    probs, values = _attend(query, prefix_key, prefix_value, softmax_scale, row_ids, compute)
    keys = _per_query_head(_rows_of(prefix_key, row_ids, batch).to(compute), num_heads)

    adapted = _has_adapter(row_ids, batch, query.device)[:, None, None, None]
    contributes = adapted & (factor != 0)[:, :, None, None]
    zero = torch.zeros((), dtype=compute, device=query.device)
    grad = grad_out.to(compute)
    grad_probs = torch.einsum("bhtd,bhpd->bhtp", grad, values)
    delta = (probs * grad_probs).sum(-1, keepdim=True)  # (batch, num_heads, q_len, 1)
    factor = factor[:, :, None, None]
    # where, not multiplication: 0 * NaN would carry a poisoned prefix into rows that do not use it
    grad_scores = torch.where(contributes, factor * probs * (grad_probs - delta), zero)
    weights = torch.where(contributes, factor * probs, zero)
    grad_query = softmax_scale * torch.einsum("bhtp,bhpd->bhtd", grad_scores, keys)
    grad_query = torch.where(contributes, grad_query, zero)

    def sum_heads(
        x: Tensor,
    ) -> Tensor:  # the query heads of one kv head, (batch, num_kv_heads, prefix_len, head_dim)
        x = torch.where(contributes, x, zero)
        return x.unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).sum(2)

    def sum_rows(x: Tensor) -> Tensor:  # every bank entry collects the rows that use it
        if row_ids is None:
            return x.sum(0, keepdim=True)
        own = [(row_ids == entry).view(-1, *[1] * (x.dim() - 1)) for entry in range(num_prefixes)]
        return torch.stack([torch.where(rows, x, zero).sum(0) for rows in own])

    grad_key = sum_rows(
        sum_heads(softmax_scale * torch.einsum("bhtp,bhtd->bhpd", grad_scores, query.to(compute)))
    )
    grad_value = sum_rows(sum_heads(torch.einsum("bhtp,bhtd->bhpd", weights, grad)))
    grad_gate = sum_rows(slope * delta.sum((2, 3)))
    return (
        torch.empty_like(query).copy_(grad_query),
        grad_key.to(prefix_key.dtype),
        grad_value.to(prefix_value.dtype),
        grad_gate.to(gate.dtype),
    )


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _gate_factor(gate: Tensor, gate_fn: str) -> tuple[Tensor, Tensor]:
    """The factor ``f(gate)`` and its derivative."""
    if gate_fn == "identity":
        return gate, torch.ones_like(gate)
    factor = gate.tanh()
    return factor, 1 - factor * factor


def _rows_of(bank: Tensor, row_ids: Tensor | None, batch: int) -> Tensor:
    """The bank entry of every row, ``(batch, ...)``; entry 0 stands in where there is none."""
    if row_ids is None:
        return bank[:1].expand(batch, *bank.shape[1:])
    return bank[row_ids.clamp(min=0).long()]


def _has_adapter(row_ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if row_ids is None:
        return torch.ones(batch, dtype=torch.bool, device=device)
    return row_ids >= 0


def _per_query_head(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _attend(query, prefix_key, prefix_value, softmax_scale, row_ids, compute):
    """Prefix probabilities ``(batch, num_heads, q_len, prefix_len)`` and the values they weigh."""
    batch, num_heads = query.shape[:2]
    keys = _per_query_head(_rows_of(prefix_key, row_ids, batch).to(compute), num_heads)
    values = _per_query_head(_rows_of(prefix_value, row_ids, batch).to(compute), num_heads)
    scores = softmax_scale * torch.einsum("bhtd,bhpd->bhtp", query.to(compute), keys)
    return scores.softmax(-1), values
