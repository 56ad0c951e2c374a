"""A prefix in an attention that torch computes: a base and our term, as one autograd function.

One function, so that the base's backward gets what makes its gradients exact (docs/maths.md, "prefix_merge"), and the
two gradients of ``query`` meet in our kernel instead of in an addition of three tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter.ops.attention import Options
from fastadapter.ops.base_attention import BASES, masked_attention, narrowed
from fastadapter.ops.gated_prefix import gated_prefix
from fastadapter.ops.gated_prefix import run_backward as term_backward
from fastadapter.ops.gated_prefix import run_backward_onto as term_backward_onto
from fastadapter.ops.gated_prefix import run_forward as term_forward
from fastadapter.ops.prefix_merge import run_backward as merge_backward
from fastadapter.ops.prefix_merge import run_forward as merge_forward


def gated_over_base(
    base: str, backend: str, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    gate: Tensor, gate_fn: str, options: Options,
) -> Tensor:  # fmt: skip
    """``gated_prefix`` on the output of ``BASES[base]``, shaped and strided like ``query``; arguments are checked."""
    tensors = (query, key, value, prefix_key, prefix_value, gate)
    if takes_masks(query, options):
        attended = masked_attention(query, key, value, _mask_of(options), options.softmax_scale)
        out = gated_prefix(
            attended, query, prefix_key, prefix_value, gate, softmax_scale=options.softmax_scale, gate_fn=gate_fn,
            row_ids=options.row_ids, backend=backend,
        )  # fmt: skip
        return _like_query(out, query)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _GatedOverBase.apply(base, backend, gate_fn, *tensors, *options)
    attended, _, _ = BASES[base].forward(query, key, value, options)
    return _like_query(_gated_term(backend, attended, *tensors, gate_fn, options), query)


def merged_over_base(
    base: str, backend: str, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    options: Options,
) -> Tensor:  # fmt: skip
    """``prefix_merge`` into ``BASES[base]``, shaped and strided like ``query``; arguments are checked."""
    tensors = (query, key, value, prefix_key, prefix_value)
    if takes_masks(query, options):
        return masked_joined(*tensors, options.row_ids, _mask_of(options), options.softmax_scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _MergedOverBase.apply(base, backend, *tensors, *options)
    return _like_query(_merged(base, backend, *tensors, options)[0], query)


def takes_masks(query: Tensor, options: Options) -> bool:
    """Whether a call under a mask goes to torch's attention as it is.

    On a GPU no base that returns ``lse`` under a mask is as fast: memory-efficient attention took 2.7 times as long,
    forward and backward, on an H200.
    """
    return options.attn_mask is not None and query.is_cuda and not options.softcap


def _mask_of(options: Options) -> Tensor:
    assert options.attn_mask is not None
    return options.attn_mask


def masked_joined(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, row_ids: Tensor | None,
    attn_mask: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Attention over a prefix and the keys, joined in memory, under a mask of the keys; differentiable.

    A row without an adapter sees the keys alone; one whose id is outside the bank is NaN.
    """
    keys, values, mask = joined_keys(key, value, prefix_key, prefix_value, row_ids, narrowed(attn_mask))
    assert mask is not None
    out = masked_attention(query, keys, values, mask, scale)
    if row_ids is not None:
        wrong = (row_ids < -1) | (row_ids >= len(prefix_key))
        out = out.masked_fill(wrong[:, None, None, None], float("nan"))
    return _like_query(out, query)


