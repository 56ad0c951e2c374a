"""Verbs change a model as a whole or not at all."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastadapter.integrations.passes import attention as hook
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.passes.prefix import PrefixHost
from fastadapter.integrations.verbs.record import Attachments, attachments

_CONTAINERS = (dict, OrderedDict, list, set)


class Undo:
    """The structure of a model as it was: every module's class, attributes, children, parameters and hooks.

    Values of parameters are not copied: who writes to some says with :meth:`add` how they come back.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._steps: list[Callable[[], Any]] = []
        self._modules = [(module, dict(module.__dict__)) for module in model.modules()]
        self._classes = [(module, type(module)) for module in model.modules()]
        self._contents = [
            (value, value.copy())
            for _, attributes in self._modules
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]
        self._requires_grad = [(each, each.requires_grad) for each in model.parameters()]
        record = attachments(model)
        self._record = None if record is None else (record, record.copied())
        self._put_state_back = record.state.remember() if record is not None else lambda: None

    def add(self, step: Callable[[], Any]) -> None:
        """Have ``step`` called if the verb fails, once the structure is what it was."""
        self._steps.append(step)

    def restore(self) -> None:
        attempted = attachments(self._model)
        found = _hosts(self._model)
        for value, content in self._contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for module, attributes in self._modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for module, kind in self._classes:
            module.__class__ = kind
        for step in reversed(self._steps):
            step()
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        if self._record is not None:
            record, copied = self._record
            record.__dict__.update(copied.__dict__)
            self._put_state_back()
        elif attempted is not None:
            attempted.state.choose(None)
        kept = _hosts(self._model)
        for host in kept:
            host.forget()
            if isinstance(host, PrefixHost):
                hook.keep_hook_for(host)
        for host in found - kept:
            hook.release_hook_for(host)
        hook.remove_hook_if_unused()
        if any(isinstance(host, PrefixHost) for host in kept):
            hook.install_hook()


def _hosts(model: nn.Module) -> set[Host]:
    return {module for module in model.modules() if isinstance(module, Host)}


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, record: Attachments) -> Iterator[Undo]:
    """Change the adapters of a model while no pass runs; after an error it is what it was.

    Raises: RuntimeError: called inside a pass of the model, or passes of other threads do not end.
    """
    with record.state.traffic.changing():
        undo = Undo(model)
        try:
            yield undo
        except BaseException:  # an interrupt too: half an adapter is no model
            undo.restore()
            raise
