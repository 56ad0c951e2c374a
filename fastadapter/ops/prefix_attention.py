"""Attention in which a learned prefix and the keys share one softmax: public function, registration, autograd."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.attention import OPTIONS_SCHEMA, check_operands, check_options, reference_options
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.base_attention import BASES, choose_form
from fastadapter.ops.registration import fake_bank_grad, fake_grad, only_needed, register

_OP = "prefix_attention"


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    row_ids: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Attention over a learned prefix and the keys, in one softmax (prefix tuning, Li & Liang, arXiv:2101.00190).

    Equivalent to ``scaled_dot_product_attention(query, cat([prefix_key, key]), cat([prefix_value, value]))`` without
    the copies, with the prefix visible to every query: mask, causality and window are about the keys alone. The soft
    cap applies to the prefix's scores too. Deterministic, forward and backward.

    Args:
        query: ``(batch, num_heads, q_len, head_dim)`` in fp32, bf16, fp16 or fp64; any strides.
        key, value: ``(batch, num_kv_heads, kv_len, head_dim)`` in the dtype of ``query``; ``num_heads`` is a multiple
            of ``num_kv_heads``; ``kv_len`` may be 0.
        prefix_key, prefix_value: bank ``(num_prefixes, num_kv_heads, prefix_len, head_dim)`` in the dtype of
            ``query`` or fp32.
        is_causal, attn_mask, softmax_scale, window, softcap, cu_seqlens, backend: as in
            :func:`fastadapter.ops.gated_prefix_attention`.
        row_ids: int32 ``(batch,)`` (``(num_seqs,)`` with ``cu_seqlens``), the bank entry of every row; -1 is plain
            attention. Needed when the bank has more than one entry.
        form: ``"single"`` computes everything in one pass of ``backend``. ``"merge"`` takes torch's own attention
            for the keys (its flash attention on a CPU; cuDNN's, else flash, on a GPU) and merges the prefix into its
            output and ``lse`` by ``backend``; forward and gradients are exact too. It has no ``window``, ``softcap``
            or ``cu_seqlens``, and computes the gradients of ``key`` and ``value`` whenever that of ``query`` is
            needed. ``"auto"`` is the table in ``fastadapter/ops/base_attention.py``, by device.
    Returns: shape, dtype and strides of ``query``; 0 for a query that sees neither key nor prefix. Gradients come in
        each argument's own dtype.
    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shape or device, options that exclude each other, ids or offsets out of range, a backend
            that cannot run, a call the merge form cannot compute.

    >>> query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    >>> prefix_key, prefix_value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    >>> prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True).shape
    torch.Size([2, 4, 5, 8])
    """
    check_operands(_OP, query, key, value, prefix_key, prefix_value)
    options = check_options(
        _OP,
        query,
        key,
        prefix_key.shape[0],
        is_causal=is_causal,
        attn_mask=attn_mask,
        cu_seqlens=cu_seqlens,
        window=window,
        softcap=softcap,
        softmax_scale=softmax_scale,
        row_ids=row_ids,
    )
    chosen = choose_backend(backend, query.device.type, query.dtype, _OP)
    args = (query, key, value, prefix_key, prefix_value, *options)
    base = choose_form(form, query, key, options)
    train = torch.is_grad_enabled() and any(x.requires_grad for x in args[:5])
    if base is not None:
        return _MergedPrefixAttention.apply(base, chosen, *args) if train else merge(base, chosen, *args)[0]
    return _PrefixAttention.apply(chosen, *args) if train else run_forward(chosen, *args, False)[0]


class _PrefixAttention(torch.autograd.Function):
    """Saves the inputs, the output and ``lse``; the probabilities are computed anew."""

    @staticmethod
    def forward(ctx, backend, *args):
        out, lse = run_forward(backend, *args, True)
        ctx.backend = backend
        ctx.constants = args[8:]
        ctx.save_for_backward(*args[:5], out, lse, *args[5:8])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[1:6]
        need_query, need_key, need_value, need_prefix_key, need_prefix_value = needed
        needs = (need_query, need_key or need_value, need_prefix_key or need_prefix_value)
        grads = run_backward(ctx.backend, grad_out, *ctx.saved_tensors, *ctx.constants, *needs)
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        return (None, *wanted, *[None] * (3 + len(ctx.constants)))


