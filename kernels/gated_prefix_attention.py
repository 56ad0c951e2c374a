"""Gated prefix attention: attention and LLaMA-Adapter's gated term (arXiv:2303.16199, eq. 6-8) in one pass.

    base = softmax(S) V,                S  = softmax_scale * Q K^T, capped and masked
    Op   = softmax(Sp) Vp,              Sp = softmax_scale * Q Kp^T
    O    = base + f * Op                f  = tanh(gate_h) or gate_h
    p  = exp(S - lse),                  delta   = rowsum(dO * base)
    pp = exp(Sp - prefix_lse),          delta_p = rowsum(pp * (dO Vp^T)),  dgate_h = f' * sum delta_p
    dS  = p * (dO V^T - delta),         dSp = f * pp * (dO Vp^T - delta_p)
    dQ  = softmax_scale * (dS K + dSp Kp)
    dK  = softmax_scale * dS^T Q,       dV  = p^T dO
    dKp = softmax_scale * dSp^T Q,      dVp = f * pp^T dO

Saved: base, lse, prefix_lse. Both terms meet in fp32 accumulators and are rounded once. Kernels: attention.py.

Layouts: query, out, base ``(batch, num_heads, q_len, head_dim)``; key, value ``(batch, num_kv_heads, kv_len,
head_dim)``; prefix_key, prefix_value ``(num_prefixes, num_kv_heads, prefix_len, head_dim)``; gate ``(num_prefixes,
num_heads)``; any strides. lse, prefix_lse ``(batch, num_heads, q_len)``, contiguous.
"""

import torch
from fastadapter.kernels import attention, attention_backward, decode
from torch import Tensor


def gated_prefix_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor,
    attn_mask: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
    softmax_scale: float, gate_fn: str, is_causal: bool, window: int, softcap: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, base, lse and prefix_lse; the last three have shape ``(0,)`` unless ``save``.

    Args: layouts of the module docstring; fp32, bf16 or fp16 activations, the prefix in that dtype or fp32, gate
        fp32. attn_mask ``(batch, num_heads, q_len, kv_len)``, bool or float. cu_seqlens int32 ``(num_seqs + 1,)``
        beside a batch of one. row_ids int32, one per row or per packed sequence; where one is outside
        ``[-1, num_prefixes)`` the row comes back as NaN.
    Raises:
        TypeError: fp64, or bf16 under the interpreter.
        ValueError: tensors on a device Triton cannot reach, ``head_dim`` above 256, an unknown ``gate_fn``.
    """
    _check_gate_fn(gate_fn)
    if not save and decode.takes(query, key, cu_seqlens, is_causal):
        out = decode.gated_prefix_attention_decode(
            query, key, value, prefix_key, prefix_value, gate, attn_mask, row_ids, softmax_scale, gate_fn, is_causal,
            window, softcap,
        )  # fmt: skip
        return out, query.new_empty(0), *(query.new_empty(0, dtype=torch.float32) for _ in range(2))
    return attention.attention_forward(
        "gated_prefix_attention", query, key, value, prefix_key, prefix_value, gate, attn_mask, cu_seqlens, row_ids,
        softmax_scale, gate_fn, is_causal, window, softcap, save,
    )  # fmt: skip


def gated_prefix_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    gate: Tensor, base: Tensor, lse: Tensor, prefix_lse: Tensor,
    attn_mask: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
    softmax_scale: float, gate_fn: str, is_causal: bool, window: int, softcap: float,
    need_query: bool, need_key_value: bool, need_prefix: bool, need_gate: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key, value, prefix_key, prefix_value and gate, each in its argument's dtype.

    Those not needed come back with shape ``(0,)``. A row whose id is outside ``[-1, num_prefixes)`` gets NaN in its
    gradient of query and adds nothing to those of the bank. Errors as in :func:`gated_prefix_attention_forward`.
    """
    _check_gate_fn(gate_fn)
    return attention_backward.attention_backward(
        "gated_prefix_attention", grad_out, query, key, value, prefix_key, prefix_value, gate, base, lse, prefix_lse,
        attn_mask, cu_seqlens, row_ids, softmax_scale, gate_fn, is_causal, window, softcap,
        need_query, need_key_value, need_prefix, need_gate,
    )  # fmt: skip


def _check_gate_fn(gate_fn: str) -> None:
    if gate_fn not in ("tanh", "identity"):
        raise ValueError(
            f"gated_prefix_attention (Triton): gate_fn must be 'tanh' or 'identity', got {gate_fn!r}"
        )
