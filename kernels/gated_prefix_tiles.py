"""What the gated prefix kernels share: device helpers, the table of tiles, and the checks before a launch."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LENGTHS = ["num_prefixes", "num_heads", "num_kv_heads", "q_len", "prefix_len"]
# Multiprocessors (compute units on AMD) of the chips in the tables.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# An option that only NVIDIA's compiler has, at the most that a thread can address.
ALL_REGISTERS = {"maxnreg": 255}


@triton.jit
def _tanh(x):
    """tanh to about one ulp: the exponential alone would cancel where gates start, near zero."""
    z = x * x
    series = -0.0057049901224672794
    series = series * z + 0.02063908986747265
    series = series * z + -0.05373971536755562
    series = series * z + 0.13331441581249237
    series = series * z + -0.3333328068256378
    tail = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    tail = tl.where(x < 0, -tail, tail)
    return tl.where(tl.abs(x) < 0.625, x + x * z * series, tail)


@triton.jit
def _row_entry(row_ids_ptr, row, num_prefixes, HAS_ROW_IDS: tl.constexpr):
    """The id of a batch row, and the bank entry it may read: entry 0 stands in where the id names none."""
    row_id = tl.zeros((), tl.int64)
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row).to(tl.int64)
    entry = tl.where((row_id >= 0) & (row_id < num_prefixes), row_id, 0)
    return row_id, entry


@triton.jit
def _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH: tl.constexpr):
    """The factor f(gate) of one row and head, and f'(gate)."""
    gate = tl.load(gate_ptr + entry * GATE_STRIDES[0] + head * GATE_STRIDES[1])
    gate = tl.where(row_id == -1, 0.0, gate)
    # A device cannot raise, so an id outside the bank has to show in the result.
    gate = tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), gate)
    factor = gate
    slope = tl.full((), 1.0, tl.float32)
    if TANH:
        factor = _tanh(gate)
        slope = 1.0 - factor * factor
    return factor, slope


@triton.jit
def _tile(ptr, STRIDES, row, head, offs_m, offs_d):
    """Pointers (BLOCK_M, BLOCK_D) into a 4-d tensor."""
    return (ptr + row * STRIDES[0] + head * STRIDES[1]) + (
        offs_m[:, None] * STRIDES[2] + offs_d[None, :] * STRIDES[3]
    )


@triton.jit
def _prefix_block(k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d):
    """Keys and values (BLOCK_P, BLOCK_D) from position ``start`` on, zero past the end, and the mask."""
    mask_p = start + tl.arange(0, k_ptrs.shape[0]) < prefix_len
    mask = mask_p[:, None] & mask_d
    first = tl.zeros((), tl.int64) + start
    k = tl.load(k_ptrs + first * KEY_STRIDES[2], mask=mask, other=0.0)
    v = tl.load(v_ptrs + first * VALUE_STRIDES[2], mask=mask, other=0.0)
    return k, v, mask_p


