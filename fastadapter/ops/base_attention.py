"""Attentions that return their ``lse``, as the base of a prefix term (docs/maths.md, "prefix_merge").

Their backward recomputes the probabilities as ``exp(score - lse)`` and takes ``delta = rowsum(grad_out * out)``. Given
the merged ``out`` and ``lse`` it therefore returns the keys' part of the merged attention's gradient, exactly.

All but "reference" are torch's own: a base is as deterministic as ``scaled_dot_product_attention`` is, which is to say
in backward on a GPU under ``torch.use_deterministic_algorithms(True)`` (docs/design.md).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.weak import WeakTensorKeyDictionary

from fastadapter import reference
from fastadapter.ops.attention import Options, reference_options

# Fastest first, by the rows in benchmarks/results/gpu.jsonl, decoding included.
GPU_PRIORITY = ("cudnn", "flash", "efficient")

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_NEVER = float("-inf")
_FLASH_HEAD_DIM = 256


class Base(NamedTuple):
    """One attention.

    ``forward(query, key, value, options) -> out, lse, state``: out like ``query``, lse ``(batch, num_heads, q_len)`` of
    any strides, -inf where a query sees no key (``out`` is then anything finite).
    ``backward(grad_out, query, key, value, out, lse, options, state)``: gradients of query, key and value.
    ``limit(query, key, options)``: why it cannot run such a call, or ``None``.
    """

    forward: Callable[..., tuple[Tensor, Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    limit: Callable[[Tensor, Tensor, Options], str | None]


def choose_base(query: Tensor, key: Tensor, options: Options) -> tuple[str, list[str]]:
    """The first of the device's bases that can run a call, and why those before it cannot.

    Decided by device, dtype, sizes and options, never by values; "reference" can run anything.
    """
    reasons: list[str] = []
    for name in _priority(query):
        reason = BASES[name].limit(query, key, options)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    return "reference", reasons


def base_of_sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> str | None:
    """The base that has the bits of ``scaled_dot_product_attention`` without a mask, ``None`` where none has.

    What torch would take, which ``torch.nn.attention.sdpa_kernel`` decides with it.
    """
    grouped = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    name = {
        (SDPBackend.FLASH_ATTENTION.value, "cpu"): "flash_cpu",
        (SDPBackend.FLASH_ATTENTION.value, "cuda"): "flash",
        (SDPBackend.CUDNN_ATTENTION.value, "cuda"): "cudnn",
    }.get((choice, query.device.type))
    if name is None:
        return None
    options = Options(None, None, None, scale, is_causal, window=0, softcap=0.0)
    return name if BASES[name].limit(query, key, options) is None else None


def _priority(query: Tensor) -> tuple[str, ...]:
    """Fastest first, by the rows in benchmarks/results/gpu.jsonl."""
    if query.device.type == "cpu":
        return ("flash_cpu",)
    if query.device.type != "cuda":
        return ()
    return GPU_PRIORITY


def _empty_limit(query: Tensor, key: Tensor) -> str | None:
    return "there are no queries or no keys" if 0 in (*query.shape, key.shape[2]) else None


def _flash_cpu_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    if options.cu_seqlens is not None:
        return "cu_seqlens is given"
    if options.window or options.softcap:
        return "window or softcap is given"
    return _empty_limit(query, key)


def _flash_cpu_forward(query, key, value, options):
    mask = _additive(options.attn_mask, query)
    query, key, value = map(_addressable, (query, key, value))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, options.is_causal, attn_mask=mask, scale=options.softmax_scale
    )
    if mask is not None:  # it reports an lse of 0 for a query that sees no key
        lse = lse.masked_fill((mask == _NEVER).all(-1), _NEVER)
    return out, lse, ()


def _flash_cpu_backward(grad_out, query, key, value, out, lse, options, state):
    mask = _additive(options.attn_mask, query)
    if mask is not None:
        lse = lse.masked_fill(lse == _NEVER, 0.0)  # its own convention; no -inf - -inf
    operands = map(_addressable, (grad_out, query, key, value, out))
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *operands, lse, 0.0, options.is_causal, attn_mask=mask, scale=options.softmax_scale
    )


def _half_limit(dtype: torch.dtype, head_dim: int, largest: int) -> str | None:
    if dtype not in _HALF:
        return f"it computes bf16 and fp16, got {dtype}"
    if head_dim % 8 or head_dim > largest:
        return f"head_dim must be a multiple of 8 up to {largest}, got {head_dim}"
    return None


def _gpu_limit(query: Tensor, key: Tensor, options: Options, largest: int) -> str | None:
    """What cuDNN's and flash attention need."""
    if reason := _half_limit(query.dtype, query.shape[3], largest):
        return reason
    if options.attn_mask is not None:
        return "attn_mask is given"
    if options.softcap:
        return "softcap is given"
    if options.is_causal and query.shape[2] != key.shape[2]:
        return "is_causal with q_len other than kv_len"
    return _empty_limit(query, key)


def _capability(device: torch.device) -> int:
    return _asked_capability(device)


