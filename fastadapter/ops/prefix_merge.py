"""Merge a learned prefix into the output of any attention that returns its ``lse``: public function and autograd."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.attention import BANK_AXES, QUERY_AXES, check_prefix
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.registration import fake_bank_grad, fake_grad, only_needed, register

_OP = "prefix_merge"


class PrefixMerge(NamedTuple):
    """A merged attention: ``out (batch, num_heads, q_len, head_dim)`` and ``lse (batch, num_heads, q_len)``."""

    out: Tensor
    lse: Tensor


def prefix_merge(
    base: Tensor,
    base_lse: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    row_ids: Tensor | None = None,
    backend: str = "auto",
) -> PrefixMerge:
    """Extend the softmax of an attention that was computed elsewhere by a learned prefix, exactly.

    If ``base, base_lse`` come from an attention over some keys, the result is that over the prefix and those keys
    (:func:`fastadapter.ops.prefix_attention`); docs/maths.md, "prefix_merge". Differentiable in ``base``,
    ``base_lse``, ``query`` and the prefix, so merges can be nested. Deterministic, forward and backward.

    An attention whose own backward takes ``out`` and ``lse`` needs no gradient from here: hand it the merged ones.

    Args:
        base, query: ``(batch, num_heads, q_len, head_dim)``, one dtype out of fp32, bf16, fp16, fp64; any strides.
        base_lse: ``(batch, num_heads, q_len)`` fp32 (fp64 beside fp64 activations): the natural logarithm of the sum
            of the exponentials of the base's scaled, capped and masked scores; -inf where it saw no key.
        prefix_key, prefix_value: bank ``(num_prefixes, num_kv_heads, prefix_len, head_dim)`` in the dtype of
            ``query`` or fp32; ``num_heads`` is a multiple of ``num_kv_heads``.
        softmax_scale: ``head_dim ** -0.5`` unless given; the base's own.
        softcap: the base's own; scores become ``softcap * tanh(scores / softcap)``.
        row_ids: int32 ``(batch,)``, the bank entry of every row; -1 leaves the bits of ``base`` and ``base_lse``.
        backend: ``"auto"`` (C++ on CPU, Triton on GPU), ``"triton"``, ``"cpp"`` or ``"reference"``.
    Returns: ``out`` with shape, dtype and strides of ``base``, and the merged ``lse``, contiguous.
    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: wrong shape or device, ids out of range, a backend that cannot run.

    >>> base, query = torch.zeros(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    >>> nothing = torch.full((2, 4, 5), float("-inf"))  # a base that saw no key
    >>> prefix_key, prefix_value = torch.randn(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
    >>> out, lse = prefix_merge(base, nothing, query, prefix_key, prefix_value)
    >>> torch.allclose(out, torch.ones_like(out))
    True
    """
    _validate(base, base_lse, query, prefix_key, prefix_value, row_ids)
    checks.require_row_ids_in_range(_OP, row_ids, prefix_key.shape[0])
    scale = checks.scale_or_default(_OP, softmax_scale, query.shape[3])
    constants = (scale, checks.softcap_or_zero(_OP, softcap))
    chosen = choose_backend(backend, query.device.type, query.dtype, _OP, query.shape[3])
    args = (base, base_lse, query, prefix_key, prefix_value, row_ids, *constants)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:5]):
        return PrefixMerge(*_PrefixMerge.apply(chosen, *args))
    return PrefixMerge(*run_forward(chosen, *args))


@checks.once(tensors=6)
def _validate(base, base_lse, query, prefix_key, prefix_value, row_ids) -> None:
    checks.require_tensor(
        _OP, base=base, base_lse=base_lse, query=query, prefix_key=prefix_key, prefix_value=prefix_value
    )
    checks.require_dims(_OP, "query", query, QUERY_AXES)
    checks.require_dims(_OP, "prefix_key", prefix_key, BANK_AXES)
    checks.require_dtype(_OP, "query", query, checks.ACTIVATION_DTYPES)
    checks.require_shape(_OP, "base", base, "the shape of query", tuple(query.shape))
    checks.require_dtype(_OP, "base", base, (query.dtype,))
    checks.require_shape(_OP, "base_lse", base_lse, "(batch, num_heads, q_len)", tuple(query.shape[:3]))
    checks.require_dtype(_OP, "base_lse", base_lse, (checks.lse_dtype(query),))
    check_prefix(_OP, query, prefix_key.shape[1], prefix_key, prefix_value)
    checks.require_same_device(_OP, query.device, base=base, base_lse=base_lse, row_ids=row_ids)
    checks.require_row_ids(_OP, row_ids, query.shape[0], prefix_key.shape[0])


class _PrefixMerge(torch.autograd.Function):
    """The gradient of a merge by itself; ``prefix_attention`` in its merge form does without that of the base."""

    @staticmethod
    def forward(ctx, backend, *args):
        base, base_lse, query, prefix_key, prefix_value, row_ids, *constants = args
        out, lse = run_forward(backend, *args)
        ctx.backend = backend
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(base, base_lse, query, prefix_key, prefix_value, row_ids, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        need_base, need_base_lse, *needed = ctx.needs_input_grad[1:6]
        need_query, need_prefix_key, need_prefix_value = needed
        base, base_lse, query, prefix_key, prefix_value, row_ids, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads: list[Tensor | None] = [None] * 5
        if need_base or need_base_lse:
            on_base = reference.prefix_merge_base_gradients(
                grad_out, grad_lse, base, base_lse, out, lse, row_ids=row_ids
            )
            grads[:2] = [grad if need else None for grad, need in zip(on_base, (need_base, need_base_lse))]
        if any(needed):
            needs = (need_query, need_prefix_key or need_prefix_value)

            def on_prefix(grad, values, merged):
                operands = (query, prefix_key, values, merged, lse, None, row_ids, *ctx.constants)
                return list(run_backward(ctx.backend, grad, *operands, *needs))

            grads[2:] = on_prefix(grad_out, prefix_value, out)
            if grad_lse is not None and (need_query or need_prefix_key):
                # The gradient through lse is p * grad_lse per score. The same backward gives it: with values of
                # zero, delta = rowsum(grad * merged) = -grad_lse is all that is left of p * (0 - delta).
                first = torch.zeros_like(out)
                first[..., 0] = 1
                through = on_prefix(
                    first * grad_lse.to(out.dtype)[..., None], torch.zeros_like(prefix_value), -first
                )
                grads[2] = grads[2] + through[0] if need_query else None
                grads[3] = grads[3] + through[1] if need_prefix_key else None
            grads[2:] = [grad if need else None for grad, need in zip(grads[2:], needed)]
        return (None, *grads, None, None, None)


def _reference_forward(base, lse, query, prefix_key, prefix_value, row_ids, softmax_scale, softcap):
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


def _fake_forward(base, lse, *rest):
    return torch.empty_like(base), lse.new_empty(lse.shape)


def _by_attention(backward):
    """The backward of a merge by that of :func:`fastadapter.ops.prefix_attention`, without keys."""

    def on_prefix(grad_out, query, prefix_key, prefix_value, out, lse, base_grad, *rest):
        row_ids, softmax_scale, softcap, need_query, need_prefix = rest
        nothing = query.new_empty(query.shape[0], prefix_key.shape[1], 0, query.shape[3])
        inputs = (query, nothing, nothing, prefix_key, prefix_value)
        options = (None, None, row_ids, softmax_scale, False, 0, softcap)
        # the merged output was rounded, and so was the base that went into it
        grads = backward(grad_out, *inputs, out.to(lse.dtype), lse, *options, need_query, False, need_prefix)
        on_query = grads[0]
        if need_query and base_grad is not None:
            on_query = torch.empty_like(query).copy_(on_query.add_(base_grad))
        return on_query, grads[3], grads[4]

    return on_prefix


def _attention_reference(grad_out, *args):
    *inputs, need_query, _, need_prefix = args
    *operands, _, _, row_ids, softmax_scale, _, _, softcap = inputs
    grads = reference.prefix_attention_backward(
        grad_out, *operands, softmax_scale=softmax_scale, softcap=softcap or None, row_ids=row_ids
    )
    return only_needed(grads, (need_query, False, False, need_prefix, need_prefix))


def _fake_backward(grad_out, query, prefix_key, prefix_value, *rest):
    need_query, need_prefix = rest[-2:]
    return (
        fake_grad(query, need_query),
        fake_bank_grad(prefix_key, need_prefix),
        fake_bank_grad(prefix_value, need_prefix),
    )


# A resolved backend on checked arguments in the order of the schema, without autograd.
run_forward = register(
    _OP,
    _OP,
    "(Tensor base, Tensor lse, Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor? row_ids, "
    "float softmax_scale, float softcap) -> (Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    launcher="prefix_merge_forward",
)
# Prefix's part of the gradients, from the merged out and lse. base_grad, the base's part of that of query, is added.
run_backward = register(
    _OP,
    "prefix_merge_backward",
    "(Tensor grad_out, Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor out, Tensor lse, "
    "Tensor? base_grad, Tensor? row_ids, float softmax_scale, float softcap, bool need_query, bool need_prefix) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_by_attention(_attention_reference),
    fake=_fake_backward,
    launcher="prefix_merge_backward",
    # by name: that op is registered later, with or without the extension
    cpu=_by_attention(lambda *args: torch.ops.fastadapter.prefix_attention_backward.default(*args)),
)
