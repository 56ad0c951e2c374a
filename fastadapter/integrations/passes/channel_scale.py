"""LLaMA-Adapter V2 in a model: hooks on linear layers, and copies that take the place of norms and heads."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.passes.replacement import PlaceHost
from fastadapter.integrations.passes.scaled_linear import ScaledLinear, ShortenedLinear
from fastadapter.integrations.passes.shortcut import Handle, Shortcut
from fastadapter.integrations.passes.training import refuse_backward
from fastadapter.nn import ChannelScale
from fastadapter.nn.channel_scale import scale_input, shift_output


class ScaleHost(PlaceHost):
    """The scales and biases of one linear layer: of all that stands in its place, LoRA around it included."""

    CHILD: ClassVar[str] = "fa_scale"
    HOOKS: ClassVar[int] = 2

    def act_in(self, module: nn.Module) -> Sequence[Handle]:
        return [
            module.register_forward_pre_hook(_before),
            module.register_forward_hook(_after),
            Shortcut(module, self.CHILD, nn.Linear, ShortenedLinear),
        ]

    def kind(self, adapter: nn.Module) -> Any:
        return adapter.convention

    def before(self, x: Tensor) -> Tensor:
        """What the layer gets instead of ``x``."""
        step = self.step()
        if step is not None:
            repeated = x if step.act is None else step.act(x, True)
            if repeated is not None:
                return repeated
        return self._on_rows(x, "before")

    def after(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """What the layer's ``output`` for ``x`` becomes."""
        step = self.step()
        if step is not None:
            repeated = output if step.act is None else step.act(output, False)
            if repeated is not None:
                return repeated
        if self.idle():
            self.settle_idle()
            return output
        return self._on_rows(refuse_backward(module, x, output), "after")

    def _on_rows(self, x: Tensor, part: str) -> Tensor:
        for group in self.groups(x.shape[0], x.device):
            adapters = [self.adapter(name) for name in group.names]
            if group.row_ids is None:
                self._settle_one(group.names[0], x.dtype)
                x = getattr(adapters[0], part)(x)
            else:
                for index, adapter in enumerate(adapters):
                    mine = (group.row_ids == index).view(-1, *[1] * (x.dim() - 1))
                    x = torch.where(mine, getattr(adapter, part)(x), x)
        return x

    def _settle_one(self, name: str, dtype: torch.dtype) -> None:
        """One adapter for all rows, its parameters rounded to the activations' dtype once for many passes."""
        if not self.keeps():
            return
        adapter: ChannelScale = self.adapter(name)
        scale, bias = self.keep(
            (name, dtype),
            lambda: [adapter],
            lambda: (adapter.scale.to(dtype), adapter.bias.to(dtype)),
            read_anew=lambda rounded: rounded,
        )
        by_input = adapter.convention == "input"
        behind = None if by_input else scale

        def act(x: Tensor, before: bool) -> Tensor | None:
            if x.dtype is not dtype:
                return None
            if before:
                return scale_input(x, scale) if by_input else x
            return shift_output(x, bias, behind)

        whole = ScaledLinear(scale, bias, by_input, self.after)
        self.settle(act, (name, dtype), whole=whole)


def _before(module: nn.Module, args: tuple) -> Any:
    host = module._modules.get(ScaleHost.CHILD)
    return None if host is None else (host.before(args[0]), *args[1:])


def _after(module: nn.Module, args: tuple, output: Tensor) -> Any:
    host = module._modules.get(ScaleHost.CHILD)
    return None if host is None else host.after(module, args[0], output)


class CopyHost(Host):
    """Copies of one norm or head, each an adapter's own."""

    CHILD: ClassVar[str] = "fa_copy"

    def hooks(self, module: nn.Module) -> Sequence[Handle]:
        return [module.register_forward_hook(_instead, with_kwargs=True), Shortcut(module, self.CHILD)]

    def kind(self, adapter: nn.Module) -> Any:
        return id(adapter)

    def instead(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """What takes the place of the module's ``output``."""
        step = self.step()
        if step is not None:
            return output if step.act is None else step.act(*args, **kwargs)
        if self.idle():
            self.settle_idle()
            return output
        return self._on_rows(module, args, kwargs, output)

    def _settle_one(self, module: nn.Module, name: str) -> None:
        """One copy for all rows, rounded to the model's dtype once for many passes."""
        if not self.keeps():
            return
        own = self.adapter(name)
        if not own.has_buffers():
            # of the module itself what is copied, not the copies in it
            inside = [*module._parameters, *(key for key in module._modules if not key.startswith("fa_"))]
            act = self.keep(
                name,
                lambda: [own, *((module, key) for key in inside)],
                lambda: own.rounded(module),
                read_anew=nn.Module.parameters,
            )
            self.settle(act, name, whole=functools.partial(_copy_instead, act))

    def _on_rows(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        first = next((each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)), None)
        if first is None:
            raise TypeError(f"{type(module).__name__} was called without a tensor, expected its input")
        for group in self.groups(len(first), first.device):
            own = self.adapter(group.names[0])
            if group.members is None:
                self._settle_one(module, group.names[0])
                return own(module, *args, **kwargs)
            mine = functools.partial(_members, len(first), group.members)
            results = own(module, *tree_map(mine, args), **tree_map(mine, kwargs))
            output = tree_map(functools.partial(_put, module, len(first), group.members), output, results)
        return output


def _instead(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    host = module._modules.get(CopyHost.CHILD)
    return None if host is None else host.instead(module, args, kwargs, output)


def _copy_instead(act: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # a norm calls no others
    is_leaf = not (act._modules or act._forward_hooks or act._forward_pre_hooks)
    return act.forward(*args, **kwargs) if is_leaf else act(*args, **kwargs)


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
