"""Gated prefix: the adapter term of LLaMA-Adapter's zero-init attention (arXiv:2303.16199, eq. 6-8).

    S  = softmax_scale * Q Kp^T,  p = softmax(S)   (q_len, prefix_len) per head
    O  = base + f * p Vp                           f = tanh(gate_h) or gate_h

Nothing is saved for backward (kernels/gated_prefix_backward.py): p costs less to recompute than to read.

Layouts: base, query, out ``(batch, num_heads, q_len, head_dim)``; prefix_key, prefix_value
``(num_prefixes, num_kv_heads, prefix_len, head_dim)``; gate ``(num_prefixes, num_heads)``; any strides.

The term is nothing but traffic: two tensors in, one out. So a program stays on one row and kv head and walks over a
run of query tiles: the prefix is read once per run, and the next tiles are on their way while one is computed. From
sm_90 on, tiles move by TMA where their strides allow it (device-side descriptors): one instruction instead of
an address per thread, which halves the registers and doubles the programs per multiprocessor. Runs follow from shapes
and the architecture; a tile's own arithmetic is the same in every run.

Tiles have fewer than 64 rows so that Hopper runs ``mma.sync``: ptxas before 13.3 may reuse the registers of a
``wgmma`` operand too early (triton issue 11781), and p is such an operand.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.gated_prefix_backward import (
    REDUCE_COLUMNS,
    REDUCE_LENGTHS,
    REDUCE_ROWS,
    _gated_prefix_reduce_kernel,
    _tiles_per_slot,
    gated_prefix_backward,
)
from fastadapter.kernels.gated_prefix_tiles import (
    LENGTHS,
    PROCESSORS,
    _gate_factor,
    _prefix_block,
    _rescale,
    _row_entry,
    _scores,
    _tanh,
    _tile,
    block_d,
    check,
    config,
    operands,
)
from torch import Tensor
from triton.runtime import _allocation

__all__ = [
    "gated_prefix_forward", "gated_prefix_backward", "block_d", "config",
    # the attention kernels are built from the same parts
    "REDUCE_COLUMNS", "REDUCE_LENGTHS", "REDUCE_ROWS", "_gate_factor", "_gated_prefix_reduce_kernel",
    "_prefix_block", "_rescale", "_row_entry", "_scores", "_tanh", "_tile", "_tiles_per_slot",
]  # fmt: skip

RUN_LENGTHS = ["batch", "runs", "visits_per_run"]
# Programs that share a multiprocessor: what tiles on their way and a short prefix leave of its shared memory.
PROGRAMS_PER_PROCESSOR = {"sm_80": 3}
# Fewer visits than this in a whole row are not worth a descriptor.
MIN_TMA_VISITS = 8


@triton.jit
def _descriptor(
    ptr, STRIDES, batch, num_heads, q_len, HEAD_DIM, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tiles (1, 1, BLOCK_M, BLOCK_D) of a 4-d tensor; the hardware clips them to its bounds."""
    return tl.make_tensor_descriptor(
        ptr,
        shape=[batch, num_heads, q_len, HEAD_DIM],
        strides=[
            tl.cast(STRIDES[0], tl.int64), tl.cast(STRIDES[1], tl.int64), tl.cast(STRIDES[2], tl.int64), STRIDES[3],
        ],
        block_shape=[1, 1, BLOCK_M, BLOCK_D],
    )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS + RUN_LENGTHS)
