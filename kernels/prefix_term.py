"""The term of a learned prefix, put into the output of any attention: forward of gated_prefix and prefix_merge.

    S  = softmax_scale * Q Kp^T                            (q_len, prefix_len) per head
    gated (LLaMA-Adapter, arXiv:2303.16199, eq. 6-8):      O = base + f * softmax(S) Vp,   f = tanh(gate_h) or gate_h
    merge (prefix tuning, arXiv:2101.00190), with the base's natural ``lse`` b:
        lse = log(exp(b) + sum exp(S)),                    O = exp(b - lse) base + exp(S - lse) Vp

Layouts: base, query, out ``(batch, num_heads, q_len, head_dim)``; base_lse, lse ``(batch, num_heads, q_len)``;
prefix_key, prefix_value ``(num_prefixes, num_kv_heads, prefix_len, head_dim)``; gate ``(num_prefixes, num_heads)``;
any strides, lse contiguous.

The term is nothing but traffic: two tensors in, one out. So a program stays on one row and kv head and walks over a
run of tiles: the prefix is read once per run, and the next tiles are on their way while one is computed. Runs follow
from shapes and the architecture; a tile's own arithmetic is the same in every run. A tile is part of one head, or,
where there are fewer query positions than rows in a tile (decoding), of all heads that share the kv head.

Tiles have fewer than 64 rows so that Hopper runs ``mma.sync``: ptxas before 13.3 may reuse the registers of a
``wgmma`` operand too early (triton issue 11781), and p is such an operand.
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
    _tile,
    check,
    config,
    operands,
)
from torch import Tensor

RUN_LENGTHS = ["runs", "tiles_per_run"]


@triton.jit
def _rows_of_tile(tile, kv_head, group_size, q_len, BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """Head (one per row if ``PACKED``) and query position of every row of a tile, and which rows exist."""
    if PACKED:
        offs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs < group_size * q_len
        head = kv_head * group_size + tl.minimum(offs // q_len, group_size - 1)
        offs_m = (offs % q_len).to(tl.int64)
    else:
        tiles = tl.cdiv(q_len, BLOCK_M)
        head = kv_head * group_size + tile // tiles
        offs_m = ((tile % tiles) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
        mask_m = offs_m < q_len
    return head, offs_m, mask_m


@triton.jit
def _load_lse(
    lse_ptr, STRIDES, row, tile, kv_head, group_size, q_len, BLOCK_M: tl.constexpr, PACKED: tl.constexpr
):
    """The base's lse of a tile, (BLOCK_M,); nothing is read behind the last one of the group."""
    head, offs_m, mask_m = _rows_of_tile(tile, kv_head, group_size, q_len, BLOCK_M, PACKED)
    if not PACKED:
        mask_m = offs_m < tl.where(head < (kv_head + 1) * group_size, q_len, 0)
    return tl.load(
        lse_ptr + row * STRIDES[0] + head * STRIDES[1] + offs_m * STRIDES[2], mask=mask_m, other=0.0
    )


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _prefix_term_fwd_kernel(
    out_ptr, lse_ptr, base_ptr, base_lse_ptr, query_ptr, key_ptr, value_ptr, gate_ptr, row_ids_ptr,
    OUT_STRIDES, BASE_STRIDES, BASE_LSE_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, GATE_STRIDES,
    softmax_scale, softcap, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len, runs, tiles_per_run,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of tiles of one row, over the query heads that share a kv head."""
    pid = tl.program_id(0)
    run = pid % runs
    kv_head = ((pid // runs) % num_kv_heads).to(tl.int64)
    row = (pid // (runs * num_kv_heads)).to(tl.int64)
    group_size = num_heads // num_kv_heads
    tiles = tl.cdiv(group_size * q_len, BLOCK_M) if PACKED else group_size * tl.cdiv(q_len, BLOCK_M)
    first_tile = run * tiles_per_run
    last_tile = tl.minimum(first_tile + tiles_per_run, tiles)
    row_id, entry = _row_entry(row_ids_ptr, row, num_prefixes, HAS_ROW_IDS)

    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    k_ptrs = _tile(key_ptr, KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    v_ptrs = _tile(value_ptr, VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    k, v, mask_p = _prefix_block(k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, 0, prefix_len, mask_d, DTYPE)
    if FORM == "merge":
        b_next = _load_lse(
            base_lse_ptr, BASE_LSE_STRIDES, row, first_tile, kv_head, group_size, q_len, BLOCK_M, PACKED
        )
    # the explicit number pipelines base too, which no product reads
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        head, offs_m, mask_m = _rows_of_tile(tile, kv_head, group_size, q_len, BLOCK_M, PACKED)
        mask_md = mask_m[:, None] & mask_d
        q = tl.load(_tile(query_ptr, QUERY_STRIDES, row, head, offs_m, offs_d), mask=mask_md, other=0.0)
        base = tl.load(_tile(base_ptr, BASE_STRIDES, row, head, offs_m, offs_d), mask=mask_md, other=0.0)
        if FORM == "merge":
            # a tile ahead: too narrow for the pipeline's copies, and late where it is used
            b = b_next  # (BLOCK_M,)
            b_next = _load_lse(
                base_lse_ptr, BASE_LSE_STRIDES, row, tile + 1, kv_head, group_size, q_len, BLOCK_M, PACKED
            )
        factor = _factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, FORM)
        if ONE_BLOCK:
            s, _ = _scores(q, k, softmax_scale, softcap, mask_p, HAS_SOFTCAP, PRECISION)
            m_i, shift, _ = _running_max(tl.full((BLOCK_M,), float("-inf"), tl.float32), s)
            p = tl.exp(s - shift[:, None])
            l_i = tl.sum(p, axis=1)
            # p is at most 1, so rounding it to the dtype of v costs less than rounding the result
            acc = tl.dot(p.to(DTYPE), v, input_precision=PRECISION)
        else:
            m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            l_i = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for start in range(0, prefix_len, BLOCK_P):
                kn, vn, mask_n = _prefix_block(
                    k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d, DTYPE
                )
                s, _ = _scores(q, kn, softmax_scale, softcap, mask_n, HAS_SOFTCAP, PRECISION)
                m_i, shift, alpha = _running_max(m_i, s)
                p = tl.exp(s - shift[:, None])
                l_i = l_i * alpha + tl.sum(p, axis=1)
                acc = tl.dot(p.to(DTYPE), vn, acc * alpha[:, None], input_precision=PRECISION)
        if FORM == "merge":
            # a base that saw no key is no part of the result, whatever it holds
            visible = b != float("-inf")
            largest = tl.maximum(b, m_i)
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            on_base, on_prefix = tl.exp(b - shift), tl.exp(m_i - shift)
            total = on_base + l_i * on_prefix
            kept = tl.where(visible[:, None], base.to(tl.float32) * (on_base / total)[:, None], 0.0)
            out = (kept + acc * (factor * on_prefix / total)[:, None]).to(base.dtype)
            lse = tl.where(factor != 0.0, factor * (shift + tl.log(total)), b)
            tl.store(lse_ptr + (row * num_heads + head) * q_len + offs_m, lse, mask=mask_m)
        else:
            out = (base.to(tl.float32) + acc * (factor / l_i)[:, None]).to(base.dtype)
        # a choice, not a product with zero: it keeps the bits of base, and Inf or NaN in the prefix out of them
        if PACKED and FORM != "merge":
            out = tl.where((factor != 0.0)[:, None], out, base)
        else:
            out = tl.where(factor != 0.0, out, base)
        tl.store(_tile(out_ptr, OUT_STRIDES, row, head, offs_m, offs_d), out, mask=mask_md)


@prepared(tensors=7)
def prefix_term_forward(
    base: Tensor, base_lse: Tensor | None, query: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    gate: Tensor | None, row_ids: Tensor | None, op: str, softmax_scale: float, softcap: float, form: str,
):  # fmt: skip
    """Output, like ``base``, and the merged lse of form "merge".

    Args: layouts of the module docstring; fp32, bf16 or fp16 activations, the prefix in that dtype or fp32, gate
        fp32, row_ids int32 ``(batch,)``. A row whose id is outside ``[-1, num_prefixes)`` comes back as NaN.
    Raises:
        TypeError: fp64, or bf16 under the interpreter.
        ValueError: tensors on a device Triton cannot reach, ``head_dim`` above 256, an unknown ``form``.
    """
    check(op, query, form)
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, prefix_len = prefix_key.shape[1:3]
    arch = target.arch(query)
    tiles = config(arch, head_dim, prefix_len, query.dtype, "merge" if form == "merge" else "forward", q_len)
    group_size = num_heads // num_kv_heads
    packed = q_len < tiles.block_m
    launch = None
    out_strides = torch.empty_like(base).stride()
    if base.numel():
        rows = group_size * q_len
        num_tiles = (
            triton.cdiv(rows, tiles.block_m) if packed else group_size * triton.cdiv(q_len, tiles.block_m)
        )
        tiles_per_run = _tiles_per_run(arch, tiles.programs, batch * num_kv_heads, num_tiles)
        runs = triton.cdiv(num_tiles, tiles_per_run)
        constants = dict(
            OUT_STRIDES=out_strides, BASE_STRIDES=base.stride(),
            BASE_LSE_STRIDES=(0, 0, 0) if base_lse is None else base_lse.stride(),
            runs=runs, tiles_per_run=tiles_per_run, ONE_BLOCK=prefix_len <= tiles.block_p, PACKED=packed,
            STAGES=tiles.num_stages,
            **operands(query, prefix_key, gate, row_ids, softmax_scale, softcap, form, tiles, arch),
            VALUE_STRIDES=prefix_value.stride(),
        )  # fmt: skip
        names = ("out", "lse", "base", "base_lse", "query", "key", "value", "gate", "row_ids")
        pointers = tuple(f"{name}_ptr" for name in names)
        launch = Launch(_prefix_term_fwd_kernel, (batch * num_kv_heads * runs,), pointers, constants)

    def run(base, base_lse, *others):
        out = torch.empty_like(base)
        lse = None if base_lse is None else base_lse.new_empty(base_lse.shape)
        if launch is not None:
            launch(out, lse, base, base_lse, *others)
        return out, lse

    return run


def _tiles_per_run(arch: str, programs: int, heads: int, num_tiles: int) -> int:
    """Tiles that one program walks over: as many programs as the device holds at once, in one wave."""
    runs = max(1, programs * PROCESSORS.get(arch, 128) // heads)
    return triton.cdiv(num_tiles, min(runs, num_tiles))
