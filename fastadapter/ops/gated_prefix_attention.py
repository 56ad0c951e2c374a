"""Attention and LLaMA-Adapter's gated prefix: public function, registration, autograd.

In one pass on a CPU; on a GPU an attention of torch (``base_attention.py``) with our term on top (``composed.py``)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.attention import OPTIONS_SCHEMA, check_operands, check_options, reference_options
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.base_attention import choose_base
from fastadapter.ops.composed import gated_over_base
from fastadapter.ops.registration import fake_bank_grad, fake_grad, only_needed, register

_OP = "gated_prefix_attention"


def gated_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    gate_fn: str = "tanh",
    row_ids: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention plus gated attention over a learned prefix, each with its own softmax.

    Equivalent to ``scaled_dot_product_attention(query, key, value) + tanh(gate) * softmax(query @ prefix_key.mT *
    softmax_scale) @ prefix_value`` with one gate per head (LLaMA-Adapter, arXiv:2303.16199, eq. 6-8).
    A zero gate gives the bits of the attention alone, whatever the prefix holds. Mask, causality, window and soft
    cap are the attention's alone. One pass on a CPU, deterministic; on a GPU torch's own attention, the first of
    cuDNN's, flash and memory-efficient that can run the call, and else the plain reference, with our kernel on its
    output: as deterministic as ``scaled_dot_product_attention``.

    Args:
        query: ``(batch, num_heads, q_len, head_dim)`` in fp32, bf16, fp16 or fp64; any strides.
        key, value: ``(batch, num_kv_heads, kv_len, head_dim)`` in the dtype of ``query``; ``num_heads`` is a multiple
            of ``num_kv_heads``.
        prefix_key, prefix_value: bank ``(num_prefixes, num_kv_heads, prefix_len, head_dim)`` in the dtype of
            ``query`` or fp32.
        gate: ``(num_prefixes, num_heads)`` fp32 (fp64 beside fp64 activations).
        is_causal: key ``j`` is visible to query ``i`` if ``j <= i`` (upper-left aligned, whatever ``kv_len``).
        attn_mask: broadcastable to ``(batch, num_heads, q_len, kv_len)``; bool (True: attend), or the dtype of
            ``query`` or fp32, added to the scaled scores. Not differentiable. Not with ``is_causal``.
        softmax_scale: ``head_dim ** -0.5`` unless given; of both softmaxes.
        gate_fn: ``"tanh"`` or ``"identity"``, applied to ``gate``.
        row_ids: int32 ``(batch,)``, the bank entry of every row; -1 is plain attention. Needed when the bank has
            more than one entry.
        window: with ``is_causal``, key ``j`` is visible only if ``j > i - window`` (``sliding_window`` of Mistral
            and Gemma).
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2).
        cu_seqlens: int32 ``(num_seqs + 1,)``, ascending from 0 to ``q_len``: the sequences of a packed batch of one.
            Attention stays within a sequence; ``row_ids`` is then ``(num_seqs,)``. Not with ``attn_mask``.
        backend: ``"auto"`` (C++ on CPU, Triton on GPU), ``"triton"``, ``"cpp"`` or ``"reference"``.
    Returns: shape, dtype and strides of ``query``. A query that sees no key gets the prefix term alone. Gradients
        come in each argument's own dtype.
    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: wrong shape or device, options that exclude each other, ids or offsets out of range, a backend
            that cannot run.

    >>> query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    >>> prefix_key, prefix_value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    >>> gated_prefix_attention(query, key, value, prefix_key, prefix_value, torch.ones(1, 4), is_causal=True).shape
    torch.Size([2, 4, 5, 8])
    """
    check_operands(query, key, value, prefix_key, prefix_value, _OP)
    checks.require_tensor(_OP, gate=gate)
    num_prefixes = prefix_key.shape[0]
    checks.require_gate(_OP, gate, query.dtype, num_prefixes, query.shape[1])
    checks.require_same_device(_OP, query.device, gate=gate)
    checks.require_gate_fn(_OP, gate_fn)
    options = check_options(
        _OP,
        query,
        key,
        num_prefixes,
        is_causal=is_causal,
        attn_mask=attn_mask,
        cu_seqlens=cu_seqlens,
        window=window,
        softcap=softcap,
        softmax_scale=softmax_scale,
        row_ids=row_ids,
    )
    chosen = choose_backend(backend, query.device.type, query.dtype, _OP, query.shape[3])
    operands = (query, key, value, prefix_key, prefix_value, gate)
    if chosen == "triton":
        base, _ = choose_base(query, key, options)
        return gated_over_base(base, chosen, *operands, gate_fn, options)
    args = (*operands, *options.gated(gate_fn))
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:6]):
        return _GatedPrefixAttention.apply(chosen, *args)
    return run_forward(chosen, *args, False)[0]


