"""Attention in which a learned prefix and the keys share one softmax: public function, registration, autograd."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.attention import (
    OPTIONS_SCHEMA,
    Options,
    check_operands,
    check_options,
    reference_options,
)
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.base_attention import choose_base
from fastadapter.ops.composed import merged_over_base
from fastadapter.ops.registration import fake_bank_grad, fake_grad, only_needed, register

_OP = "prefix_attention"
FORMS = ("auto", "single", "merge")


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
    cap applies to the prefix's scores too. Deterministic on a CPU; on a GPU as ``scaled_dot_product_attention`` is.

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
        form: ``"single"`` computes everything in one pass, which C++ has. ``"merge"`` takes an attention that torch
            has for the keys and merges the prefix into its output and ``lse``; forward and gradients are exact too,
            those of ``key`` and ``value`` are computed whenever that of ``query`` is needed. On a GPU that is the first
            of cuDNN's, flash and memory-efficient attention that can run the call, and else the plain reference; on a
            CPU torch's flash attention, which has no ``window``, ``softcap`` or ``cu_seqlens``. ``"auto"``: single on
            a CPU, where it took less time in every shape tried; merge on a GPU.
    Returns: shape, dtype and strides of ``query``; 0 for a query that sees neither key nor prefix. Gradients come in
        each argument's own dtype.
    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: wrong shape or device, options that exclude each other, ids or offsets out of range, a backend
            that cannot run, a call the merge form cannot compute.

    >>> query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    >>> prefix_key, prefix_value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    >>> prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True).shape
    torch.Size([2, 4, 5, 8])
    """
    check_operands(query, key, value, prefix_key, prefix_value, _OP)
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
    chosen = choose_backend(backend, query.device.type, query.dtype, _OP, query.shape[3])
    base = _base_of(form, chosen, query, key, options)
    if base is not None:
        return merged_over_base(base, chosen, query, key, value, prefix_key, prefix_value, options)
    args = (query, key, value, prefix_key, prefix_value, *options)
    train = torch.is_grad_enabled() and any(x.requires_grad for x in args[:5])
    return _PrefixAttention.apply(chosen, *args) if train else run_forward(chosen, *args, False)[0]


def _base_of(form: str, backend: str, query: Tensor, key: Tensor, options: Options) -> str | None:
    """The attention to merge the prefix into, ``None`` for the single pass.

    Raises:
        ValueError: unknown form, or one that ``backend`` does not have for this call, with the reason.
    """
    if form not in FORMS:
        raise ValueError(f"{_OP}: form must be one of {', '.join(FORMS)}, got {form!r}")
    if backend == "triton":
        if form == "single":
            raise ValueError(f"{_OP}: form='single' cannot run here: Triton merges into another attention")
        return choose_base(query, key, options)[0]
    if form != "merge":
        return None
    base, reasons = choose_base(query, key, options)
    if base == "reference":
        why = "; ".join(reasons) or f"torch has no attention that returns lse on {query.device.type}"
        raise ValueError(f"{_OP}: form='merge' cannot run here: {why}")
    return base


class _PrefixAttention(torch.autograd.Function):
    """Saves the inputs, the unrounded output and ``lse``; the probabilities are computed anew."""

    @staticmethod
    def forward(ctx, backend, *args):
        out, lse, wide_out = run_forward(backend, *args, True)
        ctx.backend = backend
        ctx.constants = args[8:]
        unrounded = wide_out if checks.is_half(out) else out
        ctx.save_for_backward(*args[:5], unrounded, lse, *args[5:8])
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


def _reference_forward(query, key, value, prefix_key, prefix_value, *rest):
    *options, save = rest
    results = reference.prefix_attention(
        query, key, value, prefix_key, prefix_value, **reference_options(*options)
    )
    return only_needed(results, (True, save, save and checks.is_half(query)))


def _reference_backward(grad_out, query, key, value, prefix_key, prefix_value, out, lse, *rest):
    options = reference_options(*rest[:-3])
    grads = reference.prefix_attention_backward(
        grad_out, query, key, value, prefix_key, prefix_value, out, lse, **options
    )
    need_query, need_key_value, need_prefix = rest[-3:]
    return only_needed(grads, (need_query, need_key_value, need_key_value, need_prefix, need_prefix))


def _fake_forward(query, *rest):
    save, wide = rest[-1], checks.lse_dtype(query)
    lse = query.new_empty(query.shape[:3] if save else 0, dtype=wide)
    kept = save and checks.is_half(query)
    wide_out = torch.empty_like(query, dtype=wide) if kept else query.new_empty(0, dtype=wide)
    return torch.empty_like(query), lse, wide_out


def _fake_backward(grad_out, query, key, value, prefix_key, prefix_value, *rest):
    need_query, need_key_value, need_prefix = rest[-3:]
    return (
        fake_grad(query, need_query),
        fake_grad(key, need_key_value),
        fake_grad(value, need_key_value),
        fake_bank_grad(prefix_key, need_prefix),
        fake_bank_grad(prefix_value, need_prefix),
    )


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value"
_OPTIONS = OPTIONS_SCHEMA.format(gate_fn="")

# A resolved backend on checked arguments in the order of the schema, without autograd. Beside `out` and `lse` the
# forward gives `out` before it was rounded to a half type, which is what the backward takes as `out`: the rounding is
# large beside a gradient of scores that cancels. It has shape (0,) where `out` is not rounded, or nothing is saved.
run_forward = register(
    _OP,
    _OP,
    f"({_OPERANDS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    launcher=None,
)
run_backward = register(
    _OP,
    "prefix_attention_backward",
    f"(Tensor grad_out, {_OPERANDS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool need_query, bool need_key_value, bool need_prefix) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    launcher=None,
)