@triton.jit
def _scores(q, k, scale_log2, mask_p):
    """softmax_scale * Q Kp^T in units of log 2, (BLOCK_M, BLOCK_P)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    # padded prefix positions must not enter the normaliser
    return tl.where(mask_p[None, :], s, float("-inf"))


@triton.jit
def _running_max(m_i, s):
    """The next running maximum, and a finite stand-in for it to subtract."""
    m_new = tl.maximum(m_i, tl.max(s, axis=1))
    return m_new, tl.where(m_new == float("-inf"), 0.0, m_new)


@triton.jit
def _rescale(m_i, s):
    """:func:`_running_max` of scores in units of log 2, and the factor for earlier sums."""
    m_new, shift = _running_max(m_i, s)
    return m_new, shift, tl.exp2(m_i - shift)


class Tiles(NamedTuple):
    """``BLOCK_M`` query positions by ``BLOCK_P`` prefix positions per step, and how a launch runs them.

    ``all_registers`` gives every thread what it asks for: ptxas by itself holds a kernel to a round number of programs
    per multiprocessor, even where a few values have to go to memory and back for it.
    """

    block_m: int
    block_p: int
    num_warps: int
    num_stages: int
    tma: bool = False
    all_registers: bool = False


def config(
    arch: str, head_dim: int, prefix_len: int, activation: torch.dtype, prefix: torch.dtype, launch: str
) -> Tiles:
    """The tiles of one launch: "forward"; "backward" of a prefix of one block; "backward-query" and then
    "backward-prefix" of a longer one. ``block_m`` is the same in all of backward.

    Filled by what the kernels compile to, ahead of time: no spills, and the most bytes in flight. Fewer than 64
    rows and, where dKp and dVp are summed, fewer than 64 prefix positions keep Hopper on ``mma.sync``. fp32 products
    run on vector units with a whole row of head_dim per thread, so their tiles are smaller.
    """
    nvidia = arch.startswith("sm_")
    # four wavefronts of AMD's have 512 registers per lane, which rows of 256 fill
    four = not nvidia and head_dim > 128 and launch != "forward"
    if prefix == torch.float32:
        block_p = 8 if head_dim > 128 and nvidia else 16  # AMD's matrix units take fp32, 16 at a time
        if prefix_len <= block_p:
            num_stages = 3 if head_dim <= 64 or activation == torch.float32 else 2
        else:
            num_stages = 2 if head_dim > 128 and launch != "backward-prefix" else 1
        if launch == "forward" and head_dim <= 64:
            num_stages = max(num_stages, 2)
        ampere_query = arch == "sm_80" and head_dim > 128 and launch == "backward-query"
        # 128 scores, a thread each
        four |= nvidia and head_dim > 128 and launch == "backward-query" and not ampere_query
        all_registers = ampere_query or (
            arch == "sm_80" and head_dim <= 64 and launch == "backward" and activation != prefix
        )
        num_warps = 4 if head_dim <= 64 or four else 8
        return Tiles(16, block_p, num_warps, num_stages, all_registers=all_registers)
    if launch == "forward":
        # keys and values of the whole prefix stay in shared memory over a program's run of tiles
        largest = 32 if not nvidia else 64 if head_dim > 128 else 128
        block_p = min(largest, max(16, triton.next_power_of_2(prefix_len)))
        tma = nvidia and int(arch[3:]) >= 90
        return Tiles(32, block_p, 8 if head_dim > 128 else 4, 3 if nvidia else 2, tma)
    block_p = 32 if prefix_len > 16 and head_dim <= 128 else 16
    if launch == "backward-query":
        # dS is the left operand of its only product, so its columns may be 64
        wide = head_dim <= 128 and nvidia
        num_warps = 8 if (head_dim > 64 or prefix_len > 64) and not four else 4
        crowded = arch == "sm_100" and head_dim > 128
        return Tiles(32, 64 if wide else 16, num_warps, 1 if crowded else 2, all_registers=crowded)
    num_warps = 8 if head_dim > 128 and not four else 4
    if launch == "backward":
        padded = head_dim < min(block_d(head_dim), 64)  # its masks are kept over the run
        return Tiles(32, block_p, num_warps, 2, all_registers=nvidia and padded)
    crowded = head_dim <= 32 or head_dim > 128 or arch == "sm_80"
    return Tiles(32, block_p, num_warps, 1, all_registers=nvidia and crowded)


def operands(query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn, tiles: Tiles) -> dict:
    """What the forward and backward kernels have in common."""
    num_prefixes, num_kv_heads, prefix_len, head_dim = prefix_key.shape
    return {
        "query_ptr": query, "key_ptr": prefix_key, "value_ptr": prefix_value, "gate_ptr": gate, "row_ids_ptr": row_ids,
        "QUERY_STRIDES": query.stride(), "KEY_STRIDES": prefix_key.stride(), "VALUE_STRIDES": prefix_value.stride(),
        "GATE_STRIDES": gate.stride(), "softmax_scale": softmax_scale, "num_prefixes": num_prefixes,
        "num_heads": query.shape[1], "num_kv_heads": num_kv_heads, "q_len": query.shape[2], "prefix_len": prefix_len,
        "HEAD_DIM": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_P": tiles.block_p, "BLOCK_D": block_d(head_dim),
        "HAS_ROW_IDS": row_ids is not None, "TANH": gate_fn == "tanh", "ONE_BLOCK": prefix_len <= tiles.block_p,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
        **(ALL_REGISTERS if tiles.all_registers else {}),
    }  # fmt: skip


def block_d(head_dim: int) -> int:
    """head_dim padded to what ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(head_dim))


def check(query: Tensor, gate_fn: str) -> None:
    op = "gated_prefix (Triton)"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: query must be fp32, bf16 or fp16, got {query.dtype}")
    interpreted = not isinstance(_tanh, triton.JITFunction)
    if interpreted and query.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: query must be fp32 or fp16 under TRITON_INTERPRET=1 (bf16 is wrong there), got bf16"
        )
    if not interpreted and query.device.type == "cpu":
        raise ValueError(f"{op}: query must be on a GPU (or set TRITON_INTERPRET=1), got cpu")
    if query.shape[-1] > 256:
        raise ValueError(f"{op}: head_dim must be at most 256, got {query.shape[-1]}")
    if gate_fn not in ("tanh", "identity"):
        raise ValueError(f"{op}: gate_fn must be 'tanh' or 'identity', got {gate_fn!r}")
