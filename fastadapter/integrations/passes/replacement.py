"""Linear layers that are exchanged while adapters are attached: PEFT puts its layers in their place and takes them out.

A scale belongs to a place in the model, so it moves to the layer that is put there: around LoRA while there is LoRA. A
layer of an adapter stays: its weights go into an op, so a layer around it would never run.

PyTorch tells of it: one hook on the registration of modules, for all models of the process. It does nothing unless the
module that is replaced is a layer with scales or part of an adapter.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fastadapter.integrations.parts.linear import layers_of, sizes
from fastadapter.integrations.passes.choice import State
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.passes.shortcut import Handle, Shortcut
from fastadapter.nn.masters import is_own


class PlaceHost(Host):
    """A host that acts on whatever linear layer stands in a place of the model."""

    def __init__(self, state: State):
        super().__init__(state)
        self._handles: Sequence[Handle] = ()

    def hooks(self, module: nn.Module) -> Sequence[Handle]:
        self._handles = self.act_in(module)
        return self._handles

    def act_in(self, module: nn.Module) -> Sequence[Handle]:
        """Register forward pre-hooks and forward hooks, and take a shortcut."""
        raise NotImplementedError

    def move(self, old: nn.Module, new: nn.Module) -> None:
        """Act in ``new``, which takes the place of ``old``, and no longer there."""
        for handle in self._handles:
            if isinstance(handle, Shortcut):
                handle.move(new)
                continue
            hooks = handle.hooks_dict_ref()
            if hooks is None or handle.id not in hooks:
                continue  # folded: they wait to be registered again
            before = hooks is old._forward_pre_hooks
            place = new._forward_pre_hooks if before else new._forward_hooks
            place[handle.id] = hooks.pop(handle.id)
            # so that whoever removes the adapter removes them where they are now
            marks = (
                (new._forward_pre_hooks_with_kwargs,)
                if before
                else (new._forward_hooks_with_kwargs, new._forward_hooks_always_called)
            )
            handle.hooks_dict_ref = weakref.ref(place)
            handle.extra_dict_ref = tuple(weakref.ref(each) for each in marks)
        del old._modules[self.CHILD]
        new._modules[self.CHILD] = self  # add_module asks some wrappers, which answer for what they wrap

    def leave(self, module: nn.Module) -> None:
        """Act in ``module`` no longer."""
        for handle in self._handles:
            handle.remove()
        del module._modules[self.CHILD]


def _follow(parent: nn.Module, name: str, new: Any) -> nn.Module | None:
    """What is registered instead of ``new``, if something else is."""
    old = parent._modules.get(name)
    if old is None or new is None or old is new:
        return None
    if is_own(old) and any(old is layer for layer in layers_of(new)):
        warnings.warn(
            f"{name} of an adapter ({type(parent).__name__}) stays as it is, without {type(new).__name__} of "
            f"{type(new).__module__} around it: other adapters go on the model's own layers only",
            stacklevel=2,
        )
        return old
    moving = [child for child in old._modules.values() if isinstance(child, PlaceHost)]
    _require_no_copies(name, old, new, {host.CHILD for host in moving})
    for host in moving:
        _move(host, name, old, new)
    return None


def _require_no_copies(name: str, old: nn.Module, new: nn.Module, moving: set[str]) -> None:
    """PEFT's modules_to_save copies a module with the adapters in it; no verb would ever reach those of the copy."""
    kept = {id(each) for each in old.modules()}
    for path, each in new.named_modules():
        if isinstance(each, Host) and id(each) not in kept and each.CHILD not in moving:
            raise TypeError(
                f"{name}: {type(new).__name__} holds a copy of its adapters {', '.join(each.adapters)} ({path}), which "
                "could be neither chosen nor saved: leave the module out of modules_to_save, or call get_peft_model "
                "first and attach after it"
            )


def _move(host: PlaceHost, name: str, old: nn.Module, new: nn.Module) -> None:
    wraps = any(old is layer for layer in layers_of(new))
    if not wraps and any(old is each for each in new.modules()):
        return  # in something that only passes calls on; the host acts within
    if sizes(new) != sizes(old):
        raise TypeError(
            f"{name}: adapters {', '.join(host.adapters)} act on this linear layer of sizes {sizes(old)}, so "
            f"{type(new).__name__} of sizes {sizes(new)} cannot take its place: detach them first"
        )
    for each in list(new.modules()):  # a wrapper's copy of the layer would act once more
        copied = each._modules.get(host.CHILD)
        if copied is not None and copied is not host:
            copied.leave(each)
    host.move(old, new)


register_module_module_registration_hook(_follow)  # type: ignore[arg-type]  # it may return a module
