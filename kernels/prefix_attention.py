"""Prefix attention: one softmax over a learned prefix and the keys (prefix tuning, arXiv:2101.00190).

    O = softmax([Sp; S]) [Vp; V],       S  = softmax_scale * Q K^T, capped and masked
                                        Sp = softmax_scale * Q Kp^T, capped: the prefix is visible to every query
    p = exp(S - lse), pp = exp(Sp - lse),   delta = rowsum(dO * O)
    dS  = p * (dO V^T - delta),         dSp = pp * (dO Vp^T - delta)
    dQ  = softmax_scale * (dS K + dSp Kp)
    dK  = softmax_scale * dS^T Q,       dV  = p^T dO
    dKp = softmax_scale * dSp^T Q,      dVp = pp^T dO

Merged into another attention, with output B and natural ``lse`` b of the same queries:
    lse = log(exp(b) + sum exp(Sp)),    O = exp(b - lse) B + exp(Sp - lse) Vp

Saved: out, lse. With no keys, and the (out, lse) of a prefix merged into some other attention, backward gives
exactly the prefix's part of the gradient of the whole. Kernels: attention.py.

Layouts: query, out ``(batch, num_heads, q_len, head_dim)``; key, value ``(batch, num_kv_heads, kv_len, head_dim)``;
prefix_key, prefix_value ``(num_prefixes, num_kv_heads, prefix_len, head_dim)``; any strides. lse ``(batch,
num_heads, q_len)``, contiguous.
"""

import torch
import triton
import triton.language as tl
from fastadapter.kernels import attention, attention_backward, decode, target
from fastadapter.kernels.attention import (
    LENGTHS,
    _adapter_of,
    _attend_prefix,
    _locate,
    _prefix_stages,
)
from fastadapter.kernels.attention_tiles import _load, _rows
from torch import Tensor


