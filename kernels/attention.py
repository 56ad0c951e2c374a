"""Forward kernel of both single-pass attention ops, and the device code their backward shares with it.

    S = softmax_scale * Q K^T, capped and masked    (q_len, kv_len) per head; Sp likewise over the prefix, unmasked
    gated:   O = softmax(S) V + f(gate_h) * softmax(Sp) Vp
    shared:  O = softmax([Sp; S]) [Vp; V]

Flash attention (arXiv:2205.14135): a program owns a tile of query positions of one head, walks over tiles of keys
and keeps running maximum m_i, normaliser l_i and accumulator. A shared prefix is where the running state starts; a
gated one has its own state, after the keys. Scores and ``lse`` are in natural log throughout: in units of log 2 ``lse``
would be rounded on its way out and in again, which at scores of 1e4 moves probabilities by 1e-3.

Tiles in which every key is visible to every query take a loop without masks; the tiles at the edges (diagonal,
window, end) and all tiles of an explicit mask take the masked one. Tiles without a visible key are skipped.

Packed sequences: sequence ``s`` owns the tiles from ``cu_seqlens[s] // BLOCK + s`` on. That is never fewer than it
needs and grows with ``s``, so a program finds its sequence by bisection and the grid follows from shapes alone.
Positions behind the last sequence belong to none: they come back as zero.

Hopper: triton issue 11781 (ptxas before 13.3) and issue 9433 (open) both corrupt ``wgmma`` products whose left
operand lies in registers, and p is such an operand. Tiles for sm_90 are therefore such that Triton picks
``mma.sync``: it needs 64 rows and four warps for ``wgmma``, the tiles here have fewer of one or the other.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.attention_tiles import Tiles, _load, _rows, config, row_strides
from fastadapter.kernels.gated_prefix_tiles import (
    ALL_REGISTERS,
    _gate_factor,
    _row_entry,
    _running_max,
    _tanh,
    block_d,
)
from torch import Tensor

LENGTHS = [
    "window", "num_prefixes", "num_heads", "num_kv_heads", "q_len", "kv_len", "prefix_len", "num_seqs", "num_tiles"
]  # fmt: skip
NO_MASK, BOOL_MASK, FLOAT_MASK = range(3)


@triton.jit
def _sequence_of(cu_seqlens_ptr, tile, num_seqs, BLOCK: tl.constexpr):
    """The last sequence ``s`` with ``cu_seqlens[s] // BLOCK + s <= tile``; ``num_seqs`` is what lies behind all."""
    low = tl.zeros((), tl.int32)
    high = low + num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        found = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle - 1)
    return low


@triton.jit
def _bounds(cu_seqlens_ptr, seq, num_seqs, total):
    """First position and length of a sequence; of what lies behind the last one for ``seq == num_seqs``."""
    first = tl.load(cu_seqlens_ptr + seq)
    last = tl.load(cu_seqlens_ptr + seq + 1, mask=seq < num_seqs, other=total)
    return first, tl.minimum(last, total) - first


@triton.jit
def _locate(pid, cu_seqlens_ptr, total, num_heads, num_seqs, num_tiles, BLOCK: tl.constexpr,
            PACKED: tl.constexpr, LAST_FIRST: tl.constexpr):  # fmt: skip
    """Where a program works: batch row, head, sequence, the sequence's first position and length, its tile.

    ``num_tiles`` is the number of tiles of one head: of a batch row, or of everything that is packed.
    """
    tile = pid % num_tiles
    head = pid // num_tiles
    row = head * 0
    seq = row
    first = row
    length = row + total
    if PACKED:
        seq = _sequence_of(cu_seqlens_ptr, tile, num_seqs, BLOCK)
        first, length = _bounds(cu_seqlens_ptr, seq, num_seqs, total)
        tile -= first // BLOCK + seq
    else:
        row = head // num_heads
        head = head % num_heads
        seq = row
        if LAST_FIRST:  # causal: the long ones first
            tile = num_tiles - 1 - tile
    return row.to(tl.int64), head.to(tl.int64), seq, first, length, tile


@triton.jit
def _adapter_of(row_ids_ptr, seq, num_seqs, num_prefixes, HAS_ROW_IDS: tl.constexpr, PACKED: tl.constexpr):
    """Id of a row or sequence, the bank entry it may read, and whether it reads one."""
    if PACKED:
        row_id, entry = _row_entry(row_ids_ptr, tl.minimum(seq, num_seqs - 1), num_prefixes, HAS_ROW_IDS)
        row_id = tl.where(seq == num_seqs, -1, row_id)
    else:
        row_id, entry = _row_entry(row_ids_ptr, seq, num_prefixes, HAS_ROW_IDS)
    return row_id, entry, (row_id >= 0) & (row_id < num_prefixes)


