"""Gradients of the bottleneck adapter (kernels/bottleneck.py has its formulas, docs/maths.md the derivation).

    dH = scale * dO U,  dZ = f'(z) * dH,  dY = dZ D      z, h as in forward, computed again from x
    dU = scale * dO^T h,  db_u = scale * sum dO,  dD = dZ^T norm(x),  db_d = sum dZ
    dX = dY, or through the norm: with x^ = (x - mean) * rstd and w = weight * dY, sums over hidden_size C
         dX = rstd * (w - mean(w) - x^ * mean(w * x^))           layer_norm; without mean(w) rms_norm
         dweight = sum dY * x^,  dbias = sum dY
    and dO is added where x is also the residual.

1. rows: a program owns a tile of rows and hidden columns and writes h and dZ, ``(rows, bottleneck_size)`` each.
   The two means need no pass over C of their own: C mean(w) = dZ . (D weight), C mean(w x^) = dZ . (z - b_d - D
   bias), where D weight and D bias come from a small kernel before.
2. channels: a program owns a block of channels and a slot, a run of tiles of rows. It writes dX of its run, keeps
   its block of the parameters' gradients in registers, and writes them as one fp32 partial.
3. reduce: the partials of each bank entry are summed in a fixed order.

No atomics. Slots follow from shapes alone, and with row ids not from the batch size either, so the gradient of a
row has the same bits alone and in a batch. Past one block of hidden columns, dX (a loop over blocks) and the
gradients of the weights (a program per block) are two launches of kernel 2.

A row whose dZ is zero (zero-initialised U, or scale 0) sends nothing through D, though D holds Inf or NaN.
Products, and tiles below 64 rows: see kernels/bottleneck.py.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.activation import _activate, _activation_slope
from fastadapter.kernels.bottleneck_config import backward_config, products
from fastadapter.kernels.bottleneck_tiles import (
    LENGTHS,
    _normed_tile,
    _row_entry,
    _standardised,
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

RUN_LENGTHS = ["num_tiles", "tiles_per_slot", "slots_per_row", "num_positions"]
SEGMENTS = ["up_end", "down_end", "down_bias_end", "up_bias_end", "norm_weight_end"]
REDUCE_ROWS = 8
REDUCE_COLUMNS = 512


@triton.jit
def _bottleneck_moments_kernel(
    moments_ptr, down_ptr, norm_weight_ptr, norm_bias_ptr, DOWN_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """D weight and D bias of one bank entry, into (n, 2, HIDDEN_STRIDE)."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (BOTTLENECK_SIZE + BLOCK_R - 1) // BLOCK_R
    entry = (pid // num_blocks).to(tl.int64)
    offs_r = ((pid % num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = offs_r < BOTTLENECK_SIZE
    by_weight = tl.zeros((BLOCK_R,), tl.float32)
    by_bias = tl.zeros((BLOCK_R,), tl.float32)
    for start in tl.range(0, HIDDEN_SIZE, BLOCK_C, num_stages=2):
        offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_c = offs_c < HIDDEN_SIZE
        d_ptrs = _weight(down_ptr, DOWN_STRIDES, entry, offs_r, offs_c)
        d = tl.load(d_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        weight = _vector(norm_weight_ptr, NORM_WEIGHT_STRIDES, entry, offs_c, mask_c, HAS_NORM_WEIGHT)
        bias = _vector(norm_bias_ptr, NORM_BIAS_STRIDES, entry, offs_c, mask_c, HAS_NORM_BIAS)
        by_weight += tl.sum(d * weight[None, :] if HAS_NORM_WEIGHT else d, axis=1)
        by_bias += tl.sum(d * bias[None, :], axis=1)
    ptrs = moments_ptr + entry * (2 * HIDDEN_STRIDE) + offs_r
    tl.store(ptrs, by_weight, mask=mask_r)
    tl.store(ptrs + HIDDEN_STRIDE, by_bias, mask=mask_r)


@triton.jit(do_not_specialize=[*LENGTHS, "num_positions"])
def _bottleneck_rows_kernel(
    hidden_ptr, grad_hidden_ptr, stats_ptr, grad_out_ptr, x_ptr, down_ptr, up_ptr, down_bias_ptr,
    norm_weight_ptr, norm_bias_ptr, moments_ptr, row_ids_ptr,
    GRAD_OUT_STRIDES, X_STRIDES, DOWN_STRIDES, UP_STRIDES, DOWN_BIAS_STRIDES, NORM_WEIGHT_STRIDES,
    NORM_BIAS_STRIDES, norm_eps, scale, batch, seq_len, num_adapters, num_positions,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_MOMENTS: tl.constexpr, NEED_HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h and dZ of a tile of rows and hidden columns, and the tile's statistics and parts of the two means."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (BOTTLENECK_SIZE + BLOCK_R - 1) // BLOCK_R
    tile = pid // num_blocks
    block = pid % num_blocks
    b, t, mask_m = _tile_rows(tile, batch, seq_len, BLOCK_M, HAS_ROW_IDS)
    entry, adapted, _ = _row_entry(row_ids_ptr, tile // tl.cdiv(seq_len, BLOCK_M), num_adapters, HAS_ROW_IDS)
    offs_r = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = offs_r < BOTTLENECK_SIZE
    weight_dtype = down_ptr.dtype.element_ty
    end = tl.where(adapted, HIDDEN_SIZE, 0)
    mean, rstd = _statistics(x_ptr, X_STRIDES, b, t, mask_m, end, norm_eps, HIDDEN_SIZE, BLOCK_C, NORM)
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, end, BLOCK_C):
        offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_c = offs_c < HIDDEN_SIZE
        xn = _normed_tile(
            x_ptr, norm_weight_ptr, norm_bias_ptr, X_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
            b, t, mask_m, offs_c, mask_c, entry, mean, rstd, NORM, HAS_NORM_WEIGHT, HAS_NORM_BIAS,
        )  # fmt: skip
        d_ptrs = _weight(down_ptr, DOWN_STRIDES, entry, offs_r, offs_c)
        d = tl.load(d_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        z = tl.dot(xn.to(weight_dtype), tl.trans(d), z, input_precision=PRECISION)
        do_ptrs = _tile(grad_out_ptr, GRAD_OUT_STRIDES, b, t, offs_c)
        do = tl.load(do_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_M, BLOCK_C)
        u_ptrs = _weight(up_ptr, UP_STRIDES, entry, offs_c, offs_r)
        u = tl.load(u_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_C, BLOCK_R)
        dh = tl.dot(do.to(weight_dtype), u, dh, input_precision=PRECISION)
    if tl.max(tl.max((dh != dh).to(tl.int32), axis=1), axis=0) > 0:
        # Inf or NaN in grad_out, which a zero column of U does not let through
        nonzero = tl.zeros((BLOCK_R,), tl.int32)
        for start in range(0, end, BLOCK_C):
            offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
            u_ptrs = _weight(up_ptr, UP_STRIDES, entry, offs_c, offs_r)
            u = tl.load(u_ptrs, mask=(offs_c < HIDDEN_SIZE)[:, None] & mask_r[None, :], other=0.0)
            nonzero = tl.maximum(nonzero, tl.max((u != 0.0).to(tl.int32), axis=0))
        dh = tl.where(nonzero[None, :] > 0, dh, 0.0)
    bias = _vector(down_bias_ptr, DOWN_BIAS_STRIDES, entry, offs_r, mask_r, HAS_DOWN_BIAS)
    slope = _activation_slope(z + bias[None, :], ACTIVATION)
    dh = tl.where(scale != 0.0, dh * scale, 0.0)
    dz = tl.where(dh == 0.0, 0.0, dh * slope)

    position = b * seq_len + t
    offs_mr = (position * HIDDEN_STRIDE)[:, None] + offs_r[None, :]
    # padding up to HIDDEN_STRIDE is written too, so that whole blocks of it can be read
    mask_mr = mask_m[:, None] & (offs_r < HIDDEN_STRIDE)[None, :]
    tl.store(grad_hidden_ptr + offs_mr, dz.to(weight_dtype), mask=mask_mr)
    if NEED_HIDDEN:
        h = _activate(z + bias[None, :], ACTIVATION)
        tl.store(hidden_ptr + offs_mr, h.to(weight_dtype), mask=mask_mr)
    if NORM != "none":
        if block == 0:
            tl.store(stats_ptr + position, mean, mask=mask_m)
            tl.store(stats_ptr + num_positions + position, rstd, mask=mask_m)
        parts = stats_ptr + (2 + 2 * block.to(tl.int64)) * num_positions + position
        if HAS_MOMENTS:
            moments = moments_ptr + entry * (2 * HIDDEN_STRIDE) + offs_r
            by_weight = tl.load(moments, mask=mask_r, other=0.0)
            by_bias = tl.load(moments + HIDDEN_STRIDE, mask=mask_r, other=0.0)
            # where, not a product with zero: a row that sends nothing through D has means of zero
            tl.store(parts, tl.sum(tl.where(dz == 0.0, 0.0, dz * by_weight[None, :]), axis=1), mask=mask_m)
            z -= by_bias[None, :]
        projected = tl.where(dz == 0.0, 0.0, dz * z)
        tl.store(parts + num_positions, tl.sum(projected, axis=1), mask=mask_m)


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _bottleneck_channels_kernel(
    grad_x_ptr, partial_ptr, hidden_ptr, grad_hidden_ptr, stats_ptr, grad_out_ptr, x_ptr, down_ptr,
    norm_weight_ptr, norm_bias_ptr, row_ids_ptr,
    GRAD_X_STRIDES, GRAD_OUT_STRIDES, X_STRIDES, DOWN_STRIDES, NORM_WEIGHT_STRIDES, NORM_BIAS_STRIDES,
    scale, batch, seq_len, num_adapters, num_tiles, tiles_per_slot, slots_per_row, num_positions, columns,
    up_end, down_end, down_bias_end, up_bias_end, norm_weight_end,
    HIDDEN_SIZE: tl.constexpr, BOTTLENECK_SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, ADD_GRAD_OUT: tl.constexpr,
    STAT_BLOCKS: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_DOWN_BIAS: tl.constexpr,
    NEED_UP_BIAS: tl.constexpr, NEED_NORM_WEIGHT: tl.constexpr, NEED_NORM_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dX of a block of channels over a run of tiles, and that run's part of the parameters' gradients."""
    pid = tl.program_id(0)
    num_channel_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_C - 1) // BLOCK_C
    num_blocks: tl.constexpr = (BOTTLENECK_SIZE + BLOCK_R - 1) // BLOCK_R
    NEED_CHAIN: tl.constexpr = NEED_X or NEED_NORM_WEIGHT or NEED_NORM_BIAS
    SPLIT: tl.constexpr = num_blocks > 1 and (NEED_WEIGHTS or NEED_DOWN_BIAS)
    channel_block = pid % num_channel_blocks
    rest = pid // num_channel_blocks
    block = rest % num_blocks if SPLIT else 0
    slot = (rest // num_blocks if SPLIT else rest).to(tl.int64)
    first_row = slot // slots_per_row
    tiles_per_row = tl.cdiv(seq_len, BLOCK_M)
    first_tile = (slot % slots_per_row).to(tl.int32) * tiles_per_slot
    last_tile = tl.minimum(first_tile + tiles_per_slot, num_tiles)
    entry, adapted, fill = _row_entry(row_ids_ptr, first_row, num_adapters, HAS_ROW_IDS)
    weight_dtype = down_ptr.dtype.element_ty
    plane = tl.zeros((), tl.int64) + num_positions
    offs_c = (channel_block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < HIDDEN_SIZE
    offs_r = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = offs_r < BOTTLENECK_SIZE
    weight = _vector(norm_weight_ptr, NORM_WEIGHT_STRIDES, entry, offs_c, mask_c, HAS_NORM_WEIGHT)
    bias = _vector(norm_bias_ptr, NORM_BIAS_STRIDES, entry, offs_c, mask_c, HAS_NORM_BIAS)
    if num_blocks == 1 and NEED_CHAIN:
        d_ptrs = _weight(down_ptr, DOWN_STRIDES, entry, offs_r, offs_c)
        d = tl.load(d_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)

    du = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    dd = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    d_down_bias = tl.zeros((BLOCK_R,), tl.float32)
    d_up_bias = tl.zeros((BLOCK_C,), tl.float32)
    d_norm_weight = tl.zeros((BLOCK_C,), tl.float32)
    d_norm_bias = tl.zeros((BLOCK_C,), tl.float32)
    for run_tile in range(first_tile, last_tile):
        tile = tl.zeros((), tl.int32) + run_tile
        if HAS_ROW_IDS:
            tile += first_row.to(tl.int32) * tiles_per_row
        b, t, mask_m = _tile_rows(tile, batch, seq_len, BLOCK_M, HAS_ROW_IDS)
        mask_mc = mask_m[:, None] & mask_c[None, :]
        position = b * seq_len + t
        scratch = (position * HIDDEN_STRIDE)[:, None] + offs_r[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        sends = tl.zeros((BLOCK_M,), tl.int32)
        if (NEED_CHAIN and num_blocks == 1) or NEED_WEIGHTS or NEED_DOWN_BIAS:
            dz = tl.load(grad_hidden_ptr + scratch, mask=mask_mr, other=0.0)  # (BLOCK_M, BLOCK_R)
            sends = tl.max((dz != 0.0).to(tl.int32), axis=1)
        if NEED_WEIGHTS or NEED_UP_BIAS or (NEED_X and ADD_GRAD_OUT):
            do_ptrs = _tile(grad_out_ptr, GRAD_OUT_STRIDES, b, t, offs_c)
            do = tl.load(do_ptrs, mask=mask_mc, other=0.0)  # (BLOCK_M, BLOCK_C)
        if NEED_WEIGHTS or (NEED_CHAIN and NORM != "none"):
            x = tl.load(_tile(x_ptr, X_STRIDES, b, t, offs_c), mask=mask_mc, other=0.0)  # (BLOCK_M, BLOCK_C)
            mean = tl.zeros((BLOCK_M,), tl.float32)
            rstd = mean
            if NORM != "none":
                mean = tl.load(stats_ptr + position, mask=mask_m, other=0.0)
                rstd = tl.load(stats_ptr + plane + position, mask=mask_m, other=0.0)
            xhat = _standardised(x, mean, rstd, NORM)

        if NEED_CHAIN:
            dy = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
            if num_blocks == 1:
                dy = tl.dot(dz, d, dy, input_precision=PRECISION)
            else:
                for start in range(0, BOTTLENECK_SIZE, BLOCK_R):
                    offs_k = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
                    mask_k = offs_k < BOTTLENECK_SIZE
                    dz_ptrs = grad_hidden_ptr + (position * HIDDEN_STRIDE)[:, None] + offs_k[None, :]
                    dzk = tl.load(dz_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
                    dk_ptrs = _weight(down_ptr, DOWN_STRIDES, entry, offs_k, offs_c)
                    dk = tl.load(dk_ptrs, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
                    sends = tl.maximum(sends, tl.max((dzk != 0.0).to(tl.int32), axis=1))
                    dy = tl.dot(dzk, dk, dy, input_precision=PRECISION)
            # 0 * Inf from D would make these rows NaN
            dy = tl.where(sends[:, None] > 0, dy, 0.0)
            if NEED_NORM_WEIGHT:
                d_norm_weight += tl.sum(tl.where(sends[:, None] > 0, dy * xhat, 0.0), axis=0)
            if NEED_NORM_BIAS:
                d_norm_bias += tl.sum(dy, axis=0)
            if NEED_X:
                if NORM != "none":
                    if HAS_NORM_WEIGHT:
                        dy *= weight[None, :]
                    for part in tl.static_range(STAT_BLOCKS):
                        parts = stats_ptr + (2 + 2 * part) * plane + position
                        if NORM == "layer_norm":
                            dy -= tl.load(parts, mask=mask_m, other=0.0)[:, None] / HIDDEN_SIZE
                        dy -= xhat * (tl.load(parts + plane, mask=mask_m, other=0.0)[:, None] / HIDDEN_SIZE)
                    dy = tl.where(sends[:, None] > 0, dy * rstd[:, None], 0.0)
                term = tl.where(adapted, dy, fill)
                dx_dtype = grad_x_ptr.dtype.element_ty
                dx = term.to(dx_dtype)
                if ADD_GRAD_OUT:
                    dx = tl.where(term == 0.0, do, (do.to(tl.float32) + term).to(dx_dtype))
                tl.store(_tile(grad_x_ptr, GRAD_X_STRIDES, b, t, offs_c), dx, mask=mask_mc)
        if NEED_WEIGHTS:
            h = tl.load(hidden_ptr + scratch, mask=mask_mr, other=0.0)  # (BLOCK_M, BLOCK_R)
            du = tl.dot(tl.trans(do.to(weight_dtype)), h, du, input_precision=PRECISION)
            if HAS_NORM_WEIGHT:
                xhat *= weight[None, :]
            if HAS_NORM_BIAS:
                xhat += bias[None, :]
            # also keeps out the bias of rows that are padding, and of NaN what sends nothing
            xn = tl.where(sends[:, None] > 0, xhat, 0.0).to(weight_dtype)
            dd = tl.dot(tl.trans(xn), dz, dd, input_precision=PRECISION)
        if NEED_DOWN_BIAS:
            d_down_bias += tl.sum(dz.to(tl.float32), axis=0)
        if NEED_UP_BIAS:
            d_up_bias += tl.sum(do.to(tl.float32), axis=0)

    partial_ptr += slot * columns
    if NEED_WEIGHTS:
        mask_cr = mask_c[:, None] & mask_r[None, :]
        du = tl.where(scale != 0.0, du * scale, 0.0)
        tl.store(partial_ptr + offs_c[:, None] * BOTTLENECK_SIZE + offs_r[None, :], du, mask=mask_cr)
        tl.store(partial_ptr + up_end + offs_c[:, None] + offs_r[None, :] * HIDDEN_SIZE, dd, mask=mask_cr)
    if NEED_DOWN_BIAS:
        if channel_block == 0:
            tl.store(partial_ptr + down_end + offs_r, d_down_bias, mask=mask_r)
    if NEED_UP_BIAS:
        tl.store(partial_ptr + down_bias_end + offs_c, d_up_bias * scale, mask=mask_c)
    if NEED_NORM_WEIGHT:
        tl.store(partial_ptr + up_bias_end + offs_c, d_norm_weight, mask=mask_c)
    if NEED_NORM_BIAS:
        tl.store(partial_ptr + norm_weight_end + offs_c, d_norm_bias, mask=mask_c)


@triton.jit
def _store_segment(grad_ptr, entry, offs_e, first, end, total):
    """The columns of one argument's gradient."""
    index = entry * (end - first) + offs_e - first
    tl.store(grad_ptr + index, total.to(grad_ptr.dtype.element_ty), mask=(offs_e >= first) & (offs_e < end))


@triton.jit(do_not_specialize=["num_rows", "slots_per_row"])
def _bottleneck_reduce_kernel(
    grad_up_ptr, grad_down_ptr, grad_down_bias_ptr, grad_up_bias_ptr, grad_norm_weight_ptr, grad_norm_bias_ptr,
    partial_ptr, row_ids_ptr, num_rows, slots_per_row, columns,
    up_end, down_end, down_bias_end, up_bias_end, norm_weight_end,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
):  # fmt: skip
    """Sum the partials of the rows that use one bank entry, BLOCK_E columns at a time.

    Rows are summed across a tile and slots along the loop: where a single row uses the entry, the sum does not
    depend on that row's place in the batch.
    """
    pid = tl.program_id(0)
    num_column_blocks = tl.cdiv(columns, BLOCK_E)
    entry = (pid // num_column_blocks).to(tl.int64)
    offs_e = (pid % num_column_blocks).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < columns
    acc = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for start in range(0, num_rows, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask_b = offs_b < num_rows
        if HAS_ROW_IDS:
            # only rows of this entry are read: others may hold NaN, or nothing yet
            mask_b = mask_b & (tl.load(row_ids_ptr + offs_b, mask=mask_b, other=-1) == entry)
        if tl.max(mask_b.to(tl.int32), axis=0) > 0:
            for slot in range(slots_per_row):
                offs_s = offs_b.to(tl.int64) * slots_per_row + slot
                ptrs = partial_ptr + offs_s[:, None] * columns + offs_e[None, :]
                acc += tl.load(ptrs, mask=mask_b[:, None] & mask_e[None, :], other=0.0)  # (BLOCK_B, BLOCK_E)
    total = tl.sum(acc, axis=0)
    _store_segment(grad_up_ptr, entry, offs_e, 0, up_end, total)
    _store_segment(grad_down_ptr, entry, offs_e, up_end, down_end, total)
    _store_segment(grad_down_bias_ptr, entry, offs_e, down_end, down_bias_end, total)
    _store_segment(grad_up_bias_ptr, entry, offs_e, down_bias_end, up_bias_end, total)
    _store_segment(grad_norm_weight_ptr, entry, offs_e, up_bias_end, norm_weight_end, total)
    _store_segment(grad_norm_bias_ptr, entry, offs_e, norm_weight_end, columns, total)


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
    ``z`` must be None: it is computed from x. Errors as in
    :func:`~fastadapter.kernels.bottleneck.bottleneck_forward`.
    """
    check(x, activation, norm, norm_weight, norm_bias)
    if z is not None:
        raise ValueError("bottleneck: z must be None for the Triton backend, which computes it from x")
    batch, seq_len, hidden_size = x.shape
    num_adapters, bottleneck_size, _ = down_weight.shape
    need_down_bias = need_biases and down_bias is not None
    need_norm_weight = need_norm and norm_weight is not None
    need_norm_bias = need_norm and norm_bias is not None

    def gradient(argument: Tensor | None, need: bool) -> Tensor:
        if argument is None:
            return x.new_empty(0)
        return argument.new_empty(argument.shape if need else 0)

    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_down, grad_up = gradient(down_weight, need_weights), gradient(up_weight, need_weights)
    grad_down_bias = gradient(down_bias, need_biases)
    grad_up_bias = up_weight.new_empty(up_weight.shape[:2] if need_biases else 0)
    grad_norm_weight, grad_norm_bias = gradient(norm_weight, need_norm), gradient(norm_bias, need_norm)
    grads = (grad_up, grad_down, grad_down_bias, grad_up_bias, grad_norm_weight, grad_norm_bias)
    ends = [0]
    for grad in grads:
        ends.append(ends[-1] + grad.numel() // num_adapters)
    columns = ends.pop()
    segments = dict(zip(SEGMENTS, ends[1:], strict=True)) | {"columns": columns}

    arch = target.arch(x)
    tiles = backward_config(arch, down_weight.dtype, bottleneck_size)
    rows_tiles, channels_tiles = tiles["rows"], tiles["channels"]
    by_row = row_ids is not None
    num_rows = batch if by_row else 1
    positions_per_row = seq_len if by_row else batch * seq_len
    tiles_per_row = triton.cdiv(positions_per_row, channels_tiles["BLOCK_M"])
    stat_blocks = triton.cdiv(bottleneck_size, rows_tiles["BLOCK_R"])
    num_blocks = triton.cdiv(bottleneck_size, channels_tiles["BLOCK_R"])
    num_channel_blocks = triton.cdiv(hidden_size, channels_tiles["BLOCK_C"])
    tiles_per_slot = _tiles_per_slot(tiles_per_row, num_channel_blocks, by_row, columns > 0)
    slots_per_row = triton.cdiv(tiles_per_row, tiles_per_slot)
    num_slots = num_rows * slots_per_row
    num_positions, width = batch * seq_len, padded(bottleneck_size)
    need_chain = need_x or need_norm_weight or need_norm_bias
    has_moments = norm_bias is not None or norm == "layer_norm"

    hidden = x.new_empty((num_positions if need_weights else 0, width), dtype=down_weight.dtype)
    grad_hidden = x.new_empty((num_positions, width), dtype=down_weight.dtype)
    has_norm = norm != "none"
    stats = x.new_empty((2 + 2 * stat_blocks if has_norm else 0, num_positions), dtype=torch.float32)
    moments = x.new_empty((num_adapters if has_norm and has_moments else 0, 2, width), dtype=torch.float32)
    partial = x.new_empty((num_slots, columns), dtype=torch.float32)

    norms = {
        "norm_weight_ptr": norm_weight, "norm_bias_ptr": norm_bias, "down_ptr": down_weight,
        "DOWN_STRIDES": down_weight.stride(), "NORM_WEIGHT_STRIDES": strides(norm_weight, 2),
        "NORM_BIAS_STRIDES": strides(norm_bias, 2), "HAS_NORM_WEIGHT": norm_weight is not None,
        "HAS_NORM_BIAS": norm_bias is not None, "HIDDEN_SIZE": hidden_size, "BOTTLENECK_SIZE": bottleneck_size,
        "HIDDEN_STRIDE": width,
    }  # fmt: skip
    shared = norms | {
        "grad_hidden_ptr": grad_hidden, "hidden_ptr": hidden, "stats_ptr": stats, "grad_out_ptr": grad_out,
        "x_ptr": x, "row_ids_ptr": row_ids, "GRAD_OUT_STRIDES": grad_out.stride(), "X_STRIDES": x.stride(),
        "scale": scale, "batch": batch, "seq_len": seq_len, "num_adapters": num_adapters,
        "num_positions": num_positions, "NORM": norm,
        "HAS_ROW_IDS": by_row, "PRECISION": products(arch, down_weight.dtype),
    }  # fmt: skip

    def rows() -> None:
        if has_norm and has_moments:
            _bottleneck_moments_kernel[(num_adapters * triton.cdiv(bottleneck_size, 16),)](
                moments_ptr=moments, BLOCK_R=16, BLOCK_C=128, num_warps=4, **norms
            )
        num_tiles = num_rows * triton.cdiv(positions_per_row, rows_tiles["BLOCK_M"])
        _bottleneck_rows_kernel[(num_tiles * stat_blocks,)](
            up_ptr=up_weight, down_bias_ptr=down_bias, moments_ptr=moments, UP_STRIDES=up_weight.stride(),
            DOWN_BIAS_STRIDES=strides(down_bias, 2), norm_eps=norm_eps,
            ACTIVATION=activation, HAS_DOWN_BIAS=down_bias is not None, HAS_MOMENTS=has_moments,
            NEED_HIDDEN=need_weights, **rows_tiles, **shared,
        )  # fmt: skip

    def channels(
        *, x_now: bool, norm_now: bool, up_bias_now: bool, weights_now: bool, down_bias_now: bool
    ) -> None:
        blocks = num_blocks if weights_now or down_bias_now else 1
        _bottleneck_channels_kernel[(num_slots * blocks * num_channel_blocks,)](
            grad_x_ptr=grad_x, partial_ptr=partial, GRAD_X_STRIDES=grad_x.stride() if need_x else (0, 0, 0),
            num_tiles=tiles_per_row, tiles_per_slot=tiles_per_slot, slots_per_row=slots_per_row,
            ADD_GRAD_OUT=add_grad_out, STAT_BLOCKS=stat_blocks, NEED_X=x_now,
            NEED_WEIGHTS=weights_now, NEED_DOWN_BIAS=down_bias_now, NEED_UP_BIAS=up_bias_now,
            NEED_NORM_WEIGHT=norm_now and need_norm_weight, NEED_NORM_BIAS=norm_now and need_norm_bias,
            **segments, **channels_tiles, **shared,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        if num_positions and (need_x or columns):
            if need_chain or need_weights or need_down_bias:
                rows()
            above = {"x_now": need_x, "norm_now": need_norm, "up_bias_now": need_biases}
            below = {"weights_now": need_weights, "down_bias_now": need_down_bias}
            if num_blocks == 1:
                channels(**above, **below)
            else:
                if need_chain or need_biases:
                    channels(**above, weights_now=False, down_bias_now=False)
                if need_weights or need_down_bias:
                    channels(x_now=False, norm_now=False, up_bias_now=False, **below)
        if columns:
            _bottleneck_reduce_kernel[(num_adapters * triton.cdiv(columns, REDUCE_COLUMNS),)](
                grad_up_ptr=grad_up, grad_down_ptr=grad_down, grad_down_bias_ptr=grad_down_bias,
                grad_up_bias_ptr=grad_up_bias, grad_norm_weight_ptr=grad_norm_weight,
                grad_norm_bias_ptr=grad_norm_bias, partial_ptr=partial, row_ids_ptr=row_ids,
                # without ids, the slots of the whole batch are the rows of a bank of one
                num_rows=num_rows if by_row else num_slots, slots_per_row=slots_per_row if by_row else 1,
                BLOCK_B=REDUCE_ROWS, BLOCK_E=REDUCE_COLUMNS, HAS_ROW_IDS=by_row, num_warps=4, **segments,
            )  # fmt: skip
    return grad_x, grad_down, grad_up, grad_down_bias, grad_up_bias, grad_norm_weight, grad_norm_bias


def _tiles_per_slot(tiles_per_row: int, num_channel_blocks: int, by_row: bool, partials: bool) -> int:
    """How many tiles of rows one channels program visits before it writes its partial.

    At least 16, so that partials are a small part of the traffic; for a shared adapter at most about 768 programs,
    so that they do not grow with the batch; with row ids the number must not depend on the batch. Without partials
    only the block of D that a program keeps is to be made worth its reading.
    """
    if not partials:
        return 4
    return 16 if by_row else max(16, triton.cdiv(tiles_per_row * num_channel_blocks, 768))
