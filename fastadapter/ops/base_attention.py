"""Attentions of torch that return their ``lse``, as the base of a merge (docs/maths.md, "prefix_merge").

Their backward recomputes the probabilities as ``exp(score - lse)`` and takes ``delta = rowsum(grad_out * out)``. Given
the merged ``out`` and ``lse`` it therefore returns the keys' part of the merged attention's gradient, exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapter.ops.attention import Options

FORMS = ("auto", "single", "merge")
# What form="auto" takes, by device. On a CPU the single pass took less time than the merge in every shape tried
# (q_len 1 to 1024, fp32 and bf16): benchmarks/bench_prefix_attention.py. On a GPU the two have not been compared.
PREFERRED = {"cpu": "single", "cuda": "single"}
# The bases of a device, by priority: the first that can run a call does.
PRIORITY = {"cpu": ("flash_cpu",), "cuda": ("cudnn", "flash")}

_aten = torch.ops.aten


class Base(NamedTuple):
    """``forward(query, key, value, attn_mask, is_causal, scale) -> out, lse, state`` and ``backward(grad_out, query,
    key, value, out, lse, attn_mask, is_causal, scale, state) -> grads`` of the first three."""

    forward: Callable
    backward: Callable
    limit: Callable  # (query, key, options) -> why it cannot run such a call, or None


def choose_form(form: str, query: Tensor, key: Tensor, options: Options) -> str | None:
    """The base to merge into, ``None`` for the single pass: by device, dtype, sizes and options, never by values.

    Raises:
        ValueError: unknown form, or ``"merge"`` for a call that no base can compute, with the reasons.
    """
    if form not in FORMS:
        raise ValueError(f"prefix_attention: form must be one of {', '.join(FORMS)}, got {form!r}")
    device = query.device.type
    if form == "single" or (form == "auto" and PREFERRED.get(device) != "merge"):
        return None
    reasons = []
    for name in PRIORITY.get(device, ()):
        reason = _limit(query, key, options) or BASES[name].limit(query, key, options)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if form == "auto":
        return None
    why = "; ".join(reasons) or f"torch has no attention that returns lse on {device}"
    raise ValueError(f"prefix_attention: form='merge' cannot run here: {why}")


def _limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    """What no base can do."""
    if options.cu_seqlens is not None:
        return "cu_seqlens is given"
    if options.window or options.softcap:
        return "window or softcap is given"
    if 0 in (query.shape[0], query.shape[2], key.shape[2]):
        return "there are no queries or no keys"
    return None


def _flash_cpu_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    return None


def _flash_cpu_forward(query, key, value, attn_mask, is_causal, scale):
    mask = _additive(attn_mask, query)
    query, key, value = map(_unit_stride, (query, key, value))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    if mask is not None:  # it reports an lse of 0 for a query that sees no key
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return out, lse, ()


def _flash_cpu_backward(grad_out, query, key, value, out, lse, attn_mask, is_causal, scale, state):
    mask = _additive(attn_mask, query)
    if mask is not None:
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # its own convention; no -inf - -inf
    operands = map(_unit_stride, (grad_out, query, key, value, out))
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *operands, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def _gpu_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    """What both GPU bases need; a mask would have to be padded and expanded for cuDNN."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bf16 and fp16, got {query.dtype}"
    if query.shape[3] % 8 or query.shape[3] > 128:
        return f"head_dim must be a multiple of 8 up to 128, got {query.shape[3]}"
    if options.attn_mask is not None:
        return "attn_mask is given"
    if options.is_causal and query.shape[2] != key.shape[2]:
        return "is_causal with q_len other than kv_len"
    return None


def _cudnn_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    if not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < 90100:
        return "it needs cuDNN 9.1"
    if torch.cuda.get_device_capability(query.device)[0] < 9:
        return "slower than flash attention before sm_90"
    return _gpu_limit(query, key, options)


def _cudnn_forward(query, key, value, attn_mask, is_causal, scale):
    query, key, value = map(_unit_stride, (query, key, value))
    out, lse, *_, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )
    return out, lse.view(query.shape[:3]), (seed, offset)


def _cudnn_backward(grad_out, query, key, value, out, lse, attn_mask, is_causal, scale, state):
    seed, offset = state
    operands = map(_unit_stride, (grad_out, query, key, value, out))
    lengths = (None, None, query.shape[2], key.shape[2])  # None: not packed
    return _aten._scaled_dot_product_cudnn_attention_backward(
        *operands, lse.unsqueeze(-1), seed, offset, None, *lengths, 0.0, is_causal, scale=scale
    )


def _flash_forward(query, key, value, attn_mask, is_causal, scale):
    query, key, value = map(_unit_stride, (query, key, value))
    out, lse, *_, state, unused, _ = _aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return out, lse, (state, unused)


def _flash_backward(grad_out, query, key, value, out, lse, attn_mask, is_causal, scale, state):
    operands = map(_unit_stride, (grad_out, query, key, value, out))
    lengths = (None, None, query.shape[2], key.shape[2])  # None: not packed
    return _aten._scaled_dot_product_flash_attention_backward(
        *operands, lse, *lengths, 0.0, is_causal, *state, scale=scale
    )


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels of torch take the last dimension as dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A float mask, with a size of 1 where it was broadcast."""
    if attn_mask is None:
        return None
    for dim in (0, 1):
        if attn_mask.stride(dim) == 0:
            attn_mask = attn_mask.narrow(dim, 0, 1)
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(query.dtype)
    additive = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
    return additive.masked_fill_(~attn_mask, float("-inf"))


BASES = {
    "flash_cpu": Base(_flash_cpu_forward, _flash_cpu_backward, _flash_cpu_limit),
    "cudnn": Base(_cudnn_forward, _cudnn_backward, _cudnn_limit),
    "flash": Base(_flash_forward, _flash_backward, _gpu_limit),
}
