"""The bottleneck where every batch row has weights of its own (row ids): the products that end in few columns.

1. narrow: a program owns a tile of one batch row and a block of hidden columns, and walks over hidden_size: z and
   h = scale f(z), and in backward dH = dO U beside it and dZ = scale f'(z) dH. What is hidden_size wide follows from h
   and dZ in kernels/bottleneck_wide.py.
2. weights: a program owns a block of dU and dD and a slot, a run of tiles of one batch row, and writes them as one fp32
   partial, with the sums of dO and dZ.
3. reduce: the partials of each bank entry are summed in a fixed order.

No atomics. Tiles and slots follow from shapes other than the batch size, so a row and its gradient have the same bits
alone and in a batch. Nothing is computed less when fewer gradients are asked for: it would be another kernel, which
might round in other places.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.activation import _activate, _activation_slope
from fastadapter.kernels.bottleneck_config import narrow_config, products, weights_config
from fastadapter.kernels.bottleneck_tiles import LENGTHS, _row_entry, _tile, _vector, blocks, padded, strides
from fastadapter.kernels.bottleneck_wide import wide
from torch import Tensor

REDUCE_ROWS = 8
REDUCE_COLUMNS = 512
TILES_PER_SLOT = 16  # so that partials are a small part of the traffic


@triton.jit(do_not_specialize=LENGTHS)
def _bottleneck_narrow_kernel(
    hidden_ptr, grad_z_ptr, x_ptr, grad_out_ptr, down_ptr, up_ptr, down_bias_ptr, row_ids_ptr, reached_ptr,
    X_STRIDES, GRAD_OUT_STRIDES, DOWN_STRIDES, UP_STRIDES, DOWN_BIAS_STRIDES, scale, seq_len, num_adapters,
    HIDDEN_SIZE: tl.constexpr, SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACTIVATION: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h, and in backward dZ, of a tile of rows and hidden columns, into (batch * seq, HIDDEN_STRIDE)."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (SIZE + BLOCK_R - 1) // BLOCK_R
    tiles_per_row = tl.cdiv(seq_len, BLOCK_M)
    tile = pid // num_blocks
    row = (tile // tiles_per_row).to(tl.int64)
    entry, adapted, _ = _row_entry(row_ids_ptr, row, num_adapters, True)
    offs_m = (tile % tiles_per_row).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < seq_len)[:, None]
    offs_r = ((pid % num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = offs_r < SIZE
    dtype = x_ptr.dtype.element_ty
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # a row without an adapter reads nothing
    for start in range(0, tl.where(adapted, HIDDEN_SIZE, 0), BLOCK_C):
        offs_c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask_c = offs_c < HIDDEN_SIZE
        mask = mask_m & mask_c[None, :]
        x = tl.load(_tile(x_ptr, X_STRIDES, row, offs_m, offs_c), mask=mask, other=0.0)  # (BLOCK_M, BLOCK_C)
        d_ptrs = _tile(down_ptr, DOWN_STRIDES, entry, offs_r, offs_c)
        d = tl.load(d_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        z = tl.dot(x, tl.trans(d), z, input_precision=PRECISION)
        if BACKWARD:
            do = tl.load(_tile(grad_out_ptr, GRAD_OUT_STRIDES, row, offs_m, offs_c), mask=mask, other=0.0)
            u_ptrs = _tile(up_ptr, UP_STRIDES, entry, offs_c, offs_r)
            u = tl.load(u_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_C, BLOCK_R)
            dh = tl.dot(do, u, dh, input_precision=PRECISION)
    z += _vector(down_bias_ptr, DOWN_BIAS_STRIDES, entry, offs_r, mask_r, HAS_DOWN_BIAS)[None, :]
    offs = ((row * seq_len + offs_m) * HIDDEN_STRIDE)[:, None] + offs_r[None, :]
    # padding up to HIDDEN_STRIDE is written too, so that whole blocks of it can be read
    mask_out = mask_m & (offs_r < HIDDEN_STRIDE)[None, :]
    tl.store(hidden_ptr + offs, (_activate(z, ACTIVATION) * scale).to(dtype), mask=mask_out)
    if BACKWARD:
        dz = dh * scale * _activation_slope(z, ACTIVATION)
        # where, since a product with zero keeps Inf and NaN
        dz = tl.where(adapted, tl.where(tl.load(reached_ptr + entry) != 0, dz, 0.0), 0.0)
        tl.store(grad_z_ptr + offs, dz.to(dtype), mask=mask_out)


@triton.jit(do_not_specialize=["seq_len", "num_adapters", "slots_per_row"])
def _bottleneck_weights_kernel(
    partial_ptr, hidden_ptr, grad_z_ptr, x_ptr, grad_out_ptr, row_ids_ptr, reached_ptr, X_STRIDES, GRAD_OUT_STRIDES,
    scale, seq_len, num_adapters, slots_per_row, columns, up_end, down_end, down_bias_end,
    HIDDEN_SIZE: tl.constexpr, SIZE: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the parameters' gradients that a run of TILES tiles of one batch row adds."""
    pid = tl.program_id(0)
    num_channel_blocks: tl.constexpr = (HIDDEN_SIZE + BLOCK_C - 1) // BLOCK_C
    num_blocks: tl.constexpr = (SIZE + BLOCK_R - 1) // BLOCK_R
    channel_block = pid % num_channel_blocks
    block = pid // num_channel_blocks % num_blocks
    slot = (pid // (num_channel_blocks * num_blocks)).to(tl.int64)
    row = slot // slots_per_row
    first = (slot % slots_per_row).to(tl.int32) * TILES
    last = tl.minimum(first + TILES, tl.cdiv(seq_len, BLOCK_M))
    entry, adapted, _ = _row_entry(row_ids_ptr, row, num_adapters, True)
    offs_c = (channel_block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = (offs_c < HIDDEN_SIZE)[None, :]
    offs_r = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = (offs_r < SIZE)[None, :]
    du = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    dd = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    d_down_bias = tl.zeros((BLOCK_R,), tl.float32)
    d_up_bias = tl.zeros((BLOCK_C,), tl.float32)
    # nobody reads what a row without an adapter adds
    for tile in range(first, tl.where(adapted, last, first)):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = (offs_m < seq_len)[:, None]
        offs = ((row * seq_len + offs_m) * HIDDEN_STRIDE)[:, None] + offs_r[None, :]
        h = tl.load(hidden_ptr + offs, mask=mask_m & mask_r, other=0.0)  # (BLOCK_M, BLOCK_R)
        dz = tl.load(grad_z_ptr + offs, mask=mask_m & mask_r, other=0.0)
        mask = mask_m & mask_c
        do = tl.load(_tile(grad_out_ptr, GRAD_OUT_STRIDES, row, offs_m, offs_c), mask=mask, other=0.0)
        x = tl.load(_tile(x_ptr, X_STRIDES, row, offs_m, offs_c), mask=mask, other=0.0)  # (BLOCK_M, BLOCK_C)
        du = tl.dot(tl.trans(do), h, du, input_precision=PRECISION)
        dd = tl.dot(tl.trans(x), dz, dd, input_precision=PRECISION)
        d_down_bias += tl.sum(dz.to(tl.float32), axis=0)
        d_up_bias += tl.sum(do.to(tl.float32), axis=0)
    # exact zeros below an up projection of zeros, though x may hold NaN
    dd = tl.where(tl.load(reached_ptr + entry) != 0, dd, 0.0)
    partial_ptr += slot * columns
    mask = tl.trans(mask_c) & mask_r
    tl.store(partial_ptr + offs_c[:, None] * SIZE + offs_r[None, :], du, mask=mask)
    tl.store(partial_ptr + up_end + offs_c[:, None] + offs_r[None, :] * HIDDEN_SIZE, dd, mask=mask)
    if channel_block == 0:
        tl.store(partial_ptr + down_end + offs_r, d_down_bias, mask=offs_r < SIZE)
    if block == 0:
        tl.store(partial_ptr + down_bias_end + offs_c, d_up_bias * scale, mask=offs_c < HIDDEN_SIZE)


@triton.jit
def _store_segment(grad_ptr, entry, offs_e, first, end, total):
    """The columns of one argument's gradient."""
    index = entry * (end - first) + offs_e - first
    tl.store(grad_ptr + index, total.to(grad_ptr.dtype.element_ty), mask=(offs_e >= first) & (offs_e < end))


@triton.jit(do_not_specialize=["num_rows", "slots_per_row"])
def _bottleneck_reduce_kernel(
    grad_up_ptr, grad_down_ptr, grad_down_bias_ptr, grad_up_bias_ptr, partial_ptr, row_ids_ptr,
    num_rows, slots_per_row, columns, up_end, down_end, down_bias_end, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
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
        # only rows of this entry are read: others may hold NaN
        mask_b = tl.load(row_ids_ptr + offs_b, mask=offs_b < num_rows, other=-1) == entry
        if tl.max(mask_b.to(tl.int32), axis=0) > 0:
            for slot in range(slots_per_row):
                offs_s = offs_b.to(tl.int64) * slots_per_row + slot
                ptrs = partial_ptr + offs_s[:, None] * columns + offs_e[None, :]
                acc += tl.load(ptrs, mask=mask_b[:, None] & mask_e[None, :], other=0.0)  # (BLOCK_B, BLOCK_E)
    total = tl.sum(acc, axis=0)
    _store_segment(grad_up_ptr, entry, offs_e, 0, up_end, total)
    _store_segment(grad_down_ptr, entry, offs_e, up_end, down_end, total)
    _store_segment(grad_down_bias_ptr, entry, offs_e, down_end, down_bias_end, total)
    _store_segment(grad_up_bias_ptr, entry, offs_e, down_bias_end, columns, total)


def forward(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, row_ids: Tensor, activation: str, scale: float
) -> Tensor:
    """``scale * act(down(x))``, (batch * seq, padded), in the dtype of ``x``."""
    return _narrow(x, None, down_weight, None, down_bias, row_ids, None, activation, scale)[0]


def _narrow(
    x: Tensor, grad_out: Tensor | None, down_weight: Tensor, up_weight: Tensor | None, down_bias: Tensor | None,
    row_ids: Tensor, reached: Tensor | None, activation: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h, and dZ where there is a grad_out."""
    batch, seq_len, hidden_size = x.shape
    num_adapters, size, _ = down_weight.shape
    arch, width = target.arch(x), padded(size)
    tiles = narrow_config(arch, x.dtype, size, seq_len)
    down_weight = down_weight.to(x.dtype)
    up_weight = None if up_weight is None else up_weight.to(x.dtype)
    h = x.new_empty((batch * seq_len, width))
    backward = grad_out is not None
    grad_z = x.new_empty((batch * seq_len if backward else 0, width))
    programs = batch * blocks(seq_len, tiles["BLOCK_M"]) * blocks(size, tiles["BLOCK_R"])
    _bottleneck_narrow_kernel[(programs,)](
        hidden_ptr=h, grad_z_ptr=grad_z, x_ptr=x, grad_out_ptr=grad_out, down_ptr=down_weight, up_ptr=up_weight,
        down_bias_ptr=down_bias, row_ids_ptr=row_ids, reached_ptr=reached, X_STRIDES=x.stride(),
        GRAD_OUT_STRIDES=strides(grad_out, 3), DOWN_STRIDES=down_weight.stride(), UP_STRIDES=strides(up_weight, 3),
        DOWN_BIAS_STRIDES=strides(down_bias, 2), scale=scale, seq_len=seq_len, num_adapters=num_adapters,
        HIDDEN_SIZE=hidden_size, SIZE=size, HIDDEN_STRIDE=width, ACTIVATION=activation,
        HAS_DOWN_BIAS=down_bias is not None, BACKWARD=backward, PRECISION=products(arch, x.dtype), **tiles,
    )  # fmt: skip
    return h, grad_z


def backward(
    grad_out: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None, row_ids: Tensor,
    z: None, activation: str, scale: float, add_grad_out: bool, need_x: bool, need_weights: bool, need_biases: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, down_weight, up_weight, down_bias (or of an absent one) and up_bias, in fp32 but that of x.

    Last, which entries of the bank the gradient reaches: those whose up projection is not zero.
    """
    batch, seq_len, hidden_size = x.shape
    num_adapters, size, _ = down_weight.shape
    reached = up_weight.flatten(1).any(1, keepdim=True)
    h, grad_z = _narrow(x, grad_out, down_weight, up_weight, down_bias, row_ids, reached, activation, scale)
    grad_x = None
    if need_x:
        grad_x = torch.empty_like(x)
        residual = grad_out if add_grad_out else None
        wide(grad_x, grad_z, down_weight.mT, None, residual, row_ids, 1.0, reached)
    if not (need_weights or need_biases):
        return grad_x, None, None, None, None, reached
    shapes = ((hidden_size, size), (size, hidden_size), (size,), (hidden_size,))
    grads = [x.new_empty((num_adapters, *shape), dtype=torch.float32) for shape in shapes]
    ends = [0]
    for grad in grads:
        ends.append(ends[-1] + grad.numel() // num_adapters)
    arch = target.arch(x)
    tiles = weights_config(arch, x.dtype, size)
    slots_per_row = blocks(blocks(seq_len, tiles["BLOCK_M"]), TILES_PER_SLOT)
    partial = x.new_empty((batch * slots_per_row, ends[4]), dtype=torch.float32)
    segments = {"columns": ends[4], "up_end": ends[1], "down_end": ends[2], "down_bias_end": ends[3]}
    programs = len(partial) * blocks(hidden_size, tiles["BLOCK_C"]) * blocks(size, tiles["BLOCK_R"])
    _bottleneck_weights_kernel[(programs,)](
        partial_ptr=partial, hidden_ptr=h, grad_z_ptr=grad_z, x_ptr=x, grad_out_ptr=grad_out, row_ids_ptr=row_ids,
        reached_ptr=reached, X_STRIDES=x.stride(), GRAD_OUT_STRIDES=grad_out.stride(), scale=scale, seq_len=seq_len,
        num_adapters=num_adapters, slots_per_row=slots_per_row, HIDDEN_SIZE=hidden_size, SIZE=size,
        HIDDEN_STRIDE=h.stride(0), TILES=TILES_PER_SLOT, PRECISION=products(arch, x.dtype), **segments, **tiles,
    )  # fmt: skip
    grad_up, grad_down, grad_down_bias, grad_up_bias = grads
    _bottleneck_reduce_kernel[(num_adapters * blocks(ends[4], REDUCE_COLUMNS),)](
        grad_up_ptr=grad_up, grad_down_ptr=grad_down, grad_down_bias_ptr=grad_down_bias,
        grad_up_bias_ptr=grad_up_bias, partial_ptr=partial, row_ids_ptr=row_ids, num_rows=batch,
        slots_per_row=slots_per_row, BLOCK_B=REDUCE_ROWS, BLOCK_E=REDUCE_COLUMNS, num_warps=4, **segments,
    )  # fmt: skip
    return grad_x, grad_down, grad_up, grad_down_bias, grad_up_bias, reached