def _cudnn_lack(device: torch.device) -> str | None:
    return _asked_cudnn(device)


# A graph of torch.compile takes what a device can do as it is: asking breaks it. The mark of
# torch.compiler.assume_constant_result, which imports all of torch._dynamo to set it.
for _constant in (_capability, _cudnn_lack):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _asked_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _asked_cudnn(device: torch.device) -> str | None:
    if not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < 90100:
        return "it needs cuDNN 9.1"
    return "slower than flash attention before sm_90" if _capability(device) < 9 else None


def _cudnn_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    if reason := _cudnn_lack(query.device):
        return reason
    if options.window or options.cu_seqlens is not None:
        return "window or cu_seqlens is given"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    return _gpu_limit(query, key, options, 128)


def _cudnn_forward(query, key, value, options):
    query, key, value = map(_addressable, (query, key, value))
    out, lse, *_, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, options.is_causal, False, scale=options.softmax_scale
    )
    return out, lse.view(query.shape[:3]), (seed, offset)


def _cudnn_backward(grad_out, query, key, value, out, lse, options, state):
    operands = map(_addressable, (grad_out, query, key, value, out))
    lengths = (None, None, query.shape[2], key.shape[2])  # None: not packed
    return _aten._scaled_dot_product_cudnn_attention_backward(
        *operands,
        lse.unsqueeze(-1),
        *state,
        None,
        *lengths,
        0.0,
        options.is_causal,
        scale=options.softmax_scale,
    )


def _flash_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    if _capability(query.device) < 8:
        return "it needs sm_80"
    return _gpu_limit(query, key, options, _FLASH_HEAD_DIM)


def packed_limit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's flash attention cannot run over each sequence of a packed row by itself; ``None``: it can."""
    if device.type != "cuda":
        return f"torch has none on {device.type}"
    return "it needs sm_80" if _capability(device) < 8 else _half_limit(dtype, head_dim, _FLASH_HEAD_DIM)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """Causal attention over each sequence of a packed row, by torch's flash attention; differentiable.

    Args and returns: as those of :func:`fastadapter.ops.prefix_attention` with ``cu_seqlens``.
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    options = Options(
        attn_mask=None, cu_seqlens=cu_seqlens, row_ids=None, softmax_scale=scale, is_causal=True, window=window or 0,
        softcap=0.0,
    )  # fmt: skip
    return _flash_forward(query, key, value, options)[0]


# Tokens of the longest sequence of offsets whose values the host knows, and the version of the offsets that had it.
_longest: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note_longest(cu_seqlens: Tensor, longest: int) -> None:
    """Say what offsets on a device hold, so that flash attention is launched for no longer a sequence than there is."""
    if not cu_seqlens.is_inference():
        _longest[cu_seqlens] = (cu_seqlens._version, longest)


def _longest_of(cu_seqlens: Tensor, length: int) -> int:
    """A bound for the longest sequence without a look at the device: what was noted, else the tokens of all."""
    version, longest = _longest.get(cu_seqlens, (None, length))
    return longest if version is None or version == cu_seqlens._version else length


def _flash_call(query, key, options) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Offsets and lengths, and the scale and window, of torch's low-level flash attention."""
    ends = options.cu_seqlens
    window = {"window_size_left": options.window - 1, "window_size_right": 0} if options.window else {}
    lengths = [x.shape[2] if ends is None else _longest_of(ends, x.shape[2]) for x in (query, key)]
    return (ends, ends, *lengths), {"scale": options.softmax_scale} | window


def _tokens_first(x: Tensor, packed: bool) -> Tensor:
    """``(batch, seq, heads, head_dim)``, or ``(tokens, heads, head_dim)``; dense in the last dimension."""
    x = _addressable(x).transpose(1, 2)
    return x[0] if packed else x


def _heads_first(x: Tensor, packed: bool) -> Tensor:
    return (x[None] if packed else x).transpose(1, 2)


def _flash_forward(query, key, value, options):
    packed = options.cu_seqlens is not None
    lengths, keywords = _flash_call(query, key, options)
    operands = (_tokens_first(x, packed) for x in (query, key, value))
    out, lse, state, unused, _ = _aten._flash_attention_forward(
        *operands, *lengths, 0.0, options.is_causal, False, **keywords
    )
    return _heads_first(out, packed), lse.view(query.shape[:3]), (state, unused)


def _flash_backward(grad_out, query, key, value, out, lse, options, state):
    packed = options.cu_seqlens is not None
    lengths, keywords = _flash_call(query, key, options)
    operands = (_tokens_first(x, packed) for x in (grad_out, query, key, value, out))
    grads = _aten._flash_attention_backward(
        *operands, lse[0] if packed else lse, *lengths, 0.0, options.is_causal, *state, **keywords
    )
    return tuple(_heads_first(x, packed) for x in grads)