@triton.jit(do_not_specialize=LENGTHS)
def _prefix_merge_fwd_kernel(
    out_ptr, lse_ptr, base_ptr, base_lse_ptr, query_ptr, prefix_key_ptr, prefix_value_ptr, row_ids_ptr,
    OUT_STRIDES, BASE_STRIDES, BASE_LSE_STRIDES, QUERY_STRIDES, PREFIX_KEY_STRIDES, PREFIX_VALUE_STRIDES,
    score_scale, softcap, num_prefixes, num_heads, num_kv_heads, q_len, prefix_len, num_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query positions of one row and head: the running softmax goes on from where the base left it."""
    row, head, seq, _, _, tile = _locate(
        tl.program_id(0), 0, q_len, num_heads, 0, num_tiles, BLOCK_M, False, False
    )
    kv_head = head // (num_heads // num_kv_heads)
    row_id, entry, adapted = _adapter_of(row_ids_ptr, seq, 0, num_prefixes, HAS_ROW_IDS, False)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < q_len
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d[None, :] < HEAD_DIM
    offs_p = tl.arange(0, BLOCK_P)
    base_ptrs = _rows(base_ptr, BASE_STRIDES, row, head, offs_m, offs_d)
    base = _load(base_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
    lse_ptrs = base_lse_ptr + row * BASE_LSE_STRIDES[0] + head * BASE_LSE_STRIDES[1]
    lse = tl.load(lse_ptrs + offs_m.to(tl.int64) * BASE_LSE_STRIDES[2], mask=mask_m, other=0.0)  # (BLOCK_M,)
    out = base
    if row_id != -1:
        q_ptrs = _rows(query_ptr, QUERY_STRIDES, row, head, offs_m, offs_d)
        q = _load(q_ptrs, mask_m, mask_d, True, HEAD_DIM)  # (BLOCK_M, BLOCK_D)
        k_ptrs = _rows(prefix_key_ptr, PREFIX_KEY_STRIDES, entry, kv_head, offs_p, offs_d)
        v_ptrs = _rows(prefix_value_ptr, PREFIX_VALUE_STRIDES, entry, kv_head, offs_p, offs_d)
        # a base that saw no key is no part of the result, whatever it holds
        visible = lse != float("-inf")
        acc, m_i, l_i = _attend_prefix(
            tl.where(visible[:, None], base.to(tl.float32), 0.0), lse,
            tl.where(visible, 1.0, 0.0), q.to(prefix_key_ptr.dtype.element_ty), k_ptrs, v_ptrs, PREFIX_KEY_STRIDES,
            PREFIX_VALUE_STRIDES, tl.where(adapted, prefix_len, 0), mask_d, score_scale, softcap,
            BLOCK_P, HEAD_DIM, HAS_SOFTCAP, PRECISION, _prefix_stages(k_ptrs),
        )  # fmt: skip
        # a device cannot raise, so an id outside the bank has to show in the result
        l_i = tl.where(adapted, l_i, float("nan"))
        lse = m_i + tl.log(l_i)
        out = (acc * (1.0 / l_i)[:, None]).to(base.dtype)
    out_ptrs = _rows(out_ptr, OUT_STRIDES, row, head, offs_m, offs_d)
    tl.store(out_ptrs, out, mask=mask_m[:, None] & mask_d)
    tl.store(lse_ptr + (row * num_heads + head) * q_len + offs_m, lse, mask=mask_m)


def prefix_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    attn_mask: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
    softmax_scale: float, is_causal: bool, window: int, softcap: float, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse; ``lse`` has shape ``(0,)`` unless ``save``.

    Args: layouts of the module docstring; fp32, bf16 or fp16 activations, the prefix in that dtype or fp32.
        attn_mask ``(batch, num_heads, q_len, kv_len)``, bool or float. cu_seqlens int32 ``(num_seqs + 1,)`` beside a
        batch of one. row_ids int32, one per row or per packed sequence; -1 attends to the keys alone, and where one
        is outside ``[-1, num_prefixes)`` the row comes back as NaN.
    Raises:
        TypeError: fp64, or bf16 under the interpreter.
        ValueError: tensors on a device Triton cannot reach, or ``head_dim`` above 256.
    """
    if not save and decode.takes(query, key, cu_seqlens, is_causal):
        out = decode.prefix_attention_decode(
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            attn_mask,
            row_ids,
            softmax_scale,
            is_causal,
            window,
            softcap,
        )
        return out, query.new_empty(0, dtype=torch.float32)
    out, _, lse, _ = attention.attention_forward(
        "prefix_attention", query, key, value, prefix_key, prefix_value, None, attn_mask, cu_seqlens, row_ids,
        softmax_scale, None, is_causal, window, softcap, save,
    )  # fmt: skip
    return out, lse


def prefix_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    out: Tensor, lse: Tensor, attn_mask: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
    softmax_scale: float, is_causal: bool, window: int, softcap: float,
    need_query: bool, need_key_value: bool, need_prefix: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key, value, prefix_key and prefix_value, each in its argument's dtype.

    Those not needed come back with shape ``(0,)``. A row whose id is outside ``[-1, num_prefixes)`` gets NaN in its
    gradient of query and adds nothing to those of the bank. Errors as in :func:`prefix_attention_forward`.
    """
    *grads, _ = attention_backward.attention_backward(
        "prefix_attention", grad_out, query, key, value, prefix_key, prefix_value, None, out, lse, None,
        attn_mask, cu_seqlens, row_ids, softmax_scale, None, is_causal, window, softcap,
        need_query, need_key_value, need_prefix, False,
    )  # fmt: skip
    return tuple(grads)


def prefix_merge_forward(
    base: Tensor, lse: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, row_ids: Tensor | None,
    softmax_scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, like ``base``, and lse of the base's softmax extended by the prefix.

    Args: layouts of the module docstring; ``base`` as query, ``lse`` fp32 ``(batch, num_heads, q_len)``, any strides,
        -inf where the base saw no key. An id of -1 leaves the bits of both; one outside the bank makes them NaN.
    Errors as in :func:`prefix_attention_forward`.
    """
    attention.check("prefix_merge", query)
    batch, num_heads, q_len, head_dim = query.shape
    out = torch.empty_like(base)
    merged_lse = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    if out.numel() == 0:
        return out, merged_lse
    none = query[:, :, :0]
    shared = attention.shared_arguments(
        query,
        none,
        none,
        prefix_key,
        prefix_value,
        None,
        None,
        None,
        row_ids,
        softmax_scale,
        None,
        False,
        0,
        softcap,
    )
    tiles = attention.config(
        "merge", target.arch(query), query.dtype, prefix_key.dtype, head_dim, prefix_key.shape[2]
    )
    num_tiles, rows = attention.tiles_of_head(q_len, batch, None, tiles.block_m)
    with torch.cuda.device_of(query):
        attention.launch(
            _prefix_merge_fwd_kernel, num_tiles * rows * num_heads, shared, tiles, head_dim,
            out_ptr=out, lse_ptr=merged_lse, base_ptr=base, base_lse_ptr=lse, OUT_STRIDES=attention.row_strides(out),
            BASE_STRIDES=attention.row_strides(base), BASE_LSE_STRIDES=lse.stride(), num_tiles=num_tiles,
        )  # fmt: skip
    return out, merged_lse
