"""The norm of a bottleneck's input, by torch's own kernels, with its weight and bias moved into the down projection.

    y = w * x^ + b,  z = y D^T + b_d  =  x^ D'^T + b'      D' = D diag(w),  b' = b_d + D b
    dD = dD' diag(w) + db' b^T,  db_d = db',  dw = sum_r dD' * D,  db = D^T db'

So weights and biases of a norm, which may differ by bank entry, never meet a tensor of the size of x, and neither do
their gradients; what is left, x^ = (x - mean) / sd or x / rms, is one row at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Standardised(NamedTuple):
    """x^ in the dtype of x, and what the gradient needs."""

    values: Tensor
    mean: Tensor | None
    inverse: Tensor


def _wide(x: Tensor) -> Tensor:
    """On a CPU (the interpreter) torch would round the statistics of half tensors to half."""
    return x.float() if x.device.type == "cpu" else x


def standardise(x: Tensor, norm: str, eps: float) -> Standardised:
    """``x`` over the deviation or root mean square of its last dimension."""
    if norm == "layer_norm":
        values, mean, inverse = torch.native_layer_norm(_wide(x), x.shape[-1:], None, None, eps)
        return Standardised(values.to(x.dtype), mean, inverse)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = (norms.square() / x.shape[-1] + eps).rsqrt()
    return Standardised(torch.mul(x, inverse, out=torch.empty_like(x)), None, inverse)


def standardise_backward(grad: Tensor, x: Tensor, found: Standardised) -> Tensor:
    """The gradient of ``x`` from that of x^, in the dtype of ``x``."""
    if found.mean is not None:
        given, mask = (_wide(grad), _wide(x), x.shape[-1:]), [True, False, False]
        chain = torch.ops.aten.native_layer_norm_backward(
            *given, found.mean, found.inverse, None, None, mask
        )[0]
    else:
        wide = grad.float()
        chain = found.inverse * (wide - found.values * (wide * found.values).mean(-1, keepdim=True))
    return chain.to(x.dtype)


def fold(
    down_weight: Tensor, down_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """D' and b' in fp32, for every entry of a bank."""
    # dense, so that sums over it do not depend on strides
    down = down_weight.float().contiguous()
    bias = None if down_bias is None else down_bias.float()
    if norm_bias is not None:
        added = torch.linalg.vecdot(down, norm_bias.float()[:, None])
        bias = added if bias is None else bias + added
    return down if norm_weight is None else down * norm_weight.float()[:, None], bias


def unfold(
    grad_down: Tensor, grad_bias: Tensor, down_weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of down_weight, norm_weight and norm_bias from those of D' and b', all in fp32.

    An entry that contributes nothing sends exact zeros, though its parameters hold Inf or NaN.
    """
    down, of_bias = down_weight.float().contiguous(), grad_bias[:, :, None]

    def times(grad: Tensor, parameter: Tensor) -> Tensor:
        return torch.where(grad == 0, 0.0, grad * parameter)

    grad = grad_down if norm_weight is None else times(grad_down, norm_weight.float()[:, None])
    if norm_bias is not None:
        grad = grad + times(of_bias, norm_bias.float()[:, None])
    return (
        grad,
        None if norm_weight is None else times(grad_down, down).sum(1),
        None if norm_bias is None else times(of_bias, down).sum(1),
    )
