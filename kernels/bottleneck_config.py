"""Routes and tiles of the bottleneck kernels: tables by architecture, dtypes and sizes alone, never by data.

Not measured yet: chosen so that every kernel compiles without spills (benchmarks/audit.py) for sm_80, sm_90,
sm_100 and gfx942.
"""

import torch
import triton

# The largest bottleneck_size of the one-kernel form, after padding to a power of two.
FUSED_SIZE = 64


def config(arch: str, weight: torch.dtype, hidden_size: int, bottleneck_size: int, seq_len: int) -> dict:
    """Route (``fused``: one kernel) and tiles of the forward.

    ``seq_len`` may choose, the batch size may not: a row has to have the same bits alone and in a batch. Decoding
    steps of large layers take two kernels, since one program would have to read all weights of a row alone.
    """
    block_r = max(16, triton.next_power_of_2(bottleneck_size))
    few = seq_len <= 16
    fused = block_r <= FUSED_SIZE and not (few and hidden_size * block_r >= 2**17)
    wide = weight == torch.float32
    if not fused:
        block_r = 16 if few else min(block_r, 64 if wide else 128)
    return {
        "fused": fused, "BLOCK_M": 16 if few else 32, "BLOCK_R": block_r, "BLOCK_C": 32 if wide else 64,
        # an operand of a tf32x3 product is held in two parts
        "BLOCK_N": 32 if wide and fused else 64, "BLOCK_K": 32 if wide else 64, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def backward_config(arch: str, weight: torch.dtype, bottleneck_size: int) -> dict:
    """Launch options of the ``rows`` and the ``channels`` kernel."""
    wide, nvidia = weight == torch.float32, arch.startswith("sm_")
    # more columns at once would spill: an operand of a tf32x3 product is held in two parts, and accumulators of
    # CDNA take the registers of 64 lanes
    block_r = min(max(16, triton.next_power_of_2(bottleneck_size)), 128 if nvidia and not wide else 64)
    if wide:
        rows, channels = (32, 32, 8 if nvidia else 4, 2), (16, 32, 8 if nvidia else 4, 2)
    elif block_r == 128:
        rows, channels = (32, 32, 8, 3), (16, 32, 8, 2)
    else:
        rows, channels = (32, 64, 4, 3), (32, 32, 4, 2)

    def options(block_m, block_c, num_warps, num_stages):
        blocks = {"BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_C": block_c}
        return blocks | {"num_warps": num_warps, "num_stages": num_stages}

    found = {"rows": options(*rows), "channels": options(*channels)}
    if wide and nvidia:  # ptxas would rather spill than give up a program per multiprocessor
        found["rows"]["maxnreg"] = 255
    return found


def products(arch: str, weight: torch.dtype) -> str:
    """``input_precision`` of products with weights of this dtype; half operands ignore it."""
    # AMD's matrix units take fp32 as it is
    return "tf32x3" if weight == torch.float32 and arch.startswith("sm_") else "ieee"
