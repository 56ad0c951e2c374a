"""Merge a learned prefix into the output of any attention that returns its ``lse``: public function and autograd."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.attention import BANK_AXES, QUERY_AXES, check_prefix, scale_or_default, softcap_or_zero
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.prefix_attention import prefix_gradients, run_merge

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
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shape or device, ids out of range, a backend that cannot run.

    >>> base, query = torch.zeros(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    >>> nothing = torch.full((2, 4, 5), float("-inf"))  # a base that saw no key
    >>> prefix_key, prefix_value = torch.randn(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
    >>> out, lse = prefix_merge(base, nothing, query, prefix_key, prefix_value)
    >>> torch.allclose(out, torch.ones_like(out))
    True
    """
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
    constants = (scale_or_default(_OP, softmax_scale, query.shape[3]), softcap_or_zero(_OP, softcap))
    chosen = choose_backend(backend, query.device.type, query.dtype, _OP)
    args = (base, base_lse, query, prefix_key, prefix_value, row_ids, *constants)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:5]):
        return PrefixMerge(*_PrefixMerge.apply(chosen, *args))
    return PrefixMerge(*run_merge(chosen, *args))


class _PrefixMerge(torch.autograd.Function):
    """The gradient of a merge by itself; ``prefix_attention`` in its merge form does without that of the base."""

    @staticmethod
    def forward(ctx, backend, *args):
        base, base_lse, query, prefix_key, prefix_value, row_ids, *constants = args
        out, lse = run_merge(backend, *args)
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
                return prefix_gradients(
                    ctx.backend, grad, query, prefix_key, values, merged, lse, row_ids, *ctx.constants, *needs
                )

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
