"""What the two attention ops share: argument checks, and the options in the form the registered ops take."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapter.ops import checks

# The tail of the attention ops' schemas, in order; gate_fn is the gated op's own.
OPTIONS_SCHEMA = (
    "Tensor? attn_mask, Tensor? cu_seqlens, Tensor? row_ids, float softmax_scale,{gate_fn} bool is_causal, "
    "int window, float softcap"
)
QUERY_AXES = "(batch, num_heads, q_len, head_dim)"
BANK_AXES = "(num_prefixes, num_kv_heads, prefix_len, head_dim)"


class Options(NamedTuple):
    """Checked and normalised: no window is 0, no soft cap is 0.0, a mask has its four dimensions."""

    attn_mask: Tensor | None
    cu_seqlens: Tensor | None
    row_ids: Tensor | None
    softmax_scale: float
    is_causal: bool
    window: int
    softcap: float

    def gated(self, gate_fn: str) -> tuple:
        """In the order of the gated op's schema."""
        return (*self[:4], gate_fn, *self[4:])


def reference_options(
    attn_mask, cu_seqlens, row_ids, softmax_scale, is_causal, window, softcap
) -> dict[str, Any]:
    """The schema's options as keywords of a reference."""
    return {
        "attn_mask": attn_mask,
        "cu_seqlens": cu_seqlens,
        "row_ids": row_ids,
        "softmax_scale": softmax_scale,
        "is_causal": is_causal,
        "window": window or None,
        "softcap": softcap or None,
    }


@checks.once(tensors=5)
def check_operands(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, op: str
) -> None:
    """Types, shapes, dtypes and devices of the five operands."""
    checks.require_tensor(
        op, query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value
    )
    axes = "(batch, num_kv_heads, kv_len, head_dim)"
    checks.require_dims(op, "query", query, QUERY_AXES)
    checks.require_dims(op, "key", key, axes)
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    checks.require_shape(op, "key", key, axes, (batch, num_kv_heads, kv_len, head_dim))
    checks.require_shape(op, "value", value, "the shape of key", tuple(key.shape))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{op}: num_heads of query must be a multiple of num_kv_heads of key, got {num_heads} and {num_kv_heads}"
        )
    checks.require_dtype(op, "query", query, checks.ACTIVATION_DTYPES)
    checks.require_dtype(op, "key", key, (query.dtype,))
    checks.require_dtype(op, "value", value, (query.dtype,))
    checks.require_same_device(op, query.device, key=key, value=value)
    check_prefix(op, query, num_kv_heads, prefix_key, prefix_value)


def check_prefix(op: str, query: Tensor, num_kv_heads: int, prefix_key: Tensor, prefix_value: Tensor) -> None:
    """A bank of prefixes with ``num_kv_heads`` beside a query that was checked."""
    checks.require_dims(op, "prefix_key", prefix_key, BANK_AXES)
    num_prefixes, _, prefix_len, _ = prefix_key.shape
    expected = (num_prefixes, num_kv_heads, prefix_len, query.shape[3])
    checks.require_shape(op, "prefix_key", prefix_key, BANK_AXES, expected)
    checks.require_shape(op, "prefix_value", prefix_value, "the shape of prefix_key", expected)
    if num_kv_heads == 0 or query.shape[1] % num_kv_heads:
        raise ValueError(
            f"{op}: num_heads of query must be a multiple of num_kv_heads of prefix_key, "
            f"got {query.shape[1]} and {num_kv_heads}"
        )
    if 0 in (num_prefixes, prefix_len, query.shape[3]):
        raise ValueError(
            f"{op}: num_prefixes, prefix_len and head_dim must be at least 1, got prefix_key {expected}"
        )
    checks.require_prefix_dtype(op, query.dtype, prefix_key, prefix_value)
    checks.require_same_device(op, query.device, prefix_key=prefix_key, prefix_value=prefix_value)


def check_options(
    op: str,
    query: Tensor,
    key: Tensor,
    num_prefixes: int,
    *,
    is_causal: bool,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float | None,
    row_ids: Tensor | None,
) -> Options:
    """The options that both ops take; the operands were checked before."""
    batch, num_heads, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal must be a bool, got {type(is_causal).__name__}")
    if attn_mask is not None:
        attn_mask = _expanded_mask(op, query, attn_mask, (batch, num_heads, q_len, kv_len))
        if is_causal:
            raise ValueError(f"{op}: attn_mask must be None with is_causal=True, got a mask as well")
        if cu_seqlens is not None:
            raise ValueError(f"{op}: attn_mask must be None with cu_seqlens, got a mask as well")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"{op}: window must be an int or None, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"{op}: window must be at least 1, got {window}")
        if window >= 2**63:
            raise ValueError(f"{op}: window must be below 2^63, got {window}")
        if not is_causal:
            raise ValueError(f"{op}: window needs is_causal=True, got is_causal=False")
    rows, axes = batch, "(batch,)"
    if cu_seqlens is not None:
        require_cu_seqlens(op, cu_seqlens, query, kv_len)
        rows, axes = cu_seqlens.shape[0] - 1, "(num_seqs,)"
    checks.require_row_ids(op, row_ids, rows, num_prefixes, axes)
    checks.require_same_device(op, query.device, attn_mask=attn_mask, cu_seqlens=cu_seqlens, row_ids=row_ids)
    return Options(
        attn_mask,
        cu_seqlens,
        row_ids,
        checks.scale_or_default(op, softmax_scale, head_dim),
        is_causal,
        window or 0,
        checks.softcap_or_zero(op, softcap),
    )


def require_cu_seqlens(op: str, cu_seqlens: Tensor, query: Tensor, kv_len: int) -> None:
    """Offsets of packed sequences; their values are checked on a CPU, where reading them stalls nothing."""
    batch, _, q_len, _ = query.shape
    checks.require_tensor(op, cu_seqlens=cu_seqlens)
    checks.require_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must be (num_seqs + 1,), got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"{op}: with cu_seqlens, query must have batch 1, got {batch}")
    if q_len != kv_len:
        raise ValueError(f"{op}: with cu_seqlens, key must have kv_len {q_len} like q_len, got {kv_len}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != q_len or any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"{op}: cu_seqlens must ascend from 0 to q_len {q_len}, got {_shortened(ends)}")


def _expanded_mask(op: str, query: Tensor, attn_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    checks.require_tensor(op, attn_mask=attn_mask)
    checks.require_dtype(op, "attn_mask", attn_mask, (torch.bool, query.dtype, torch.float32))
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: attn_mask is not differentiable, got one that requires a gradient")
    sizes = tuple(attn_mask.shape)
    missing = len(shape) - len(sizes)
    if missing < 0 or any(size not in (1, full) for size, full in zip(sizes, shape[missing:])):
        raise ValueError(
            f"{op}: attn_mask must broadcast to (batch, num_heads, q_len, kv_len) = {shape}, got {sizes}"
        )
    return attn_mask.expand(shape)


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ... {values[-1]}]"
