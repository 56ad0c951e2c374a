"""Backward of the prefix term (kernels/prefix_term.py has the forward; docs/maths.md the derivation).

    gated:  p = softmax(S),      f the factor,  delta = rowsum(p * (dO Vp^T)),   dgate_h = f' * sum delta
    merge:  p = exp(S - lse),    f = 1,         delta = rowsum(dO * O)           O, lse: the merged ones
    dS = p * (dO Vp^T - delta)
    dQ = grad_query of the base + f * softmax_scale * dS Kp,   dKp = f * softmax_scale * dS^T Q,   dVp = f * p^T dO

With the merged O and lse the base's own backward gives its part of dQ; the two meet here instead of in an addition of
three tensors.

Backward is deterministic without atomics. A program owns one slot, kv head and block of prefix positions; a slot is a
run of query tiles, of one batch row if there are row ids, else of the whole batch. It keeps dKp and dVp in registers
over its run and writes one fp32 partial, and delta of every query position; a second kernel sums them for each bank
entry in a fixed order. Slots follow from shapes and the architecture, and with row ids not from the batch size either,
so the gradient of a row has the same bits alone and in a batch.

What is not needed is not written and not reduced, by lengths of zero at run time: code compiled without it would round
elsewhere, and a gradient would have other bits when another one is asked for.

Tiles have fewer than 64 rows, and blocks fewer than 64 prefix positions, so that Hopper runs ``mma.sync``: p and dS
are operands from registers (see the forward), and dS^T is one of those that Triton 3.4 to 3.7.0 gets wrong.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.launch import Launch, prepared
from fastadapter.kernels.prefix_tiles import (
    LENGTHS,
    PROCESSORS,
    _factor,
    _prefix_block,
    _row_entry,
    _running_max,
    _scores,
    _tanh,
    _tile,
    check,
    config,
    operands,
)
from torch import Tensor

RUN_LENGTHS = [
    "num_tiles",
    "tiles_per_slot",
    "slots_per_row",
    "kv_columns",
    "columns",
    "written_rows",
    "written_positions",
]
REDUCE_LENGTHS = [
    "num_rows",
    "slots_per_row",
    "kv_columns",
    "columns",
    "num_heads",
    "q_len",
    "gate_rows",
    "num_prefixes",
]
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_LENGTH = 8, 128, 1024


@triton.jit
def _rows_of_visit(
    visit, first_row, first_tile, tiles, tiles_per_row, kv_head, group_size, q_len, BLOCK_M: tl.constexpr
):
    """Batch row and head of a visit of a slot's tile, its query positions, and which of them exist."""
    head = kv_head * group_size + visit // tiles
    tile = first_tile + visit % tiles
    row = first_row + tile // tiles_per_row
    offs_m = ((tile % tiles_per_row) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    # none behind the last visit: the one ahead asks
    return row, head, offs_m, offs_m < tl.where(visit < group_size * tiles, q_len, 0)


@triton.jit
def _load_stats(
    ptr, num_heads, visit, first_row, first_tile, tiles, tiles_per_row, kv_head, group_size, q_len,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse or delta of a visit's query positions, (BLOCK_M,) of (batch, num_heads, q_len)."""
    row, head, offs_m, mask_m = _rows_of_visit(
        visit, first_row, first_tile, tiles, tiles_per_row, kv_head, group_size, q_len, BLOCK_M
    )
    return tl.load(ptr + (row * num_heads + head) * q_len + offs_m, mask=mask_m, other=0.0)


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _prefix_term_bwd_kernel(
    grad_query_ptr, partial_ptr, delta_ptr, lse_ptr, base_grad_ptr, grad_out_ptr, out_ptr, query_ptr, key_ptr,
    value_ptr, gate_ptr, row_ids_ptr,
    GRAD_QUERY_STRIDES, BASE_GRAD_STRIDES, GRAD_OUT_STRIDES, OUT_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES,
    GATE_STRIDES,
    softmax_scale, softcap, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len,
    num_tiles, tiles_per_slot, slots_per_row, kv_columns, columns, written_rows, written_positions,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BASE_GRAD: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ and delta of a run of query tiles, and that run's part of dKp and dVp.

    ``PART`` "both" does all of it, for a prefix of one block. Otherwise "query" does dQ and leaves lse and delta of
    every query position, and "prefix" does one block of dKp and dVp per program from them.
    """
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(prefix_len, BLOCK_P) if PART == "prefix" else 1
    first_p = (pid % num_blocks) * BLOCK_P
    kv_head = ((pid // num_blocks) % num_kv_heads).to(tl.int64)
    slot = (pid // (num_blocks * num_kv_heads)).to(tl.int64)
    group_size = num_heads // num_kv_heads
    tiles_per_row = tl.cdiv(q_len, BLOCK_M)
    first_row = slot // slots_per_row if HAS_ROW_IDS else slot * 0
    first_tile = (slot % slots_per_row).to(tl.int32) * tiles_per_slot
    tiles = tl.minimum(first_tile + tiles_per_slot, num_tiles) - first_tile
    row_id, entry = _row_entry(row_ids_ptr, first_row, num_prefixes, HAS_ROW_IDS)

    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    k_ptrs = _tile(key_ptr, KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    v_ptrs = _tile(value_ptr, VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    k, v, mask_p = _prefix_block(
        k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, first_p, prefix_len, mask_d, DTYPE
    )
    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    if FORM == "merge" or PART == "prefix":
        lse_next = _load_stats(
            lse_ptr,
            num_heads,
            0,
            first_row,
            first_tile,
            tiles,
            tiles_per_row,
            kv_head,
            group_size,
            q_len,
            BLOCK_M,
        )
    if PART == "prefix":
        delta_next = _load_stats(
            delta_ptr,
            num_heads,
            0,
            first_row,
            first_tile,
            tiles,
            tiles_per_row,
            kv_head,
            group_size,
            q_len,
            BLOCK_M,
        )
    # one loop over heads and tiles: the next tile is on its way at the end of a head, too
    for visit in tl.range(0, group_size * tiles, num_stages=STAGES):
        row, head, offs_m, mask_m = _rows_of_visit(
            visit, first_row, first_tile, tiles, tiles_per_row, kv_head, group_size, q_len, BLOCK_M
        )
        mask_md = mask_m[:, None] & mask_d
        q = tl.load(_tile(query_ptr, QUERY_STRIDES, row, head, offs_m, offs_d), mask=mask_md, other=0.0)
        do_ptrs = _tile(grad_out_ptr, GRAD_OUT_STRIDES, row, head, offs_m, offs_d)
        do = tl.load(do_ptrs, mask=mask_md, other=0.0)
        factor = _factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, FORM)
        offs_stats = (row * num_heads + head) * q_len + offs_m  # (BLOCK_M,) in (batch, num_heads, q_len)
        lse = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        if FORM == "merge" or PART == "prefix":
            # a visit ahead: too narrow for the pipeline's copies, and late where it is used
            lse = lse_next
            lse_next = _load_stats(
                lse_ptr, num_heads, visit + 1, first_row, first_tile, tiles, tiles_per_row, kv_head, group_size, q_len,
                BLOCK_M,
            )  # fmt: skip
        if PART == "prefix":
            delta = delta_next
            delta_next = _load_stats(
                delta_ptr, num_heads, visit + 1, first_row, first_tile, tiles, tiles_per_row, kv_head, group_size,
                q_len, BLOCK_M,
            )  # fmt: skip
        else:
            if FORM == "merge":
                o_ptrs = _tile(out_ptr, OUT_STRIDES, row, head, offs_m, offs_d)
                o = tl.load(o_ptrs, mask=mask_md, other=0.0)
                # loaded again (from L2): shared memory is laid out for one kind of use, and products need the other
                do_rows = tl.load(do_ptrs, mask=mask_md, other=0.0, eviction_policy="evict_first")
                delta = tl.sum(o.to(tl.float32) * do_rows.to(tl.float32), axis=1)

        if PART != "query":
            s, slope = _scores(q, k, softmax_scale, softcap, mask_p, HAS_SOFTCAP, PRECISION)
            # no query is there: 0 times an infinite key is NaN, and no gradient of the prefix
            s = tl.where(mask_m[:, None], s, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_P)
            if FORM == "merge" or PART == "prefix":
                p = tl.exp(s - lse[:, None])
            else:
                _, shift, _ = _running_max(tl.full((BLOCK_M,), float("-inf"), tl.float32), s)
                p = tl.exp(s - shift[:, None])
                l_i = tl.sum(p, axis=1)
                delta = tl.sum(p * dp, axis=1) / l_i
                p = p / l_i[:, None]
            ds = p * (dp - delta[:, None])
            if HAS_SOFTCAP:
                ds = ds * slope
        elif FORM != "merge":
            m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            l_i = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, prefix_len, BLOCK_P):
                kn, vn, mask_n = _prefix_block(
                    k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d, DTYPE
                )
                s, _ = _scores(q, kn, softmax_scale, softcap, mask_n, HAS_SOFTCAP, PRECISION)
                m_i, shift, alpha = _running_max(m_i, s)
                p = tl.exp(s - shift[:, None])
                dp = tl.dot(do, tl.trans(vn), input_precision=PRECISION)
                l_i = l_i * alpha + tl.sum(p, axis=1)
                delta = delta * alpha + tl.sum(p * dp, axis=1)
            delta = delta / l_i
            lse = m_i + tl.log(l_i)
            tl.store(lse_ptr + offs_stats, lse, mask=mask_m)

        if PART != "prefix":
            if FORM != "merge" or PART == "query":
                tl.store(delta_ptr + offs_stats, delta, mask=mask_m)
            mask_w = (offs_m < written_rows)[:, None] & mask_d
            if PART == "both":
                # the factor comes after the product: in fp16 a small gate would flush dS to zero
                dq = tl.dot(ds.to(DTYPE), k, input_precision=PRECISION)
            else:
                dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                for start in range(0, prefix_len, BLOCK_P):
                    kn, vn, mask_n = _prefix_block(
                        k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d, DTYPE
                    )
                    s, slope = _scores(q, kn, softmax_scale, softcap, mask_n, HAS_SOFTCAP, PRECISION)
                    dp = tl.dot(do, tl.trans(vn), input_precision=PRECISION)
                    dsn = tl.exp(s - lse[:, None]) * (dp - delta[:, None])
                    if HAS_SOFTCAP:
                        dsn = dsn * slope
                    dq = tl.dot(dsn.to(DTYPE), kn, dq, input_precision=PRECISION)
            # a choice, not a product with zero: Inf or NaN in the prefix stay out of what has no adapter
            dq = tl.where(factor != 0.0, dq * (factor * softmax_scale), 0.0)
            if HAS_BASE_GRAD:
                base_ptrs = _tile(base_grad_ptr, BASE_GRAD_STRIDES, row, head, offs_m, offs_d)
                dq += tl.load(base_ptrs, mask=mask_w, other=0.0).to(tl.float32)
            dq_ptrs = _tile(grad_query_ptr, GRAD_QUERY_STRIDES, row, head, offs_m, offs_d)
            tl.store(dq_ptrs, dq.to(DTYPE), mask=mask_w)
        if PART != "query":
            on_key = tl.dot(tl.trans(ds.to(DTYPE)), q, input_precision=PRECISION)
            on_value = tl.dot(tl.trans(p.to(DTYPE)), do, input_precision=PRECISION)
            dk += tl.where(factor != 0.0, on_key * factor, 0.0)
            dv += tl.where(factor != 0.0, on_value * factor, 0.0)
    if PART != "query":
        offs_pd = (kv_head * prefix_len + first_p + offs_p)[:, None] * HEAD_DIM + offs_d[None, :]
        mask_pd = (first_p + offs_p < written_positions)[:, None] & mask_d
        tl.store(partial_ptr + slot * columns + offs_pd, dk * softmax_scale, mask=mask_pd)
        tl.store(partial_ptr + slot * columns + kv_columns + offs_pd, dv, mask=mask_pd)


@triton.jit(do_not_specialize=REDUCE_LENGTHS)
def _prefix_term_reduce_kernel(
    grad_key_ptr, grad_value_ptr, grad_gate_ptr, partial_ptr, delta_ptr, gate_ptr, row_ids_ptr, GATE_STRIDES,
    num_rows, slots_per_row, kv_columns, columns, num_heads, q_len, gate_rows, num_prefixes,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """Sum over the rows that use one bank entry: BLOCK_E columns of the partials (dKp | dVp), or delta of one head.

    Rows are summed across a tile and slots along the loop: where a single row uses the entry, the sum does not
    depend on that row's place in the batch.
    """
    pid = tl.program_id(0)
    num_column_blocks = tl.cdiv(columns, BLOCK_E)
    if pid < num_prefixes * num_column_blocks:
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
                    acc += tl.load(
                        ptrs, mask=mask_r[:, None] & mask_e[None, :], other=0.0
                    )  # (BLOCK_R, BLOCK_E)
        total = tl.sum(acc, axis=0)
        dtype = grad_key_ptr.dtype.element_ty
        tl.store(grad_key_ptr + entry * kv_columns + offs_e, total.to(dtype), mask=offs_e < kv_columns)
        is_value = (offs_e >= kv_columns) & mask_e
        tl.store(grad_value_ptr + (entry - 1) * kv_columns + offs_e, total.to(dtype), mask=is_value)
    elif FORM != "merge":
        place = pid - num_prefixes * num_column_blocks
        bank = (place // num_heads).to(tl.int64)
        head = (place % num_heads).to(tl.int64)
        total_delta = tl.zeros((BLOCK_T,), tl.float32)
        for batch_row in range(gate_rows):
            used = batch_row >= 0
            if HAS_ROW_IDS:
                used = tl.load(row_ids_ptr + batch_row) == bank
            if used:
                for start in range(0, q_len, BLOCK_T):
                    offs_t = start + tl.arange(0, BLOCK_T)
                    ptrs = delta_ptr + (tl.cast(batch_row, tl.int64) * num_heads + head) * q_len + offs_t
                    total_delta += tl.load(ptrs, mask=offs_t < q_len, other=0.0)  # (BLOCK_T,)
        slope = tl.full((), 1.0, tl.float32)
        if FORM == "tanh":
            factor = _tanh(tl.load(gate_ptr + bank * GATE_STRIDES[0] + head * GATE_STRIDES[1]))
            slope = 1.0 - factor * factor
        tl.store(grad_gate_ptr + bank * num_heads + head, tl.sum(total_delta, axis=0) * slope)


@prepared(tensors=9)
def prefix_term_backward(
    grad_out: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor | None,
    out: Tensor | None, lse: Tensor | None, base_grad: Tensor | None, row_ids: Tensor | None,
    op: str, softmax_scale: float, softcap: float, form: str, need_query: bool, need_prefix: bool, need_gate: bool,
):  # fmt: skip
    """Gradients of query, prefix_key, prefix_value and gate (none in form "merge"), each in its argument's dtype.

    Args: ``out`` and ``lse`` (fp32, contiguous) are the merged ones of form "merge". ``base_grad``, like query, is
        the base's part of the gradient of query, to which the prefix's is added.
    Those not needed come back with shape ``(0,)``. A row whose id is outside ``[-1, num_prefixes)`` gets NaN in
    its gradient of query and adds nothing to the others. Errors as in :func:`prefix_term_forward`.
    """
    check(op, query, form)
    batch, num_heads, q_len, head_dim = query.shape
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    by_row = row_ids is not None
    arch = target.arch(query)
    tiles = config(arch, head_dim, prefix_len, query.dtype, "backward", q_len)
    one_block = prefix_len <= tiles.block_p
    merge, gated = form == "merge", gate is not None

    query_shape = query.shape if need_query else (0,)
    prefix_shape = prefix_key.shape if need_prefix else (0,)
    gate_shape = gate.shape if gated and need_gate else (0,)
    stats = (batch, num_heads, q_len)
    delta_shape = (0,) if merge and one_block else stats
    lse_shape = (0,) if one_block else stats

    num_rows = batch if by_row else 1
    num_tiles = triton.cdiv(q_len, tiles.block_m) * (1 if by_row else batch)
    tiles_per_slot = _tiles_per_slot(
        arch, tiles.programs, num_tiles, num_heads // num_kv_heads, num_kv_heads, by_row
    )
    slots_per_row = triton.cdiv(num_tiles, tiles_per_slot)
    num_slots = num_rows * slots_per_row
    kv_columns = num_kv_heads * prefix_len * head_dim if need_prefix else 0
    names = (
        "grad_query", "partial", "delta", "lse", "base_grad", "grad_out", "out", "query", "key", "value", "gate",
        "row_ids",
    )  # fmt: skip
    pointers = tuple(f"{name}_ptr" for name in names)
    strides = query.stride()

    def part_of(part: str) -> Launch:
        tiles = config(
            arch, head_dim, prefix_len, query.dtype, f"backward-{part}".removesuffix("-both"), q_len
        )
        num_blocks = triton.cdiv(prefix_len, tiles.block_p) if part == "prefix" else 1
        constants = dict(
            GRAD_QUERY_STRIDES=torch.empty_like(query).stride(),
            BASE_GRAD_STRIDES=strides if base_grad is None else base_grad.stride(),
            GRAD_OUT_STRIDES=grad_out.stride(), OUT_STRIDES=strides if out is None else out.stride(),
            num_tiles=num_tiles, tiles_per_slot=tiles_per_slot, slots_per_row=slots_per_row,
            kv_columns=kv_columns, columns=2 * kv_columns, written_rows=q_len if need_query else 0,
            written_positions=prefix_len if need_prefix else 0, HAS_BASE_GRAD=base_grad is not None, PART=part,
            STAGES=tiles.num_stages,
            **operands(query, prefix_key, gate, row_ids, softmax_scale, softcap, form, tiles, arch),
            VALUE_STRIDES=prefix_value.stride(),
        )  # fmt: skip
        return Launch(_prefix_term_bwd_kernel, (num_slots * num_kv_heads * num_blocks,), pointers, constants)

    launches = []
    if num_slots * num_kv_heads:
        wanted = ("both",) if one_block else ("query", "prefix") if need_prefix else ("query",)
        launches = [part_of(part) for part in wanted]
    reduce = None
    programs = triton.cdiv(2 * kv_columns, REDUCE_COLUMNS) * num_prefixes
    programs += num_prefixes * num_heads if gated and need_gate else 0
    if programs:
        names = ("grad_key", "grad_value", "grad_gate", "partial", "delta", "gate", "row_ids")
        constants = {
            "GATE_STRIDES": (0, 0) if gate is None else gate.stride(),
            # without ids, the slots of the whole batch are the rows of a bank of one
            "num_rows": num_rows if by_row else num_slots, "slots_per_row": slots_per_row if by_row else 1,
            "kv_columns": kv_columns, "columns": 2 * kv_columns, "num_heads": num_heads, "q_len": q_len,
            "gate_rows": batch, "num_prefixes": num_prefixes, "BLOCK_R": REDUCE_ROWS, "BLOCK_E": REDUCE_COLUMNS,
            "BLOCK_T": REDUCE_LENGTH, "HAS_ROW_IDS": by_row, "FORM": form, "num_warps": 4,
        }  # fmt: skip
        reduce = Launch(
            _prefix_term_reduce_kernel, (programs,), tuple(f"{name}_ptr" for name in names), constants
        )

    def run(grad_out, query, prefix_key, prefix_value, gate, out, lse, base_grad, row_ids):
        grad_query = torch.empty_like(query) if need_query else query.new_empty(query_shape)
        grad_key, grad_value = prefix_key.new_empty(prefix_shape), prefix_value.new_empty(prefix_shape)
        grad_gate = gate.new_empty(gate_shape) if gated else None
        partial = query.new_empty((num_slots, 2 * kv_columns), dtype=torch.float32)
        delta = query.new_empty(delta_shape, dtype=torch.float32)
        if lse is None:
            lse = query.new_empty(lse_shape, dtype=torch.float32)
        operands = (grad_out, out, query, prefix_key, prefix_value, gate, row_ids)
        for launch in launches:
            launch(grad_query, partial, delta, lse, base_grad, *operands)
        if reduce is not None:
            reduce(grad_key, grad_value, grad_gate, partial, delta, gate, row_ids)
        return grad_query, grad_key, grad_value, grad_gate

    return run


def _tiles_per_slot(
    arch: str, programs: int, num_tiles: int, group_size: int, num_kv_heads: int, by_row: bool
) -> int:
    """How many query tiles one backward program sums before it writes its partial.

    At least 16 visits (tiles times query heads), so that partials are a small part of the traffic. For a shared prefix
    as many programs as the device holds at once, in one wave; with row ids the number must not depend on the batch.
    """
    tiles = triton.cdiv(16, group_size)
    if by_row:
        return tiles
    slots = max(1, programs * PROCESSORS.get(arch, 128) // num_kv_heads)
    return max(tiles, triton.cdiv(num_tiles, slots))
