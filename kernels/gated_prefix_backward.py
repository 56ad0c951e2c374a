"""Backward of the gated prefix term (kernels/gated_prefix.py has the forward; docs/maths.md the derivation).

    p, f as in the forward
    delta = rowsum(p * (dO Vp^T)),                dgate_h = f' * sum delta
    dS = f * p * (dO Vp^T - delta)
    dQ = softmax_scale * dS Kp,  dKp = softmax_scale * dS^T Q,  dVp = f * p^T dO

Backward is deterministic without atomics. A program owns one slot, kv head and block of prefix positions; a slot
is a run of query tiles, of one batch row if there are row ids, else of the whole batch. It keeps dKp and dVp in
registers over its run and writes one fp32 partial; a second kernel sums the partials of each bank entry in a
fixed order. Slots follow from shapes alone, and with row ids not from the batch size either, so the gradient of
a row has the same bits alone and in a batch.

Tiles have fewer than 64 rows, and blocks fewer than 64 prefix positions, so that Hopper runs ``mma.sync``: p and dS
are operands from registers (see the forward), and dS^T is one of those that Triton 3.4 to 3.7.0 gets wrong.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.gated_prefix_tiles import (
    LENGTHS,
    _gate_factor,
    _prefix_block,
    _rescale,
    _row_entry,
    _scores,
    _tile,
    check,
    config,
    operands,
)
from torch import Tensor

RUN_LENGTHS = ["num_tiles", "tiles_per_slot", "slots_per_row", "kv_columns", "columns", "stats_plane"]
REDUCE_LENGTHS = ["num_rows", "slots_per_row", "kv_columns", "columns"]
REDUCE_ROWS = 8
REDUCE_COLUMNS = 128


@triton.jit
def _dot_fp32_by(a, b, acc, WIDE: tl.constexpr):
    """acc + a b for an fp32 ``a`` beside an operand in the dtype of the prefix.

    fp16 operands are widened to a tf32 product, which is exact for ``b`` and rounds ``a`` about as fp16 would,
    but does not flush it to zero: f p and dS are tiny where gates start.
    """
    if b.dtype == tl.bfloat16:
        acc = tl.dot(a.to(tl.bfloat16), b, acc)
    elif b.dtype == tl.float16:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=WIDE)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _softmax_step(m_i, l_i, delta, q, do, k, v, scale_log2, mask_p):
    """Take one prefix block into the running maximum, the normaliser, and delta times the normaliser."""
    s = _scores(q, k, scale_log2, mask_p)
    m_i, shift, alpha = _rescale(m_i, s)
    p = tl.exp2(s - shift[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # (BLOCK_M, BLOCK_P)
    return m_i, shift, l_i * alpha + tl.sum(p, axis=1), delta * alpha + tl.sum(p * dp, axis=1)


@triton.jit
def _weights_and_ds(q, do, k, v, shift, weight, delta, scale_log2, mask_m, mask_p):
    """f p and dS of one prefix block, (BLOCK_M, BLOCK_P); ``weight`` is f over the normaliser."""
    p = tl.exp2(_scores(q, k, scale_log2, mask_p) - shift[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    # padded positions: 0 * Inf from the prefix would make them NaN
    mask = mask_m[:, None] & mask_p[None, :]
    weights = tl.where(mask, p * weight[:, None], 0.0)
    return weights, tl.where(mask, weights * (dp - delta[:, None]), 0.0)


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _gated_prefix_bwd_kernel(
    grad_query_ptr, partial_ptr, stats_ptr, grad_out_ptr, query_ptr, key_ptr, value_ptr, gate_ptr, row_ids_ptr,
    GRAD_QUERY_STRIDES, GRAD_OUT_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, GATE_STRIDES,
    softmax_scale, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len,
    num_tiles, tiles_per_slot, slots_per_row, kv_columns, columns, stats_plane,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, TANH: tl.constexpr, ONE_BLOCK: tl.constexpr, WIDE: tl.constexpr,
    NEED_QUERY: tl.constexpr, NEED_PREFIX: tl.constexpr, NEED_GATE: tl.constexpr, SAVE_STATS: tl.constexpr,
):  # fmt: skip
    """dQ of a run of query tiles, and that run's part of dKp, dVp and dgate.

    A program does all of it if the prefix fits one block. Otherwise one launch does dQ and dgate and leaves the
    softmax statistics of every query position, and a second does one block of dKp and dVp per program from them.
    """
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(prefix_len, BLOCK_P) if NEED_PREFIX else 1
    first_p = (pid % num_blocks) * BLOCK_P
    kv_head = ((pid // num_blocks) % num_kv_heads).to(tl.int64)
    slot = (pid // (num_blocks * num_kv_heads)).to(tl.int64)
    group_size = num_heads // num_kv_heads
    tiles_per_row = tl.cdiv(q_len, BLOCK_M)
    first_row = slot // slots_per_row if HAS_ROW_IDS else slot * 0
    first_tile = (slot % slots_per_row).to(tl.int32) * tiles_per_slot
    last_tile = tl.minimum(first_tile + tiles_per_slot, num_tiles)
    row_id, entry = _row_entry(row_ids_ptr, first_row, num_prefixes, HAS_ROW_IDS)

    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    k_ptrs = _tile(key_ptr, KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    v_ptrs = _tile(value_ptr, VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    k, v, mask_p = _prefix_block(k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, first_p, prefix_len, mask_d)
    scale_log2 = softmax_scale * 1.4426950408889634
    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for member in range(group_size):
        head = kv_head * group_size + member
        factor, slope = _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH)
        delta_sum = tl.zeros((BLOCK_M,), tl.float32)
        for tile in range(first_tile, last_tile):
            row = first_row + tile // tiles_per_row
            offs_m = (tile % tiles_per_row).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < q_len
            mask_md = mask_m[:, None] & mask_d
            q_ptrs = _tile(query_ptr, QUERY_STRIDES, row, head, offs_m, offs_d)
            do_ptrs = _tile(grad_out_ptr, GRAD_OUT_STRIDES, row, head, offs_m, offs_d)
            q = tl.load(q_ptrs, mask=mask_md, other=0.0).to(key_ptr.dtype.element_ty)  # (BLOCK_M, BLOCK_D)
            do = tl.load(do_ptrs, mask=mask_md, other=0.0).to(key_ptr.dtype.element_ty)  # (BLOCK_M, BLOCK_D)

            m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            shift = tl.zeros((BLOCK_M,), tl.float32)
            l_i = tl.zeros((BLOCK_M,), tl.float32)
            delta = tl.zeros((BLOCK_M,), tl.float32)
            # (BLOCK_M,) in (3, batch, num_heads, q_len)
            stats_ptrs = stats_ptr + (row * num_heads + head) * q_len + offs_m
            if NEED_PREFIX and not ONE_BLOCK:
                shift = tl.load(stats_ptrs, mask=mask_m, other=0.0)
                l_i = tl.load(stats_ptrs + stats_plane, mask=mask_m, other=1.0)
                delta = tl.load(stats_ptrs + 2 * stats_plane, mask=mask_m, other=0.0)
            elif ONE_BLOCK:
                m_i, shift, l_i, delta = _softmax_step(m_i, l_i, delta, q, do, k, v, scale_log2, mask_p)
            else:
                for start in range(0, prefix_len, BLOCK_P):
                    kn, vn, mask_n = _prefix_block(
                        k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d
                    )
                    m_i, shift, l_i, delta = _softmax_step(m_i, l_i, delta, q, do, kn, vn, scale_log2, mask_n)
            if SAVE_STATS:
                tl.store(stats_ptrs, shift, mask=mask_m)
                tl.store(stats_ptrs + stats_plane, l_i, mask=mask_m)
                tl.store(stats_ptrs + 2 * stats_plane, delta, mask=mask_m)
            delta = delta / l_i
            weight = factor / l_i
            delta_sum += tl.where(mask_m, delta, 0.0)

            if ONE_BLOCK or NEED_PREFIX:
                weights, ds = _weights_and_ds(q, do, k, v, shift, weight, delta, scale_log2, mask_m, mask_p)
            if NEED_QUERY:
                dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                if factor != 0.0:
                    if ONE_BLOCK:
                        dq = _dot_fp32_by(ds, k, dq, WIDE)
                    else:
                        for start in range(0, prefix_len, BLOCK_P):
                            kn, vn, mask_n = _prefix_block(
                                k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d
                            )
                            _, dsn = _weights_and_ds(
                                q, do, kn, vn, shift, weight, delta, scale_log2, mask_m, mask_n
                            )
                            dq = _dot_fp32_by(dsn, kn, dq, WIDE)
                dq_ptrs = _tile(grad_query_ptr, GRAD_QUERY_STRIDES, row, head, offs_m, offs_d)
                tl.store(dq_ptrs, (dq * softmax_scale).to(grad_query_ptr.dtype.element_ty), mask=mask_md)
            if NEED_PREFIX:
                if factor != 0.0:
                    dk = _dot_fp32_by(tl.trans(ds), q, dk, WIDE)
                    dv = _dot_fp32_by(tl.trans(weights), do, dv, WIDE)
        if NEED_GATE:
            tl.store(partial_ptr + slot * columns + 2 * kv_columns + head, slope * tl.sum(delta_sum, axis=0))
    if NEED_PREFIX:
        offs_pd = (kv_head * prefix_len + first_p + offs_p)[:, None] * HEAD_DIM + offs_d[None, :]
        mask_pd = mask_p[:, None] & mask_d
        tl.store(partial_ptr + slot * columns + offs_pd, dk * softmax_scale, mask=mask_pd)
        tl.store(partial_ptr + slot * columns + kv_columns + offs_pd, dv, mask=mask_pd)


@triton.jit(do_not_specialize=REDUCE_LENGTHS)
def _gated_prefix_reduce_kernel(
    grad_key_ptr, grad_value_ptr, grad_gate_ptr, partial_ptr, row_ids_ptr,
    num_rows, slots_per_row, kv_columns, columns,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
):  # fmt: skip
    """Sum the partials of the rows that use one bank entry, BLOCK_E columns of (dKp | dVp | dgate) at a time.

    Rows are summed across a tile and slots along the loop: where a single row uses the entry, the sum does not
    depend on that row's place in the batch.
    """
    pid = tl.program_id(0)
    num_column_blocks = tl.cdiv(columns, BLOCK_E)
    entry = (pid // num_column_blocks).to(tl.int64)
    offs_e = (pid % num_column_blocks).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < columns
    acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        if HAS_ROW_IDS:
            # only rows of this entry are read: others may hold NaN, or nothing yet
            mask_r = mask_r & (tl.load(row_ids_ptr + offs_r, mask=mask_r, other=-1) == entry)
        if tl.max(mask_r.to(tl.int32), axis=0) > 0:
            for slot in range(slots_per_row):
                offs_s = offs_r.to(tl.int64) * slots_per_row + slot
                ptrs = partial_ptr + offs_s[:, None] * columns + offs_e[None, :]
                acc += tl.load(ptrs, mask=mask_r[:, None] & mask_e[None, :], other=0.0)  # (BLOCK_R, BLOCK_E)
    total = tl.sum(acc, axis=0)
    is_key = offs_e < kv_columns
    is_value = (offs_e >= kv_columns) & (offs_e < 2 * kv_columns)
    is_gate = (offs_e >= 2 * kv_columns) & mask_e
    prefix_dtype = grad_key_ptr.dtype.element_ty
    tl.store(grad_key_ptr + entry * kv_columns + offs_e, total.to(prefix_dtype), mask=is_key)
    tl.store(grad_value_ptr + (entry - 1) * kv_columns + offs_e, total.to(prefix_dtype), mask=is_value)
    num_heads = columns - 2 * kv_columns
    tl.store(grad_gate_ptr + entry * num_heads + offs_e - 2 * kv_columns, total, mask=is_gate)


def gated_prefix_backward(
    grad_out: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor,
    row_ids: Tensor | None, softmax_scale: float, gate_fn: str,
    need_query: bool, need_prefix: bool, need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, prefix_key, prefix_value and gate, each in its argument's dtype.

    Those not needed come back with shape ``(0,)``. A row whose id is outside ``[-1, num_prefixes)`` gets NaN in
    its gradient of query and adds nothing to the others. Errors as in :func:`gated_prefix_forward`.
    """
    check(query, gate_fn)
    batch, num_heads, q_len, head_dim = query.shape
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    by_row = row_ids is not None
    arch = target.arch(query)
    table = (arch, head_dim, prefix_len, query.dtype, prefix_key.dtype)
    tiles = config(*table, "backward")
    one_block = prefix_len <= tiles.block_p

    grad_query = torch.empty_like(query) if need_query else query.new_empty(0)
    grad_key = prefix_key.new_empty(prefix_key.shape if need_prefix else (0,))
    grad_value = prefix_value.new_empty(prefix_value.shape if need_prefix else (0,))
    grad_gate = gate.new_empty(gate.shape if need_gate else (0,))

    num_rows = batch if by_row else 1
    num_tiles = triton.cdiv(q_len, tiles.block_m) * (1 if by_row else batch)
    tiles_per_slot = _tiles_per_slot(num_tiles, num_heads, num_kv_heads, by_row)
    slots_per_row = triton.cdiv(num_tiles, tiles_per_slot)
    num_slots = num_rows * slots_per_row
    kv_columns = num_kv_heads * prefix_len * head_dim if need_prefix else 0
    columns = 2 * kv_columns + (num_heads if need_gate else 0)
    partial = query.new_empty((num_slots, columns), dtype=torch.float32)
    # shift, normaliser and delta of every query position, handed from the first launch to the second
    in_two = need_prefix and not one_block
    stats = query.new_empty((3, batch, num_heads, q_len) if in_two else 0, dtype=torch.float32)

    def launch(
        kind: str, query_now: bool, prefix_now: bool, gate_now: bool, save_stats: bool = False
    ) -> None:
        tiles = config(*table, kind)
        num_blocks = triton.cdiv(prefix_len, tiles.block_p) if prefix_now else 1
        _gated_prefix_bwd_kernel[(num_slots * num_kv_heads * num_blocks,)](
            grad_query_ptr=grad_query, partial_ptr=partial, stats_ptr=stats, grad_out_ptr=grad_out,
            GRAD_QUERY_STRIDES=grad_query.stride() if need_query else query.stride(),
            GRAD_OUT_STRIDES=grad_out.stride(),
            num_tiles=num_tiles, tiles_per_slot=tiles_per_slot, slots_per_row=slots_per_row,
            kv_columns=kv_columns, columns=columns, stats_plane=stats.numel() // 3,
            WIDE="ieee" if arch.startswith("gfx") else "tf32",  # AMD's matrix units take fp32 as it is
            NEED_QUERY=query_now, NEED_PREFIX=prefix_now, NEED_GATE=gate_now, SAVE_STATS=save_stats,
            **operands(query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn, tiles),
        )  # fmt: skip

    with torch.cuda.device_of(query):
        if num_slots * num_kv_heads and (need_query or columns):
            if one_block:
                launch("backward", need_query, need_prefix, need_gate)
            else:
                launch("backward-query", need_query, False, need_gate, save_stats=need_prefix)
                if need_prefix:
                    launch("backward-prefix", False, True, False)
        if columns:
            _gated_prefix_reduce_kernel[(num_prefixes * triton.cdiv(columns, REDUCE_COLUMNS),)](
                grad_key_ptr=grad_key, grad_value_ptr=grad_value, grad_gate_ptr=grad_gate,
                partial_ptr=partial, row_ids_ptr=row_ids,
                # without ids, the slots of the whole batch are the rows of a bank of one
                num_rows=num_rows if by_row else num_slots, slots_per_row=slots_per_row if by_row else 1,
                kv_columns=kv_columns, columns=columns,
                BLOCK_R=REDUCE_ROWS, BLOCK_E=REDUCE_COLUMNS, HAS_ROW_IDS=by_row, num_warps=4,
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_gate


def _tiles_per_slot(num_tiles: int, num_heads: int, num_kv_heads: int, by_row: bool) -> int:
    """How many query tiles one backward program sums before it writes its partial.

    At least 16 visits (tiles times query heads), so that partials are a small part of the traffic. For a shared
    prefix at most about 384 programs, three for every multiprocessor of an H100, so that partials do not grow with
    the batch; with row ids the number must not depend on the batch.
    """
    tiles = triton.cdiv(16 * num_kv_heads, num_heads)
    return tiles if by_row else max(tiles, triton.cdiv(num_tiles * num_kv_heads, 384))
