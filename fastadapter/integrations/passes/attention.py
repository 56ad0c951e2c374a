"""The hook into transformers' attention, and the projection of a prompt through a layer's own weights.

transformers looks every attention function up with ``AttentionInterface.get_interface``. While an adapter is
attached anywhere, that lookup returns the same function wrapped in :func:`_dispatch`, which runs it and adds the
term of the adapter found in the calling module. Masks, caches and the configuration stay the model's own. (An
attention name of our own would drop masks in silence, see docs/design.md.)
"""

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Name of our child module in an attention module.
CHILD = "fa_prefix"
# Keyword by which `project_by_forward` asks the dispatcher for keys and values instead of attention.
CAPTURE = "fa_capture"
# Keyword under which a decoder passes the keys and values of soft prompts down to its attention.
PROMPTS = "fa_prompts"

# Every adapted attention in the process, copies of models included.
_hosts: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_original_lookup: Any = None


def _dispatch(attention, module, query, key, value, attention_mask, *args, **kwargs):
    """Run ``attention`` as the model would, with what the adapters in ``module`` make of it."""
    captured = kwargs.pop(CAPTURE, None)
    if captured is not None:
        captured.append((query, key, value))
        return query.transpose(1, 2), None
    prompts = kwargs.pop(PROMPTS, None)
    host = module._modules.get(CHILD)
    if host is None:
        return attention(module, query, key, value, attention_mask, *args, **kwargs)
    call = functools.partial(attention, module, query, key, value, attention_mask, *args, **kwargs)
    return host.attend(call, module, query, key, value, attention_mask, prompts, kwargs)


def _patched_lookup(self, attn_implementation, default):
    return functools.partial(_dispatch, _original_lookup(self, attn_implementation, default))


def install_hook() -> None:
    """Wrap the lookup, once however often it is called."""
    from transformers.modeling_utils import AttentionInterface

    global _original_lookup
    if AttentionInterface.get_interface is not _patched_lookup:
        _original_lookup = AttentionInterface.get_interface
        AttentionInterface.get_interface = _patched_lookup


def keep_hook_for(host: nn.Module) -> None:
    """Count a host among those that need the hook, for as long as it exists."""
    _hosts.add(host)


def release_hook_for(host: nn.Module) -> None:
    _hosts.discard(host)


def remove_hook_if_unused() -> None:
    """Restore the lookup when no adapted module is left in the process, copies of models included."""
    from transformers.modeling_utils import AttentionInterface

    # Somebody who patched after us keeps our wrapper inside theirs; without hosts it only passes calls on.
    if not _hosts and AttentionInterface.get_interface is _patched_lookup:
        AttentionInterface.get_interface = _original_lookup


def project_by_forward(
    attention: nn.Module, rows: Tensor, rotary_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of prompt ``rows (1, prefix_len, hidden_size)`` as the layer itself computes them.

    Runs the layer's own forward with the rotary embedding switched off (cos 1, sin 0, so a scaling such as YaRN's
    does not apply either: LLaMA-Adapter's prompt has no position) and takes what reaches the attention function.
    Right for any projection, norm or head layout; costs an output projection of ``prefix_len`` rows.
    """
    captured: list[tuple[Tensor, Tensor, Tensor]] = []
    arguments: dict[str, Any] = {CAPTURE: captured}
    for name, parameter in list(inspect.signature(attention.forward).parameters.items())[1:]:
        if name == "position_embeddings" and rotary_dim is not None:
            ones = rows.new_ones(1, rows.shape[1], rotary_dim)
            arguments[name] = (ones, torch.zeros_like(ones))
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[name] = None
    attention.forward(rows, **arguments)
    if len(captured) != 1:
        raise TypeError(
            f"{type(attention).__name__} did not call its attention function when it was given a prompt"
        )
    return captured[0]


_SEPARATE = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))


def projection_modules(attention: nn.Module) -> dict[str, nn.Module]:
    """The modules a prompt goes through, by name: key and value projections and key norm, or all children."""
    for names in _SEPARATE:
        if all(attention._modules.get(name) is not None for name in names):
            found = ((name, attention._modules.get(name)) for name in (*names, "k_norm"))
            return {name: module for name, module in found if module is not None}
    return {name: child for name, child in attention._modules.items() if name != CHILD and child is not None}


def project_by_modules(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same keys and values from the key and value projections alone; only used where bit-equal at attach."""
    key_module, value_module, *norms = projection_modules(attention).values()
    shape = (
        *rows.shape[:-1],
        -1,
        attention.head_dim if hasattr(attention, "head_dim") else _head_size(attention),
    )
    key, value = key_module(rows).view(shape), value_module(rows).view(shape)
    for norm in norms:
        key = norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def _head_size(attention: nn.Module) -> int:
    for name in ("attention_head_size", "key_value_proj_dim"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise AttributeError(f"{type(attention).__name__} names no head size")


def can_project_by_modules(attention: nn.Module, rows: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`project_by_modules` gives the bits of ``key`` and ``value`` for this layer."""
    if len(projection_modules(attention)) not in (2, 3) or rows.is_meta:
        return False
    try:
        fast_key, fast_value = project_by_modules(attention, rows)
    except (
        AttributeError,
        RuntimeError,
        ValueError,
        TypeError,
    ):  # another layout: the layer's forward knows it
        return False
    return torch.equal(fast_key, key) and torch.equal(fast_value, value)