def joined_keys(
    key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, row_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The prefix of every row before its keys and values, and the mask of both; differentiable.

    Args:
        mask: broadcastable to ``(batch, num_heads, q_len, kv_len)``, of the keys alone; no mask hides the prefix, but
            that of a row without an adapter.
    """
    batch, prefix_len = key.shape[0], prefix_key.shape[2]
    adapted = None
    if row_ids is None:
        bank = [x.expand(batch, -1, -1, -1) for x in (prefix_key, prefix_value)]
    else:
        adapted = (row_ids >= 0)[:, None, None, None]
        entries = row_ids.clamp(0, len(prefix_key) - 1).long()
        # where: the entry that stands in where there is none may hold NaN
        bank = [torch.where(adapted, x[entries], 0.0) for x in (prefix_key, prefix_value)]
        mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device) if mask is None else mask
        mask = mask.expand(batch, *((1, 1, 1, *mask.shape)[-3:]))
    if mask is not None:
        seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        on_prefix = seen((*mask.shape[:-1], prefix_len))
        if adapted is not None:
            on_prefix = on_prefix.masked_fill(~adapted, False if mask.dtype == torch.bool else float("-inf"))
        mask = torch.cat([on_prefix, mask], dim=-1)
    keys, values = (
        torch.cat([x.to(own.dtype), own], dim=2) for x, own in zip(bank, (key, value), strict=True)
    )
    return keys, values, mask


class _GatedOverBase(torch.autograd.Function):
    """Saves the inputs, and what the base's backward needs."""

    @staticmethod
    def forward(ctx, base, backend, gate_fn, query, key, value, prefix_key, prefix_value, gate, *options):
        ctx.base, ctx.backend, ctx.gate_fn, ctx.constants = base, backend, gate_fn, options[3:]
        choice = Options(*options)
        attended, lse, state = BASES[base].forward(query, key, value, choice)
        tensors = (query, key, value, prefix_key, prefix_value, gate)
        ctx.save_for_backward(*tensors, attended, lse, *options[:3], *state)
        return _like_query(_gated_term(backend, attended, *tensors, gate_fn, choice), query)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, prefix_key, prefix_value, gate, attended, lse, *rest = ctx.saved_tensors
        options, state = Options(*rest[:3], *ctx.constants), rest[3:]
        needed = ctx.needs_input_grad[3:9]
        need_query, need_key, need_value, need_prefix_key, need_prefix_value, need_gate = needed
        grads: list[Tensor | None] = [None] * 6
        if need_query or need_key or need_value:
            grads[:3] = BASES[ctx.base].backward(grad_out, query, key, value, attended, lse, options, state)
        if need_query or need_prefix_key or need_prefix_value or need_gate:
            needs = (need_query, need_prefix_key or need_prefix_value, need_gate)
            rows = _Rows(query, options)
            bank = (prefix_key, prefix_value, gate, rows.ids, options.softmax_scale, ctx.gate_fn)
            operands = (rows.of(query), *bank, *needs)
            if need_query:
                found = term_backward_onto(ctx.backend, rows.of(grad_out), rows.of(grads[0]), *operands)
            else:
                found = term_backward(ctx.backend, rows.of(grad_out), *operands)
            grads[0], grads[3:] = rows.back(found[0]) if need_query else None, found[1:]
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        return (None, None, None, *wanted, *[None] * 7)


class _MergedOverBase(torch.autograd.Function):
    """The base's own backward gets the merged output and ``lse``: its probabilities are then the shared softmax's."""

    @staticmethod
    def forward(ctx, base, backend, query, key, value, prefix_key, prefix_value, *options):
        ctx.base, ctx.backend, ctx.constants = base, backend, options[3:]
        tensors = (query, key, value, prefix_key, prefix_value)
        out, lse, state = _merged(base, backend, *tensors, Options(*options))
        ctx.save_for_backward(*tensors, out, lse, *options[:3], *state)
        return _like_query(out, query)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, prefix_key, prefix_value, out, lse, *rest = ctx.saved_tensors
        options, state = Options(*rest[:3], *ctx.constants), rest[3:]
        needed = ctx.needs_input_grad[2:7]
        need_query, need_key, need_value, need_prefix_key, need_prefix_value = needed
        grads: list[Tensor | None] = [None] * 5
        if need_query or need_key or need_value:
            grads[:3] = BASES[ctx.base].backward(grad_out, query, key, value, out, lse, options, state)
        if need_query or need_prefix_key or need_prefix_value:
            needs = (need_query, need_prefix_key or need_prefix_value)
            rows = _Rows(query, options)
            on_query, *grads[3:] = merge_backward(
                ctx.backend, *map(rows.of, (grad_out, query)), prefix_key, prefix_value,
                rows.of(out), rows.of(lse).contiguous(), rows.of(grads[0]) if need_query else None, rows.ids,
                options.softmax_scale, options.softcap, *needs,
            )  # fmt: skip
            grads[0] = rows.back(on_query) if need_query else None
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        return (None, None, *wanted, *[None] * 7)


def _gated_term(
    backend, attended, query, key, value, prefix_key, prefix_value, gate, gate_fn, options
) -> Tensor:
    rows = _Rows(query, options)
    bank = (prefix_key, prefix_value, gate, rows.ids, options.softmax_scale, gate_fn)
    return rows.back(term_forward(backend, rows.of(attended), rows.of(query), *bank))


def _merged(base, backend, query, key, value, prefix_key, prefix_value, options):
    """Merged ``out, lse`` and the state that the backward of ``base`` needs."""
    attended, attended_lse, state = BASES[base].forward(query, key, value, options)
    rows = _Rows(query, options)
    out, lse = merge_forward(
        backend, *map(rows.of, (attended, attended_lse, query)), prefix_key, prefix_value, rows.ids,
        options.softmax_scale, options.softcap,
    )  # fmt: skip
    return rows.back(out), rows.back(lse).contiguous(), state


def _like_query(out: Tensor, query: Tensor) -> Tensor:
    return out if out.stride() == query.stride() else torch.empty_like(query).copy_(out)


class _Rows:
    """How the term sees a batch: as it is, or, packed with an entry per sequence, every token as a row of its own."""

    def __init__(self, query: Tensor, options: Options):
        self.by_token = options.cu_seqlens is not None and options.row_ids is not None
        self.ids = options.row_ids
        if options.cu_seqlens is not None and options.row_ids is not None:
            tokens = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
            self.ids = options.row_ids[torch.bucketize(tokens, options.cu_seqlens[1:-1], right=True)]

    def of(self, x: Any) -> Any:
        """``(1, heads, tokens, ...)`` to ``(tokens, heads, 1, ...)``."""
        return x.transpose(0, 2) if self.by_token else x

    back = of
