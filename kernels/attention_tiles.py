"""Tiles of the single-pass attention kernels: how they are loaded, and their sizes.

The sizes are one small table, filled by what the kernels compile to, no autotuning.

``fastadapter bench audit`` shows registers, spills and matrix instructions of its cases. Nothing here depends on batch
or sequence lengths: a row or a packed sequence has the same bits alone and in any batch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastadapter.kernels.gated_prefix_tiles import block_d
from torch import Tensor


class Tiles(NamedTuple):
    """What one launch is compiled with; ``precision`` is that of fp32 products.

    ``all_registers`` gives every thread what it asks for: ptxas by itself holds a kernel to a round number of programs
    per multiprocessor, even where a few values have to go to memory and back for it.
    """

    block_m: int
    block_n: int
    block_p: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"
    all_registers: bool = False


# (block_m, block_n, num_warps, num_stages) of half-precision kernels, for head_dim up to 64, 128 and 256
_FORWARD = ((64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 8, 1))
_FORWARD_ON = {
    "sm_80": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "sm_90": ((32, 64, 2, 2), (32, 64, 4, 2), (32, 32, 8, 1)),
    "sm_100": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
}
_SMALL = {
    "merge": ((32, 0, 4, 2), (32, 0, 4, 2), (32, 0, 8, 1)),
    "prefix": ((32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
    "keys": ((32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 1)),
    "query": ((32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 8, 1)),
}
_QUERY = ((64, 64, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1))
_ALL_REGISTERS = {("query", "sm_90", 0), ("query", "sm_100", 1)}  # 0, 1: place in the rows above


def config(kernel: str, arch: str, activation, prefix, head_dim: int, prefix_len: int) -> Tiles:
    """Tiles of "forward", "merge", "prefix", "keys" or "query" (:mod:`.attention_backward`) for two dtypes.

    All of Hopper stays on ``mma.sync``: fewer than 64 rows or four warps (:mod:`.attention` says why).
    """
    size = (head_dim > 64) + (head_dim > 128)
    nvidia = arch.startswith("sm_")
    if activation == torch.float32:  # exact products, on vector units, a row of head_dim per thread
        num_warps = 4 if size == 0 or kernel == "keys" else 8
        if size == 2:  # by what did not spill
            backward = kernel in ("prefix", "keys", "query")
            num_warps = 16 if nvidia and kernel == "prefix" else 8 if nvidia or not backward else 4
        num_stages = 2 if kernel == "keys" and size == 2 and not nvidia else 1
        return Tiles(
            16, 16, 16, num_warps, num_stages, all_registers=nvidia and kernel == "keys" and not size
        )
    if prefix == torch.float32 and kernel != "keys":  # the prefix likewise, beside matrix units
        if not nvidia and size == 2 and kernel in ("prefix", "query"):
            return Tiles(16, 16, 16, 4, 1)
        small = (arch, size) == ("sm_90", 2) if kernel == "query" else size or kernel != "forward"
        block_m = 16 if small else 32
        all_registers = nvidia and (kernel == "query" or (kernel == "prefix" and size == 2))
        return Tiles(block_m, 32, 16, 8, 1, all_registers=all_registers)
    if kernel == "forward":
        rows = _FORWARD_ON.get(arch, _FORWARD)
    elif (
        kernel == "query" and arch != "sm_90" and not (arch == "sm_80" and head_dim < block_d(head_dim) <= 64)
    ):
        rows = _QUERY  # on sm_80, the masks of a padded head_dim are what a tile of 64 has no registers for
    else:
        rows = _SMALL[kernel]
    block_m, block_n, num_warps, num_stages = rows[size]
    if not nvidia:  # 64 KiB of shared memory, and 512 registers for up to four wavefronts of 64
        num_warps, num_stages = min(num_warps, 4), 1
        block_m = 16 if kernel == "keys" and size == 2 else block_m
    block_p = 16 if prefix_len <= 16 or head_dim > 128 else 32
    all_registers = nvidia and (kernel == "prefix" or (kernel, arch, size) in _ALL_REGISTERS)
    return Tiles(block_m, block_n, block_p, num_warps, num_stages, all_registers=all_registers)


@triton.jit
def _rows(ptr, STRIDES, row, head, offs, offs_d):
    """Pointers (rows, BLOCK_D) into a 4-d tensor; offsets are 64-bit, a view may span more than 2^31 elements."""
    FACTOR: tl.constexpr = STRIDES[4]
    outer = row * STRIDES[0] + head * STRIDES[1]
    rows = offs.to(tl.int64)[:, None] * STRIDES[2]
    if FACTOR > 1:
        outer = tl.multiple_of(outer, FACTOR)
        rows = tl.multiple_of(rows, (FACTOR, FACTOR))
    return (ptr + outer) + (rows + offs_d[None, :] * STRIDES[3])


def row_strides(x: Tensor) -> tuple:
    """Strides of a 4-d tensor for ``_rows``, and the power of two that all but the last share.

    Triton looks for 16 by itself. Rows of head_dim 40 share 8, which is enough for 16-byte loads of half precision;
    loaded element by element, their addresses would not fit into the registers.
    """
    shared = math.gcd(16, *x.stride()[:3])
    return *x.stride(), tl.constexpr(shared if shared < 16 else 1)


@triton.jit
def _load(ptrs, mask, mask_d, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A tile of rows; padding is zero. ``mask`` counts only where MASKED."""
    if MASKED:
        x = tl.load(ptrs, mask=mask[:, None] & mask_d, other=0.0)
    elif ptrs.shape[1] != HEAD_DIM:
        x = tl.load(ptrs, mask=mask_d, other=0.0)
    else:
        x = tl.load(ptrs)
    return x
