"""A word about adapters that act in training and cannot learn from it."""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch

# By the state that all hosts of a model share.
_said: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def say_if_frozen(host: Any, names: Iterable[str | None]) -> None:
    """Warn, once per model and adapter, about adapters that act in a training pass and cannot learn from it."""
    if not (host.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    for name in names:
        if name is None or name not in host.adapters:
            continue
        # in every layer of every step: asked at the first parameter, as a rule
        if any(each.requires_grad for each in host.adapters[name].parameters()):
            continue
        said = _said.setdefault(host.state, set())
        if name in said or next(host.adapters[name].parameters(), None) is None:
            continue
        said.add(name)
        warnings.warn(
            f"adapter {name!r} acts in a training pass but its parameters are frozen, as get_peft_model and others "
            "leave them: call requires_grad_(True) on those with '.fa_' in their names, and make the optimiser after "
            "that; nothing is to be done where it shall stay as it is",
            stacklevel=2,
        )
