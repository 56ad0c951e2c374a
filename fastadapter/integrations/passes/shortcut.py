"""Calls of a module that a pass has settled, without the way through PyTorch's hooks.

A model of LLaMA-Adapter V2 has hooks at every linear layer and norm, and a token of a small model is some hundred of
them: what they add to it is the machinery around a multiplication and an addition, and a norm whose output a copy
replaces. So a module with a host of these asks, when it is called, whether an earlier pass like this one has left a
step, and takes it whole. Everything else goes the way it went before, hooks and all.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.choice import this_thread
from fastadapter.nn.classes import class_of, put_before, take_away


class Shortened(nn.Module):
    FA_HOST: ClassVar[str]  # the child that may have left a step

    # Once per layer and token, with nothing in the caches: one function, and no more calls than it takes.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # first: a graph is not to depend on steps
            inside = self.__dict__
            host = inside["_modules"].get(self.FA_HOST)
            step = None if host is None else host.__dict__["_step"]
            if step is not None and step.whole is not None:
                run = this_thread.passing
                hooks = len(inside["_forward_hooks"]) + len(inside["_forward_pre_hooks"])
                if run is not None and run.stamp is step.stamp and hooks == host.HOOKS:
                    return step.whole(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class Shortcut:
    """Lets ``module`` take the steps of its child ``host``, until it is removed.

    Args:
        only: the one class of modules that the steps are for; ``None``: any.
        kind: how the steps are taken.
    """

    def __init__(
        self,
        module: nn.Module,
        host: str,
        only: type[nn.Module] | None = None,
        kind: type[Shortened] = Shortened,
    ):
        self._module, self._host, self._only, self._kind = module, host, only, kind
        self._take()

    def move(self, module: nn.Module) -> None:
        self.remove()
        self._module = module
        self._take()

    def _take(self) -> None:
        kind = class_of(self._module)
        # one that does more when it is called than run its hooks is left alone
        if kind.__call__ is nn.Module.__call__ and self._only in (None, kind):
            put_before(self._module, self._kind, FA_HOST=self._host)

    def remove(self) -> None:
        take_away(self._module, self._kind)


Handle = RemovableHandle | Shortcut
