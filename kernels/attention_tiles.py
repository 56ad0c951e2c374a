"""Tiles of the single-pass attention kernels: one small table, filled by what they compile to, no autotuning.

``fastadapter bench audit`` shows registers, spills and matrix instructions of its cases. Nothing here depends on batch
or sequence lengths: a row or a packed sequence has the same bits alone and in any batch.
"""

from typing import NamedTuple

import torch
from fastadapter.kernels.gated_prefix_tiles import block_d


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
