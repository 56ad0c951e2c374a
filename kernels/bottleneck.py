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

from collections.abc import Sequence

import torch
from fastadapter.kernels import bottleneck_rows, bottleneck_tiles
from fastadapter.kernels.bottleneck_norm import fold, standardise, standardise_backward, unfold
from fastadapter.kernels.bottleneck_tiles import check, flat, in_dtype, lies_flat, padded
from fastadapter.kernels.bottleneck_wide import PARTS, below_run, hidden_run, wide, wide_run
from fastadapter.kernels.launch import prepared
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
    if row_ids is None:
        return _forward(out, x, down_weight, up_weight, down_bias, up_bias, residual, activation, scale)
    with torch.cuda.device_of(x):
        h = bottleneck_rows.forward(x, down_weight, down_bias, row_ids, activation, scale)
        wide(out, h, up_weight, up_bias, residual, row_ids, scale)
    return h


# No guard of the device around the shared form: the library's products have their own, and so has every launch.
@prepared(tensors=7)
def _forward(out, x, down_weight, up_weight, down_bias, up_bias, residual, activation, scale):
    """Write out; z of every row: the rows of all sequences are one."""
    num_rows, size = x.shape[0] * x.shape[1], down_weight.shape[1]
    as_it_is = activation == "identity" and scale == 1
    act = None if as_it_is else hidden_run(num_rows, size, activation, scale)
    width = size if as_it_is else padded(size)
    out_lies_flat = lies_flat(out)
    residual_lies_flat = residual is None or lies_flat(residual)
    residual_rows = None if residual is None else flat(residual)
    across = wide_run(flat(out), width, up_weight, up_bias, residual_rows, None, None, scale)

    def run(out, x, down_weight, up_weight, down_bias, up_bias, residual):
        z = _project(x, down_weight, down_bias)
        h = z if act is None else act(z, None, None)[0]
        rows = out if out_lies_flat else flat(out)
        across(rows, h, up_weight, up_bias, residual if residual_lies_flat else flat(residual), None, None)
        if not out_lies_flat:
            out.copy_(rows.view(out.shape))
        return z

    return run


def _project(x: Tensor, down_weight: Tensor, down_bias: Tensor | None) -> Tensor:
    """z of every row, (rows, bottleneck_size) in the dtype of x."""
    dtype = x.dtype
    bias = None if down_bias is None else in_dtype(down_bias, dtype).squeeze(0)
    weight = in_dtype(down_weight, dtype).squeeze(0)
    return bottleneck_tiles.product(x.reshape(-1, x.shape[2]), weight.mT, dtype, bias)


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

    grads: Sequence[Tensor | None]
    if scale == 0 or x.numel() == 0:
        # x's like x, those of banks contiguous
        parameters = (down_weight, up_weight, down_bias, up_weight[..., 0], norm_weight, norm_bias)
        grads = [torch.zeros_like(x), *(None if p is None else p.new_zeros(p.shape) for p in parameters)]
        if add_grad_out:
            grads[0] = torch.empty_like(x).copy_(grad_out)
    else:
        grads = _chain(
            grad_out, x, down_weight, up_weight, down_bias, norm_weight, norm_bias, row_ids, z, activation, norm,
            norm_eps, scale, add_grad_out, need_x, need_weights, need_biases, need_norm,
        )  # fmt: skip
    grad_x, grad_down, grad_up, grad_bias, grad_up_bias, grad_norm, grad_norm_bias = grads
    return (
        _result(grad_x, x, need_x, x),
        _result(grad_down, down_weight, need_weights, x),
        _result(grad_up, up_weight, need_weights, x),
        _result(grad_bias, down_bias, need_biases, x),
        _result(grad_up_bias, up_weight, need_biases, x),
        _result(grad_norm, norm_weight, need_norm, x),
        _result(grad_norm_bias, norm_bias, need_norm, x),
    )


def _result(grad: Tensor | None, argument: Tensor | None, need: bool, x: Tensor) -> Tensor:
    """In the dtype of its argument; absent or not needed: without elements."""
    if grad is None or argument is None or not need:
        return (x if argument is None else argument).new_empty(0)
    return in_dtype(grad, argument.dtype)