def _gated_prefix_fwd_kernel(
    out_ptr, base_ptr, query_ptr, key_ptr, value_ptr, gate_ptr, row_ids_ptr,
    OUT_STRIDES, BASE_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, GATE_STRIDES,
    softmax_scale, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len, batch, runs, visits_per_run,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, TANH: tl.constexpr, ONE_BLOCK: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of query tiles of one row, over the query heads that share a kv head."""
    pid = tl.program_id(0)
    run = pid % runs
    kv_head = ((pid // runs) % num_kv_heads).to(tl.int64)
    row = (pid // (runs * num_kv_heads)).to(tl.int64)
    group_size = num_heads // num_kv_heads
    num_tiles = tl.cdiv(q_len, BLOCK_M)
    first_visit = run * visits_per_run
    last_visit = tl.minimum(first_visit + visits_per_run, group_size * num_tiles)
    row_id, entry = _row_entry(row_ids_ptr, row, num_prefixes, HAS_ROW_IDS)

    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    scale_log2 = softmax_scale * 1.4426950408889634
    k_ptrs = _tile(key_ptr, KEY_STRIDES, entry, kv_head, offs_p, offs_d)
    v_ptrs = _tile(value_ptr, VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
    k, v, mask_p = _prefix_block(k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, 0, prefix_len, mask_d)
    if TMA:
        q_desc = _descriptor(query_ptr, QUERY_STRIDES, batch, num_heads, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        base_desc = _descriptor(base_ptr, BASE_STRIDES, batch, num_heads, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        out_desc = _descriptor(out_ptr, OUT_STRIDES, batch, num_heads, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    # the explicit number pipelines base too, which no product reads
    for visit in tl.range(first_visit, last_visit, num_stages=STAGES):
        head = kv_head * group_size + visit // num_tiles
        start_m = (visit % num_tiles) * BLOCK_M
        offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        mask_md = (offs_m[:, None] < q_len) & mask_d
        if TMA:
            where = [row.to(tl.int32), head.to(tl.int32), start_m, 0]
            q = q_desc.load(where).reshape(BLOCK_M, BLOCK_D)
            base = base_desc.load(where).reshape(BLOCK_M, BLOCK_D)
        else:
            q = tl.load(_tile(query_ptr, QUERY_STRIDES, row, head, offs_m, offs_d), mask=mask_md, other=0.0)
            base = tl.load(_tile(base_ptr, BASE_STRIDES, row, head, offs_m, offs_d), mask=mask_md, other=0.0)
        q = q.to(key_ptr.dtype.element_ty)  # (BLOCK_M, BLOCK_D)
        factor, _ = _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH)
        if ONE_BLOCK:
            s = _scores(q, k, scale_log2, mask_p)
            _, shift, _ = _rescale(tl.full((BLOCK_M,), float("-inf"), tl.float32), s)
            p = tl.exp2(s - shift[:, None])
            l_i = tl.sum(p, axis=1)
            # p is at most 1, so rounding it to the dtype of v costs less than rounding the result
            acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            l_i = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for start in range(0, prefix_len, BLOCK_P):
                kn, vn, mask_n = _prefix_block(
                    k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d
                )
                s = _scores(q, kn, scale_log2, mask_n)
                m_i, shift, alpha = _rescale(m_i, s)
                p = tl.exp2(s - shift[:, None])
                l_i = l_i * alpha + tl.sum(p, axis=1)
                acc = tl.dot(p.to(vn.dtype), vn, acc * alpha[:, None], input_precision="ieee")
        out = (base.to(tl.float32) + acc * (factor / l_i)[:, None]).to(base.dtype)
        # a choice, not a product with zero: it keeps the bits of base, and Inf or NaN in the prefix out of them
        out = tl.where(factor != 0.0, out, base)
        if TMA:
            out_desc.store(where, out.reshape(1, 1, BLOCK_M, BLOCK_D))
        else:
            tl.store(_tile(out_ptr, OUT_STRIDES, row, head, offs_m, offs_d), out, mask=mask_md)


def gated_prefix_forward(
    base: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor,
    row_ids: Tensor | None, softmax_scale: float, gate_fn: str,
) -> Tensor:  # fmt: skip
    """``base`` plus the gated prefix term, in the dtype and strides of ``base``.

    Args: layouts of the module docstring; fp32, bf16 or fp16 activations, the prefix in that dtype or fp32, gate
        fp32, row_ids int32 ``(batch,)``. A row whose id is outside ``[-1, num_prefixes)`` comes back as NaN.
    Raises:
        TypeError: fp64, or bf16 under the interpreter.
        ValueError: tensors on a device Triton cannot reach, ``head_dim`` above 256, an unknown ``gate_fn``.
    """
    check(query, gate_fn)
    out = torch.empty_like(base)
    if out.numel() == 0:
        return out
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, prefix_len = prefix_key.shape[1:3]
    arch = target.arch(query)
    tiles = config(arch, head_dim, prefix_len, query.dtype, prefix_key.dtype, "forward")
    visits = num_heads // num_kv_heads * triton.cdiv(q_len, tiles.block_m)
    visits_per_run = _visits_per_run(arch, batch * num_kv_heads, visits)
    runs = triton.cdiv(visits, visits_per_run)
    tma = tiles.tma and visits >= MIN_TMA_VISITS and all(_reached_by_tma(x) for x in (out, base, query))
    with torch.cuda.device_of(query):
        if tma:
            _provide_scratch()
        _gated_prefix_fwd_kernel[(batch * num_kv_heads * runs,)](
            out_ptr=out, base_ptr=base, OUT_STRIDES=out.stride(), BASE_STRIDES=base.stride(),
            batch=batch, runs=runs, visits_per_run=visits_per_run, TMA=tma,
            STAGES=tiles.num_stages,
            **operands(query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn, tiles),
        )  # fmt: skip
    return out


def _visits_per_run(arch: str, heads: int, visits: int) -> int:
    """Query tiles that one program walks over: as many programs as the device holds at once, in one wave."""
    runs = max(1, PROGRAMS_PER_PROCESSOR.get(arch, 4) * PROCESSORS.get(arch, 128) // heads)
    return triton.cdiv(visits, min(runs, visits))


def _reached_by_tma(x: Tensor) -> bool:
    """Whether the hardware can address ``x``: dense innermost, all else in steps of 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    dense = x.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)
    return dense and x.data_ptr() % 16 == 0


def _provide_scratch() -> None:
    """Descriptors made on a device live in memory that Triton asks the caller for; an allocator set by others stays.

    At every launch, because the setting is one per thread.
    """
    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """On the current device, which is the one that is launched on."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
