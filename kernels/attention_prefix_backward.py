"""The prefix's part of the backward of both single-pass attention ops; attention_backward.py says how it fits in."""

import triton
import triton.language as tl
from fastadapter.kernels.attention import (
    LENGTHS,
    _adapter_of,
    _bounds,
    _capped,
    _dot_fp32_by,
    _sequence_of,
)
from fastadapter.kernels.attention_tiles import _load, _rows
from fastadapter.kernels.gated_prefix_tiles import _gate_factor

RUN_LENGTHS = ["tiles_per_slot", "slots_per_row", "slot_len", "kv_columns", "columns", "num_rows"]


@triton.jit
def _shift(lse):
    """What to subtract from scores; where nothing is visible, 0 instead of -inf."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def _prefix_tile(ptrs, STRIDES, start, mask_p, mask_d, HEAD_DIM: tl.constexpr):
    """Prefix rows (BLOCK_P, BLOCK_D) from position ``start`` on, zero past the end."""
    return _load(ptrs + (tl.zeros((), tl.int64) + start) * STRIDES[2], mask_p, mask_d, True, HEAD_DIM)


@triton.jit
def _prefix_probs(q, do, k, v, shift, mask_p, score_scale, softcap, HAS_SOFTCAP: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """p, dO Vp^T and the slope of the cap for one prefix block, (BLOCK_M, BLOCK_P)."""
    s, slope = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), score_scale, softcap, HAS_SOFTCAP)
    p = tl.exp(tl.where(mask_p[None, :], s, float("-inf")) - shift[:, None])
    return p, tl.dot(do, tl.trans(v), input_precision=PRECISION), slope


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _attention_bwd_prefix_kernel(
    grad_query_ptr, partial_ptr, delta_ptr, prefix_delta_ptr, grad_out_ptr, out_ptr, lse_ptr,
    query_ptr, prefix_key_ptr, prefix_value_ptr, gate_ptr, cu_seqlens_ptr, row_ids_ptr,
    GRAD_QUERY_STRIDES, GRAD_OUT_STRIDES, OUT_STRIDES, QUERY_STRIDES, PREFIX_KEY_STRIDES, PREFIX_VALUE_STRIDES,
    GATE_STRIDES,
    softmax_scale, score_scale, softcap, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len,
    num_seqs, num_tiles, tiles_per_slot, slots_per_row, kv_columns, columns,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    GATED: tl.constexpr, TANH: tl.constexpr, HAS_ROW_IDS: tl.constexpr, PACKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    FIRST: tl.constexpr, SAVE_DELTA: tl.constexpr, SAVE_PREFIX_DELTA: tl.constexpr, NEED_PREFIX: tl.constexpr,
    NEED_GATE: tl.constexpr, NEED_QUERY: tl.constexpr,
):  # fmt: skip
    """Delta of a run of query tiles, and that run's part of dKp, dVp and dgate; without keys, dQ too.

    ``lse_ptr`` is the lse of the softmax that the prefix is in, ``prefix_delta_ptr`` the delta of that softmax where
    it is not the delta of the output. FIRST computes both, else they are loaded.
    """
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(prefix_len, BLOCK_P) if NEED_PREFIX else 1
    first_p = (pid % num_blocks) * BLOCK_P
    kv_head = ((pid // num_blocks) % num_kv_heads).to(tl.int64)
    slot = pid // (num_blocks * num_kv_heads)
    group_size = num_heads // num_kv_heads
    tiles_per_row = tl.cdiv(q_len, BLOCK_M)
    first_row = slot * 0
    begin = first_row
    length = first_row + q_len
    if PACKED:
        seq = _sequence_of(cu_seqlens_ptr, slot, num_seqs, tiles_per_slot * BLOCK_M)
        begin, length = _bounds(cu_seqlens_ptr, seq, num_seqs, q_len)
        length = tl.where(seq < num_seqs, length, 0)
        first_tile = (slot - (begin // (tiles_per_slot * BLOCK_M) + seq)) * tiles_per_slot
        last_tile = tl.minimum(first_tile + tiles_per_slot, tl.cdiv(length, BLOCK_M))
    else:
        if HAS_ROW_IDS:
            first_row = slot // slots_per_row
        seq = first_row
        first_tile = (slot % slots_per_row) * tiles_per_slot
        last_tile = tl.minimum(first_tile + tiles_per_slot, num_tiles)
    row_id, entry, adapted = _adapter_of(row_ids_ptr, seq, num_seqs, num_prefixes, HAS_ROW_IDS, PACKED)
    outside = (row_id < -1) | (row_id >= num_prefixes)

    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = first_p + offs_p < prefix_len
    prefix_dtype = prefix_key_ptr.dtype.element_ty
    prefix_scale = softmax_scale if GATED else score_scale
    k_ptrs = _rows(prefix_key_ptr, PREFIX_KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    v_ptrs = _rows(prefix_value_ptr, PREFIX_VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    NEED_DELTA: tl.constexpr = FIRST and (
        NEED_GATE or SAVE_PREFIX_DELTA or (GATED and (NEED_PREFIX or NEED_QUERY))
    )
    NEED_BLOCK: tl.constexpr = NEED_PREFIX or NEED_QUERY or (NEED_DELTA and ONE_BLOCK)
    if NEED_BLOCK:
        k = _prefix_tile(k_ptrs, PREFIX_KEY_STRIDES, first_p, mask_p, mask_d, HEAD_DIM)  # (BLOCK_P, BLOCK_D)
        v = _prefix_tile(
            v_ptrs, PREFIX_VALUE_STRIDES, first_p, mask_p, mask_d, HEAD_DIM
        )  # (BLOCK_P, BLOCK_D)
    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for member in range(group_size):
        head = kv_head * group_size + member
        factor = tl.full((), 1.0, tl.float32)
        slope = factor
        contributes = adapted
        if GATED:
            factor, slope = _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH)
            contributes = adapted & (factor != 0.0)
        delta_sum = tl.zeros((BLOCK_M,), tl.float32)
        for tile in range(first_tile, last_tile):
            row = (tl.zeros((), tl.int32) + first_row).to(tl.int64)
            tile_in_row = tl.zeros((), tl.int32) + tile
            if not PACKED:
                row += tile_in_row // tiles_per_row
                tile_in_row = tile_in_row % tiles_per_row
            offs_m = tile_in_row * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < length
            offs_m += begin
            # (BLOCK_M,) in (batch, num_heads, q_len)
            offs_stats = (row * num_heads + head) * q_len + offs_m
            do_ptrs = _rows(grad_out_ptr, GRAD_OUT_STRIDES, row, head, offs_m, offs_d)
            do = _load(do_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
            delta = tl.zeros((BLOCK_M,), tl.float32)
            if FIRST:
                if SAVE_DELTA or not GATED:
                    out_ptrs = _rows(out_ptr, OUT_STRIDES, row, head, offs_m, offs_d)
                    out = _load(out_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
                    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
                if SAVE_DELTA:
                    tl.store(delta_ptr + offs_stats, delta, mask=mask_m)
            elif GATED:
                delta = tl.load(prefix_delta_ptr + offs_stats, mask=mask_m, other=0.0)
            else:
                delta = tl.load(delta_ptr + offs_stats, mask=mask_m, other=0.0)

            if NEED_BLOCK or NEED_DELTA:
                q_ptrs = _rows(query_ptr, QUERY_STRIDES, row, head, offs_m, offs_d)
                q = _load(q_ptrs, mask_m, mask_d, True, HEAD_DIM).to(prefix_dtype)  # (BLOCK_M, BLOCK_D)
                do = do.to(prefix_dtype)
                shift = _shift(tl.load(lse_ptr + offs_stats, mask=mask_m, other=0.0))
                if NEED_DELTA and not ONE_BLOCK:
                    total = tl.zeros((BLOCK_M,), tl.float32)
                    delta = tl.zeros((BLOCK_M,), tl.float32)
                    for start in range(0, tl.where(adapted, prefix_len, 0), BLOCK_P):
                        mask_n = start + offs_p < prefix_len
                        kn = _prefix_tile(k_ptrs, PREFIX_KEY_STRIDES, start, mask_n, mask_d, HEAD_DIM)
                        vn = _prefix_tile(v_ptrs, PREFIX_VALUE_STRIDES, start, mask_n, mask_d, HEAD_DIM)
                        p, dp, _ = _prefix_probs(
                            q, do, kn, vn, shift, mask_n, softmax_scale, 0.0, False, PRECISION
                        )
                        total += tl.sum(p, axis=1)
                        delta += tl.sum(p * dp, axis=1)
                    delta = delta / tl.where(total == 0.0, 1.0, total)
                if NEED_BLOCK:
                    p, dp, cap = _prefix_probs(
                        q, do, k, v, shift, mask_p, prefix_scale, softcap, HAS_SOFTCAP and not GATED, PRECISION
                    )  # fmt: skip
                    if NEED_DELTA and ONE_BLOCK:
                        # p by its own sum: dP - delta cancels, and the lse that p comes from was rounded
                        p = p / tl.sum(p, axis=1)[:, None]
                        delta = tl.sum(p * dp, axis=1)
                    # padded positions: 0 * Inf from the prefix would make them NaN
                    mask_mp = mask_m[:, None] & mask_p[None, :]
                    weights = tl.where(mask_mp, p * factor, 0.0)
                    ds = tl.where(mask_mp, weights * (dp - delta[:, None]) * cap, 0.0)
                    if NEED_PREFIX:
                        if contributes:
                            dk = _dot_fp32_by(tl.trans(ds), q, dk, WIDE, PRECISION)
                            dv = _dot_fp32_by(tl.trans(weights), do, dv, WIDE, PRECISION)
                    if NEED_QUERY:
                        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                        if contributes:
                            dq = _dot_fp32_by(ds, k, dq, WIDE, PRECISION)
                        dq = tl.where(outside, float("nan"), dq * softmax_scale)
                        dq_ptrs = _rows(grad_query_ptr, GRAD_QUERY_STRIDES, row, head, offs_m, offs_d)
                        dq = dq.to(grad_query_ptr.dtype.element_ty)
                        tl.store(dq_ptrs, dq, mask=mask_m[:, None] & mask_d)
                if NEED_DELTA:
                    delta_sum += tl.where(mask_m, delta, 0.0)
                    if SAVE_PREFIX_DELTA:
                        tl.store(prefix_delta_ptr + offs_stats, delta, mask=mask_m)
        if NEED_GATE:
            offs_gate = slot.to(tl.int64) * columns + 2 * kv_columns + head
            tl.store(partial_ptr + offs_gate, slope * tl.sum(delta_sum, axis=0))
    if NEED_PREFIX:
        offs_pd = (kv_head * prefix_len + first_p + offs_p)[:, None] * HEAD_DIM + offs_d[None, :]
        mask_pd = mask_p[:, None] & mask_d
        partial_ptrs = partial_ptr + slot.to(tl.int64) * columns + offs_pd
        tl.store(partial_ptrs, dk * softmax_scale, mask=mask_pd)
        tl.store(partial_ptrs + kv_columns, dv, mask=mask_pd)


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _attention_bwd_reduce_kernel(
    grad_key_ptr, grad_value_ptr, grad_gate_ptr, partial_ptr, cu_seqlens_ptr, row_ids_ptr,
    num_rows, slots_per_row, slot_len, kv_columns, columns,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, HAS_ROW_IDS: tl.constexpr, PACKED: tl.constexpr,
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
        offs_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < num_rows
        if HAS_ROW_IDS:
            # only rows of this entry are read: others may hold NaN, or nothing yet
            mask_r = mask_r & (tl.load(row_ids_ptr + offs_r, mask=mask_r, other=-1) == entry)
        first_slot = offs_r * slots_per_row
        num_slots = tl.where(mask_r, slots_per_row, 0)
        if PACKED:
            begin = tl.load(cu_seqlens_ptr + offs_r, mask=mask_r, other=0)
            end = tl.load(cu_seqlens_ptr + offs_r + 1, mask=mask_r, other=0)
            first_slot = begin // slot_len + offs_r
            num_slots = tl.where(mask_r, tl.cdiv(end - begin, slot_len), 0)
        for slot in range(tl.max(num_slots, axis=0)):
            ptrs = partial_ptr + (first_slot + slot)[:, None] * columns + offs_e[None, :]
            mask = (slot < num_slots)[:, None] & mask_e[None, :]
            acc += tl.load(ptrs, mask=mask, other=0.0)  # (BLOCK_R, BLOCK_E)
    total = tl.sum(acc, axis=0)
    is_key = offs_e < kv_columns
    is_value = (offs_e >= kv_columns) & (offs_e < 2 * kv_columns)
    is_gate = (offs_e >= 2 * kv_columns) & mask_e
    prefix_dtype = grad_key_ptr.dtype.element_ty
    tl.store(grad_key_ptr + entry * kv_columns + offs_e, total.to(prefix_dtype), mask=is_key)
    tl.store(grad_value_ptr + (entry - 1) * kv_columns + offs_e, total.to(prefix_dtype), mask=is_value)
    num_heads = columns - 2 * kv_columns
    tl.store(grad_gate_ptr + entry * num_heads + offs_e - 2 * kv_columns, total, mask=is_gate)
