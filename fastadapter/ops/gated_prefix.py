"""Gated prefix attention term of LLaMA-Adapter: public function, registration, autograd.

The kernels sit behind one registered boundary, ``torch.ops.fastadapter.gated_prefix`` and its backward, so that
``torch.compile`` sees one opaque call. Autograd stays outside of it in a :class:`torch.autograd.Function`, which
costs less per call than autograd registered on the op.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.backends import automatic_backend, choose_backend
from fastadapter.ops.registration import fake_bank_grad, fake_grad, only_needed, register

GATE_FUNCTIONS = checks.GATE_FUNCTIONS


def gated_prefix(
    base: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor,
    *,
    softmax_scale: float | None = None,
    gate_fn: str = "tanh",
    row_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add gated attention over a learned prefix to ``base``, the output of any attention.

    Equivalent to ``base + tanh(gate) * softmax(query @ prefix_key.mT * softmax_scale) @ prefix_value`` with one
    gate per head and the softmax over the prefix only (LLaMA-Adapter, arXiv:2303.16199, eq. 6-8). A zero gate
    returns the bits of ``base`` whatever the prefix holds. Deterministic, forward and backward.

    Args:
        base, query: ``(batch, num_heads, q_len, head_dim)``, one dtype out of fp32, bf16, fp16, fp64; any strides.
            ``query`` is what the attention saw, after rotary embedding and norm.
        prefix_key, prefix_value: bank ``(num_prefixes, num_kv_heads, prefix_len, head_dim)`` in the dtype of
            ``query`` or fp32; ``num_heads`` is a multiple of ``num_kv_heads``.
        gate: ``(num_prefixes, num_heads)`` fp32 (fp64 beside fp64 activations).
        softmax_scale: ``head_dim ** -0.5`` unless given.
        gate_fn: ``"tanh"`` or ``"identity"``, applied to ``gate``.
        row_ids: int32 ``(batch,)``, the bank entry of every row; -1 leaves a row as it is. Needed when the bank
            has more than one entry.
        backend: ``"auto"`` (C++ on CPU, Triton on GPU), ``"triton"``, ``"cpp"`` or ``"reference"``.
    Returns: shape, dtype and strides of ``base``. Gradients come in each argument's own dtype.
    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: wrong shape or device, a scale that is not finite, ``row_ids`` out of range, a backend that cannot
            run.

    >>> base, query = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    >>> key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    >>> torch.equal(gated_prefix(base, query, key, value, torch.zeros(1, 4)), base)
    True
    """
    _validate(base, query, prefix_key, prefix_value, gate, row_ids, gate_fn)
    checks.require_row_ids_in_range("gated_prefix", row_ids, prefix_key.shape[0])
    scale = checks.scale_or_default("gated_prefix", softmax_scale, query.shape[3])
    chosen = choose_backend(backend, query.device.type, query.dtype, "gated_prefix", query.shape[3])
    args = (base, query, prefix_key, prefix_value, gate, row_ids, scale, gate_fn)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:5]):
        return _GatedPrefix.apply(*args, chosen)
    return run_forward(chosen, *args)


@checks.once(tensors=6)
def _validate(base, query, prefix_key, prefix_value, gate, row_ids, gate_fn) -> None:
    op = "gated_prefix"
    checks.require_tensor(
        op, base=base, query=query, prefix_key=prefix_key, prefix_value=prefix_value, gate=gate
    )
    if query.dim() != 4:
        raise ValueError(
            f"{op}: query must have 4 dims (batch, num_heads, q_len, head_dim), got {tuple(query.shape)}"
        )
    if prefix_key.dim() != 4:
        raise ValueError(
            f"{op}: prefix_key must have 4 dims (num_prefixes, num_kv_heads, prefix_len, head_dim), "
            f"got {tuple(prefix_key.shape)}"
        )
    batch, num_heads, _, head_dim = query.shape
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    if base.shape != query.shape:
        checks.require_shape(op, "base", base, "the shape of query", tuple(query.shape))
    if prefix_key.shape[3] != head_dim:
        raise ValueError(
            f"{op}: prefix_key must have head_dim {head_dim} like query, got {prefix_key.shape[3]}"
        )
    if prefix_value.shape != prefix_key.shape:
        checks.require_shape(
            op, "prefix_value", prefix_value, "the shape of prefix_key", tuple(prefix_key.shape)
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{op}: num_heads of query must be a multiple of num_kv_heads of prefix_key, "
            f"got {num_heads} and {num_kv_heads}"
        )
    if num_prefixes == 0 or prefix_len == 0 or head_dim == 0:
        raise ValueError(
            f"{op}: num_prefixes, prefix_len and head_dim must be at least 1, got prefix_key {tuple(prefix_key.shape)}"
        )
    dtype = query.dtype
    checks.require_dtype(op, "query", query, checks.ACTIVATION_DTYPES)
    if base.dtype != dtype:
        checks.require_dtype(op, "base", base, (dtype,))
    if prefix_key.dtype != dtype or prefix_value.dtype != dtype:
        checks.require_prefix_dtype(op, dtype, prefix_key, prefix_value)
    checks.require_gate(op, gate, dtype, num_prefixes, num_heads)
    device = query.device
    checks.require_same_device(
        op,
        device,
        base=base,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        gate=gate,
    )
    checks.require_gate_fn(op, gate_fn)
    checks.require_row_ids(op, row_ids, batch, num_prefixes)
    if row_ids is not None:
        checks.require_same_device(op, device, row_ids=row_ids)


