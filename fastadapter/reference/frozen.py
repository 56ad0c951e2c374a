"""Parts of a frozen model around the adapters, as transformers computes them.

    rms_norm:  r = 1 / sqrt(mean(x^2) + eps) in fp32,  out = weight * (x r),  (x r) in the dtype of x
    glu:       out = act(gate) * up
    rotary:    out = x cos + (-x2, x1) sin   with x = (x1, x2)

    d rms_norm: g = grad_out * weight,  grad_x = r (g - x r^2 mean(g x))
    d glu:      grad_up = grad_out act(gate),  grad_gate = grad_out up act'(gate)
    d rotary:   grad_x = grad_out cos + (g2, -g1)  with (g1, g2) = grad_out sin

Zhang and Sennrich, arXiv:1910.07467, equation 4; Shazeer, arXiv:2002.05202, section 2; Su et al., arXiv:2104.09864,
equation 34, with halves in place of neighbours. Weights get no gradients: they are frozen. Derivation: docs/maths.md.
"""

import torch
from torch import Tensor

from fastadapter.reference.bottleneck import activate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x (..., hidden)``, ``weight (hidden,)`` of its dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_backward(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide, g = x.to(wide_dtype), grad_out.to(wide_dtype) * weight.to(wide_dtype)
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (r * (g - wide * r * r * (g * wide).mean(-1, keepdim=True))).to(x.dtype)


def glu_backward(grad_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` and ``up``, of one shape and dtype, in ``act(gate) * up``."""
    wide_dtype = torch.promote_types(gate.dtype, torch.float32)
    value, slope = activate(gate.to(wide_dtype), activation)
    grad = grad_out.to(wide_dtype)
    return (grad * up.to(wide_dtype) * slope).to(gate.dtype), (grad * value).to(up.dtype)


def rotary(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """``query``, ``key`` ``(batch, heads, q_len, head_dim)``, ``cosine``, ``sine`` ``(batch or 1, q_len, head_dim)``.

    Args:
        transposed: the gradients of query and key, for those of what they became.
    """
    turn = _turned_back if transposed else _turned
    first, second = (turn(x, cosine[:, None], sine[:, None]) for x in (query, key))
    return first, second


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-x2, x1), dim=-1) * sine


def _turned_back(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    g1, g2 = (grad * sine).chunk(2, dim=-1)
    return grad * cosine + torch.cat((g2, -g1), dim=-1)
