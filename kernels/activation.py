"""Activations of a bottleneck and their derivatives, in fp32, as helpers of the kernels."""

import triton
import triton.language as tl
from fastadapter.kernels.prefix_tiles import _tanh

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "identity")


@triton.jit
def _sigmoid_and_slope(x):
    """``(1 + tanh(x)) / 2`` and the derivative of tanh, ``1 - tanh(x)^2``.

    Of the exponential, and not of tanh: both are as exact where tanh is next to 1 or -1, and sums with it cancel.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    whole = 1.0 + e
    return tl.where(x < 0, e, 1.0) / whole, 4.0 * e / (whole * whole)


@triton.jit
def _gelu_tanh_inner(z):
    """What the approximate gelu takes the tanh of, and its derivative."""
    square = z * z
    return 0.7978845608028654 * z * (1.0 + 0.044715 * square), 0.7978845608028654 * (1.0 + 0.134145 * square)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """f(z); zero stays zero, so padded hidden columns add nothing."""
    if ACTIVATION == "relu":
        h = tl.where(z < 0.0, 0.0, z)  # NaN passes, as in torch
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner, _ = _gelu_tanh_inner(z)
        share, _ = _sigmoid_and_slope(inner)
        h = z * share
    elif ACTIVATION == "silu":
        h = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        h = _tanh(z)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        h = z
    return h


@triton.jit
def _activation_slope(z, ACTIVATION: tl.constexpr):
    """f'(z)."""
    if ACTIVATION == "relu":
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        inner, inner_slope = _gelu_tanh_inner(z)
        share, tanh_slope = _sigmoid_and_slope(inner)
        slope = share + 0.5 * z * tanh_slope * inner_slope
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        _, slope = _sigmoid_and_slope(z)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope
