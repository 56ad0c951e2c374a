"""Prefix attention: one softmax over a learned prefix and the keys (prefix tuning, arXiv:2101.00190).

    O = softmax([Sp; S]) [Vp; V],       S  = softmax_scale * Q K^T, capped and masked
                                        Sp = softmax_scale * Q Kp^T, capped: the prefix is visible to every query
    p = exp(S - lse), pp = exp(Sp - lse),   delta = rowsum(dO * O)
    dS  = p * (dO V^T - delta),         dSp = pp * (dO Vp^T - delta)
    dQ  = softmax_scale * (dS K + dSp Kp)
    dK  = softmax_scale * dS^T Q,       dV  = p^T dO
    dKp = softmax_scale * dSp^T Q,      dVp = pp^T dO

Saved: out, lse. With no keys, and the (out, lse) of a prefix merged into some other attention, backward gives
exactly the prefix's part of the gradient of the whole. Kernels: attention.py.

Layouts: query, out ``(batch, num_heads, q_len, head_dim)``; key, value ``(batch, num_kv_heads, kv_len, head_dim)``;
prefix_key, prefix_value ``(num_prefixes, num_kv_heads, prefix_len, head_dim)``; any strides. lse ``(batch,
num_heads, q_len)``, contiguous.
"""

from fastadapter.kernels import attention, attention_backward
from torch import Tensor


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
