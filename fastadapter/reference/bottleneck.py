"""Bottleneck adapter: Houlsby (arXiv:1902.00751), Pfeiffer (arXiv:2005.00247), with a scale He (arXiv:2110.04366).

    y   = norm(x)                        layer norm, RMS norm or none
    z   = y D^T + b_d                    (tokens, bottleneck_size)
    h   = act(z)
    out = residual + scale * (h U^T + b_u)

    dH = scale * dO U,  dZ = act'(z) * dH,  dY = dZ D
    dU = scale * dO^T h,  db_u = scale * sum dO,  dD = dZ^T y,  db_d = sum dZ
    dX = norm backward of dY;  the gradient of the residual is dO itself

Derivation: docs/maths.md. An output channel whose row of U and whose bias are zero, and a row without an adapter,
return ``residual`` itself, so a down projection that holds Inf or NaN cannot reach them. An entry that contributes
nothing (U all zero, or a scale of zero) sends no gradient through its down projection.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    activation: str = "gelu",
    norm: str = "none",
    norm_eps: float = 1e-5,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``residual + scale * (up(act(down(norm(x)))) + up_bias)``.

    Args:
        x, residual: ``(batch, q_len, hidden)``.
        down_weight, up_weight: ``(n, bottleneck_size, hidden)`` and ``(n, hidden, bottleneck_size)``.
        down_bias, up_bias: ``(n, bottleneck_size)`` and ``(n, hidden)``.
        norm_weight, norm_bias: ``(n, hidden)``.
        row_ids: int32 ``(batch,)``, which bank entry each row uses; -1 is none. ``None``: entry 0 for all rows.
        norm: ``"none"``, ``"layer_norm"`` or ``"rms_norm"`` over the hidden dimension, statistics at least in fp32.
        compute_dtype: precision of every intermediate; fp32, or fp64 for fp64 inputs, unless given.
    Returns: ``(batch, q_len, hidden)``, dtype and strides of ``x``.
    """
    compute = compute_dtype or _compute_dtype(x)
    _, _, y = _normalize(x, norm_weight, norm_bias, row_ids, norm, norm_eps, compute)
    hidden, _ = activate(_down(y, down_weight, down_bias, row_ids), activation)
    term = torch.einsum("btr,bcr->btc", hidden, _rows_of(up_weight, row_ids, x).to(compute))
    active = (up_weight != 0).any(-1)  # (n, hidden)
    if up_bias is not None:
        term = term + _rows_of(up_bias, row_ids, x).to(compute)[:, None]
        active = active | (up_bias != 0)
    active = (_rows_of(active, row_ids, x) & _has_adapter(row_ids, x)[:, None])[:, None] & (scale != 0)
    kept = torch.zeros_like(x) if residual is None else residual
    out = torch.where(active, (kept.to(compute) + scale * term).to(x.dtype), kept)
    return torch.empty_like(x).copy_(out)


