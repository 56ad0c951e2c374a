"""The text that prompts and prefixes start from unless told otherwise: what the template says of the task."""

import dataclasses
import string
from typing import Any

from fastadapter.methods import TEXT, MethodConfig


def task_text(template: str) -> str | None:
    r"""A template without its record; ``None`` where that says nothing.

    >>> task_text("Review: {text}\nSentiment:")
    'Review: \nSentiment:'
    >>> task_text("{text}") is None
    True
    """
    text = "".join(literal for literal, *_ in string.Formatter().parse(template))
    return text if text.strip() else None


def from_text(config: MethodConfig, text: str | None) -> MethodConfig:
    """The configuration with a start from ``text``; as it is where there is none, or the method has no such start."""
    chosen: Any = config
    if text is None or getattr(chosen, "init", TEXT) == TEXT or not hasattr(chosen, "init_text"):
        return config
    width = getattr(chosen, "reparam_size", None)
    if width is not None and width < chosen.prefix_len:  # too narrow to give chosen keys and values
        return config
    return dataclasses.replace(chosen, init=None, init_text=text)
