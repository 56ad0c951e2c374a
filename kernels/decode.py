"""Attention for a few query positions over long keys, with a prefix: what a model does for every generated token.

    base = softmax(softmax_scale * Q K^T + mask) V                     over the keys, in splits
    gated:   out = base + f(gate_h) * softmax(softmax_scale * Q Kp^T) Vp     (LLaMA-Adapter, arXiv:2303.16199, eq. 6-8)
    shared:  out = softmax(softmax_scale * Q [Kp; K]^T + mask) [Vp; V]       (prefix tuning, arXiv:2101.00190)

Two launches. The first cuts the keys into splits, so that a batch of one fills the device: a program takes one split
of one row and kv head for all query heads of that head's group, which reads the cache once, and leaves the maximum
m, the normaliser l and the accumulator of its split in fp32. The second merges the splits of each query position in
their order and takes in the prefix of the row's own bank entry, where a kernel for the prefix alone would cost a
launch per layer and token.

Splits follow from the architecture and from shapes other than the batch, never from data: a captured graph can be
replayed over a static cache, and a row has the same bits alone and in a batch. Keys that no query of a tile sees are
not loaded, so the unwritten end of a static cache costs no traffic, and what it holds does not matter.

Inference only: nothing is saved for backward. Scores stay in natural units, so that a mask of the lowest finite
value, as transformers makes them, does not overflow to -inf.

Layouts: query, out ``(batch, num_heads, q_len, head_dim)``; key, value ``(batch, num_kv_heads, kv_len, head_dim)``;
attn_mask ``(batch, num_heads, q_len, kv_len)``; prefix_key, prefix_value ``(num_prefixes, num_kv_heads, prefix_len,
head_dim)``; gate ``(num_prefixes, num_heads)``; any strides.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import target
from fastadapter.kernels.gated_prefix_tiles import (
    PROCESSORS,
    _gate_factor,
    _prefix_block,
    _row_entry,
    _tanh,
    _tile,
    block_d,
)
from torch import Tensor

# More query positions than this keep the single-pass kernels busy by themselves.
MAX_Q_LEN = 16
SPLIT_LENGTHS = [
    "num_heads",
    "num_kv_heads",
    "q_len",
    "kv_len",
    "window",
    "split_len",
    "num_splits",
    "stats_plane",
]
MERGE_LENGTHS = [
    "num_prefixes",
    "num_heads",
    "num_kv_heads",
    "q_len",
    "prefix_len",
    "num_splits",
    "stats_plane",
]
# Splits that one step of the merge takes in together.
MERGE_SPLITS = 16
# A split shorter than this spends more on its partial result than on its keys.
MIN_SPLIT_ELEMENTS = 128 * 128
MAX_SPLITS = 128


@triton.jit
def _visible(
    mask_ptr, MASK_STRIDES, row, head, offs_t, offs_n, in_m, in_n, window,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which keys each query position sees, (BLOCK_M, BLOCK_N), and what a float mask adds to their scores."""
    visible = in_m[:, None] & in_n[None, :]
    bias = tl.zeros((), tl.float32)
    if IS_CAUSAL:
        visible = visible & (offs_n[None, :] <= offs_t[:, None])
    if HAS_WINDOW:
        visible = visible & (offs_n[None, :] > offs_t[:, None] - window)
    if MASK != "none":
        ptrs = (mask_ptr + row * MASK_STRIDES[0]) + (
            (head * MASK_STRIDES[1] + offs_t * MASK_STRIDES[2])[:, None] + offs_n[None, :] * MASK_STRIDES[3]
        )
        if MASK == "bool":
            visible = visible & (tl.load(ptrs, mask=visible, other=0) != 0)  # (BLOCK_M, BLOCK_N)
        else:
            bias = tl.load(ptrs, mask=visible, other=float("-inf")).to(tl.float32)  # (BLOCK_M, BLOCK_N)
            visible = visible & (bias != float("-inf"))
    return visible, bias


