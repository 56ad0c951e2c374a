"""Bottleneck adapter: residual + scale * up(act(down(norm(x)))) (arXiv:1902.00751, fig. 2; arXiv:2110.04366).

    z   = norm(x) D^T + b_d          (rows, bottleneck_size);  norm: none, layer_norm or rms_norm over hidden_size
    h   = f(z),  y = h U^T + b_u     f: relu, gelu (erf), gelu_tanh, silu, tanh, identity
    out = residual + scale * y       rounded once

Nothing but x is kept for backward (kernels/bottleneck_backward.py, docs/maths.md).

Layouts: x, residual, out ``(batch, seq, hidden)``; banks down_weight ``(n, r, hidden)``, up_weight
``(n, hidden, r)``, down_bias ``(n, r)``, up_bias, norm_weight, norm_bias ``(n, hidden)``; any strides.

Up to ``FUSED_SIZE`` hidden columns (kernels/bottleneck_config.py), one kernel: a program keeps h of its rows in
registers between a loop over hidden_size for down and one for up. Past it, the weights that every program rereads
would be the larger part of the traffic, so one kernel leaves h in memory and a second one tiles rows and channels.

Weights in the dtype of half-precision activations multiply as they are, with h rounded to it. fp32 weights get
fp32-accurate products whatever the activations: three tf32 products (``tf32x3``, about 2^-21 per product, blocks
summed in fp32) on NVIDIA, where one would lose the digits that an fp32 master and its gradient hold, and fp32
ones on AMD.

A channel whose row of U and bias are zero gets the bits of residual: an exact zero is not added (-0.0 + 0.0 is
0.0), and where h is not finite, rows of U are searched for something to multiply it by.

Rows are never mixed, and tiles do not depend on the batch size: with row ids they lie within one batch row.
Tiles have fewer than 64 rows so that Hopper runs ``mma.sync``: ptxas before 13.3 may reuse the registers of a
``wgmma`` operand too early (triton issue 11781), and h is such an operand.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.activation import _activate
from fastadapter.kernels.bottleneck_backward import bottleneck_backward
from fastadapter.kernels.bottleneck_config import config, products
from fastadapter.kernels.bottleneck_tiles import (
    LENGTHS,
    _normed_tile,
    _row_entry,
    _statistics,
    _tile,
    _tile_rows,
    _vector,
    _weight,
    check,
    padded,
    strides,
)
from torch import Tensor

__all__ = ["bottleneck_backward", "bottleneck_forward", "config"]


@triton.jit
def _hidden_tile(
    x_ptr, down_ptr, down_bias_ptr, norm_weight_ptr, norm_bias_ptr,
    X_STRIDES, DOWN_STRIDES, DOWN_BIAS_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
    b, t, mask_m, entry, adapted, offs_r, norm_eps,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of a tile of rows and hidden columns, (BLOCK_M, BLOCK_R), in the dtype of the weights."""
    weight_dtype = down_ptr.dtype.element_ty
    # a row without an adapter reads nothing
    end = tl.where(adapted, HIDDEN_SIZE, 0)
    mask_r = offs_r < BOTTLENECK_SIZE
    mean, rstd = _statistics(x_ptr, X_STRIDES, b, t, mask_m, end, norm_eps, HIDDEN_SIZE, BLOCK_C, NORM)
    acc = tl.zeros((b.shape[0], offs_r.shape[0]), tl.float32)
    for start in range(0, end, BLOCK_C):
        offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_c = offs_c < HIDDEN_SIZE
        xn = _normed_tile(
            x_ptr, norm_weight_ptr, norm_bias_ptr, X_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
            b, t, mask_m, offs_c, mask_c, entry, mean, rstd, NORM, HAS_NORM_WEIGHT, HAS_NORM_BIAS,
        )  # fmt: skip
        d_ptrs = _weight(down_ptr, DOWN_STRIDES, entry, offs_r, offs_c)
        d = tl.load(d_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        acc = tl.dot(xn.to(weight_dtype), tl.trans(d), acc, input_precision=PRECISION)
    bias = _vector(down_bias_ptr, DOWN_BIAS_STRIDES, entry, offs_r, mask_r, HAS_DOWN_BIAS)
    return _activate(acc + bias[None, :], ACTIVATION).to(weight_dtype)


@triton.jit
def _store_sum(
    out_ptr, residual_ptr, OUT_STRIDES, RESIDUAL_STRIDES, b, t, mask_m, offs_c, mask_c, acc, bias, live, scale,
    adapted, fill, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out = residual + scale * (acc + bias), in the channels that are ``live``."""
    mask = mask_m[:, None] & mask_c[None, :]
    term = (acc + bias[None, :]) * scale
    # where, since a product with zero keeps Inf and NaN
    term = tl.where(live[None, :], tl.where(scale != 0.0, term, 0.0), 0.0)
    term = tl.where(adapted, term, fill)
    out_dtype = out_ptr.dtype.element_ty
    residual = tl.zeros(term.shape, out_dtype)
    if HAS_RESIDUAL:
        residual = tl.load(_tile(residual_ptr, RESIDUAL_STRIDES, b, t, offs_c), mask=mask)
    total = tl.where(term == 0.0, residual, (residual.to(tl.float32) + term).to(out_dtype))
    tl.store(_tile(out_ptr, OUT_STRIDES, b, t, offs_c), total, mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _bottleneck_fwd_kernel(
    out_ptr, x_ptr, down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr,
    row_ids_ptr, OUT_STRIDES, X_STRIDES, DOWN_STRIDES, UP_STRIDES, DOWN_BIAS_STRIDES, UP_BIAS_STRIDES,
    RESIDUAL_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES, norm_eps, scale, batch, seq_len, num_adapters,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_ROW_IDS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All of it for one tile of rows."""
    pid = tl.program_id(0)
    b, t, mask_m = _tile_rows(pid, batch, seq_len, BLOCK_M, HAS_ROW_IDS)
    row = pid // tl.cdiv(seq_len, BLOCK_M)
    entry, adapted, fill = _row_entry(row_ids_ptr, row, num_adapters, HAS_ROW_IDS)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    h = _hidden_tile(
        x_ptr, down_ptr, down_bias_ptr, norm_weight_ptr, norm_bias_ptr,
        X_STRIDES, DOWN_STRIDES, DOWN_BIAS_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
        b, t, mask_m, entry, adapted, offs_r, norm_eps,
        HIDDEN_SIZE, BOTTLENECK_SIZE, BLOCK_C, NORM, ACTIVATION, HAS_DOWN_BIAS, HAS_NORM_WEIGHT, HAS_NORM_BIAS,
        PRECISION,
    )  # fmt: skip
    # Inf and NaN times zero is NaN, so then zero rows of U have to be looked for
    spoiled = tl.max(tl.max((tl.abs(h.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, axis=1), axis=0) > 0
    mask_r = offs_r < tl.where(adapted, BOTTLENECK_SIZE, 0)
    for start in tl.range(0, HIDDEN_SIZE, BLOCK_N, num_stages=NUM_STAGES):
        offs_c = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_c = offs_c < HIDDEN_SIZE
        u_ptrs = _weight(up_ptr, UP_STRIDES, entry, offs_c, offs_r)
        u = tl.load(u_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_N, BLOCK_R)
        bias = _vector(up_bias_ptr, UP_BIAS_STRIDES, entry, offs_c, mask_c, HAS_UP_BIAS)
        acc = tl.dot(h, tl.trans(u), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        live = tl.full((BLOCK_N,), True, tl.int1)
        if spoiled:
            live = (tl.max((u != 0.0).to(tl.int32), axis=1) > 0) | (bias != 0.0)
        _store_sum(
            out_ptr, residual_ptr, OUT_STRIDES, RESIDUAL_STRIDES, b, t, mask_m, offs_c, mask_c, acc, bias, live,
            scale, adapted, fill, HAS_RESIDUAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def _bottleneck_down_kernel(
    hidden_ptr, x_ptr, down_ptr, down_bias_ptr, norm_weight_ptr, norm_bias_ptr, row_ids_ptr,
    X_STRIDES, DOWN_STRIDES, DOWN_BIAS_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
    norm_eps, batch, seq_len, num_adapters,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of one tile of rows and hidden columns, into (batch * seq, HIDDEN_STRIDE)."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (BOTTLENECK_SIZE + BLOCK_R - 1) // BLOCK_R
    tile = pid // num_blocks
    b, t, mask_m = _tile_rows(tile, batch, seq_len, BLOCK_M, HAS_ROW_IDS)
    entry, adapted, _ = _row_entry(row_ids_ptr, tile // tl.cdiv(seq_len, BLOCK_M), num_adapters, HAS_ROW_IDS)
    offs_r = ((pid % num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    h = _hidden_tile(
        x_ptr, down_ptr, down_bias_ptr, norm_weight_ptr, norm_bias_ptr,
        X_STRIDES, DOWN_STRIDES, DOWN_BIAS_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
        b, t, mask_m, entry, adapted, offs_r, norm_eps,
        HIDDEN_SIZE, BOTTLENECK_SIZE, BLOCK_C, NORM, ACTIVATION, HAS_DOWN_BIAS, HAS_NORM_WEIGHT, HAS_NORM_BIAS,
        PRECISION,
    )  # fmt: skip
    h_ptrs = hidden_ptr + ((b * seq_len + t) * HIDDEN_STRIDE)[:, None] + offs_r[None, :]
    tl.store(h_ptrs, h, mask=mask_m[:, None] & (offs_r < BOTTLENECK_SIZE)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _bottleneck_up_kernel(
    out_ptr, hidden_ptr, up_ptr, up_bias_ptr, residual_ptr, row_ids_ptr,
    OUT_STRIDES, UP_STRIDES, UP_BIAS_STRIDES, RESIDUAL_STRIDES, scale, batch, seq_len, num_adapters,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ROW_IDS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows and channels from h."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_N - 1) // BLOCK_N
    tile = pid // num_blocks
    b, t, mask_m = _tile_rows(tile, batch, seq_len, BLOCK_M, HAS_ROW_IDS)
    row = tile // tl.cdiv(seq_len, BLOCK_M)
    entry, adapted, fill = _row_entry(row_ids_ptr, row, num_adapters, HAS_ROW_IDS)
    offs_c = ((pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_c = offs_c < HIDDEN_SIZE
    h_rows = hidden_ptr + ((b * seq_len + t) * HIDDEN_STRIDE)[:, None]
    end = tl.where(adapted, BOTTLENECK_SIZE, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, end, BLOCK_K):
        offs_r = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_r = (offs_r < BOTTLENECK_SIZE)[None, :]
        h = tl.load(h_rows + offs_r[None, :], mask=mask_m[:, None] & mask_r, other=0.0)  # (BLOCK_M, BLOCK_K)
        u_ptrs = _weight(up_ptr, UP_STRIDES, entry, offs_c, offs_r)
        u = tl.load(u_ptrs, mask=mask_c[:, None] & mask_r, other=0.0)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(h, tl.trans(u), acc, input_precision=PRECISION)
    bias = _vector(up_bias_ptr, UP_BIAS_STRIDES, entry, offs_c, mask_c, HAS_UP_BIAS)
    live = tl.full((BLOCK_N,), True, tl.int1)
    if tl.max(tl.max((acc != acc).to(tl.int32), axis=1), axis=0) > 0:
        nonzero = (bias != 0.0).to(tl.int32)
        for start in range(0, end, BLOCK_K):
            offs_r = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            u_ptrs = _weight(up_ptr, UP_STRIDES, entry, offs_c, offs_r)
            u = tl.load(u_ptrs, mask=mask_c[:, None] & (offs_r < BOTTLENECK_SIZE)[None, :], other=0.0)
            nonzero = tl.maximum(nonzero, tl.max((u != 0.0).to(tl.int32), axis=1))
        live = nonzero > 0
    _store_sum(
        out_ptr, residual_ptr, OUT_STRIDES, RESIDUAL_STRIDES, b, t, mask_m, offs_c, mask_c, acc, bias, live,
        scale, adapted, fill, HAS_RESIDUAL,
    )  # fmt: skip


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
    check(x, activation, norm, norm_weight, norm_bias)
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    batch, seq_len, hidden_size = x.shape
    num_adapters, bottleneck_size, _ = down_weight.shape
    arch = target.arch(x)
    tiles = config(arch, down_weight.dtype, hidden_size, bottleneck_size, seq_len)
    by_row = row_ids is not None
    block_m = tiles["BLOCK_M"]
    num_tiles = batch * triton.cdiv(seq_len, block_m) if by_row else triton.cdiv(batch * seq_len, block_m)
    shared = {
        "row_ids_ptr": row_ids, "batch": batch, "seq_len": seq_len, "num_adapters": num_adapters,
        "HIDDEN_SIZE": hidden_size, "BOTTLENECK_SIZE": bottleneck_size, "BLOCK_M": block_m, "HAS_ROW_IDS": by_row,
        "PRECISION": products(arch, down_weight.dtype),
        "num_warps": tiles["num_warps"], "num_stages": tiles["num_stages"],
    }  # fmt: skip
    down = {
        "x_ptr": x, "down_ptr": down_weight, "down_bias_ptr": down_bias, "norm_weight_ptr": norm_weight,
        "norm_bias_ptr": norm_bias, "X_STRIDES": x.stride(), "DOWN_STRIDES": down_weight.stride(),
        "DOWN_BIAS_STRIDES": strides(down_bias, 2), "NORM_WEIGHT_STRIDES": strides(norm_weight, 2),
        "NORM_BIAS_STRIDES": strides(norm_bias, 2), "norm_eps": norm_eps, "BLOCK_R": tiles["BLOCK_R"],
        "BLOCK_C": tiles["BLOCK_C"], "NORM": norm, "ACTIVATION": activation,
        "HAS_DOWN_BIAS": down_bias is not None, "HAS_NORM_WEIGHT": norm_weight is not None,
        "HAS_NORM_BIAS": norm_bias is not None,
    }  # fmt: skip
    up = {
        "out_ptr": out, "up_ptr": up_weight, "up_bias_ptr": up_bias, "residual_ptr": residual,
        "OUT_STRIDES": out.stride(), "UP_STRIDES": up_weight.stride(), "UP_BIAS_STRIDES": strides(up_bias, 2),
        "RESIDUAL_STRIDES": strides(residual, 3), "scale": scale, "BLOCK_N": tiles["BLOCK_N"],
        "HAS_UP_BIAS": up_bias is not None, "HAS_RESIDUAL": residual is not None,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if tiles["fused"]:
            _bottleneck_fwd_kernel[(num_tiles,)](**down, **up, **shared, NUM_STAGES=tiles["num_stages"])
            return out
        width = padded(bottleneck_size)
        hidden = x.new_empty((batch * seq_len, width), dtype=down_weight.dtype)
        _bottleneck_down_kernel[(num_tiles * triton.cdiv(bottleneck_size, tiles["BLOCK_R"]),)](
            hidden_ptr=hidden, HIDDEN_STRIDE=width, **down, **shared
        )
        _bottleneck_up_kernel[(num_tiles * triton.cdiv(hidden_size, tiles["BLOCK_N"]),)](
            hidden_ptr=hidden, HIDDEN_STRIDE=width, BLOCK_K=tiles["BLOCK_K"], **up, **shared
        )
    return out
