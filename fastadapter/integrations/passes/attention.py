"""The hook into transformers' attention.

transformers looks every attention function up with ``AttentionInterface.get_interface``. While an adapter is
attached anywhere, that lookup returns the same function wrapped in :func:`_dispatch`, which runs it and adds the
term of the adapter found in the calling module. Masks, caches and the configuration stay the model's own. (An
attention name of our own would drop masks in silence, see docs/design.md.)
"""

import functools
import weakref
from typing import Any

from torch import nn

from fastadapter.integrations.parts.projection import CAPTURE, StandIn
from fastadapter.integrations.passes.packed import PACKED, by_sequences, sequences_in

# Name of our child module in an attention module.
CHILD = "fa_prefix"
# Keyword under which a decoder passes the keys and values of soft prompts down to its attention.
PROMPTS = "fa_prompts"

# Every adapted attention in the process, copies of models included.
_hosts: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_original_lookup: Any = None


def _dispatch(attention, module, query, key, value, attention_mask, *args, **kwargs):
    """Run ``attention`` as the model would, with what the adapters in ``module`` make of it."""
    captured = module.fa_captured if isinstance(module, StandIn) else kwargs.pop(CAPTURE, None)
    if captured is not None:
        captured.append((query, key, value, kwargs))
        batch, num_heads, q_len, _ = query.shape
        return query.new_zeros(batch, q_len, num_heads, value.shape[-1]), None
    prompts = kwargs.pop(PROMPTS, None)
    offsets, options = kwargs.pop(PACKED, None), kwargs
    call = functools.partial(attention, module, query, key, value, attention_mask, *args, **kwargs)
    if offsets is not None:
        sequences = sequences_in(module, query, key, value, attention_mask, {**kwargs, PACKED: offsets})
        if sequences is not None:
            call = functools.partial(by_sequences, query, key, value, sequences, kwargs.get("scaling"))
        options = {**kwargs, PACKED: sequences}
    host = module._modules.get(CHILD)
    if host is None:
        return call()
    return host.attend(call, module, query, key, value, attention_mask, prompts, options)


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