@triton.jit(do_not_specialize=SPLIT_LENGTHS)
def _decode_split_kernel(
    acc_ptr, stats_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, MASK_STRIDES,
    softmax_scale, softcap, num_heads, num_kv_heads, q_len, kv_len, window, split_len, num_splits, stats_plane,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one row and kv head, for BLOCK_M of the query positions of that head's group."""
    pid = tl.program_id(0)
    group_size = num_heads // num_kv_heads
    num_tiles = tl.cdiv(group_size * q_len, BLOCK_M)
    # tiles of one split run side by side: the second finds the keys in the cache of the first
    pid_m = pid % num_tiles
    split = (pid // num_tiles) % num_splits
    pid_bh = pid // (num_tiles * num_splits)
    row = (pid_bh // num_kv_heads).to(tl.int64)
    kv_head = (pid_bh % num_kv_heads).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < group_size * q_len
    head = kv_head * group_size + offs_m // q_len  # (BLOCK_M,)
    offs_t = (offs_m % q_len).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    mask_md = in_m[:, None] & mask_d
    q_ptrs = (query_ptr + row * QUERY_STRIDES[0]) + (
        (head * QUERY_STRIDES[1] + offs_t * QUERY_STRIDES[2])[:, None] + offs_d[None, :] * QUERY_STRIDES[3]
    )
    q = tl.load(q_ptrs, mask=mask_md, other=0.0)  # (BLOCK_M, BLOCK_D)
    k_ptrs = key_ptr + row * KEY_STRIDES[0] + kv_head * KEY_STRIDES[1] + offs_d[None, :] * KEY_STRIDES[3]
    v_ptrs = (
        value_ptr + row * VALUE_STRIDES[0] + kv_head * VALUE_STRIDES[1] + offs_d[None, :] * VALUE_STRIDES[3]
    )

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = split * split_len
    last = tl.minimum(first + split_len, kv_len)
    for start in range(first, last, BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = offs_n < last
        visible, bias = _visible(
            mask_ptr, MASK_STRIDES, row, head, offs_t, offs_n, in_m, in_n, window, MASK, IS_CAUSAL, HAS_WINDOW
        )
        if MASK != "none" or IS_CAUSAL:
            in_n = tl.max(visible.to(tl.int32), axis=0) > 0
        mask_nd = in_n[:, None] & mask_d
        k = tl.load(k_ptrs + offs_n[:, None] * KEY_STRIDES[2], mask=mask_nd, other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(
            v_ptrs + offs_n[:, None] * VALUE_STRIDES[2], mask=mask_nd, other=0.0
        )  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale  # (BLOCK_M, BLOCK_N)
        if HAS_SOFTCAP:
            s = softcap * _tanh(s / softcap)
        s = tl.where(visible, s + bias, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m_i - shift)
        p = tl.exp(s - shift[:, None])
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")

    # (batch, num_heads, q_len, num_splits)
    offs_s = ((row * num_heads + head) * q_len + offs_t) * num_splits + split
    tl.store(stats_ptr + offs_s, m_i, mask=in_m)
    tl.store(stats_ptr + stats_plane + offs_s, l_i, mask=in_m)
    tl.store(acc_ptr + offs_s[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask_md)


@triton.jit
def _take_in(m_i, l_i, acc, m_n, l_n, acc_n):
    """Add the softmax sums of several parts, (N,) and (N, BLOCK_D), to the running ones, () and (BLOCK_D,)."""
    m_new = tl.maximum(m_i, tl.max(m_n, axis=0))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp(m_i - shift)
    weights = tl.exp(m_n - shift)
    return (
        m_new,
        l_i * alpha + tl.sum(weights * l_n, axis=0),
        acc * alpha + tl.sum(weights[:, None] * acc_n, axis=0),
    )


@triton.jit
def _normalised(acc, l_i):
    """Zero where no key was visible: the softmax over nothing contributes nothing."""
    return tl.where(l_i == 0.0, 0.0, acc / tl.where(l_i == 0.0, 1.0, l_i))


@triton.jit(do_not_specialize=MERGE_LENGTHS)
def _decode_merge_kernel(
    out_ptr, acc_ptr, stats_ptr, query_ptr, key_ptr, value_ptr, gate_ptr, row_ids_ptr,
    OUT_STRIDES, QUERY_STRIDES, KEY_STRIDES, VALUE_STRIDES, GATE_STRIDES,
    softmax_scale, softcap, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len, num_splits, stats_plane,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """One query position of one row and head: its splits in their order, then its prefix."""
    pid = tl.program_id(0).to(tl.int64)
    t = pid % q_len
    head = (pid // q_len) % num_heads
    row = pid // (q_len * num_heads)
    kv_head = head // (num_heads // num_kv_heads)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < HEAD_DIM

    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < num_splits
        offs_s = pid * num_splits + offs_s
        m_s = tl.load(stats_ptr + offs_s, mask=mask_s, other=float("-inf"))  # (BLOCK_S,)
        l_s = tl.load(stats_ptr + stats_plane + offs_s, mask=mask_s, other=0.0)  # (BLOCK_S,)
        acc_ptrs = acc_ptr + offs_s[:, None] * HEAD_DIM + offs_d[None, :]
        acc_s = tl.load(acc_ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)  # (BLOCK_S, BLOCK_D)
        m_i, l_i, acc = _take_in(m_i, l_i, acc, m_s, l_s, acc_s)

    row_id, entry = _row_entry(row_ids_ptr, row, num_prefixes, HAS_ROW_IDS)
    factor = tl.full((), 1.0, tl.float32)
    attends = row_id != -1
    if GATED:
        factor, _ = _gate_factor(gate_ptr, GATE_STRIDES, row_id, entry, num_prefixes, head, TANH)
        attends = factor != 0.0
    elif HAS_ROW_IDS:
        # a device cannot raise, so an id outside the bank has to show in the result
        factor = tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), factor)
    out = acc
    # a branch, not a product with zero: it keeps the bits of base, and Inf or NaN in the prefix out of them
    if attends:
        m_p, l_p, acc_p = m_i, l_i, acc
        if GATED:
            m_p = tl.full((), float("-inf"), tl.float32)
            l_p = tl.zeros((), tl.float32)
            acc_p = tl.zeros((BLOCK_D,), tl.float32)
        q_ptrs = query_ptr + row * QUERY_STRIDES[0] + head * QUERY_STRIDES[1] + t * QUERY_STRIDES[2]
        q = tl.load(q_ptrs + offs_d * QUERY_STRIDES[3], mask=mask_d, other=0.0).to(tl.float32)  # (BLOCK_D,)
        offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
        k_ptrs = _tile(key_ptr, KEY_STRIDES, entry, kv_head, offs_p, offs_d)
        v_ptrs = _tile(value_ptr, VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
        for start in range(0, prefix_len, BLOCK_P):
            k, v, mask_p = _prefix_block(
                k_ptrs, v_ptrs, KEY_STRIDES, VALUE_STRIDES, start, prefix_len, mask_d[None, :]
            )
            s = tl.sum(q[None, :] * k.to(tl.float32), axis=1) * softmax_scale  # (BLOCK_P,)
            if HAS_SOFTCAP and not GATED:
                s = softcap * _tanh(s / softcap)
            s = tl.where(mask_p, s, float("-inf"))
            m_p, l_p, acc_p = _take_in(m_p, l_p, acc_p, s, tl.where(mask_p, 1.0, 0.0), v.to(tl.float32))
        if GATED:
            out = _normalised(acc, l_i) + factor * (acc_p / l_p)
        else:
            out = factor * _normalised(acc_p, l_p)
    else:
        out = _normalised(acc, l_i)
    out_ptrs = out_ptr + row * OUT_STRIDES[0] + head * OUT_STRIDES[1] + t * OUT_STRIDES[2]
    tl.store(out_ptrs + offs_d * OUT_STRIDES[3], out.to(out_ptr.dtype.element_ty), mask=mask_d)


def wants_decode(arch: str, num_kv_heads: int, q_len: int, kv_len: int, head_dim: int) -> bool:
    """Whether a forward without backward is better split over its keys: few queries, and keys worth two splits.

    The batch does not enter, because a row must have the same bits in every batch.
    """
    return 0 < q_len <= MAX_Q_LEN and _splits(arch, num_kv_heads, kv_len, head_dim)[1] > 1


def takes(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, is_causal: bool) -> bool:
    """:func:`wants_decode` for the arguments of one call; packed sequences have no long keys per query."""
    kv_len = min(key.shape[2], query.shape[2]) if is_causal else key.shape[2]
    shape = (key.shape[1], query.shape[2], kv_len, query.shape[3])
    return cu_seqlens is None and wants_decode(target.arch(query), *shape)


def config(arch: str, head_dim: int, dtype: torch.dtype, group_rows: int) -> dict[str, int]:
    """Tiles of the first launch for ``group_rows`` query positions that share their keys.

    Fewer than 64 rows, so that Hopper runs ``mma.sync``: the probabilities are an operand that comes from registers.
    """
    block_m = 16 if group_rows <= 16 else 32
    block_n = 64 if head_dim <= 64 else 32
    num_stages = 4 if head_dim <= 128 else 2
    if dtype == torch.float32:
        block_n, num_stages = (16 if head_dim > 128 else 32), (3 if head_dim <= 128 else 2)
    if arch.startswith("gfx"):
        num_stages = 2
    num_warps = 4 if block_m == 16 else 8
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def _splits(arch: str, num_kv_heads: int, kv_len: int, head_dim: int) -> tuple[int, int]:
    """Keys per split, and splits: a row and its kv heads fill the device if the keys suffice."""
    shortest = max(64, triton.next_power_of_2(triton.cdiv(MIN_SPLIT_ELEMENTS, head_dim)))
    wanted = min(MAX_SPLITS, triton.cdiv(PROCESSORS.get(arch, 128), max(1, num_kv_heads)))
    # a multiple of 64 keys, so that only the last split has a partial tile
    split_len = max(shortest, 64 * triton.cdiv(kv_len, 64 * wanted))
    return split_len, triton.cdiv(kv_len, split_len)


def gated_prefix_attention_decode(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor,
    attn_mask: Tensor | None, row_ids: Tensor | None, softmax_scale: float, gate_fn: str, is_causal: bool,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention over the keys plus the gated prefix term, in the dtype and dense strides of ``query``.

    Args: layouts of the module docstring; fp32, bf16 or fp16 activations, the prefix in that dtype or fp32, gate
        fp32, row_ids int32 ``(batch,)``. ``window`` 0 and ``softcap`` 0.0 are none; they, the mask and causality
        act on the keys alone. A row whose id is outside ``[-1, num_prefixes)`` comes back as NaN.
    Raises:
        TypeError: fp64, or bf16 under the interpreter.
        ValueError: tensors on a device Triton cannot reach, ``head_dim`` above 256, an unknown ``gate_fn``.
    """
    op = "gated_prefix_attention (Triton, decode)"
    if gate_fn not in ("tanh", "identity"):
        raise ValueError(f"{op}: gate_fn must be 'tanh' or 'identity', got {gate_fn!r}")
    return _decode(
        op, query, key, value, prefix_key, prefix_value, gate, attn_mask, row_ids, softmax_scale, gate_fn,
        is_causal, window, softcap,
    )  # fmt: skip


def prefix_attention_decode(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    attn_mask: Tensor | None, row_ids: Tensor | None, softmax_scale: float, is_causal: bool, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """One softmax over prefix and keys; neither mask, window nor causality hide the prefix, ``softcap`` acts on it.

    Otherwise as :func:`gated_prefix_attention_decode`.
    """
    op = "prefix_attention (Triton, decode)"
    return _decode(
        op, query, key, value, prefix_key, prefix_value, None, attn_mask, row_ids, softmax_scale, None,
        is_causal, window, softcap,
    )  # fmt: skip


def _decode(
    op, query, key, value, prefix_key, prefix_value, gate, attn_mask, row_ids, softmax_scale, gate_fn,
    is_causal, window, softcap,
) -> Tensor:  # fmt: skip
    """Both launches; without ``gate`` the prefix shares the softmax of the keys."""
    _check(op, query)
    batch, num_heads, q_len, head_dim = query.shape
    num_prefixes, num_kv_heads, prefix_len, _ = prefix_key.shape
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    arch = target.arch(query)
    # causal is aligned to the upper left: no query sees a key beyond the last query's own position
    kv_len = min(key.shape[2], q_len) if is_causal else key.shape[2]
    split_len, num_splits = _splits(arch, num_kv_heads, kv_len, head_dim)
    acc = query.new_empty((batch, num_heads, q_len, num_splits, head_dim), dtype=torch.float32)
    stats = query.new_empty((2, batch, num_heads, q_len, num_splits), dtype=torch.float32)
    shared = {
        "acc_ptr": acc, "stats_ptr": stats, "query_ptr": query, "QUERY_STRIDES": query.stride(),
        "softmax_scale": softmax_scale, "softcap": softcap, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
        "q_len": q_len, "num_splits": num_splits, "stats_plane": stats.numel() // 2,
        "HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), "HAS_SOFTCAP": softcap != 0.0,
    }  # fmt: skip
    group_rows = num_heads // num_kv_heads * q_len
    tiles = config(arch, head_dim, query.dtype, group_rows)
    with torch.cuda.device_of(query):
        if num_splits:
            num_tiles = triton.cdiv(group_rows, tiles["BLOCK_M"])
            _decode_split_kernel[(num_tiles * num_splits * num_kv_heads * batch,)](
                key_ptr=key, value_ptr=value, mask_ptr=attn_mask,
                KEY_STRIDES=key.stride(), VALUE_STRIDES=value.stride(),
                MASK_STRIDES=(0, 0, 0, 0) if attn_mask is None else attn_mask.stride(),
                kv_len=kv_len, window=window, split_len=split_len, MASK=_mask_kind(attn_mask),
                IS_CAUSAL=is_causal, HAS_WINDOW=window != 0, **shared, **tiles,
            )  # fmt: skip
        _decode_merge_kernel[(batch * num_heads * q_len,)](
            out_ptr=out, key_ptr=prefix_key, value_ptr=prefix_value, gate_ptr=gate, row_ids_ptr=row_ids,
            OUT_STRIDES=out.stride(), KEY_STRIDES=prefix_key.stride(), VALUE_STRIDES=prefix_value.stride(),
            GATE_STRIDES=(0, 0) if gate is None else gate.stride(),
            num_prefixes=num_prefixes, prefix_len=prefix_len, BLOCK_S=MERGE_SPLITS,
            BLOCK_P=16 if head_dim > 128 else 32, HAS_ROW_IDS=row_ids is not None,
            GATED=gate is not None, TANH=gate_fn == "tanh", num_warps=4, **shared,
        )  # fmt: skip
    return out


def _mask_kind(attn_mask: Tensor | None) -> str:
    if attn_mask is None:
        return "none"
    return "bool" if attn_mask.dtype == torch.bool else "float"


def _check(op: str, query: Tensor) -> None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: query must be fp32, bf16 or fp16, got {query.dtype}")
    interpreted = not isinstance(_decode_split_kernel, triton.JITFunction)
    if interpreted and query.dtype == torch.bfloat16:
        raise TypeError(
            f"{op}: query must be fp32 or fp16 under TRITON_INTERPRET=1 (bf16 is wrong there), got bf16"
        )
    if not interpreted and query.device.type == "cpu":
        raise ValueError(f"{op}: query must be on a GPU (or set TRITON_INTERPRET=1), got cpu")
    if query.shape[-1] > 256:
        raise ValueError(f"{op}: head_dim must be at most 256, got {query.shape[-1]}")