def _chain(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, row_ids: Tensor | None, z: Tensor | None,
    activation: str, norm: str, norm_eps: float, scale: float, add_grad_out: bool,
    need_x: bool, need_weights: bool, need_biases: bool, need_norm: bool,
) -> Sequence[Tensor | None]:  # fmt: skip
    """The gradients of :func:`bottleneck_backward`, those that are needed, in the dtypes they are summed in."""
    tail = (row_ids, z, activation, scale)
    if row_ids is None and norm == "none":
        needs = (need_x, need_weights, need_biases)
        found = _backward(grad_out, x, down_weight, up_weight, down_bias, *tail, add_grad_out, *needs)
        return (*found[:5], None, None)
    compute = _backward if row_ids is None else bottleneck_rows.backward
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


@prepared(tensors=7)
def _backward(
    grad_out, x, down_weight, up_weight, down_bias, row_ids, z, activation, scale, add_grad_out,
    need_x, need_weights, need_biases,
):  # fmt: skip
    """Gradients of x, down_weight, up_weight, down_bias (or of an absent one) and up_bias, without a norm or row ids.

    The same products whatever is asked for, so that a gradient has the same bits. Those of weights are in the weight's
    dtype, of biases in fp32. Last, which entries of the bank (here one) the gradient reaches, in parts.
    """
    dtype, shape = x.dtype, x.shape
    num_rows, size, hidden_size = shape[0] * shape[1], down_weight.shape[1], shape[2]
    # both biases or none is the rule: then one product gives dU and db_u
    ones = down_bias is not None
    need_up = need_weights or (need_biases and ones)
    act = hidden_run(num_rows, size, activation, scale, up_weight.numel(), ones)
    below = None
    if need_weights or need_biases:
        below = below_run(num_rows, size, hidden_size, scale, need_weights, need_up, ones)
    grad_out_lies_flat = lies_flat(grad_out)
    z_is_dense = z is not None and z.is_contiguous()
    x_lies_flat, across = True, None
    if need_x:
        like = torch.empty_like(x)
        x_lies_flat = lies_flat(like)
        residual = flat(grad_out) if add_grad_out else None
        reached = torch.empty((1, PARTS), dtype=torch.int32, device=x.device)
        across = wide_run(flat(like), padded(size + ones), down_weight.mT, None, residual, None, reached, 1.0)
        del like, residual, reached

    def run(grad_out, x, down_weight, up_weight, down_bias, row_ids, z):
        rows, grad_rows = x.reshape(-1, hidden_size), grad_out.reshape(-1, hidden_size)
        if z is None:
            z = _project(x, down_weight, down_bias)
        elif not z_is_dense:
            z = z.contiguous()
        up = in_dtype(up_weight, dtype).contiguous()
        grad_hidden = bottleneck_tiles.product(grad_rows, up.squeeze(0), dtype)
        h, grad_z, sums, reached = act(z, grad_hidden, up)
        grad_x = grad_down = grad_up = grad_bias = grad_up_bias = None
        if across is not None:
            grad_x = torch.empty_like(x)
            target = grad_x if x_lies_flat else flat(grad_x)
            residual = None
            if add_grad_out:
                residual = grad_out if grad_out_lies_flat else flat(grad_out)
            across(target, grad_z, down_weight.mT, None, residual, None, reached)
            if not x_lies_flat:
                grad_x.copy_(target.view(shape))
        product = None
        if need_up:
            product = bottleneck_tiles.product(grad_rows.mT, h, up_weight.dtype)
        if need_weights:
            grad_down = bottleneck_tiles.product(grad_z[:, :size].mT, rows, down_weight.dtype)[None]
        if below is not None:
            grad_bias, grad_up, grad_up_bias = below(grad_down, product, sums, reached)
        if need_biases and not ones:
            grad_up_bias = grad_rows.sum(0, dtype=torch.float32)[None] * scale
        return grad_x, grad_down, grad_up, grad_bias, grad_up_bias, reached

    return run
