"""Activations of a bottleneck and their derivatives, in fp32, as helpers of the kernels."""

import triton
import triton.language as tl
from fastadapter.kernels.prefix_tiles import _tanh

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "identity")


@triton.jit
def _gelu_tanh_inner(z):
    """The tanh of the approximate gelu, and the derivative of what it is taken of."""
    square = z * z
    inner = 0.7978845608028654 * z * (1.0 + 0.044715 * square)
    return _tanh(inner), 0.7978845608028654 * (1.0 + 0.134145 * square)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """f(z); zero stays zero, so padded hidden columns add nothing."""
    if ACTIVATION == "relu":
        h = tl.where(z < 0.0, 0.0, z)  # NaN passes, as in torch
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        t, _ = _gelu_tanh_inner(z)
        h = 0.5 * z * (1.0 + t)
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
        t, inner_slope = _gelu_tanh_inner(z)
        slope = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner_slope
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        slope = 1.0 - t * t
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope
