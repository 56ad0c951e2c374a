"""What the bottleneck kernels share: entries of a bank, pointers, scratch, checks, products of the library."""

import torch
import triton
import triton.language as tl
from fastadapter.kernels.activation import ACTIVATIONS
from torch import Tensor

# Sizes that change from call to call: not worth a compilation each.
LENGTHS = ["seq_len", "num_adapters"]
NORMS = ("none", "layer_norm", "rms_norm")
# Rows of the scratch tensors between two kernels start on 16 elements, so that they load 128 bits at a time.
SCRATCH_ALIGNMENT = 16


@triton.jit
def _row_entry(row_ids_ptr, row, num_adapters, HAS_ROW_IDS: tl.constexpr):
    """The bank entry of a batch row (0 where its id names none), whether there is one, and whether the id is out of
    the bank: a device cannot raise, so such a row becomes NaN.
    """
    row_id = tl.zeros((), tl.int64)
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row).to(tl.int64)
    adapted = (row_id >= 0) & (row_id < num_adapters)
    return tl.where(adapted, row_id, 0), adapted, (row_id < -1) | (row_id >= num_adapters)


@triton.jit
def _tile(ptr, STRIDES, row, offs_m, offs_c):
    """Pointers (BLOCK_M, BLOCK_C) into one row of a (batch, seq, hidden) tensor, or one entry of a bank of matrices."""
    return (ptr + row * STRIDES[0]) + (offs_m * STRIDES[1])[:, None] + (offs_c * STRIDES[2])[None, :]


@triton.jit
def _vector(ptr, STRIDES, entry, offs, mask, PRESENT: tl.constexpr):
    """One entry of a bank of vectors in fp32, zero where the argument is absent."""
    if PRESENT:
        v = tl.load(ptr + entry * STRIDES[0] + offs * STRIDES[1], mask=mask, other=0.0).to(tl.float32)
    else:
        v = tl.zeros(offs.shape, tl.float32)
    return v


def check(x: Tensor, activation: str, norm: str, *norm_vectors: Tensor | None) -> None:
    """What the kernels cannot do, said before anything is launched."""
    op = "bottleneck (Triton)"
    interpreted = not isinstance(_row_entry, triton.JITFunction)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x must be fp32, bf16 or fp16, got {x.dtype}")
    if interpreted and x.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: x must be fp32 or fp16 under TRITON_INTERPRET=1 (bf16 is wrong there), got bf16"
        )
    if not interpreted and x.device.type == "cpu":
        raise ValueError(f"{op}: x must be on a GPU (or set TRITON_INTERPRET=1), got cpu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "none" and any(vector is not None for vector in norm_vectors):
        raise ValueError(f"{op}: norm_weight and norm_bias need a norm, got norm 'none'")


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``; triton.cdiv is made for kernels, too, and takes a microsecond or two."""
    return -(-size // block)


def padded(size: int) -> int:
    """The length of a scratch row that holds ``size`` elements."""
    return blocks(size, SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


def power_of_2(size: int) -> int:
    """The smallest that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides for a signature: zeros stand for a tensor that is absent."""
    return (0,) * dims if tensor is None else tensor.stride()


def flat(x: Tensor) -> Tensor:
    """``(1, rows, hidden)``: a view where the strides of ``(batch, seq, hidden)`` have one."""
    return x.reshape(1, -1, x.shape[-1])


def lies_flat(x: Tensor) -> bool:
    """Whether :func:`flat` is a view, so that a kernel may take ``x`` itself by the strides of the view."""
    return flat(x).data_ptr() == x.data_ptr()


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without a call where it is that already."""
    return x if x.dtype is dtype else x.to(dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` by the library, summed in fp32 and rounded once, to ``dtype``."""
    if (
        a.device.type == "cpu"
    ):  # of the interpreter, where half products are slow and fp32 results have no kernel
        found = torch.mm(a.float(), b.float())
        return (found if bias is None else found + bias).to(dtype)
    if bias is not None:
        return torch.addmm(bias, a, b)
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.device.type == "cuda" and not torch.version.hip:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)  # ROCm has no such product
