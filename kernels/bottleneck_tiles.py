"""What the forward and backward kernels of ``bottleneck`` share: rows, statistics, normalised tiles, checks."""

import torch
import triton
import triton.language as tl
from fastadapter.kernels.activation import ACTIVATIONS
from torch import Tensor

# Sizes that change from call to call: not worth a compilation each.
LENGTHS = ["batch", "seq_len", "num_adapters"]
NORMS = ("none", "layer_norm", "rms_norm")
# Rows of the scratch tensors between two kernels start on 16 elements, so that they load 128 bits at a time.
SCRATCH_ALIGNMENT = 16


@triton.jit
def _tile_rows(tile, batch, seq_len, BLOCK_M: tl.constexpr, HAS_ROW_IDS: tl.constexpr):
    """Batch row and token of every row of a tile, and which of them exist.

    With row ids a tile lies within one batch row; without, the rows of the whole batch follow each other.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if HAS_ROW_IDS:
        tiles_per_row = tl.cdiv(seq_len, BLOCK_M)
        b = (tile // tiles_per_row).to(tl.int64) + tl.zeros((BLOCK_M,), tl.int64)
        t = (tile % tiles_per_row).to(tl.int64) * BLOCK_M + offs_m
        mask_m = t < seq_len
    else:
        # one 64-bit division, of a scalar
        first = tile.to(tl.int64) * BLOCK_M
        first_b = first // seq_len
        within = (first - first_b * seq_len).to(tl.int32) + offs_m
        b = first_b + within // seq_len
        t = (within % seq_len).to(tl.int64)
        mask_m = b < batch
    return b, t, mask_m


@triton.jit
def _row_entry(row_ids_ptr, row, num_adapters, HAS_ROW_IDS: tl.constexpr):
    """The bank entry of a batch row (0 where its id names none), whether there is one, and what stands for the
    adapter's term where there is not: nothing for -1, NaN for an id outside the bank, since a device cannot raise.
    """
    row_id = tl.zeros((), tl.int64)
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row).to(tl.int64)
    adapted = (row_id >= 0) & (row_id < num_adapters)
    fill = tl.where(row_id == -1, 0.0, float("nan"))
    return tl.where(adapted, row_id, 0), adapted, fill


@triton.jit
def _tile(ptr, STRIDES, b, t, offs_c):
    """Pointers (BLOCK_M, BLOCK_C) into a (batch, seq, hidden) tensor."""
    return ptr + (b * STRIDES[0] + t * STRIDES[1])[:, None] + (offs_c * STRIDES[2])[None, :]


@triton.jit
def _weight(ptr, STRIDES, entry, offs_0, offs_1):
    """Pointers into one entry of a bank of matrices."""
    return (ptr + entry * STRIDES[0]) + (offs_0 * STRIDES[1])[:, None] + (offs_1 * STRIDES[2])[None, :]


@triton.jit
def _vector(ptr, STRIDES, entry, offs, mask, PRESENT: tl.constexpr):
    """One entry of a bank of vectors in fp32, zero where the argument is absent."""
    if PRESENT:
        v = tl.load(ptr + entry * STRIDES[0] + offs * STRIDES[1], mask=mask, other=0.0).to(tl.float32)
    else:
        v = tl.zeros(offs.shape, tl.float32)
    return v


@triton.jit
def _statistics(
    x_ptr, X_STRIDES, b, t, mask_m, end, norm_eps,
    HIDDEN_SIZE: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Mean (0 for the root mean square norm) and reciprocal deviation of every row, (BLOCK_M,).

    Blocks are merged by their means and squared deviations (Chan, Golub, LeVeque 1979): E[x^2] - E[x]^2 would
    cancel where the mean is large.
    """
    mean = tl.zeros(b.shape, tl.float32)
    squares = tl.zeros(b.shape, tl.float32)
    if NORM == "none":
        rstd = mean
    else:
        for start in tl.range(0, end, BLOCK_C, num_stages=2):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < HIDDEN_SIZE)[None, :]
            x = tl.load(_tile(x_ptr, X_STRIDES, b, t, offs_c.to(tl.int64)), mask=mask, other=0.0)
            x = x.to(tl.float32)  # (BLOCK_M, BLOCK_C)
            if NORM == "layer_norm":
                count = tl.minimum(HIDDEN_SIZE - start, BLOCK_C).to(tl.float32)
                seen = tl.zeros((), tl.float32) + start
                block_mean = tl.sum(x, axis=1) / count
                centred = tl.where(mask, x - block_mean[:, None], 0.0)
                delta = block_mean - mean
                share = count / (seen + count)
                mean += delta * share
                squares += tl.sum(centred * centred, axis=1) + delta * delta * (seen * share)
            else:
                squares += tl.sum(x * x, axis=1)
        rstd = 1.0 / tl.sqrt_rn(squares / HIDDEN_SIZE + norm_eps)
    return mean, rstd


@triton.jit
def _standardised(x, mean, rstd, NORM: tl.constexpr):
    """(x - mean) * rstd in fp32, or x."""
    xhat = x.to(tl.float32)
    if NORM != "none":
        xhat = (xhat - mean[:, None]) * rstd[:, None]
    return xhat


@triton.jit
def _normed_tile(
    x_ptr, norm_weight_ptr, norm_bias_ptr, X_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
    b, t, mask_m, offs_c, mask_c, entry, mean, rstd,
    NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """norm(x) in fp32, (BLOCK_M, BLOCK_C), zero outside; without a norm, x in its own dtype."""
    mask = mask_m[:, None] & mask_c[None, :]
    x = tl.load(_tile(x_ptr, X_STRIDES, b, t, offs_c), mask=mask, other=0.0)
    if NORM != "none":
        xn = _standardised(x, mean, rstd, NORM)
        if HAS_NORM_WEIGHT:
            xn *= _vector(norm_weight_ptr, NORM_WEIGHT_STRIDES, entry, offs_c, mask_c, True)[None, :]
        if HAS_NORM_BIAS:
            xn += _vector(norm_bias_ptr, NORM_BIAS_STRIDES, entry, offs_c, mask_c, True)[None, :]
        x = tl.where(mask, xn, 0.0)
    return x


def check(x: Tensor, activation: str, norm: str, *norm_vectors: Tensor | None) -> None:
    """What the kernels cannot do, said before anything is launched."""
    op = "bottleneck (Triton)"
    interpreted = not isinstance(_tile_rows, triton.JITFunction)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x must be fp32, bf16 or fp16, got {x.dtype}")
    if interpreted and x.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: x must be fp32 or fp16 under TRITON_INTERPRET=1 (bf16 is wrong there), got bf16"
        )
    if not interpreted and x.device.type == "cpu":
        raise ValueError(f"{op}: x must be on a GPU (or set TRITON_INTERPRET=1), got cpu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "none" and any(vector is not None for vector in norm_vectors):
        raise ValueError(f"{op}: norm_weight and norm_bias need a norm, got norm 'none'")


def padded(size: int) -> int:
    """The length of a scratch row that holds ``size`` elements."""
    return triton.cdiv(size, SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides for a signature: zeros stand for a tensor that is absent."""
    return (0,) * dims if tensor is None else tensor.stride()
