"""How the layers of a decoder mix tokens: whether a prompt can be run through them apart from its text."""

import re
from typing import Any

from torch import nn

# Layers that carry a state, or a window of inputs, from token to token.
_STATEFUL = re.compile(
    r"Mamba|SSM|Ssm|Recurrent|LinearAttention|GatedDelta|DeltaNet|DeltaAttention|ShortConv|RWKV|Rwkv|Retention|"
    r"LightningAttention|HGRN|RgLru"
)
# Rotary embeddings whose factors depend on how long the whole sequence is.
_LENGTH_DEPENDENT = {"longrope", "dynamic"}


def reason_to_join(decoder: nn.Module) -> str | None:
    """Why a prompt has to be run with its text, as far as the kinds of layers tell; ``None``: it can be run apart."""
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Conv1d) or _STATEFUL.search(type(module).__name__):
            return f"{path} ({type(module).__name__}) carries a state from token to token"
    config = getattr(decoder, "config", None)
    for kind in _rope_types(config):
        if kind in _LENGTH_DEPENDENT:
            return f"rotary embeddings of the type {kind!r} depend on the length of the sequence"
    if _is_windowed(config):
        return "a window cuts off what is far, prompts too"
    return None


def _is_windowed(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind not in ("full_attention", "attention") for kind in kinds)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return bool(window) and getattr(config, "use_sliding_window", True) is not False


def _rope_types(config: Any) -> list[str]:
    found = []
    for field in ("rope_parameters", "rope_scaling"):
        value = getattr(config, field, None)
        if isinstance(value, dict):
            each = [value, *(inner for inner in value.values() if isinstance(inner, dict))]
            found += [str(parameters.get("rope_type", parameters.get("type"))) for parameters in each]
    return found