class _MergedPrefixAttention(torch.autograd.Function):
    """The base's own backward gets the merged output and ``lse``: its probabilities are then the shared softmax's."""

    @staticmethod
    def forward(ctx, base, backend, *args):
        out, lse, state = merge(base, backend, *args)
        ctx.base, ctx.backend = base, backend
        ctx.constants = args[8:]
        ctx.save_for_backward(*args[:5], out, lse, args[5], args[7], *state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, prefix_key, prefix_value, out, lse, attn_mask, row_ids, *state = ctx.saved_tensors
        softmax_scale, is_causal, _, softcap = ctx.constants
        need_query, need_key, need_value, need_prefix_key, need_prefix_value = ctx.needs_input_grad[2:7]
        grads: list[Tensor | None] = [None] * 5
        if need_query or need_key or need_value:
            on_base = BASES[ctx.base].backward(
                grad_out, query, key, value, out, lse, attn_mask, is_causal, softmax_scale, state
            )
            grads[:3] = [x if need else None for x, need in zip(on_base, (need_query, need_key, need_value))]
        need_prefix = need_prefix_key or need_prefix_value
        if need_query or need_prefix:
            on_query, on_key, on_value = prefix_gradients(
                ctx.backend,
                grad_out,
                query,
                prefix_key,
                prefix_value,
                out,
                lse,
                row_ids,
                softmax_scale,
                softcap,
                need_query,
                need_prefix,
            )
            if need_query:
                grads[0] = torch.empty_like(query).copy_(on_query.add_(on_base[0]))
            grads[3] = on_key if need_prefix_key else None
            grads[4] = on_value if need_prefix_value else None
        return (None, None, *grads, *[None] * (3 + len(ctx.constants)))


def merge(base: str, backend: str, query, key, value, prefix_key, prefix_value, *options):
    """Merged ``out, lse`` and the state that the backward of ``base`` needs."""
    attn_mask, _, row_ids, softmax_scale, is_causal, _, softcap = options
    attended, attended_lse, state = BASES[base].forward(
        query, key, value, attn_mask, is_causal, softmax_scale
    )
    out, lse = run_merge(
        backend, attended, attended_lse, query, prefix_key, prefix_value, row_ids, softmax_scale, softcap
    )
    if out.stride() != query.stride():
        out = torch.empty_like(query).copy_(out)
    return out, lse, state


def prefix_gradients(
    backend: str,
    grad_out,
    query,
    prefix_key,
    prefix_value,
    out,
    lse,
    row_ids,
    softmax_scale,
    softcap,
    *needs: bool,
) -> list[Tensor]:
    """``grad_query, grad_prefix_key, grad_prefix_value`` of a merge: the shared softmax's backward without keys."""
    need_query, need_prefix = needs
    nothing = query.new_empty(query.shape[0], prefix_key.shape[1], 0, query.shape[3])
    options = (None, None, row_ids, softmax_scale, False, 0, softcap)
    grads = run_backward(
        backend,
        grad_out,
        query,
        nothing,
        nothing,
        prefix_key,
        prefix_value,
        out,
        lse,
        *options,
        need_query,
        False,
        need_prefix,
    )
    return [grads[0], grads[3], grads[4]]


def _reference_forward(query, key, value, prefix_key, prefix_value, *rest):
    *options, save = rest
    results = reference.prefix_attention(
        query, key, value, prefix_key, prefix_value, **reference_options(*options)
    )
    return only_needed(results, (True, save))


def _reference_backward(grad_out, query, key, value, prefix_key, prefix_value, out, lse, *rest):
    options = reference_options(*rest[:-3])
    grads = reference.prefix_attention_backward(
        grad_out, query, key, value, prefix_key, prefix_value, out, lse, **options
    )
    need_query, need_key_value, need_prefix = rest[-3:]
    return only_needed(grads, (need_query, need_key_value, need_key_value, need_prefix, need_prefix))


def _fake_forward(query, *rest):
    shape = query.shape[:3] if rest[-1] else 0
    return torch.empty_like(query), query.new_empty(shape, dtype=checks.lse_dtype(query))


def _fake_backward(grad_out, query, key, value, prefix_key, prefix_value, *rest):
    need_query, need_key_value, need_prefix = rest[-3:]
    return (
        fake_grad(query, need_query),
        fake_grad(key, need_key_value),
        fake_grad(value, need_key_value),
        fake_bank_grad(prefix_key, need_prefix),
        fake_bank_grad(prefix_value, need_prefix),
    )


def _reference_merge(base, lse, query, prefix_key, prefix_value, row_ids, softmax_scale, softcap):
    return reference.prefix_merge(
        base,
        lse,
        query,
        prefix_key,
        prefix_value,
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        row_ids=row_ids,
    )


def _fake_merge(base, lse, *rest):
    return torch.empty_like(base), lse.new_empty(lse.shape)


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value"
_OPTIONS = OPTIONS_SCHEMA.format(gate_fn="")

# A resolved backend on checked arguments in the order of the schema, without autograd.
run_forward = register(
    _OP,
    _OP,
    f"({_OPERANDS}, {_OPTIONS}, bool save) -> (Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    launcher="prefix_attention_forward",
)
run_backward = register(
    _OP,
    "prefix_attention_backward",
    f"(Tensor grad_out, {_OPERANDS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool need_query, bool need_key_value, bool need_prefix) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    launcher="prefix_attention_backward",
)
run_merge = register(
    "prefix_merge",
    "prefix_merge",
    "(Tensor base, Tensor lse, Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor? row_ids, "
    "float softmax_scale, float softcap) -> (Tensor, Tensor)",
    reference=_reference_merge,
    fake=_fake_merge,
    launcher="prefix_merge_forward",
    kernel_file=_OP,
)
