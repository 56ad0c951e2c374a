"""A frozen model's RMS norm, gated linear unit and rotary embedding on a CPU: registration and autograd.

They have the bits of PyTorch's own operations forward (the sums of :func:`rms_norm` are in PyTorch's order, :func:`glu`
calls the model's activation) and one pass for the gradients of their activations; their weights are frozen. They keep
their inputs for backward, where PyTorch keeps several tensors of that size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter.ops.backends import choose_backend, lack
from fastadapter.ops.registration import register
from fastadapter.reference import frozen as reference


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, backend):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.backend = eps, backend
        return run_rms_norm(backend, x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        grad_x = _run_rms_norm_backward(ctx.backend, grad_out.contiguous(), x, weight, ctx.eps)
        return grad_x, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))``, the mean and the root in fp32 (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        x: ``(..., hidden)``, fp32, bf16 or fp16 (fp64 by the reference).
        weight: ``(hidden,)`` of the dtype of ``x``, frozen: it gets no gradient.
        eps: added to the mean square.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.
    Returns: shape and dtype of ``x``, contiguous; the bits of :func:`fastadapter.reference.frozen.rms_norm`.

    >>> x, weight = torch.randn(2, 8), torch.ones(8)
    >>> torch.equal(rms_norm(x, weight, 1e-6), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    True
    """
    chosen = choose_backend(backend, x.device.type, x.dtype, "rms_norm")
    x, weight = x.contiguous(), weight.detach().contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _RmsNorm.apply(x, weight, eps, chosen)
    return run_rms_norm(chosen, x, weight, eps)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act, activation, backend):
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        operands = (each.contiguous() for each in (grad_out, *ctx.saved_tensors))
        grad_gate, grad_up = _run_glu_backward(ctx.backend, *operands, ctx.activation)
        return grad_gate, grad_up, None, None, None


def glu(
    gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], activation: str, backend: str = "auto"
) -> Tensor:
    """``act(gate) * up`` (Shazeer, arXiv:2002.05202, section 2), for activations of one shape and dtype.

    Args:
        act: the model's own function; its bits are those of the result.
        activation: its name among :data:`fastadapter.ops.bottleneck.ACTIVATIONS`, for the gradient.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.

    >>> gate, up = torch.randn(2, 8), torch.randn(2, 8)
    >>> silu = torch.nn.functional.silu
    >>> torch.equal(glu(gate, up, silu, "silu"), silu(gate) * up)
    True
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        chosen = choose_backend(backend, gate.device.type, gate.dtype, "glu_backward")
        return _Glu.apply(gate, up, act, activation, chosen)
    return act(gate) * up


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cosine, sine, backend):
        ctx.save_for_backward(cosine, sine)
        ctx.backend = backend
        return run_rotary(backend, query, key, cosine, sine, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key):
        grads = run_rotary(ctx.backend, grad_query, grad_key, *ctx.saved_tensors, True)
        return (*grads, None, None, None)


def rotary(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``x cos + (-x2, x1) sin`` of queries and keys ``x = (x1, x2)`` (Su et al., arXiv:2104.09864, equation 34).

    Args:
        query: ``(batch, num_heads, q_len, head_dim)``, fp32, bf16 or fp16 (fp64 by the reference).
        key: ``(batch, num_kv_heads, q_len, head_dim)``.
        cosine, sine: ``(batch or 1, q_len, head_dim)``, of the same dtype; they get no gradient.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.
    Returns: both, with the bits of :func:`fastadapter.reference.frozen.rotary`.

    >>> query, key, angle = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8)
    >>> turned, _ = rotary(query, key, angle.cos(), angle.sin())
    >>> torch.equal(turned, reference.rotary(query, key, angle.cos(), angle.sin())[0])
    True
    """
    chosen = choose_backend(backend, query.device.type, query.dtype, "rotary")
    cosine, sine = cosine.detach(), sine.detach()
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _Rotary.apply(query, key, cosine, sine, chosen)
    return run_rotary(chosen, query, key, cosine, sine, False)


for _op in ("rms_norm", "glu_backward", "rotary"):
    lack(_op, "triton", f"there is no Triton kernel of {_op}: on a GPU the frozen model is its own")

# On arguments that are known to be right and without autograd: once per norm and token.
run_rms_norm = register(
    "rms_norm",
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm,
    fake=lambda x, weight, eps: torch.empty_like(x),
    launcher=None,
)
_run_rms_norm_backward = register(
    "rms_norm",
    "rms_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm_backward,
    fake=lambda grad_out, x, weight, eps: torch.empty_like(x),
    launcher=None,
)
_run_glu_backward = register(
    "glu_backward",
    "glu_backward",
    "(Tensor grad_out, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    reference=reference.glu_backward,
    fake=lambda grad_out, gate, up, activation: (torch.empty_like(gate), torch.empty_like(up)),
    launcher=None,
)
run_rotary = register(
    "rotary",
    "rotary",
    "(Tensor query, Tensor key, Tensor cosine, Tensor sine, bool transposed) -> (Tensor, Tensor)",
    reference=reference.rotary,
    fake=lambda query, key, *_: (torch.empty_like(query), torch.empty_like(key)),
    launcher=None,
)
