"""What an adapter's file says of its origin beside its configuration: task, labels, templates, dtype, versions.

Whoever trains an adapter says it once, with :func:`annotate`; it is part of the record of what is attached, so every
save writes it and it survives a load. Nothing in it changes what the adapter computes.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.verbs.record import require_attachments, require_name

_TEXT = (str, type(None))
# What can be said, and the types it may have in a file.
FIELDS: dict[str, tuple[type, ...]] = {
    "task": _TEXT,
    "labels": (list, type(None)),
    "template": _TEXT,
    "completion_template": _TEXT,
    "system_prompt": _TEXT,
    "chat": (bool, type(None)),
    "base_name": _TEXT,
}
# What every save adds itself.
_WRITTEN: dict[str, tuple[type, ...]] = {"dtype": _TEXT, "versions": (dict, type(None))}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_MAX_LABELS = 65_536


def annotate(model: nn.Module, name: str, facts: Mapping[str, Any]) -> None:
    """Say of adapter ``name`` what its files shall tell: any of :data:`FIELDS`, also the name of the base as given.

    Raises: ValueError: no such adapter or field. TypeError: a value of another type.

    >>> annotate(model, "default", {"task": "classification", "labels": ["bad", "good"]})  # doctest: +SKIP
    """
    record = require_attachments(model)
    require_name(record, name)
    for key in facts:
        if key not in FIELDS:
            raise ValueError(f"facts: expected some of {', '.join(FIELDS)}, got {key!r}")
    try:
        _require_types(facts, FIELDS)
    except ValueError as error:
        raise TypeError(f"facts: {error}") from None
    record.about[name] = {**record.about.get(name, {}), **facts}


def about(model: nn.Module, name: str) -> dict[str, Any]:
    """What the file of an adapter says now, as JSON."""
    facts = require_attachments(model).about.get(name, {})
    return {**facts, "dtype": base_dtype(model), "versions": versions()}


def read_about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The same out of a file's metadata; empty for a file from before there was any. Unknown fields are left out.

    Raises: ValueError: it is malformed.
    """
    try:
        found = json.loads(metadata.get("about", "{}"))
    except (ValueError, RecursionError):
        raise ValueError("its metadata field 'about' is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError("its metadata field 'about' is not a JSON object")
    known = {key: value for key, value in found.items() if key in FIELDS or key in _WRITTEN}
    _require_types(known, {**FIELDS, **_WRITTEN})
    return known


def versions() -> dict[str, str | None]:
    """Of what decides the numbers."""
    from fastadapter import __version__

    try:
        transformers: str | None = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = None
    return {
        "fastadapter": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers,
        "python": platform.python_version(),
    }


def base_dtype(model: nn.Module) -> str | None:
    """The dtype of most of the frozen model's numbers, in short; ``None``: it has none."""
    inner = unwrap(model)
    adapters = {id(each) for host in inner.modules() if isinstance(host, Host) for each in host.parameters()}
    counts: dict[str, int] = {}
    for parameter in inner.parameters():
        if parameter.is_floating_point() and id(parameter) not in adapters:
            word = str(parameter.dtype).removeprefix("torch.")
            counts[word] = counts.get(word, 0) + parameter.numel()
    most = max(counts, key=lambda word: counts[word], default=None)
    return None if most is None else _SHORT.get(most, most)


def _require_types(found: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    for key, value in found.items():
        if not isinstance(value, types[key]):
            expected = " or ".join("null" if each is type(None) else each.__name__ for each in types[key])
            raise ValueError(f"{key!r} must be {expected}, got {type(value).__name__}")
    labels = found.get("labels")
    if labels is not None and (
        len(labels) > _MAX_LABELS or not all(isinstance(label, str) for label in labels)
    ):
        raise ValueError(f"'labels' must be at most {_MAX_LABELS} strings")
