"""What the references of the attention ops share: bank rows, scores, masks, the softmax and its gradients.

S  = c(softmax_scale * Q K^T) + mask,     c(x) = softcap * tanh(x / softcap), or x
p  = exp(S - lse)                         0 where no key is visible (lse = -inf)
dS = p * (dO V^T - delta)                 delta = rowsum(dO * O)
dQ = softmax_scale * (dS * c') K          c' = 1 - tanh(x / softcap)^2, or 1
dK = softmax_scale * (dS * c')^T Q,       dV = p^T dO
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

NEVER = float("-inf")  # the score of a key that is not visible


def default_compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(bank: Tensor, row_ids: Tensor | None, batch: int) -> Tensor:
    """The bank entry of every row, ``(batch, ...)``; entry 0 stands in where there is none."""
    if row_ids is None:
        return bank[:1].expand(batch, *bank.shape[1:])
    return bank[row_ids.clamp(min=0).long()]


def has_adapter(row_ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if row_ids is None:
        return torch.ones(batch, dtype=torch.bool, device=device)
    return row_ids >= 0


def sum_rows(x: Tensor, row_ids: Tensor | None, num_prefixes: int) -> Tensor:
    """A bank's gradient from the rows' ``(batch, ...)``: every entry collects the rows that use it."""
    if row_ids is None:
        return x.sum(0, keepdim=True)
    # where, not multiplication: 0 * NaN would carry one row into the entry of another
    own = [(row_ids == entry).view(-1, *[1] * (x.dim() - 1)) for entry in range(num_prefixes)]
    return torch.stack([torch.where(rows, x, 0).sum(0) for rows in own])


def per_query_head(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def sum_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """The query heads of one kv head summed: ``(batch, num_kv_heads, ...)``."""
    return x.unflatten(1, (num_kv_heads, x.shape[1] // num_kv_heads)).sum(2)


def scores_of(query: Tensor, keys: Tensor, softmax_scale: float, softcap: float | None = None):
    """Scaled, capped scores ``(batch, num_heads, q_len, kv_len)`` and their slope by the uncapped (1 without cap)."""
    scores = softmax_scale * torch.einsum("bhtd,bhsd->bhts", query, keys)
    if softcap is None:
        return scores, torch.ones((), dtype=scores.dtype, device=scores.device)
    bounded = torch.tanh(scores / softcap)
    return softcap * bounded, 1 - bounded * bounded


def mask_scores(scores: Tensor, attn_mask: Tensor | None, is_causal: bool, window: int | None) -> Tensor:
    """``-inf`` where a key is not visible; a float mask is added."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            return torch.where(attn_mask, scores, NEVER)
        return scores + attn_mask.to(scores.dtype)
    if not is_causal:
        return scores
    q_len, kv_len = scores.shape[-2:]
    i = torch.arange(q_len, device=scores.device)[:, None]
    j = torch.arange(kv_len, device=scores.device)
    visible = j <= i if window is None else (j <= i) & (j > i - window)
    return torch.where(visible, scores, NEVER)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, all 0 where nothing is visible, and the natural ``lse`` in at least fp32."""
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return torch.where(lse[..., None] == NEVER, 0, scores.softmax(-1)), lse


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """The probabilities again, from a saved ``lse``."""
    shift = torch.where(lse == NEVER, 0, lse)  # no -inf - -inf
    return (scores.to(lse.dtype) - shift[..., None]).exp().to(scores.dtype)


def softmax_gradients(grad_out, query, keys, values, probs, slope, delta, softmax_scale):
    """``grad_query, grad_keys, grad_values`` per query head; ``delta`` is ``(batch, num_heads, q_len, 1)``."""
    grad_scores = probs * (torch.einsum("bhtd,bhsd->bhts", grad_out, values) - delta) * slope
    return (
        softmax_scale * torch.einsum("bhts,bhsd->bhtd", grad_scores, keys),
        softmax_scale * torch.einsum("bhts,bhtd->bhsd", grad_scores, query),
        torch.einsum("bhts,bhtd->bhsd", probs, grad_out),
    )


def sequences(cu_seqlens: Tensor, row_ids: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Every packed sequence: its positions, and its own id as the ``row_ids`` of a batch of one.

    The references take a packed batch apart and run each sequence alone, which is what packing has to equal.
    """
    for index, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        yield slice(start, stop), None if row_ids is None else row_ids[index : index + 1]


def tokens(x: Tensor, span: slice) -> Tensor:
    """Positions of a ``(batch, heads, seq, ...)`` tensor, copied: products of unaligned views round differently."""
    return x[:, :, span].contiguous()