def _efficient_limit(query: Tensor, key: Tensor, options: Options) -> str | None:
    if query.dtype not in (*_HALF, torch.float32):
        return f"it computes fp32, bf16 and fp16, got {query.dtype}"
    if options.attn_mask is not None:
        return "attn_mask is given"
    step = 16 // query.element_size()
    if query.shape[3] % step:
        return f"head_dim must be a multiple of {step}, got {query.shape[3]}"
    if options.softcap:
        return "softcap is given"
    if options.window or options.cu_seqlens is not None:
        return "window or cu_seqlens is given"
    return _empty_limit(query, key)


def _efficient_operands(query, key, value):
    """``(batch, seq, num_heads, head_dim)``; keys and values copied per query head, which it needs."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return [_tokens_first(x, False) for x in (query, key, value)]


def _efficient_forward(query, key, value, options):
    operands = _efficient_operands(query, key, value)
    out, lse, seed, offset, *_ = _aten._efficient_attention_forward(
        *operands,
        None,
        None,
        None,
        None,
        None,
        0.0,
        int(options.is_causal),
        True,
        scale=options.softmax_scale,
    )
    return out.transpose(1, 2), lse[..., : query.shape[2]], (seed, offset)


def _efficient_backward(grad_out, query, key, value, out, lse, options, state):
    q_len, kv_len = query.shape[2], key.shape[2]
    # its rows of lse are multiples of 32; inf is a probability of zero
    stats = lse.new_full((*lse.shape[:2], -(-q_len // 32) * 32), float("inf"))
    stats[..., :q_len] = lse
    operands = _efficient_operands(query, key, value)
    # of out it takes any strides and reads it as if it were contiguous
    grad_out, out = (_tokens_first(x, False).contiguous() for x in (grad_out, out))
    grads = _aten._efficient_attention_backward(
        grad_out, *operands, None, out, None, None, q_len, kv_len, stats, 0.0, *state,
        int(options.is_causal), False, scale=options.softmax_scale,
    )[:3]  # fmt: skip
    grad_query, *on_keys = (x.transpose(1, 2) for x in grads)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        on_keys = [x.unflatten(1, (key.shape[1], group)).sum(2) for x in on_keys]
    return grad_query, *on_keys


def _reference_call(
    query: Tensor, key: Tensor, options: Options
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """A prefix that no row uses, and the options: what is left is the attention over the keys."""
    rows = query.shape[0] if options.cu_seqlens is None else options.cu_seqlens.shape[0] - 1
    nobody = torch.full((rows,), -1, dtype=torch.int32, device=query.device)
    prefix = query.new_zeros((1, key.shape[1], 1, query.shape[3]))
    return (prefix, prefix), reference_options(*options._replace(row_ids=nobody))


def _reference_forward(query, key, value, options):
    prefix, keywords = _reference_call(query, key, options)
    out, lse, _ = reference.prefix_attention(query, key, value, *prefix, **keywords)
    return out, lse, ()


def _reference_backward(grad_out, query, key, value, out, lse, options, state):
    prefix, keywords = _reference_call(query, key, options)
    return reference.prefix_attention_backward(grad_out, query, key, value, *prefix, out, lse, **keywords)[:3]


def _addressable(x: Tensor) -> Tensor:
    """Dense in the last dimension and, on a GPU, with every row on 16 bytes: torch's kernels take both for granted, and
    an address that is not ends the process's use of the device.
    """
    whole = x.stride(-1) == 1
    if whole and x.is_cuda and not torch.compiler.is_compiling():
        whole = aligned(x)
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> bool:
    """Whether the first number and every step but the last's are on 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in x.stride()[:-1])


def masked_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """``scaled_dot_product_attention`` under a mask, 0 for a query that sees no key; differentiable.

    A row of -inf alone has no softmax in some of torch's kernels: such a query is let see everything, and its output
    dropped.
    """
    mask = narrowed(attn_mask)
    if mask.dtype == torch.bool:
        seen = mask.any(-1, keepdim=True)
        mask = mask | ~seen
    else:
        mask = mask.to(query.dtype)  # first: what is finite in fp32 can be -inf in half
        seen = (mask != _NEVER).any(-1, keepdim=True)
        mask = mask.masked_fill(~seen, 0.0)
    query, key, value = (_addressable(x) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out.masked_fill(~seen, 0.0)


def narrowed(attn_mask: Tensor) -> Tensor:
    """A size of 1 where a mask was broadcast."""
    for dim in (0, 1):
        if attn_mask.stride(dim) == 0:
            attn_mask = attn_mask.narrow(dim, 0, 1)
    return attn_mask


def _additive(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A float mask, with a size of 1 where it was broadcast."""
    if attn_mask is None:
        return None
    attn_mask = narrowed(attn_mask)
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(query.dtype)
    additive = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
    return additive.masked_fill_(~attn_mask, _NEVER)


BASES = {
    "flash_cpu": Base(_flash_cpu_forward, _flash_cpu_backward, _flash_cpu_limit),
    "cudnn": Base(_cudnn_forward, _cudnn_backward, _cudnn_limit),
    "flash": Base(_flash_forward, _flash_backward, _flash_limit),
    "efficient": Base(_efficient_forward, _efficient_backward, _efficient_limit),
    "reference": Base(_reference_forward, _reference_backward, lambda query, key, options: None),
}