def bottleneck_backward(
    grad_out: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    row_ids: Tensor | None = None,
    activation: str = "gelu",
    norm: str = "none",
    norm_eps: float = 1e-5,
    scale: float = 1.0,
    add_grad_out: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`bottleneck`; that of ``residual`` is ``grad_out`` itself.

    Args:
        add_grad_out: ``residual`` was ``x``, so ``grad_out`` is a part of ``grad_x``.
    Returns: ``grad_x, grad_down_weight, grad_up_weight, grad_down_bias, grad_up_bias, grad_norm_weight,
        grad_norm_bias``, each in the shape and dtype of its input (``grad_up_bias`` in that of ``up_weight``);
        ``None`` for an input that is absent.
    """
    compute = compute_dtype or _compute_dtype(x)
    num_entries = down_weight.shape[0]
    normed, inverse, y = _normalize(x, norm_weight, norm_bias, row_ids, norm, norm_eps, compute)
    hidden, slope = activate(_down(y, down_weight, down_bias, row_ids), activation)
    grad = grad_out.to(compute)
    zero = torch.zeros((), dtype=compute, device=x.device)

    grad_hidden = scale * torch.einsum("btc,bcr->btr", grad, _rows_of(up_weight, row_ids, x).to(compute))
    grad_down = (slope * grad_hidden).to(compute)
    grad_y = torch.einsum("btr,brc->btc", grad_down, _rows_of(down_weight, row_ids, x).to(compute))
    grad_normed = (
        grad_y if norm_weight is None else grad_y * _rows_of(norm_weight, row_ids, x).to(compute)[:, None]
    )
    chain = _normalize_backward(grad_normed, normed, inverse, norm).to(compute)

    contributes = (up_weight != 0).any(-1).any(-1) & (scale != 0)  # (n,)
    through = (_rows_of(contributes, row_ids, x) & _has_adapter(row_ids, x))[:, None, None]
    kept = grad_out if add_grad_out else torch.zeros_like(grad_out)
    grad_x = torch.where(through, (kept.to(compute) + chain).to(x.dtype), kept)

    def sum_entries(rule: str, *operands: Tensor) -> Tensor:
        """Every bank entry collects the rows that use it; where, so that 0 * NaN of another row stays out."""
        sums = []
        for entry in range(num_entries):
            own = _has_adapter(row_ids, x) if row_ids is None else row_ids == entry
            sums.append(torch.einsum(rule, *(torch.where(own[:, None, None], t, zero) for t in operands)))
        return torch.stack(sums)

    def below(sums: Tensor, like: Tensor) -> Tensor:
        """Of what lies below the up projection, which an entry that contributes nothing does not reach."""
        return torch.where(contributes.view(-1, *[1] * (sums.dim() - 1)), sums, zero).to(like.dtype)

    scaled = scale * grad
    grad_up_weight = (
        sum_entries("btc,btr->cr", scaled, hidden)
        if scale
        else torch.zeros(up_weight.shape, dtype=up_weight.dtype, device=x.device)
    )
    return (
        torch.empty_like(x).copy_(grad_x),
        below(sum_entries("btr,btc->rc", grad_down, y), down_weight),
        grad_up_weight.to(up_weight.dtype),
        None if down_bias is None else below(sum_entries("btr->r", grad_down), down_bias),
        sum_entries("btc->c", scaled).to(up_weight.dtype),
        None if norm_weight is None else below(sum_entries("btc->c", grad_y * normed), norm_weight),
        None if norm_bias is None else below(sum_entries("btc->c", grad_y), norm_bias),
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What PyTorch computes statistics and elementwise functions of ``dtype`` in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_of(bank: Tensor, row_ids: Tensor | None, x: Tensor) -> Tensor:
    """The bank entry of every row, ``(batch, ...)``; entry 0 stands in where there is none."""
    if row_ids is None:
        return bank[:1].expand(x.shape[0], *bank.shape[1:])
    return bank[row_ids.clamp(min=0).long()]


def _has_adapter(row_ids: Tensor | None, x: Tensor) -> Tensor:
    if row_ids is None:
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    return row_ids >= 0


def _normalize(x, norm_weight, norm_bias, row_ids, norm, norm_eps, compute):
    """``x`` normalised, one over its standard deviation or root mean square, and the input of the projection."""
    if norm == "none":
        return x.to(compute), None, x.to(compute)
    wide = _wide(compute)
    values = x.to(wide)
    if norm == "layer_norm":
        values = values - values.mean(-1, keepdim=True)
    inverse = (values.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    normed = values * inverse
    y = normed
    if norm_weight is not None:
        y = y * _rows_of(norm_weight, row_ids, x).to(wide)[:, None]
    if norm_bias is not None:
        y = y + _rows_of(norm_bias, row_ids, x).to(wide)[:, None]
    return normed.to(compute), inverse, y.to(compute)


def _normalize_backward(grad, normed, inverse, norm):
    if norm == "none":
        return grad
    grad, normed = grad.to(inverse.dtype), normed.to(inverse.dtype)
    shift = grad.mean(-1, keepdim=True) if norm == "layer_norm" else 0
    return inverse * (grad - shift - normed * (grad * normed).mean(-1, keepdim=True))


def _down(y, down_weight, down_bias, row_ids):
    z = torch.einsum("btc,brc->btr", y, _rows_of(down_weight, row_ids, y).to(y.dtype))
    return z if down_bias is None else z + _rows_of(down_bias, row_ids, y).to(y.dtype)[:, None]


def activate(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``act(z)`` and its derivative, both rounded once to the dtype of ``z`` (the slope stays wide)."""
    wide = z.to(_wide(z.dtype))
    if activation == "relu":
        value, slope = wide.relu(), (wide > 0).to(wide.dtype)
    elif activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(wide * math.sqrt(0.5)))
        value, slope = F.gelu(wide), cdf + wide * torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    elif activation == "gelu_tanh":
        factor = math.sqrt(2 / math.pi)
        t = torch.tanh(factor * (wide + 0.044715 * wide**3))
        inner = factor * (1 + 3 * 0.044715 * wide * wide)
        value, slope = F.gelu(wide, approximate="tanh"), 0.5 * (1 + t) + 0.5 * wide * (1 - t * t) * inner
    elif activation == "silu":
        sigmoid = wide.sigmoid()
        value, slope = wide * sigmoid, sigmoid * (1 + wide * (1 - sigmoid))
    elif activation == "tanh":
        value = wide.tanh()
        slope = 1 - value * value
    else:
        value, slope = wide, torch.ones_like(wide)
    return value.to(z.dtype), slope
