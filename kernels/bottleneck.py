"""Bottleneck adapter: residual + scale * up(act(down(norm(x)))) (arXiv:1902.00751, fig. 2; arXiv:2110.04366).

    z   = norm(x) D^T + b_d          (rows, bottleneck_size);  norm: none, layer_norm or rms_norm over hidden_size
    h   = f(z),  y = h U^T + b_u     f: relu, gelu (erf), gelu_tanh, silu, tanh, identity
    out = residual + scale * y       rounded once

    dH = scale * dO U,  dZ = f'(z) * dH
    dU = scale * dO^T h,  db_u = scale * sum dO,  dD = dZ^T norm(x),  db_d = sum dZ
    dX = dZ D, through the norm, plus dO where x is also the residual

What is bottleneck_size wide is left to the library's products, which are at the speed of memory there: z, dH, dU and
dD. What is hidden_size wide is one kernel for both directions (kernels/bottleneck_wide.py): up projection and sum
forward, dX backward. z is kept for backward, r / C of x. With row ids every row has weights of its own, and all
products are kernels (kernels/bottleneck_rows.py); rows are never mixed there, and a row has the bits it has alone.

Products are in the dtype of the activations with fp32 accumulators, fp32 weights beside half activations rounded to it;
gradients come in the dtype of their argument. A norm is the library's, see kernels/bottleneck_norm.py.

Layouts: x, residual, out ``(batch, seq, hidden)``; banks down_weight ``(n, r, hidden)``, up_weight
``(n, hidden, r)``, down_bias ``(n, r)``, up_bias, norm_weight, norm_bias ``(n, hidden)``; any strides.
"""

import torch
from fastadapter.kernels import bottleneck_rows, bottleneck_tiles
from fastadapter.kernels.bottleneck_norm import fold, standardise, standardise_backward, unfold
from fastadapter.kernels.bottleneck_tiles import check, flat
from fastadapter.kernels.bottleneck_wide import below, hidden, wide
from torch import Tensor

__all__ = ["bottleneck_backward", "bottleneck_forward", "bottleneck_saving"]