class _GatedPrefixAttention(torch.autograd.Function):
    """Saves the inputs, the unrounded base output and both ``lse``; the probabilities are computed anew."""

    @staticmethod
    def forward(ctx, backend, *args):
        out, *kept = run_forward(backend, *args, True)
        ctx.backend = backend
        ctx.constants = args[9:]
        ctx.save_for_backward(*args[:6], *kept, *args[6:9])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[1:7]
        need_query, need_key, need_value, need_prefix_key, need_prefix_value, need_gate = needed
        needs = (need_query, need_key or need_value, need_prefix_key or need_prefix_value, need_gate)
        grads = _backward(ctx.backend, grad_out, *ctx.saved_tensors, *ctx.constants, *needs)
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        return (None, *wanted, *[None] * (3 + len(ctx.constants)))


def _reference_forward(query, key, value, prefix_key, prefix_value, gate, *rest):
    mask, cu_seqlens, row_ids, scale, gate_fn, *others, save = rest
    options = reference_options(mask, cu_seqlens, row_ids, scale, *others)
    results = reference.gated_prefix_attention(
        query, key, value, prefix_key, prefix_value, gate, gate_fn=gate_fn, **options
    )
    return only_needed(results, (True, save, save, save))


def _reference_backward(grad_out, *args):
    *operands, mask, cu_seqlens, row_ids, scale, gate_fn, is_causal, window, softcap = args[:-4]
    options = reference_options(mask, cu_seqlens, row_ids, scale, is_causal, window, softcap)
    grads = reference.gated_prefix_attention_backward(grad_out, *operands, gate_fn=gate_fn, **options)
    need_query, need_key_value, need_prefix, need_gate = args[-4:]
    return only_needed(
        grads, (need_query, need_key_value, need_key_value, need_prefix, need_prefix, need_gate)
    )


def _fake_forward(query, *rest):
    out = torch.empty_like(query)
    wide = checks.lse_dtype(query)
    if not rest[-1]:
        return out, *(query.new_empty(0, dtype=wide) for _ in range(3))
    lse = query.new_empty(query.shape[:3], dtype=wide)
    return out, torch.empty_like(query, dtype=wide), lse, torch.empty_like(lse)


def _fake_backward(grad_out, query, key, value, prefix_key, prefix_value, gate, *rest):
    need_query, need_key_value, need_prefix, need_gate = rest[-4:]
    return (
        fake_grad(query, need_query),
        fake_grad(key, need_key_value),
        fake_grad(value, need_key_value),
        fake_bank_grad(prefix_key, need_prefix),
        fake_bank_grad(prefix_value, need_prefix),
        fake_bank_grad(gate, need_gate),
    )


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor gate"
_OPTIONS = OPTIONS_SCHEMA.format(gate_fn=" str gate_fn,")

# A resolved backend on checked arguments in the order of the schema, without autograd.
run_forward = register(
    _OP,
    _OP,
    f"({_OPERANDS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    launcher=None,
)
_backward = register(
    _OP,
    "gated_prefix_attention_backward",
    f"(Tensor grad_out, {_OPERANDS}, Tensor base, Tensor lse, Tensor prefix_lse, {_OPTIONS}, "
    "bool need_query, bool need_key_value, bool need_prefix, bool need_gate) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    launcher=None,
)
