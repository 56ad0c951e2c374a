"""What a model asks of its attention in keyword arguments, beside query, key, value and mask."""

from typing import Any

# Keyword arguments that change what a softmax over prefix and keys would mean.
_UNKNOWN = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "choices of keys for each query",
    "block_indices": "choices of keys for each query",
}
_SPECIAL = (*_UNKNOWN, "position_bias", "softcap")


def require_known(options: dict[str, Any]) -> None:
    """Refuse what the model asks of its attention and a softmax that is shared with a prefix does not do.

    Args:
        options: the keyword arguments of the model's attention.
    Raises: ValueError: naming the argument.
    """
    for name, meaning in _UNKNOWN.items():
        if options.get(name) is not None:
            raise ValueError(f"{meaning} ({name}) do not go with a prefix or soft prompt")


def is_plain(options: dict[str, Any]) -> bool:
    """Whether nothing but a scale, causality and a window is asked of the attention."""
    return all(options.get(name) is None for name in _SPECIAL) and not options.get("output_attentions")