def bottleneck_forward(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, row_ids: Tensor | None,
    activation: str, norm: str, norm_eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """``residual + scale * up(act(down(norm(x))))``, like ``torch.empty_like(x)``.

    Args: layouts of the module docstring; fp32, bf16 or fp16 activations, weights in that dtype or fp32, row_ids
        int32 ``(batch,)``. A row whose id is -1 gets ``residual`` alone (0 without one), one whose id is outside
        ``[-1, n)`` NaN.
    Raises:
        TypeError: fp64, or bf16 under the interpreter.
        ValueError: tensors on a device Triton cannot reach, an unknown activation or norm.
    """
    out = torch.empty_like(x)
    _run(out, x, down_weight, up_weight, down_bias, up_bias, residual, norm_weight, norm_bias, row_ids,
         activation, norm, norm_eps, scale)  # fmt: skip
    return out


def bottleneck_saving(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """:func:`bottleneck_forward` and z ``(batch, seq, bottleneck_size)`` in the dtype of ``x``, for backward.

    Raises: ValueError: row_ids, whose backward computes z from x.
    """
    if args[7] is not None:
        raise ValueError("bottleneck (Triton): row_ids must be None where z is kept")
    out = torch.empty_like(x)
    z = _run(out, x, *args)
    return out, z.view(*x.shape[:2], z.shape[1])


def _run(
    out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, row_ids: Tensor | None,
    activation: str, norm: str, norm_eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """Write out; z, or with row ids h, of every row."""
    check(x, activation, norm, norm_weight, norm_bias)
    if out.numel() == 0:
        return x.new_empty((0, down_weight.shape[1]))
    if norm != "none":
        x = standardise(x, norm, norm_eps).values
        down_weight, down_bias = fold(down_weight, down_bias, norm_weight, norm_bias)
    with torch.cuda.device_of(x):
        if row_ids is not None:
            h = bottleneck_rows.forward(x, down_weight, down_bias, row_ids, activation, scale)
            wide(out, h, up_weight, up_bias, residual, row_ids, scale)
            return h
        z = _project(x, down_weight, down_bias)
        h = z if activation == "identity" and scale == 1 else hidden(z, activation, scale)[0]
        rows = flat(out)
        wide(rows, h, up_weight, up_bias, None if residual is None else flat(residual), None, scale)
        if rows.data_ptr() != out.data_ptr():  # strides that no view has
            out.copy_(rows.view(out.shape))
        return z


def _project(x: Tensor, down_weight: Tensor, down_bias: Tensor | None) -> Tensor:
    """z of every row, (rows, bottleneck_size) in the dtype of x."""
    bias = None if down_bias is None else down_bias[0].to(x.dtype)
    return bottleneck_tiles.product(flat(x)[0], down_weight[0].to(x.dtype).mT, x.dtype, bias)


def bottleneck_backward(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, row_ids: Tensor | None, z: Tensor | None,
    activation: str, norm: str, norm_eps: float, scale: float, add_grad_out: bool,
    need_x: bool, need_weights: bool, need_biases: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, down_weight, up_weight, down_bias, up_bias, norm_weight and norm_bias.

    Each in its argument's dtype, that of up_bias in up_weight's; those not needed, and those of arguments that are
    absent, have shape ``(0,)``. With ``add_grad_out`` x was the residual too, and grad_out is a part of its
    gradient. A row whose id is outside ``[-1, n)`` gets NaN in its gradient of x and adds nothing to the others.
    ``z`` is what :func:`bottleneck_saving` kept, or None: then it is computed from x. Errors as in
    :func:`bottleneck_forward`.
    """
    check(x, activation, norm, norm_weight, norm_bias)
    if z is not None and row_ids is not None:
        raise ValueError("bottleneck (Triton): z must be None with row_ids, which computes it from x")

    arguments = (x, down_weight, up_weight, down_bias, up_weight[..., 0], norm_weight, norm_bias)
    needed = (need_x, need_weights, need_weights, need_biases, need_biases, need_norm, need_norm)
    grads: list[Tensor | None]
    if scale == 0 or x.numel() == 0:
        # x's like x, those of banks contiguous
        grads = [torch.zeros_like(x), *(None if p is None else p.new_zeros(p.shape) for p in arguments[1:])]
        if add_grad_out:
            grads[0] = torch.empty_like(x).copy_(grad_out)
    else:
        grads = _chain(
            grad_out, x, down_weight, up_weight, down_bias, norm_weight, norm_bias, row_ids, z, activation, norm,
            norm_eps, scale, add_grad_out, need_x, need_weights, need_biases, need_norm,
        )  # fmt: skip
    return tuple(map(_result, grads, arguments, needed, [x] * 7))


def _result(grad: Tensor | None, argument: Tensor | None, need: bool, x: Tensor) -> Tensor:
    """In the dtype of its argument; absent or not needed: without elements."""
    if grad is None or argument is None or not need:
        return (x if argument is None else argument).new_empty(0)
    return grad.to(argument.dtype)


def _chain(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, row_ids: Tensor | None, z: Tensor | None,
    activation: str, norm: str, norm_eps: float, scale: float, add_grad_out: bool,
    need_x: bool, need_weights: bool, need_biases: bool, need_norm: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of :func:`bottleneck_backward`, those that are needed, in the dtypes they are summed in."""
    compute = _backward if row_ids is None else bottleneck_rows.backward
    tail = (row_ids, z, activation, scale)
    with torch.cuda.device_of(x):
        if norm == "none":
            needs = (need_x, need_weights, need_biases)
            *grads, _ = compute(grad_out, x, down_weight, up_weight, down_bias, *tail, add_grad_out, *needs)
            return [*grads, None, None]
        found = standardise(x, norm, norm_eps)
        folded, bias = fold(down_weight, down_bias, norm_weight, norm_bias)
        need_below = need_weights or need_norm
        # of biases, too: that of the norm is in b'
        needs = (need_x, need_below, need_below or need_biases)
        grad_x, grad_down, grad_up, grad_bias, grad_up_bias, reached = compute(
            grad_out, found.values, folded, up_weight, bias, *tail, False, *needs
        )
        if need_x:
            grad_x = standardise_backward(grad_x, x, found)
            total = _through(grad_x, grad_out if add_grad_out else None, reached, row_ids)
            grad_x = torch.empty_like(x)
            # torch's norm returns a contiguous gradient, whatever the strides of x
            grad_x = total if total.stride() == grad_x.stride() else grad_x.copy_(total)
        of_norm: tuple[Tensor | None, ...] = (None, None)
        if need_below:
            grad_down, *of_norm = unfold(grad_down, grad_bias, down_weight, norm_weight, norm_bias)
        return [grad_x, grad_down, grad_up, grad_bias, grad_up_bias, *of_norm]


def _through(chain: Tensor, kept: Tensor | None, reached: Tensor, row_ids: Tensor | None) -> Tensor:
    """kept + chain in the rows that the adapter's gradient reaches, the bits of kept (or zeros) in the others."""
    through = reached.any(1)
    if row_ids is not None:
        last = len(reached) - 1
        through = through[row_ids.clamp(0, last).long()] & (row_ids >= 0)
        through |= (row_ids < -1) | (row_ids > last)  # a wrong id, whose row is NaN
    total = chain if kept is None else kept + chain
    return torch.where(through[:, None, None], total, 0.0 if kept is None else kept)


def _backward(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None,
    row_ids: None, z: Tensor | None, activation: str, scale: float, add_grad_out: bool,
    need_x: bool, need_weights: bool, need_biases: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, down_weight, up_weight, down_bias (or of an absent one) and up_bias, without a norm.

    The same products whatever is asked for, so that a gradient has the same bits. Those of weights are in the weight's
    dtype, of biases in fp32. Last, which entries of the bank (here one) the gradient reaches, in parts.
    """
    dtype, size = x.dtype, down_weight.shape[1]
    rows, grad_rows = flat(x)[0], flat(grad_out)[0]
    z = _project(x, down_weight, down_bias) if z is None else flat(z)[0].contiguous()
    up = up_weight[0].to(dtype).contiguous()
    # both biases or none is the rule: then one product gives dU and db_u
    ones = down_bias is not None
    grad_hidden = bottleneck_tiles.product(grad_rows, up, dtype)
    h, grad_z, sums, reached = hidden(z, activation, scale, grad_hidden, up, ones)
    grad_x = grad_down = grad_up = grad_bias = grad_up_bias = None
    if need_x:
        grad_x = torch.empty_like(x)
        target = flat(grad_x)
        residual = flat(grad_out) if add_grad_out else None
        wide(target, grad_z, down_weight.mT, None, residual, None, 1.0, reached)
        if target.data_ptr() != grad_x.data_ptr():
            grad_x.copy_(target.view(x.shape))
    if need_weights or (need_biases and ones):
        grad_up = bottleneck_tiles.product(grad_rows.mT, h, up_weight.dtype)
        if ones:
            grad_up_bias = grad_up[None, :, size] * scale
        grad_up = grad_up[None, :, :size].contiguous()
    if need_weights:
        grad_down = bottleneck_tiles.product(grad_z[:, :size].mT, rows, down_weight.dtype)[None]
    if need_weights or need_biases:
        grad_bias = below(grad_down if need_weights else x.new_empty(0), sums, reached)[None]
    if need_biases and not ones:
        grad_up_bias = grad_rows.sum(0, dtype=torch.float32)[None] * scale
    return grad_x, grad_down, grad_up, grad_bias, grad_up_bias, reached
