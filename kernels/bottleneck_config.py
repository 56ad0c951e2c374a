"""Tiles of the bottleneck kernels: tables by architecture, dtype and sizes alone, never by data.

Chosen so that every kernel compiles without spills for sm_80, sm_90, sm_100 and gfx942 (benchmarks/audit).
"""

import torch
from fastadapter.kernels.bottleneck_tiles import power_of_2
from fastadapter.kernels.prefix_tiles import PROCESSORS

# The largest bottleneck_size whose block of U stays on chip while a program walks over rows.
RESIDENT_SIZE = 256
# Launch options of the wide kernel by the padded bottleneck_size, half precision on NVIDIA:
# rows and channels of a tile, warps, stages, programs that share a multiprocessor.
WIDE = {
    16: (32, 128, 4, 3, 4),
    32: (32, 128, 4, 3, 4),
    64: (32, 128, 4, 3, 3),
    128: (32, 128, 8, 3, 2),
    256: (32, 64, 4, 2, 2),
}
# Where a program may have more than 100 KiB of shared memory. On sm_90 a product of 64 rows runs on wgmma, which is
# safe here, as both operands come from shared memory.
WIDE_LARGE = {
    "sm_80": {256: (32, 128, 4, 2, 1)},
    "sm_90": {256: (64, 128, 4, 3, 1)},
    "sm_100": {256: (32, 128, 4, 2, 2)},
}


def wide_config(arch: str, dtype: torch.dtype, size: int, seq_len: int) -> dict:
    """Launch options of the kernel that is as wide as the hidden states, and its ``programs`` per multiprocessor."""
    block_k = max(16, power_of_2(size))
    if dtype == torch.float32:
        # an operand of a tf32x3 product is held in two parts
        block_k = min(block_k, 64)
        block_m, block_n, num_warps, num_stages, programs = 16, 64, 4, 2, 2
    elif not arch.startswith("sm_"):
        block_k = min(block_k, 128)
        block_m, block_n, num_warps, num_stages, programs = 32, 64, 4, 2, 2
    elif block_k > RESIDENT_SIZE:
        block_k = 64
        block_m, block_n, num_warps, num_stages, programs = 32, 128, 4, 3, 3
    else:
        table = WIDE | WIDE_LARGE.get(arch, {})
        block_m, block_n, num_warps, num_stages, programs = table[block_k]
    if seq_len <= 16:
        block_m = 16
    found = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps,
        "num_stages": num_stages, "programs": programs * PROCESSORS.get(arch, 128),
    }  # fmt: skip
    if arch.startswith("sm_"):  # so that as many programs fit as the grid is made for
        found["maxnreg"] = min(255, 65536 // (programs * num_warps * 32) // 8 * 8)
    return found


def narrow_config(arch: str, dtype: torch.dtype, size: int, seq_len: int) -> dict:
    """Launch options of the products that end in ``bottleneck_size`` columns, of calls with row ids."""
    fp32, few = dtype == torch.float32, seq_len <= 16
    block_r = max(16, power_of_2(size))
    block_r = 16 if few else min(block_r, 32 if fp32 else 64)
    return {
        "BLOCK_M": 16 if few else 32, "BLOCK_R": block_r, "BLOCK_C": 32 if fp32 else 64, "num_warps": 4,
        "num_stages": 2 if fp32 else 3,
    }  # fmt: skip


def weights_config(arch: str, dtype: torch.dtype, size: int) -> dict:
    """Launch options of the weight gradients of calls with row ids."""
    fp32 = dtype == torch.float32
    block_r = min(max(16, power_of_2(size)), 32 if fp32 else 64)
    return {"BLOCK_M": 32, "BLOCK_R": block_r, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}


def products(arch: str, dtype: torch.dtype) -> str:
    """``input_precision`` of products of this dtype; half operands ignore it."""
    # one tf32 product would lose digits of fp32; AMD's matrix units take fp32 as it is
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"
