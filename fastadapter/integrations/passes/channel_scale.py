"""LLaMA-Adapter V2 in a model: hooks on linear layers, and copies that take the place of norms and heads."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.passes.replacement import PlaceHost
from fastadapter.integrations.passes.training import refuse_backward


class ScaleHost(PlaceHost):
    """The scales and biases of one linear layer: of all that stands in its place, LoRA around it included."""

    CHILD: ClassVar[str] = "fa_scale"

    def act_in(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_pre_hook(_before), module.register_forward_hook(_after)]

    def kind(self, adapter: nn.Module) -> Any:
        return adapter.convention

    def on_rows(self, x: Tensor, part: str) -> Tensor:
        for group in self.groups(x.shape[0], x.device):
            adapters = [self.adapter(name) for name in group.names]
            if group.row_ids is None:
                x = getattr(adapters[0], part)(x)
            else:
                for index, adapter in enumerate(adapters):
                    mine = (group.row_ids == index).view(-1, *[1] * (x.dim() - 1))
                    x = torch.where(mine, getattr(adapter, part)(x), x)
        return x


def _before(module: nn.Module, args: tuple) -> Any:
    host = module._modules.get(ScaleHost.CHILD)
    return None if host is None or host.idle() else (host.on_rows(args[0], "before"), *args[1:])


def _after(module: nn.Module, args: tuple, output: Tensor) -> Any:
    host = module._modules.get(ScaleHost.CHILD)
    if host is None or host.idle():
        return None
    return host.on_rows(refuse_backward(module, args[0], output), "after")


class CopyHost(Host):
    """Copies of one norm or head, each an adapter's own."""

    CHILD: ClassVar[str] = "fa_copy"

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(_instead, with_kwargs=True)]

    def kind(self, adapter: nn.Module) -> Any:
        return id(adapter)

    def on_rows(self, module: nn.Module, x: Tensor, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        for group in self.groups(x.shape[0], x.device):
            own = self.adapter(group.names[0])
            if group.members is None:
                return own(module, x, **kwargs)
            output = output.index_copy(0, group.members, own(module, x[group.members], **kwargs))
        return output


def _instead(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    host = module._modules.get(CopyHost.CHILD)
    if host is None or host.idle():
        return None
    if args:
        return host.on_rows(module, args[0], kwargs, output)
    (name, x), *others = kwargs.items()
    raise TypeError(f"{type(module).__name__} was called with {name} as a keyword, expected its input first")
