"""Backward kernels of both single-pass attention ops; formulas in gated_prefix_attention.py and prefix_attention.py.

Flash attention's backward (arXiv:2307.08691) without its atomics, in four launches:

1. ``prefix``: the query tiles once, for delta of every query position and all gradients of the prefix and the gate.
   A program owns one slot, kv head and block of prefix positions; a slot is a run of query tiles, of one row or
   packed sequence where these may differ in their prefix, else of the whole batch. It keeps dKp and dVp in registers
   over its run and writes one fp32 partial. A prefix of more than one block takes a launch for delta and one for
   the blocks.
2. ``reduce`` sums the partials of each bank entry in a fixed order. Slots follow from shapes, and within a row or
   sequence from its own length alone, so its gradient has the same bits alone and in any batch.
3. ``keys``: dK and dV; a program owns a tile of keys and walks over the query tiles of its group's heads in order.
4. ``query``: dQ; a program owns a tile of queries and walks over the prefix and the keys.

What is not needed is not launched. Without keys, as behind a merge, the first launch finishes dQ as well.
Hopper stays on ``mma.sync``; attention.py says why.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import attention, target
from fastadapter.kernels.attention import (
    LENGTHS,
    _adapter_of,
    _capped,
    _dot_fp32_by,
    _hide,
    _key_ranges,
    _locate,
)
from fastadapter.kernels.attention_prefix_backward import (
    _attention_bwd_prefix_kernel,
    _attention_bwd_reduce_kernel,
    _prefix_probs,
    _prefix_tile,
    _shift,
)
from fastadapter.kernels.attention_tiles import _load, _rows
from fastadapter.kernels.gated_prefix_tiles import _gate_factor
from torch import Tensor

REDUCE_ROWS = 8
REDUCE_COLUMNS = 128


@triton.jit
def _keys_from_queries(
    dk, dv, k, v, q_ptrs, do_ptrs, stats_offs, lse_ptr, delta_ptr, mask_ptr, QUERY_STRIDES, GRAD_OUT_STRIDES,
    MASK_STRIDES, low, high, offs_n, mask_d, score_scale, softcap, q_len, kv_len, window,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the part of queries [low, high) of one head to dK and dV of a tile of keys."""
    for start in range(low, high, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < q_len
        first = tl.zeros((), tl.int64) + start
        q = _load(q_ptrs + first * QUERY_STRIDES[2], mask_m, mask_d, MASKED, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
        do = _load(
            do_ptrs + first * GRAD_OUT_STRIDES[2], mask_m, mask_d, MASKED, HEAD_DIM
        )  # (BLOCK_M, BLOCK_D)
        shift = _shift(tl.load(lse_ptr + stats_offs + first, mask=mask_m, other=0.0))
        delta = tl.load(delta_ptr + stats_offs + first, mask=mask_m, other=0.0)
        # transposed, (BLOCK_N, BLOCK_M): p and dS are then the left operands as they come
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s, slope = _capped(s, score_scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = _hide(s, offs_m[None, :], offs_n[:, None], mask_ptr, MASK_STRIDES, q_len, kv_len, window,
                      IS_CAUSAL, HAS_WINDOW, MASK_KIND)  # fmt: skip
        p = tl.exp(s - shift[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _query_ranges(first, q_len, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
                  HAS_WINDOW: tl.constexpr, MASK_KIND: tl.constexpr):  # fmt: skip
    """``low, full_low, full_high, high``: queries that see a key of the tile, and inside, whole tiles that see all."""
    low = first * 0
    high = low + q_len
    full_low = low
    full_high = high // BLOCK_M * BLOCK_M
    if IS_CAUSAL:
        low = first // BLOCK_M * BLOCK_M
        full_low = tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    if HAS_WINDOW:
        high = tl.minimum(high, first + BLOCK_N - 1 + window)
        full_high = tl.minimum(full_high, (first + window) // BLOCK_M * BLOCK_M)
    if MASK_KIND != 0:
        full_high = low
    none = full_high <= full_low
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_keys_kernel(
    grad_key_ptr, grad_value_ptr, grad_out_ptr, lse_ptr, delta_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    cu_seqlens_ptr,
    GRAD_KEY_STRIDES, GRAD_VALUE_STRIDES, GRAD_OUT_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES,
    softmax_scale, score_scale, softcap, window, num_heads, num_kv_heads, q_len, kv_len, num_seqs, num_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one row and kv head."""
    # causal: the first keys are seen by the most queries, and come first as they are
    row, kv_head, seq, begin, keys, tile = _locate(
        tl.program_id(0), cu_seqlens_ptr, kv_len, num_kv_heads, num_seqs, num_tiles, BLOCK_N, PACKED, False
    )
    queries = tl.where(seq < num_seqs, keys, 0) if PACKED else q_len
    group_size = num_heads // num_kv_heads
    first = tile * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < keys
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    k_ptrs = _rows(key_ptr, KEY_STRIDES, row, kv_head, begin + offs_n, offs_d)
    v_ptrs = _rows(value_ptr, VALUE_STRIDES, row, kv_head, begin + offs_n, offs_d)
    k = _load(k_ptrs, mask_n, mask_d, True, HEAD_DIM)  # (BLOCK_N, BLOCK_D)
    v = _load(v_ptrs, mask_n, mask_d, True, HEAD_DIM)  # (BLOCK_N, BLOCK_D)
    low, full_low, full_high, high = _query_ranges(
        first, queries, window, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW, MASK_KIND
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(group_size):
        head = kv_head * group_size + member
        q_ptrs = _rows(query_ptr, QUERY_STRIDES, row, head, begin + offs_m, offs_d)
        do_ptrs = _rows(grad_out_ptr, GRAD_OUT_STRIDES, row, head, begin + offs_m, offs_d)
        # (BLOCK_M,) in (batch, num_heads, q_len)
        offs_stats = (row * num_heads + head) * q_len + begin + offs_m
        mask_ptrs = mask_ptr
        if MASK_KIND != 0:
            mask_ptrs += row * MASK_STRIDES[0] + head * MASK_STRIDES[1]
        if IS_CAUSAL:
            dk, dv = _keys_from_queries(
                dk, dv, k, v, q_ptrs, do_ptrs, offs_stats, lse_ptr, delta_ptr, mask_ptrs, QUERY_STRIDES,
                GRAD_OUT_STRIDES, MASK_STRIDES, low, full_low, offs_n, mask_d, score_scale, softcap, queries, keys,
                window, BLOCK_M, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, True,
            )  # fmt: skip
        if MASK_KIND == 0:
            dk, dv = _keys_from_queries(
                dk, dv, k, v, q_ptrs, do_ptrs, offs_stats, lse_ptr, delta_ptr, mask_ptrs, QUERY_STRIDES,
                GRAD_OUT_STRIDES, MASK_STRIDES, full_low, full_high, offs_n, mask_d, score_scale, softcap, queries,
                keys, window, BLOCK_M, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, False,
            )  # fmt: skip
        dk, dv = _keys_from_queries(
            dk, dv, k, v, q_ptrs, do_ptrs, offs_stats, lse_ptr, delta_ptr, mask_ptrs, QUERY_STRIDES,
            GRAD_OUT_STRIDES, MASK_STRIDES, full_high, high, offs_n, mask_d, score_scale, softcap, queries, keys,
            window, BLOCK_M, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, True,
        )  # fmt: skip
    mask_nd = mask_n[:, None] & mask_d
    dk_ptrs = _rows(grad_key_ptr, GRAD_KEY_STRIDES, row, kv_head, begin + offs_n, offs_d)
    dv_ptrs = _rows(grad_value_ptr, GRAD_VALUE_STRIDES, row, kv_head, begin + offs_n, offs_d)
    tl.store(dk_ptrs, (dk * softmax_scale).to(grad_key_ptr.dtype.element_ty), mask=mask_nd)
    tl.store(dv_ptrs, dv.to(grad_value_ptr.dtype.element_ty), mask=mask_nd)


@triton.jit
def _query_from_keys(
    dq, q, do, shift, delta, k_ptrs, v_ptrs, mask_ptr, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, low, high, offs_m,
    mask_d, score_scale, softcap, q_len, kv_len, window,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the part of keys [low, high) to dQ of a tile of queries."""
    for start in range(low, high, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        first = tl.zeros((), tl.int64) + start
        k = _load(
            k_ptrs + first * KEY_STRIDES[2], offs_n < kv_len, mask_d, MASKED, HEAD_DIM
        )  # (BLOCK_N, BLOCK_D)
        v = _load(
            v_ptrs + first * VALUE_STRIDES[2], offs_n < kv_len, mask_d, MASKED, HEAD_DIM
        )  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, slope = _capped(s, score_scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = _hide(s, offs_m[:, None], offs_n[None, :], mask_ptr, MASK_STRIDES, q_len, kv_len, window,
                      IS_CAUSAL, HAS_WINDOW, MASK_KIND)  # fmt: skip
        p = tl.exp(s - shift[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_query_kernel(
    grad_query_ptr, grad_out_ptr, lse_ptr, prefix_lse_ptr, delta_ptr, prefix_delta_ptr, query_ptr, key_ptr, value_ptr,
    prefix_key_ptr, prefix_value_ptr, gate_ptr, mask_ptr, cu_seqlens_ptr, row_ids_ptr,
    GRAD_QUERY_STRIDES, GRAD_OUT_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, PREFIX_KEY_STRIDES,
    PREFIX_VALUE_STRIDES, GATE_STRIDES, MASK_STRIDES,
    softmax_scale, score_scale, softcap, window, num_prefixes, num_heads, num_kv_heads, q_len, kv_len,
    prefix_len, num_seqs, num_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_KIND: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query positions of one row and head."""
    row, head, seq, begin, length, tile = _locate(
        tl.program_id(0), cu_seqlens_ptr, q_len, num_heads, num_seqs, num_tiles, BLOCK_M, PACKED, IS_CAUSAL
    )
    kv_head = head // (num_heads // num_kv_heads)
    row_id, entry, adapted = _adapter_of(row_ids_ptr, seq, num_seqs, num_prefixes, HAS_ROW_IDS, PACKED)
    keys = tl.where(seq < num_seqs, length, 0) if PACKED else kv_len
    first = tile * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    q_ptrs = _rows(query_ptr, QUERY_STRIDES, row, head, begin + offs_m, offs_d)
    do_ptrs = _rows(grad_out_ptr, GRAD_OUT_STRIDES, row, head, begin + offs_m, offs_d)
    q = _load(q_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
    do = _load(do_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
    # (BLOCK_M,) in (batch, num_heads, q_len)
    offs_stats = (row * num_heads + head) * q_len + begin + offs_m
    shift = _shift(tl.load(lse_ptr + offs_stats, mask=mask_m, other=0.0))
    delta = tl.load(delta_ptr + offs_stats, mask=mask_m, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    factor = tl.full((), 1.0, tl.float32)
    prefix_shift = shift
    prefix_delta = delta
    if GATED:
        factor, _ = _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH)
        prefix_shift = _shift(tl.load(prefix_lse_ptr + offs_stats, mask=mask_m, other=0.0))
        prefix_delta = tl.load(prefix_delta_ptr + offs_stats, mask=mask_m, other=0.0)
    offs_p = tl.arange(0, BLOCK_P)
    prefix_dtype = prefix_key_ptr.dtype.element_ty
    prefix_scale = softmax_scale if GATED else score_scale
    pk_ptrs = _rows(prefix_key_ptr, PREFIX_KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    pv_ptrs = _rows(prefix_value_ptr, PREFIX_VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    for start in tl.range(0, tl.where(adapted & (factor != 0.0), prefix_len, 0), BLOCK_P, num_stages=1):
        mask_p = start + offs_p < prefix_len
        k = _prefix_tile(pk_ptrs, PREFIX_KEY_STRIDES, start, mask_p, mask_d, HEAD_DIM)  # (BLOCK_P, BLOCK_D)
        v = _prefix_tile(pv_ptrs, PREFIX_VALUE_STRIDES, start, mask_p, mask_d, HEAD_DIM)  # (BLOCK_P, BLOCK_D)
        p, dp, cap = _prefix_probs(q.to(prefix_dtype), do.to(prefix_dtype), k, v, prefix_shift, mask_p, prefix_scale,
                                   softcap, HAS_SOFTCAP and not GATED, PRECISION)  # fmt: skip
        ds = tl.where(mask_p[None, :], p * factor * (dp - prefix_delta[:, None]) * cap, 0.0)
        dq = _dot_fp32_by(ds, k, dq, WIDE, PRECISION)

    offs_n = tl.arange(0, BLOCK_N)
    k_ptrs = _rows(key_ptr, KEY_STRIDES, row, kv_head, begin + offs_n, offs_d)
    v_ptrs = _rows(value_ptr, VALUE_STRIDES, row, kv_head, begin + offs_n, offs_d)
    mask_ptrs = mask_ptr
    if MASK_KIND != 0:
        mask_ptrs += row * MASK_STRIDES[0] + head * MASK_STRIDES[1]
    low, full_low, full_high, high = _key_ranges(
        first, keys, window, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW, MASK_KIND
    )
    if HAS_WINDOW:
        dq = _query_from_keys(
            dq, q, do, shift, delta, k_ptrs, v_ptrs, mask_ptrs, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, low,
            full_low, offs_m, mask_d, score_scale, softcap, length, keys, window,
            BLOCK_N, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, True,
        )  # fmt: skip
    if MASK_KIND == 0:
        dq = _query_from_keys(
            dq, q, do, shift, delta, k_ptrs, v_ptrs, mask_ptrs, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, full_low,
            full_high, offs_m, mask_d, score_scale, softcap, length, keys, window,
            BLOCK_N, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, False,
        )  # fmt: skip
    dq = _query_from_keys(
        dq, q, do, shift, delta, k_ptrs, v_ptrs, mask_ptrs, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, full_high,
        high, offs_m, mask_d, score_scale, softcap, length, keys, window,
        BLOCK_N, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, True,
    )  # fmt: skip
    dq = tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), dq * softmax_scale)
    dq_ptrs = _rows(grad_query_ptr, GRAD_QUERY_STRIDES, row, head, begin + offs_m, offs_d)
    tl.store(dq_ptrs, dq.to(grad_query_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)


def attention_backward(
    op: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    gate: Tensor | None, out: Tensor, lse: Tensor, prefix_lse: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, row_ids: Tensor | None, softmax_scale: float, gate_fn: str | None, is_causal: bool,
    window: int, softcap: float, need_query: bool, need_key_value: bool, need_prefix: bool, need_gate: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key, value, prefix_key, prefix_value and gate; shape (0,) where not needed.

    ``out`` is what ``lse`` belongs to: the base of a gated prefix, the output of a shared one, whose ``prefix_lse``
    is None.
    """
    attention.check(op, query)
    grads = [
        torch.empty_like(x) if need else x.new_empty(0)
        for x, need in ((query, need_query), (key, need_key_value), (value, need_key_value))
    ] + [x.new_empty(x.shape if need_prefix else (0,)) for x in (prefix_key, prefix_value)]
    gate = query.new_empty(0, dtype=torch.float32) if gate is None else gate
    grads.append(gate.new_empty(gate.shape if need_gate else (0,)))
    if query.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    need_key_value = need_key_value and key.numel() > 0
    options = (softmax_scale, gate_fn, is_causal, window, softcap)
    operands = (query, key, value, prefix_key, prefix_value, gate if prefix_lse is not None else None)
    shared = attention.shared_arguments(*operands, attn_mask, cu_seqlens, row_ids, *options)
    shared |= {"grad_out_ptr": grad_out, "GRAD_OUT_STRIDES": attention.row_strides(grad_out)}
    gated = shared["GATED"]
    stats = [torch.empty_like(lse, dtype=torch.float32) for _ in range(1 + gated)]
    shared |= {"delta_ptr": stats[0], "prefix_delta_ptr": stats[-1]}
    # without keys, the launch that reads query and grad_out for the prefix can finish dQ
    fuse_query = (
        need_query and key.shape[2] == 0 and shared["prefix_len"] <= _tiles("prefix", *operands).block_p
    )
    with torch.cuda.device_of(query):
        _launch_prefix(
            shared, operands, grads, out, lse if prefix_lse is None else prefix_lse, cu_seqlens, row_ids,
            need_query, need_key_value, need_prefix, need_gate, fuse_query,
        )  # fmt: skip
        if need_key_value:
            tiles = _tiles("keys", *operands)
            num_tiles, rows = attention.tiles_of_head(key.shape[2], key.shape[0], cu_seqlens, tiles.block_n)
            attention.launch(
                _attention_bwd_keys_kernel, num_tiles * rows * key.shape[1], shared, tiles, query.shape[-1],
                grad_key_ptr=grads[1], grad_value_ptr=grads[2], lse_ptr=lse,
                GRAD_KEY_STRIDES=attention.row_strides(grads[1]), GRAD_VALUE_STRIDES=attention.row_strides(grads[2]),
                num_tiles=num_tiles,
            )  # fmt: skip
        if need_query and not fuse_query:
            tiles = _tiles("query", *operands)
            num_tiles, rows = attention.tiles_of_head(
                query.shape[2], query.shape[0], cu_seqlens, tiles.block_m
            )
            attention.launch(
                _attention_bwd_query_kernel, num_tiles * rows * query.shape[1], shared, tiles, query.shape[-1],
                grad_query_ptr=grads[0], lse_ptr=lse, prefix_lse_ptr=prefix_lse,
                GRAD_QUERY_STRIDES=attention.row_strides(grads[0]), num_tiles=num_tiles,
            )  # fmt: skip
    return tuple(grads)


def _launch_prefix(
    shared, operands, grads, out, lse, cu_seqlens, row_ids, need_query, need_key_value, need_prefix, need_gate,
    fuse_query,
):  # fmt: skip
    """Delta, the partials of the prefix's gradients, and their sum."""
    query, _, _, prefix_key, *_ = operands
    grad_query, _, _, grad_key, grad_value, grad_gate = grads
    batch, num_heads, q_len, head_dim = query.shape
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    tiles = _tiles("prefix", *operands)
    packed = cu_seqlens is not None
    by_row = packed or shared["HAS_ROW_IDS"]
    num_tiles = triton.cdiv(q_len, tiles.block_m) * (1 if by_row else batch)
    tiles_per_slot = _tiles_per_slot(num_tiles, num_heads, num_kv_heads, by_row)
    slot_len = tiles_per_slot * tiles.block_m
    slots_per_row = triton.cdiv(num_tiles, tiles_per_slot)
    num_rows = (cu_seqlens.shape[0] - 1 if packed else batch) if by_row else slots_per_row
    num_slots = q_len // slot_len + num_rows if packed else slots_per_row * (num_rows if by_row else 1)
    kv_columns = num_kv_heads * prefix_len * head_dim if need_prefix else 0
    columns = 2 * kv_columns + (num_heads if need_gate else 0)
    partial = query.new_empty((num_slots, columns), dtype=torch.float32)

    one_block = prefix_len <= tiles.block_p
    in_two = need_prefix and not one_block

    def launch(num_blocks: int, first: bool, **flags: bool) -> None:
        query_too = flags["NEED_QUERY"]
        attention.launch(
            _attention_bwd_prefix_kernel, num_slots * num_kv_heads * num_blocks, shared, tiles, head_dim,
            grad_query_ptr=grad_query, partial_ptr=partial, out_ptr=out, lse_ptr=lse,
            GRAD_QUERY_STRIDES=attention.row_strides(grad_query if query_too else query),
            OUT_STRIDES=attention.row_strides(out),
            num_tiles=num_tiles, tiles_per_slot=tiles_per_slot, slots_per_row=slots_per_row, kv_columns=kv_columns,
            columns=columns, ONE_BLOCK=one_block, FIRST=first, NEED_GATE=need_gate and first, **flags,
        )  # fmt: skip

    # which launches to come read the delta of the output, and that of a gated prefix
    query_later = need_query and not fuse_query
    save = {
        "SAVE_DELTA": need_key_value or query_later or (in_two and not shared["GATED"]),
        "SAVE_PREFIX_DELTA": shared["GATED"] and (query_later or in_two),
    }
    if columns or fuse_query or any(save.values()):
        launch(1, True, NEED_PREFIX=need_prefix and one_block, NEED_QUERY=fuse_query, **save)
    if in_two:
        no_save = dict.fromkeys(save, False)
        launch(triton.cdiv(prefix_len, tiles.block_p), False, NEED_PREFIX=True, NEED_QUERY=False, **no_save)
    if columns:
        arguments = {
            "grad_key_ptr": grad_key, "grad_value_ptr": grad_value, "grad_gate_ptr": grad_gate, "partial_ptr": partial,
            "cu_seqlens_ptr": cu_seqlens, "row_ids_ptr": row_ids, "num_rows": num_rows,
            "slots_per_row": slots_per_row if by_row else 1, "slot_len": slot_len, "kv_columns": kv_columns,
            "columns": columns, "BLOCK_R": REDUCE_ROWS, "BLOCK_E": REDUCE_COLUMNS,
            "HAS_ROW_IDS": shared["HAS_ROW_IDS"], "PACKED": packed, "num_warps": 4,
        }  # fmt: skip
        _attention_bwd_reduce_kernel[(num_prefixes * triton.cdiv(columns, REDUCE_COLUMNS),)](**arguments)


def _tiles(kernel: str, query, key, value, prefix_key, prefix_value, gate) -> attention.Tiles:
    return attention.config(
        kernel, target.arch(query), query.dtype, prefix_key.dtype, query.shape[-1], prefix_key.shape[2]
    )


def _tiles_per_slot(num_tiles: int, num_heads: int, num_kv_heads: int, by_row: bool) -> int:
    """How many query tiles one program of the prefix launch sums before it writes its partial.

    At least 16 visits (tiles times query heads), so that partials are a small part of the traffic; where all rows
    share a prefix, at most about 384 programs, so that partials do not grow with the batch.
    """
    tiles = triton.cdiv(16 * num_kv_heads, num_heads)
    return tiles if by_row else max(tiles, triton.cdiv(num_tiles * num_kv_heads, 384))