@triton.jit
def _capped(s, score_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores from products ``s``, and the derivative of the cap."""
    slope = 1.0
    if HAS_SOFTCAP:
        t = _tanh(s * score_scale)
        slope = 1.0 - t * t
        s = t * softcap
    else:
        s = s * score_scale
    return s, slope


@triton.jit
def _hide(s, offs_m, offs_n, mask_ptr, MASK_STRIDES, q_len, kv_len, window,
          IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK_KIND: tl.constexpr):  # fmt: skip
    """-inf where a key is hidden from a query; positions come shaped to broadcast to ``s``, either way round."""
    # padded queries too: 0 * Inf from a key would make them NaN
    visible = (offs_m < q_len) & (offs_n < kv_len)
    if IS_CAUSAL:
        visible = visible & (offs_n <= offs_m)
    if HAS_WINDOW:
        visible = visible & (offs_n > offs_m - window)
    if MASK_KIND != 0:
        ptrs = mask_ptr + offs_m.to(tl.int64) * MASK_STRIDES[2] + offs_n.to(tl.int64) * MASK_STRIDES[3]
        given = tl.load(ptrs, mask=(offs_m < q_len) & (offs_n < kv_len), other=0)
        if MASK_KIND == 1:
            visible = visible & (given != 0)
        else:
            s += given.to(tl.float32)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _softmax_step(acc, m_i, l_i, s, v, PRECISION: tl.constexpr):
    """Take scores (BLOCK_M, BLOCK_N) and their values into the running state."""
    m_new, shift = _running_max(m_i, s)
    alpha = tl.exp(m_i - shift)
    p = tl.exp(s - shift[:, None])
    l_i = l_i * alpha + tl.sum(p, axis=1)
    # p is at most 1, so rounding it to the dtype of v costs less than rounding the result
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_i


@triton.constexpr_function
def _prefix_stages(ptrs):
    """How a loop over prefix blocks is pipelined: by two where rows of fp32 are longer than 64.

    Their products run on vector units, a whole row per thread. What waits in shared memory is read as it is
    multiplied; what a loop without stages loads has to stay in registers, and does not fit.
    """
    return 2 if ptrs.dtype.element_ty == tl.float32 and ptrs.shape[1] > 64 else 1


@triton.jit
def _attend_prefix(
    acc, m_i, l_i, q, k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, end, mask_d, score_scale, softcap,
    BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Take prefix positions up to ``end`` into the running state."""
    for start in tl.range(0, end, BLOCK_P, num_stages=STAGES):
        mask_p = start + tl.arange(0, BLOCK_P) < end
        first = tl.zeros((), tl.int64) + start
        k = _load(k_ptrs + first * KEY_STRIDES[2], mask_p, mask_d, True, HEAD_DIM)  # (BLOCK_P, BLOCK_D)
        v = _load(v_ptrs + first * VALUE_STRIDES[2], mask_p, mask_d, True, HEAD_DIM)  # (BLOCK_P, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, _ = _capped(s, score_scale, softcap, HAS_SOFTCAP)
        s = tl.where(mask_p[None, :], s, float("-inf"))
        acc, m_i, l_i = _softmax_step(acc, m_i, l_i, s, v, PRECISION)
    return acc, m_i, l_i


@triton.jit
def _dot_fp32_by(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b for an fp32 ``a`` beside an operand in the dtype of the prefix.

    fp16 operands are widened to a tf32 product, which is exact for ``b`` and rounds ``a`` about as fp16 would,
    but does not flush it to zero: f p and dS are tiny where gates start.
    """
    if b.dtype == tl.bfloat16:
        acc = tl.dot(a.to(tl.bfloat16), b, acc)
    elif b.dtype == tl.float16:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=WIDE)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add_gated_prefix(
    out, q, k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, factor, end, mask_d, softmax_scale,
    BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out`` plus the gated term, and its running maximum and normaliser.

    Scores are computed twice, once for the normaliser: a second accumulator beside ``out`` would spill.
    """
    m_i = tl.full((out.shape[0],), float("-inf"), tl.float32)
    l_i = tl.zeros((out.shape[0],), tl.float32)
    STAGES: tl.constexpr = _prefix_stages(k_ptrs)
    for start in tl.range(0, end, BLOCK_P, num_stages=STAGES):
        s, _ = _prefix_scores(
            q, k_ptrs, KEY_STRIDES, start, end, mask_d, softmax_scale, BLOCK_P, HEAD_DIM, PRECISION
        )
        m_new, shift = _running_max(m_i, s)
        l_i = l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(s - shift[:, None]), axis=1)
        m_i = m_new
    if factor != 0.0:
        shift = tl.where(m_i == float("-inf"), 0.0, m_i)
        weight = factor / tl.where(l_i == 0.0, 1.0, l_i)
        for start in tl.range(0, end, BLOCK_P, num_stages=STAGES):
            s, mask_p = _prefix_scores(
                q, k_ptrs, KEY_STRIDES, start, end, mask_d, softmax_scale, BLOCK_P, HEAD_DIM, PRECISION
            )
            v = _load(
                v_ptrs + (tl.zeros((), tl.int64) + start) * VALUE_STRIDES[2], mask_p, mask_d, True, HEAD_DIM
            )
            out = _dot_fp32_by(tl.exp(s - shift[:, None]) * weight[:, None], v, out, WIDE, PRECISION)
    return out, m_i, l_i


@triton.jit
def _prefix_scores(q, k_ptrs, KEY_STRIDES, start, end, mask_d, softmax_scale, BLOCK_P: tl.constexpr,
                   HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores (BLOCK_M, BLOCK_P) of a gated prefix, and which positions there are."""
    mask_p = start + tl.arange(0, BLOCK_P) < end
    first = tl.zeros((), tl.int64) + start
    k = _load(k_ptrs + first * KEY_STRIDES[2], mask_p, mask_d, True, HEAD_DIM)  # (BLOCK_P, BLOCK_D)
    s, _ = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), softmax_scale, 0.0, False)
    return tl.where(mask_p[None, :], s, float("-inf")), mask_p


@triton.jit
def _attend_keys(
    acc, m_i, l_i, q, k_ptrs, v_ptrs, mask_ptr, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, low, high, offs_m, mask_d,
    score_scale, softcap, q_len, kv_len, window,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys [low, high) into the running state."""
    for start in range(low, high, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        first = tl.zeros((), tl.int64) + start
        k = _load(
            k_ptrs + first * KEY_STRIDES[2], offs_n < kv_len, mask_d, MASKED, HEAD_DIM
        )  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, _ = _capped(s, score_scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = _hide(s, offs_m[:, None], offs_n[None, :], mask_ptr, MASK_STRIDES, q_len, kv_len, window,
                      IS_CAUSAL, HAS_WINDOW, MASK_KIND)  # fmt: skip
        v = _load(
            v_ptrs + first * VALUE_STRIDES[2], offs_n < kv_len, mask_d, MASKED, HEAD_DIM
        )  # (BLOCK_N, BLOCK_D)
        acc, m_i, l_i = _softmax_step(acc, m_i, l_i, s, v, PRECISION)
    return acc, m_i, l_i


@triton.jit
def _key_ranges(first, kv_len, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
                HAS_WINDOW: tl.constexpr, MASK_KIND: tl.constexpr):  # fmt: skip
    """``low, full_low, full_high, high``: keys some query of a tile sees, and inside, whole tiles that all see."""
    low = first * 0
    high = low + kv_len
    full_high = high // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        high = tl.minimum(high, first + BLOCK_M)
        full_high = tl.minimum(full_high, (first + 1) // BLOCK_N * BLOCK_N)
    full_low = low
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
    if MASK_KIND != 0:
        full_high = low
    none = full_high <= full_low
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd_kernel(
    out_ptr, base_ptr, lse_ptr, prefix_lse_ptr, query_ptr, key_ptr, value_ptr, prefix_key_ptr, prefix_value_ptr,
    gate_ptr, mask_ptr, cu_seqlens_ptr, row_ids_ptr,
    OUT_STRIDES, BASE_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, PREFIX_KEY_STRIDES, PREFIX_VALUE_STRIDES,
    GATE_STRIDES, MASK_STRIDES,
    softmax_scale, score_scale, softcap, window, num_prefixes, num_heads, num_kv_heads, q_len, kv_len, prefix_len,
    num_seqs, num_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_KIND: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One tile of query positions of one row and head."""
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
    offs_n = tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    k_ptrs = _rows(key_ptr, KEY_STRIDES, row, kv_head, begin + offs_n, offs_d)
    v_ptrs = _rows(value_ptr, VALUE_STRIDES, row, kv_head, begin + offs_n, offs_d)
    pk_ptrs = _rows(prefix_key_ptr, PREFIX_KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    pv_ptrs = _rows(prefix_value_ptr, PREFIX_VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    mask_ptrs = mask_ptr
    if MASK_KIND != 0:
        mask_ptrs += row * MASK_STRIDES[0] + head * MASK_STRIDES[1]

    q_ptrs = _rows(query_ptr, QUERY_STRIDES, row, head, begin + offs_m, offs_d)
    q = _load(q_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if not GATED:
        acc, m_i, l_i = _attend_prefix(
            acc, m_i, l_i, q.to(prefix_key_ptr.dtype.element_ty), pk_ptrs, pv_ptrs, PREFIX_KEY_STRIDES,
            PREFIX_VALUE_STRIDES, tl.where(adapted, prefix_len, 0), mask_d, score_scale, softcap,
            BLOCK_P, HEAD_DIM, HAS_SOFTCAP, PRECISION, 1,
        )  # fmt: skip
    low, full_low, full_high, high = _key_ranges(
        first, keys, window, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW, MASK_KIND
    )
    if HAS_WINDOW:
        acc, m_i, l_i = _attend_keys(
            acc, m_i, l_i, q, k_ptrs, v_ptrs, mask_ptrs, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, low, full_low,
            offs_m, mask_d, score_scale, softcap, length, keys, window,
            BLOCK_N, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, True,
        )  # fmt: skip
    if MASK_KIND == 0:
        acc, m_i, l_i = _attend_keys(
            acc, m_i, l_i, q, k_ptrs, v_ptrs, mask_ptrs, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, full_low, full_high,
            offs_m, mask_d, score_scale, softcap, length, keys, window,
            BLOCK_N, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, False,
        )  # fmt: skip
    acc, m_i, l_i = _attend_keys(
        acc, m_i, l_i, q, k_ptrs, v_ptrs, mask_ptrs, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES, full_high, high,
        offs_m, mask_d, score_scale, softcap, length, keys, window,
        BLOCK_N, HEAD_DIM, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASK_KIND, PRECISION, True,
    )  # fmt: skip

    mask_md = mask_m[:, None] & mask_d
    # (BLOCK_M,) in (batch, num_heads, q_len)
    lse_offs = (row * num_heads + head) * q_len + begin + offs_m
    some = tl.where(l_i == 0.0, 1.0, l_i)  # a query without a visible key: 0, and an lse of -inf
    out = acc * (1.0 / some)[:, None]
    if SAVE:
        tl.store(lse_ptr + lse_offs, m_i + tl.log(some), mask=mask_m)
    if GATED:
        if SAVE:
            base_ptrs = _rows(base_ptr, BASE_STRIDES, row, head, begin + offs_m, offs_d)
            tl.store(base_ptrs, out.to(base_ptr.dtype.element_ty), mask=mask_md)
        factor, _ = _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH)
        # a branch or an empty loop, not a product with zero: Inf or NaN in the prefix stays out of the bits of base
        out, m_i, l_i = _add_gated_prefix(
            out, q.to(prefix_key_ptr.dtype.element_ty), pk_ptrs, pv_ptrs, PREFIX_KEY_STRIDES, PREFIX_VALUE_STRIDES,
            factor, tl.where(adapted & (SAVE or (factor != 0.0)), prefix_len, 0), mask_d, softmax_scale,
            BLOCK_P, HEAD_DIM, WIDE, PRECISION,
        )  # fmt: skip
        if SAVE:
            some = tl.where(l_i == 0.0, 1.0, l_i)
            tl.store(prefix_lse_ptr + lse_offs, m_i + tl.log(some), mask=mask_m)
    # a device cannot raise, so an id outside the bank has to show in the result
    out = tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), out)
    out_ptrs = _rows(out_ptr, OUT_STRIDES, row, head, begin + offs_m, offs_d)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_md)


def attention_forward(
    op: str, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    gate: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
    softmax_scale: float, gate_fn: str | None, is_causal: bool, window: int, softcap: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, base, lse and prefix lse; the last three have shape (0,) unless saved, and without a gate no base."""
    check(op, query)
    batch, num_heads, q_len, head_dim = query.shape
    gated = gate is not None
    out = torch.empty_like(query)
    base = torch.empty_like(query) if save and gated else query.new_empty(0)
    lse = query.new_empty((batch, num_heads, q_len) if save else 0, dtype=torch.float32)
    prefix_lse = torch.empty_like(lse) if gated else lse.new_empty(0)
    if out.numel() == 0:
        return out, base, lse, prefix_lse
    shared = shared_arguments(
        query, key, value, prefix_key, prefix_value, gate, attn_mask, cu_seqlens, row_ids,
        softmax_scale, gate_fn, is_causal, window, softcap,
    )  # fmt: skip
    tiles = config(
        "forward", target.arch(query), query.dtype, prefix_key.dtype, head_dim, prefix_key.shape[2]
    )
    num_tiles, rows = tiles_of_head(q_len, batch, cu_seqlens, tiles.block_m)
    with torch.cuda.device_of(query):
        launch(
            _attention_fwd_kernel, num_tiles * rows * num_heads, shared, tiles, head_dim,
            out_ptr=out, base_ptr=base, lse_ptr=lse, prefix_lse_ptr=prefix_lse,
            OUT_STRIDES=row_strides(out), BASE_STRIDES=row_strides(base if base.dim() == 4 else out),
            num_tiles=num_tiles, SAVE=save,
        )  # fmt: skip
    return out, base, lse, prefix_lse


def shared_arguments(
    query, key, value, prefix_key, prefix_value, gate, attn_mask, cu_seqlens, row_ids,
    softmax_scale, gate_fn, is_causal, window, softcap,
) -> dict:  # fmt: skip
    """What the forward and backward kernels have in common."""
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    packed = cu_seqlens is not None
    mask_kind = NO_MASK
    if attn_mask is not None:
        mask_kind = BOOL_MASK if attn_mask.dtype == torch.bool else FLOAT_MASK
        if mask_kind == BOOL_MASK:
            attn_mask = attn_mask.view(torch.uint8)
    return {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "prefix_key_ptr": prefix_key,
        "prefix_value_ptr": prefix_value, "gate_ptr": gate, "mask_ptr": attn_mask, "cu_seqlens_ptr": cu_seqlens,
        "row_ids_ptr": row_ids,
        "QUERY_STRIDES": row_strides(query), "KEY_STRIDES": row_strides(key), "VALUE_STRIDES": row_strides(value),
        "PREFIX_KEY_STRIDES": row_strides(prefix_key), "PREFIX_VALUE_STRIDES": row_strides(prefix_value),
        "GATE_STRIDES": (0, 0) if gate is None else gate.stride(),
        "MASK_STRIDES": (0, 0, 0, 0) if attn_mask is None else attn_mask.stride(),
        "softmax_scale": softmax_scale, "softcap": softcap,
        # what _capped multiplies products by; rounded once, here
        "score_scale": softmax_scale / softcap if softcap > 0 else softmax_scale,
        "window": window, "num_prefixes": num_prefixes,
        "num_heads": query.shape[1], "num_kv_heads": num_kv_heads, "q_len": query.shape[2], "kv_len": key.shape[2],
        "prefix_len": prefix_len, "num_seqs": cu_seqlens.shape[0] - 1 if packed else 0,
        "GATED": gate is not None, "TANH": gate_fn == "tanh",
        # no sequences, no ids to read
        "HAS_ROW_IDS": row_ids is not None and row_ids.numel() > 0, "PACKED": packed,
        "IS_CAUSAL": is_causal, "HAS_WINDOW": window > 0, "HAS_SOFTCAP": softcap > 0, "MASK_KIND": mask_kind,
    }  # fmt: skip


def launch(kernel, num_programs: int, shared: dict, tiles: Tiles, head_dim: int, **own) -> None:
    """Launch with its own arguments and those of the shared ones that this kernel has."""
    arguments = shared | own | {
        "HEAD_DIM": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_P": tiles.block_p,
        "BLOCK_D": block_d(head_dim), "PRECISION": tiles.precision,
        "WIDE": "ieee" if torch.version.hip else "tf32",  # AMD's matrix units take fp32 as it is
    }  # fmt: skip
    kernel[(num_programs,)](
        **{name: arguments[name] for name in kernel.arg_names},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **(ALL_REGISTERS if tiles.all_registers else {}),
    )


def tiles_of_head(length: int, batch: int, cu_seqlens: Tensor | None, block: int) -> tuple[int, int]:
    """Tiles of one head, and how many batch rows have as many."""
    if cu_seqlens is None:
        return triton.cdiv(length, block), batch
    return triton.cdiv(length, block) + cu_seqlens.shape[0] - 1, 1


def check(op: str, query: Tensor) -> None:
    op = f"{op} (Triton)"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: query must be fp32, bf16 or fp16, got {query.dtype}")
    interpreted = not isinstance(_attention_fwd_kernel, triton.JITFunction)
    if interpreted and query.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: query must be fp32 or fp16 under TRITON_INTERPRET=1 (bf16 is wrong there), got bf16"
        )
    if not interpreted and query.device.type == "cpu":
        raise ValueError(f"{op}: query must be on a GPU (or set TRITON_INTERPRET=1), got cpu")
    if query.shape[-1] > 256:
        raise ValueError(f"{op}: head_dim must be at most 256, got {query.shape[-1]}")
