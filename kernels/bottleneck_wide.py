"""Kernels of the bottleneck between the library's products: what is as wide as the hidden states, and elementwise.

``wide`` serves both directions (kernels/bottleneck.py):

    out = residual + scale * (act(z) U^T + b_u)        hidden = scale * act(z), weight = U
    dX  = dO + dZ D                                     hidden = dZ, weight = D^T, residual = dO

It is traffic: residual in, out out, 2 C values a row. So a program stays on a block of channels, keeps its block of
the weight on chip, and walks over a run of row tiles, the next of which are on their way while one is computed. What
depends on a channel alone is decided before the walk: a channel that adds nothing (its row of the weight and bias
zero; its row of the batch without an adapter) is a copy of residual, whatever ``hidden`` holds.

Where a tile has 64 rows Hopper runs ``wgmma``. ptxas before 13.3 may reuse the registers of one of its operands too
early (triton issue 11781); here both come from shared memory, as ``hidden`` is loaded and used as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from fastadapter.kernels import bottleneck_config, target
from fastadapter.kernels.activation import _activate, _activation_slope
from fastadapter.kernels.bottleneck_tiles import (
    LENGTHS,
    _row_entry,
    _tile,
    _vector,
    blocks,
    padded,
    power_of_2,
    strides,
)
from fastadapter.kernels.launch import Launch, prepared
from torch import Tensor

HIDDEN_ROWS = 32
# Programs that look for something in U, each in a part of it.
PARTS = 64


@triton.jit(do_not_specialize=["rows"])
def _bottleneck_hidden_kernel(
    hidden_ptr, grad_z_ptr, sums_ptr, reached_ptr, z_ptr, grad_hidden_ptr, up_ptr, scale, rows,
    SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, UP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, ONES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """h = scale f(z) and dZ = scale f'(z) dH of a tile; z and dH (rows, SIZE), h and dZ (rows, HIDDEN_STRIDE).

    Columns past SIZE are zero; with ONES, column SIZE of h is one: its product with dO is the sum of dO. Backward also
    writes the tile's sum of dZ (tiles, SIZE) and, for each of PARTS parts of U, whether it holds anything but zeros.
    """
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (HIDDEN_STRIDE + BLOCK_R - 1) // BLOCK_R
    offs_m = (pid // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = (pid % num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = (offs_m < rows)[:, None]
    inside = (offs_r < SIZE)[None, :]
    mask = mask_m & (offs_r < HIDDEN_STRIDE)[None, :]
    offs = (offs_m * SIZE)[:, None] + offs_r[None, :]
    offs_out = (offs_m * HIDDEN_STRIDE)[:, None] + offs_r[None, :]
    z = tl.load(z_ptr + offs, mask=mask_m & inside, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_R)
    dtype = z_ptr.dtype.element_ty
    h = _activate(z, ACTIVATION) * scale
    if ONES:
        h = tl.where((offs_r == SIZE)[None, :], 1.0, h)
    tl.store(hidden_ptr + offs_out, h.to(dtype), mask=mask)
    if BACKWARD:
        dh = tl.load(grad_hidden_ptr + offs, mask=mask_m & inside, other=0.0).to(tl.float32)
        dz = dh * scale * _activation_slope(z, ACTIVATION)
        dz = tl.where(mask_m & inside, dz, 0.0)
        tl.store(grad_z_ptr + offs_out, dz.to(dtype), mask=mask)
        tile = (pid // num_blocks).to(tl.int64)
        # more programs than tiles where these are few: the others look at U alone
        mask_r = offs_r < tl.where(tile * BLOCK_M < rows, SIZE, 0)
        tl.store(sums_ptr + tile * SIZE + offs_r, tl.sum(dz, axis=0), mask=mask_r)
        if pid < PARTS:
            part: tl.constexpr = (UP_SIZE + PARTS - 1) // PARTS
            first = pid.to(tl.int64) * part
            found = tl.zeros((2048,), tl.int32)
            for start in range(0, part, 2048):
                offs_u = start + tl.arange(0, 2048)
                mask_u = (offs_u < part) & (first + offs_u < UP_SIZE)
                u = tl.load(up_ptr + first + offs_u, mask=mask_u, other=0.0)
                found = tl.maximum(found, (u != 0.0).to(tl.int32))
            tl.store(reached_ptr + pid, tl.max(found, axis=0))


@triton.jit(do_not_specialize=["num_sums"])
def _bottleneck_below_kernel(
    grad_down_ptr, grad_bias_ptr, grad_up_ptr, grad_up_bias_ptr, product_ptr, sums_ptr, reached_ptr, scale, num_sums,
    SIZE: tl.constexpr, DOWN_SIZE: tl.constexpr, UP_SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ONES: tl.constexpr,
):  # fmt: skip
    """The gradient of the down bias, and where U is zero, exact zeros in that of the down projection.

    And dO^T h, (UP_SIZE / SIZE, WIDTH), taken apart: the gradient of U, and with ONES that of the up bias.
    """
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if UP_SIZE > 0:
        dtype = grad_up_ptr.dtype.element_ty
        mask_u = offs < UP_SIZE
        du = tl.load(product_ptr + offs // SIZE * WIDTH + offs % SIZE, mask=mask_u, other=0.0)
        tl.store(grad_up_ptr + offs, du, mask=mask_u)
        if ONES:
            mask_c = offs < UP_SIZE // SIZE
            summed = tl.load(product_ptr + offs * WIDTH + SIZE, mask=mask_c, other=0.0).to(tl.float32)
            tl.store(grad_up_bias_ptr + offs, (summed * scale).to(dtype), mask=mask_c)
    reached = tl.max(tl.load(reached_ptr + tl.arange(0, PARTS)), axis=0)
    if pid < (SIZE + BLOCK_R - 1) // BLOCK_R:
        offs_r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, num_sums, BLOCK_M):
            offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask = (offs_m < num_sums)[:, None] & (offs_r < SIZE)[None, :]
            acc += tl.load(sums_ptr + (offs_m * SIZE)[:, None] + offs_r[None, :], mask=mask, other=0.0)
        total = tl.where(reached > 0, tl.sum(acc, axis=0), 0.0)
        tl.store(grad_bias_ptr + offs_r, total, mask=offs_r < SIZE)
    if reached == 0:
        tl.store(
            grad_down_ptr + offs, tl.zeros((BLOCK,), grad_down_ptr.dtype.element_ty), mask=offs < DOWN_SIZE
        )


@triton.jit(do_not_specialize=[*LENGTHS, "runs", "tiles_per_run"])
def _bottleneck_wide_kernel(
    out_ptr, hidden_ptr, weight_ptr, bias_ptr, residual_ptr, row_ids_ptr, reached_ptr,
    OUT_STRIDES, WEIGHT_STRIDES, BIAS_STRIDES, RESIDUAL_STRIDES, scale, seq_len, num_adapters, runs, tiles_per_run,
    HIDDEN_SIZE: tl.constexpr, SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """residual + hidden weight^T + scale * bias of a block of channels, over a run of row tiles of one batch row."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_N - 1) // BLOCK_N
    row = (pid // (num_blocks * runs)).to(tl.int64)
    first = (pid // num_blocks % runs) * tiles_per_run
    last = tl.minimum(first + tiles_per_run, tl.cdiv(seq_len, BLOCK_M))
    entry, adapted, wrong = _row_entry(row_ids_ptr, row, num_adapters, HAS_ROW_IDS)
    offs_c = ((pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_c = offs_c < HIDDEN_SIZE
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    dtype = hidden_ptr.dtype.element_ty
    RESIDENT: tl.constexpr = SIZE <= BLOCK_K

    bias = _vector(bias_ptr, BIAS_STRIDES, entry, offs_c, mask_c, HAS_BIAS)
    used = (bias != 0.0).to(tl.int32)  # whether a channel adds anything
    w_ptrs = (weight_ptr + entry * WEIGHT_STRIDES[0]) + (offs_k * WEIGHT_STRIDES[2])[:, None]
    w_ptrs += (offs_c * WEIGHT_STRIDES[1])[None, :]
    if RESIDENT:
        w = tl.load(w_ptrs, mask=(offs_k < SIZE)[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        used = tl.maximum(used, tl.max((w != 0.0).to(tl.int32), axis=0))
        w = w.to(dtype)
    else:
        for start in range(0, SIZE, BLOCK_K):
            mask_w = (start + offs_k < SIZE)[:, None] & mask_c[None, :]
            wk = tl.load(w_ptrs + tl.cast(start, tl.int64) * WEIGHT_STRIDES[2], mask=mask_w, other=0.0)
            used = tl.maximum(used, tl.max((wk != 0.0).to(tl.int32), axis=0))
    acts = tl.where(scale != 0.0, 1, 0)
    if PARTS > 0:
        acts *= tl.max(tl.load(reached_ptr + entry * PARTS + tl.arange(0, PARTS)).to(tl.int32), axis=0)
    bias *= scale
    if HAS_ROW_IDS:
        acts *= adapted.to(tl.int32)
        used += wrong.to(tl.int32)
        acts += wrong.to(tl.int32)
        bias = tl.where(wrong, float("nan"), bias)
    live = used * acts > 0

    hidden_ptr += row * seq_len * HIDDEN_STRIDE
    for tile in tl.range(first, last, num_stages=STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = (offs_m < seq_len)[:, None]
        mask = mask_m & mask_c[None, :]
        if HAS_RESIDUAL:
            residual = tl.load(
                _tile(residual_ptr, RESIDUAL_STRIDES, row, offs_m, offs_c), mask=mask, other=0.0
            )
        h_ptrs = hidden_ptr + (offs_m * HIDDEN_STRIDE)[:, None] + offs_k[None, :]
        if RESIDENT:
            h = tl.load(h_ptrs, mask=mask_m & (offs_k < SIZE)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
            acc = tl.dot(h, w, input_precision=PRECISION)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, SIZE, BLOCK_K):
                mask_k = start + offs_k < SIZE
                hk = tl.load(h_ptrs + start, mask=mask_m & mask_k[None, :], other=0.0)
                wk_ptrs = w_ptrs + tl.cast(start, tl.int64) * WEIGHT_STRIDES[2]
                wk = tl.load(wk_ptrs, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
                acc = tl.dot(hk, wk, acc, input_precision=PRECISION)
        if HAS_BIAS or HAS_ROW_IDS:
            acc += bias[None, :]
        # a choice, not a product with zero: it keeps the bits of residual, and Inf or NaN in hidden out of them
        if HAS_RESIDUAL:
            out = tl.where(live[None, :], (residual.to(tl.float32) + acc).to(dtype), residual)
        else:
            out = tl.where(live[None, :], acc, 0.0).to(dtype)
        tl.store(_tile(out_ptr, OUT_STRIDES, row, offs_m, offs_c), out, mask=mask)


def hidden_run(
    rows: int, size: int, activation: str, scale: float, up_size: int | None = None, ones: bool = False
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """A launch of ``scale * act(z)``; in backward of ``scale * act'(z) * grad_hidden``, too, with its sums.

    Args:
        rows, size: of z and grad_hidden, which are contiguous.
        up_size: elements of the up projection, contiguous; ``None``: forward.
        ones: a column of ones behind those of h.
    Returns: what is called with z, grad_hidden and up, and returns both results ``(rows, padded)``, and what
        :func:`below_run` takes.
    """
    width, backward = padded(size + ones), up_size is not None
    block_r, tiles = min(128, power_of_2(width)), blocks(rows, HIDDEN_ROWS)
    programs = tiles * blocks(width, block_r)
    names = ("hidden_ptr", "grad_z_ptr", "sums_ptr", "reached_ptr", "z_ptr", "grad_hidden_ptr", "up_ptr")
    constants = {
        "scale": scale, "rows": rows, "SIZE": size, "HIDDEN_STRIDE": width, "UP_SIZE": up_size or 0,
        "BLOCK_M": HIDDEN_ROWS, "BLOCK_R": block_r, "PARTS": PARTS, "ACTIVATION": activation, "ONES": ones,
        "BACKWARD": backward, "num_warps": 4,
    }  # fmt: skip
    launch = Launch(
        _bottleneck_hidden_kernel, (max(programs, PARTS) if backward else programs,), names, constants
    )

    def run(z, grad_hidden, up):
        h = z.new_empty((rows, width))
        if not backward:
            launch(h, None, None, None, z, None, None)
            return h, None, None, None
        grad_z = z.new_empty((rows, width))
        sums = z.new_empty((tiles, size), dtype=torch.float32)
        reached = z.new_empty((1, PARTS), dtype=torch.int32)
        launch(h, grad_z, sums, reached, z, grad_hidden, up)
        return h, grad_z, sums, reached

    return run


def below_run(
    rows: int, size: int, hidden_size: int, scale: float, need_down: bool, need_up: bool, ones: bool
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    """A launch of what is left to do below the products of backward.

    Args:
        rows, size, ones: as in :func:`hidden_run`, which makes sums and reached.
        scale: of the up bias.
        need_down, need_up: whether there is a grad_down, and the product of grad_out and h.
    Returns: what is called with grad_down ``(1, size, hidden)``, which gets zeros where U is zero, the product
        ``(hidden, padded)``, sums and reached, and returns the gradient of the down bias, ``(1, size)`` in fp32, and
        those of the up projection and, with ``ones``, of its bias in the dtype of the product.
    """
    num_sums, width = blocks(rows, HIDDEN_ROWS), padded(size + ones)
    block, block_r = 1024, min(64, power_of_2(size))
    programs = blocks(size, block_r)
    if need_down or need_up:
        programs = max(programs, blocks(size * hidden_size, block))
    names = ("grad_down", "grad_bias", "grad_up", "grad_up_bias", "product", "sums", "reached")
    constants = {
        "scale": scale, "num_sums": num_sums, "SIZE": size, "DOWN_SIZE": size * hidden_size if need_down else 0,
        "UP_SIZE": size * hidden_size if need_up else 0, "WIDTH": width, "BLOCK_M": 64, "BLOCK_R": block_r,
        "BLOCK": block, "PARTS": PARTS, "ONES": ones, "num_warps": 4,
    }  # fmt: skip
    launch = Launch(_bottleneck_below_kernel, (programs,), tuple(f"{name}_ptr" for name in names), constants)

    def run(grad_down, product, sums, reached):
        grad_bias = sums.new_empty((1, size))
        grad_up = product.new_empty((1, hidden_size, size)) if need_up else None
        grad_up_bias = product.new_empty((1, hidden_size)) if need_up and ones else None
        # what is not needed has a pointer all the same: nothing is read or written there
        launch(
            sums if grad_down is None else grad_down, grad_bias, grad_up, grad_up_bias, product, sums, reached
        )
        return grad_bias, grad_up, grad_up_bias

    return run


def plan(
    arch: str, dtype: torch.dtype, batch: int, seq_len: int, hidden_size: int, size: int
) -> tuple[int, dict[str, Any]]:
    """Programs and launch options of the wide kernel, all that follows from shapes."""
    tiles = bottleneck_config.wide_config(arch, dtype, size, seq_len)
    programs = tiles.pop("programs")
    num_tiles, num_blocks = blocks(seq_len, tiles["BLOCK_M"]), blocks(hidden_size, tiles["BLOCK_N"])
    # one wave: as many runs as the device holds programs at once
    tiles_per_run = blocks(num_tiles, min(num_tiles, max(1, programs // (batch * num_blocks))))
    runs = blocks(num_tiles, tiles_per_run)
    options = {
        "seq_len": seq_len, "runs": runs, "tiles_per_run": tiles_per_run, "HIDDEN_SIZE": hidden_size, "SIZE": size,
        "STAGES": tiles["num_stages"], "PRECISION": bottleneck_config.products(arch, dtype),
    }  # fmt: skip
    return batch * runs * num_blocks, options | tiles


def wide(
    out: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, row_ids: Tensor | None,
    scale: float, reached: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``residual + h @ weight^T + scale * bias``.

    Args:
        out, residual: ``(batch, seq, hidden)`` any strides.
        h: ``(batch * seq, at least bottleneck_size)``, dense.
        weight, bias: banks ``(n, hidden, bottleneck_size)`` and ``(n, hidden)``, any strides.
        reached: ``(n, a power of two)``: entries where all is zero copy ``residual``.
    """
    _wide(out, h, weight, bias, residual, row_ids, reached, scale)


@prepared(tensors=7)
def _wide(out, h, weight, bias, residual, row_ids, reached, scale):
    return wide_run(out, h.stride(0), weight, bias, residual, row_ids, reached, scale)


def wide_run(
    out: Tensor, h_stride: int, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    row_ids: Tensor | None, reached: Tensor | None, scale: float,
) -> Callable[..., None]:  # fmt: skip
    """What :func:`wide` does with tensors of this layout, called with out, h, weight, bias, residual, row_ids and
    reached. Strides are those of now: tensors that have others, but the same elements by these, may be given.
    """
    batch, seq_len, hidden_size = out.shape
    num_adapters, _, size = weight.shape
    programs, options = plan(target.arch(out), out.dtype, batch, seq_len, hidden_size, size)
    # read again with every tile of rows: rounded once, in one pass
    rounded = size > options["BLOCK_K"] and weight.dtype != out.dtype
    names = ("out", "hidden", "weight", "bias", "residual", "row_ids", "reached")
    constants = {
        "OUT_STRIDES": out.stride(), "WEIGHT_STRIDES": (torch.empty_like(weight) if rounded else weight).stride(),
        "BIAS_STRIDES": strides(bias, 2), "RESIDUAL_STRIDES": strides(residual, 3), "scale": scale,
        "num_adapters": num_adapters, "HIDDEN_STRIDE": h_stride, "HAS_ROW_IDS": row_ids is not None,
        "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "PARTS": 0 if reached is None else reached.shape[1], **options,
    }  # fmt: skip
    launch = Launch(_bottleneck_wide_kernel, (programs,), tuple(f"{name}_ptr" for name in names), constants)

    def run(out, h, weight, *others):
        launch(out, h, weight.to(out.dtype) if rounded else weight, *others)

    return run
