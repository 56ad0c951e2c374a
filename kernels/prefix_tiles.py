"""What the kernels of a prefix beside another attention share: device helpers, the table of tiles, the checks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes that change from call to call: not worth a compilation each.
LENGTHS = ["num_prefixes", "num_heads", "num_kv_heads", "q_len", "prefix_len"]
# Multiprocessors (compute units on AMD) of the chips in the tables.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# What a kernel does with the prefix term: the factor of the gate by which it is added, or a shared softmax.
FORMS = ("tanh", "identity", "merge")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
def _factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, FORM: tl.constexpr):
    """By what the term of one row and head is multiplied: f(gate), or 1 in a shared softmax; 0 without an adapter.

    A device cannot raise, so an id outside the bank has to show in the result: its factor is NaN.
    """
    if FORM == "merge":
        factor = tl.full((), 1.0, tl.float32)
    else:
        factor = tl.load(gate_ptr + entry * GATE_STRIDES[0] + head * GATE_STRIDES[1])
        if FORM == "tanh":
            factor = _tanh(factor)
    factor = tl.where(row_id == -1, 0.0, factor)
    return tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), factor)


@triton.jit
def _tile(ptr, STRIDES, row, head, offs_m, offs_d):
    """Pointers (BLOCK_M, BLOCK_D) into a 4-d tensor; ``head`` is one, or one per row of the tile."""
    offs_row = row * STRIDES[0] + head * STRIDES[1] + offs_m * STRIDES[2]
    return ptr + offs_row[:, None] + (offs_d * STRIDES[3])[None, :]


@triton.jit
def _prefix_block(k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d, DTYPE: tl.constexpr):
    """Keys and values (BLOCK_P, BLOCK_D) from position ``start`` on, zero past the end, and the mask.

    fp32 masters beside half-precision activations are rounded here, as autocast rounds them.
    """
    mask_p = start + tl.arange(0, k_ptrs.shape[0]) < prefix_len
    mask = mask_p[:, None] & mask_d
    first = tl.zeros((), tl.int64) + start
    k = tl.load(k_ptrs + first * KEY_STRIDES[2], mask=mask, other=0.0).to(DTYPE)
    v = tl.load(v_ptrs + first * VALUE_STRIDES[2], mask=mask, other=0.0).to(DTYPE)
    return k, v, mask_p


@triton.jit
def _scores(q, k, softmax_scale, softcap, mask_p, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """softmax_scale * Q Kp^T, capped, (BLOCK_M, BLOCK_P), and the derivative of the cap.

    In natural log, as ``lse`` is: in units of log 2 it would be rounded on its way out and in again, which at scores
    of 1e4 moves probabilities by 1e-3.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * softmax_scale
    slope = tl.full(s.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        t = _tanh(s / softcap)
        s = t * softcap
        slope = 1.0 - t * t
    # padded prefix positions must not enter the normaliser
    return tl.where(mask_p[None, :], s, float("-inf")), slope


@triton.jit
def _running_max(m_i, s):
    """The next running maximum, a finite stand-in for it to subtract, and the factor for earlier sums."""
    m_new = tl.maximum(m_i, tl.max(s, axis=1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, shift, tl.exp(m_i - shift)


class Tiles(NamedTuple):
    """``BLOCK_M`` query positions by ``BLOCK_P`` prefix positions per step, and how a launch runs them.

    ``programs`` share a multiprocessor: as many as its registers and shared memory hold, so that all of a grid of
    that size run at once.
    """

    block_m: int
    block_p: int
    num_warps: int
    num_stages: int
    programs: int
    max_registers: int = 0


def config(arch: str, head_dim: int, prefix_len: int, dtype: torch.dtype, launch: str, q_len: int) -> Tiles:
    """The tiles of one launch: "forward" or "merge"; "backward" of a prefix of one block; "backward-query" and then
    "backward-prefix" of a longer one. ``block_m`` is the same in all of backward.

    From what the kernels compile to (no spills) and what was measured on an H200 (benchmarks/results/gpu.jsonl). Fewer
    than 64 rows and, where dKp and dVp are summed, fewer than 64 prefix positions keep Hopper on ``mma.sync``. More
    programs than the device holds at once even out the last wave.
    """
    nvidia, wide = arch.startswith("sm_"), head_dim > 128
    if launch in ("forward", "merge"):
        if dtype == torch.float32:
            return Tiles(16, 16, 8 if prefix_len > 16 and head_dim > 64 else 4, 1, 8)
        largest = 128 if nvidia and not wide else 32
        block_p = min(largest, max(16, triton.next_power_of_2(prefix_len)))
        if q_len < 16:  # a token of each head: one short tile per program, as many programs at once as fit
            return Tiles(16, block_p, 8 if wide or block_p > 64 else 2, 1, 16)
        if launch == "merge" and block_p == 16 and not wide and nvidia:
            return Tiles(16, 16, 2, 3, 6)
        return Tiles(32, block_p, 8 if wide else 4, 3 if nvidia else 2, 8)
    if (
        dtype == torch.float32
    ):  # two accumulators beside operands of three parts each would spill: never one launch
        return Tiles(16, 0 if launch == "backward" else 16, 4, 1, 2)
    block_p = 32 if prefix_len > 16 and not wide else 16
    if launch == "backward-query":
        return Tiles(16, 16 if wide or not nvidia else 32, 4, 2, 3)
    if launch == "backward" and block_p == 16 and not wide:
        return Tiles(16, 16, 2, 3, 4)
    # ptxas would rather spill there than give up a program per multiprocessor
    return Tiles(16, block_p, 8 if wide else 4, 2, 3, 255 if arch == "sm_100" and block_p == 32 else 0)


def operands(query, prefix_key, gate, row_ids, softmax_scale, softcap, form, tiles, arch) -> dict:
    """What the forward and backward kernels have in common, but for pointers."""
    num_prefixes, num_kv_heads, prefix_len, head_dim = prefix_key.shape
    return {
        "QUERY_STRIDES": query.stride(), "KEY_STRIDES": prefix_key.stride(),
        "GATE_STRIDES": (0, 0) if gate is None else gate.stride(), "softmax_scale": softmax_scale, "softcap": softcap,
        "num_prefixes": num_prefixes, "num_heads": query.shape[1], "num_kv_heads": num_kv_heads,
        "q_len": query.shape[2], "prefix_len": prefix_len,
        "HEAD_DIM": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_P": tiles.block_p, "BLOCK_D": block_d(head_dim),
        "HAS_ROW_IDS": row_ids is not None, "HAS_SOFTCAP": softcap > 0, "FORM": form, "PRECISION": precision(arch),
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
        **({"maxnreg": tiles.max_registers} if tiles.max_registers else {}),
    }  # fmt: skip


def precision(arch: str) -> str:
    """``input_precision`` of fp32 products; half operands ignore it.

    Six products of bf16 parts keep 2^-24 and run on matrix units (three of tf32 keep 2^-21, too little for a gate,
    whose gradient is one sum over all positions); AMD's take fp32 as it is, and the interpreter knows nothing else.
    """
    return "bf16x6" if arch.startswith("sm_") and not interpreted() else "ieee"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return not isinstance(_tanh, triton.JITFunction)


def block_d(head_dim: int) -> int:
    """head_dim padded to what ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(head_dim))


def check(op: str, query: Tensor, form: str) -> None:
    op = f"{op} (Triton)"
    if query.dtype not in DTYPES:
        raise TypeError(f"{op}: query must be fp32, bf16 or fp16, got {query.dtype}")
    if interpreted() and query.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: query must be fp32 or fp16 under TRITON_INTERPRET=1 (bf16 is wrong there), got bf16"
        )
    if not interpreted() and query.device.type == "cpu":
        raise ValueError(f"{op}: query must be on a GPU (or set TRITON_INTERPRET=1), got cpu")
    if query.shape[-1] > 256:
        raise ValueError(f"{op}: head_dim must be at most 256, got {query.shape[-1]}")
    if form not in FORMS:
        raise ValueError(f"{op}: gate_fn must be 'tanh' or 'identity', got {form!r}")