class _GatedPrefix(torch.autograd.Function):
    """Saves the inputs only: the probabilities are a tile wide and cheaper to recompute than to store."""

    @staticmethod
    def forward(ctx, base, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn, backend):
        ctx.save_for_backward(query, prefix_key, prefix_value, gate, row_ids)
        ctx.constants = (softmax_scale, gate_fn)
        ctx.backend = backend
        return run_forward(
            backend, base, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        need_base, need_query, need_key, need_value, need_gate = ctx.needs_input_grad[:5]
        grads: list[Tensor | None] = [None] * 4
        if need_query or need_key or need_value or need_gate:
            needs = (need_query, need_key or need_value, need_gate)
            computed = run_backward(ctx.backend, grad_out, *ctx.saved_tensors, *ctx.constants, *needs)
            wanted = (need_query, need_key, need_value, need_gate)
            grads = [grad if want else None for grad, want in zip(computed, wanted, strict=True)]
        return (grad_out if need_base else None, *grads, None, None, None, None)


def _reference_forward(base, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn):
    return reference.gated_prefix(
        base,
        query,
        prefix_key,
        prefix_value,
        gate,
        softmax_scale=softmax_scale,
        gate_fn=gate_fn,
        row_ids=row_ids,
    )


def _reference_backward(
    grad_out, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn, *needs: bool
):
    grads = reference.gated_prefix_backward(
        grad_out,
        query,
        prefix_key,
        prefix_value,
        gate,
        softmax_scale=softmax_scale,
        gate_fn=gate_fn,
        row_ids=row_ids,
    )
    need_query, need_prefix, need_gate = needs
    return only_needed(grads, (need_query, need_prefix, need_prefix, need_gate))


def _fake_forward(base, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn):
    return torch.empty_like(base)


def _fake_backward(
    grad_out, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn, *needs: bool
):
    need_query, need_prefix, need_gate = needs
    return (
        fake_grad(query, need_query),
        fake_bank_grad(prefix_key, need_prefix),
        fake_bank_grad(prefix_value, need_prefix),
        fake_bank_grad(gate, need_gate),
    )


def _reference_backward_onto(grad_out, base_grad, query, *rest):
    grad_query, *others = _reference_backward(grad_out, query, *rest)
    return _onto(base_grad, grad_query, query), *others


def _cpu_backward_onto(grad_out, base_grad, query, *rest):
    backend = automatic_backend("cpu", query.dtype, "gated_prefix")[0]
    grad_query, *others = run_backward(backend, grad_out, query, *rest)
    return _onto(base_grad, grad_query, query), *others


def _onto(base_grad: Tensor, grad_query: Tensor, query: Tensor) -> Tensor:
    """The two parts of the gradient of ``query``, strided like it."""
    return torch.empty_like(query).copy_(grad_query.add_(base_grad)) if grad_query.numel() else grad_query


def _fake_backward_onto(grad_out, base_grad, *rest):
    return _fake_backward(grad_out, *rest)


_OPERANDS = "Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor gate, Tensor? row_ids"
_CONSTANTS = "float softmax_scale, str gate_fn"

# The forward of a resolved backend on arguments that are known to be right, in the order of the registered op and
# without autograd: for callers that checked everything before and run once per layer and token.
run_forward = register(
    "gated_prefix",
    "gated_prefix",
    f"(Tensor base, {_OPERANDS}, {_CONSTANTS}) -> Tensor",
    reference=_reference_forward,
    fake=_fake_forward,
    launcher="gated_prefix_forward",
)
_NEEDS = "bool need_query, bool need_prefix, bool need_gate"
run_backward = register(
    "gated_prefix",
    "gated_prefix_backward",
    f"(Tensor grad_out, {_OPERANDS}, {_CONSTANTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    launcher="gated_prefix_backward",
)
# The same where the base's part of the gradient of query is known: on a GPU the two meet in the kernel.
run_backward_onto = register(
    "gated_prefix",
    "gated_prefix_backward_onto",
    f"(Tensor grad_out, Tensor base_grad, {_OPERANDS}, {_CONSTANTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward_onto,
    fake=_fake_backward_onto,
    launcher="gated_prefix_backward_onto",
    cpu=_cpu_backward_onto,
)
