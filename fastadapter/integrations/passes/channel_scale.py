"""LLaMA-Adapter V2 in a model: hooks on linear layers, and copies that take the place of norms and heads."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
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

    def on_rows(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        first = next((each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)), None)
        if first is None:
            raise TypeError(f"{type(module).__name__} was called without a tensor, expected its input")
        for group in self.groups(len(first), first.device):
            own = self.adapter(group.names[0])
            if group.members is None:
                return own(module, *args, **kwargs)
            mine = functools.partial(_members, len(first), group.members)
            results = own(module, *tree_map(mine, args), **tree_map(mine, kwargs))
            output = tree_map(functools.partial(_put, module, len(first), group.members), output, results)
        return output


def _instead(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    host = module._modules.get(CopyHost.CHILD)
    return None if host is None or host.idle() else host.on_rows(module, args, kwargs, output)


def _members(batch: int, members: Tensor, value: Any) -> Any:
    """The rows of one adapter of what a module is given; what has no rows is for all of them."""
    return value[members] if torch.is_tensor(value) and value.dim() and len(value) == batch else value


def _put(module: nn.Module, batch: int, members: Tensor, output: Any, result: Any) -> Any:
    """What a module gives with the rows of one adapter in it."""
    if not torch.is_tensor(output):
        return output
    if not output.dim() or len(output) != batch:
        raise ValueError(
            f"rows: {type(module).__name__} gives a tensor {tuple(output.shape)} for a batch of {batch} rows, which "
            "cannot be one adapter's for some of them"
        )
    return output.index_copy(0, members, result)
