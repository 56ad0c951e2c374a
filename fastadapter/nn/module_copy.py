"""A trainable copy of one of the model's own modules."""

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastadapter.nn.classes import class_of
from fastadapter.nn.masters import Masters

# functional_call puts tensors into the copy while it runs, which no second thread may see.
_EXCHANGING = threading.Lock()
# What accelerate puts on a module itself, to bring the weights that it holds for the model there.
_PUT_ON_MODULES = ("forward", "_hf_hook", "_old_forward")


class ModuleCopy(Masters):
    """The parameters of a norm or a head as an adapter's own, starting from the model's, and its running statistics.

    fp32 whatever the dtype of the model, computed with in the model's dtype, so that a fresh copy gives the same bits.

    Args:
        module: the model's.
        shared: names of parameters in it that are not copied: what ``module`` holds when it is called acts.
        copied: what was copied before, as ``copy.deepcopy`` keeps it; modules that share a parameter, copied with the
            same ``copied``, share its copy.
    Raises: TypeError: the module cannot be copied, or its weights are quantised or offloaded and cannot be trained.

    >>> norm, x = torch.nn.LayerNorm(8), torch.randn(2, 8)
    >>> torch.equal(ModuleCopy(norm)(norm, x), norm(x))
    True
    """

    def __init__(self, module: nn.Module, shared: Sequence[str] = (), copied: dict[int, Any] | None = None):
        super().__init__()
        copied = {} if copied is None else copied
        plain = _plain(module, {})
        kept = {id(parameter) for key, parameter in plain.named_parameters() if key in shared}
        for key, parameter in plain.named_parameters():
            if id(parameter) in kept:
                copied[id(parameter)] = parameter
            elif not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao"):
                raise TypeError(
                    f"{key} of {type(module).__name__} is quantised ({type(parameter).__name__} of {parameter.dtype}) "
                    "and cannot be trained; load the model with this module left as it is"
                )
            elif parameter.is_meta and any("_hf_hook" in vars(each) for each in module.modules()):
                raise TypeError(
                    f"{key} of {type(module).__name__} is offloaded by accelerate and cannot be trained; keep this "
                    "module on a device (device_map)"
                )
        try:
            self.own = copy.deepcopy(plain, copied)
        except (RuntimeError, TypeError) as error:
            raise TypeError(f"a {type(module).__name__} cannot be copied: {error}") from error
        for holder in self.own.modules():
            for name in [name for name, each in holder._parameters.items() if id(each) in kept]:
                del holder._parameters[name]
                holder.register_buffer(name, torch.empty(0, device="cpu"), persistent=False)
        for parameter in self.own.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def statistics(self) -> dict[str, Tensor]:
        """What training changes besides parameters, by its names in the copy: buffers that are saved."""
        saved = self.own.state_dict(keep_vars=True)
        return {key: value for key, value in self.own.named_buffers() if key in saved}

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` gives with these parameters in place of its own."""
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _EXCHANGING:
            statistics = self.statistics() if self.has_buffers() else {}
            own: dict[str, Tensor] = {**dict(self.own.named_parameters()), **statistics}
            tensors = {key: value.to(_tensor(module, key).dtype) for key, value in own.items()}
            constant = [key for key, _ in self.own.named_buffers() if key not in statistics]
            if constant or any(tensors[key] is not value for key, value in own.items()):
                tensors |= {key: _tensor(module, key) for key in constant}
                # Not a copy of the module made for the call: a compiler cannot follow that.
                output = functional_call(self.own, tensors, args, kwargs)
                if self.training:
                    _write_back(statistics, tensors)
                return output
        return self.own(*args, **kwargs)

    def rounded(self, module: nn.Module) -> nn.Module:
        """A module that gives what :meth:`forward` gives without gradients, with the parameters as they are now.

        It is the copy itself where the dtypes agree, so that a large head is not in memory twice.

        Raises: TypeError: the module has buffers, which change.
        """
        if self.has_buffers():
            raise TypeError(f"a {type(self.own).__name__} with buffers cannot be rounded once for many calls")
        with _EXCHANGING:  # another thread's call may have put its tensors in
            dtypes = {key: _tensor(module, key).dtype for key, _ in self.own.named_parameters()}
            if all(parameter.dtype == dtypes[key] for key, parameter in self.own.named_parameters()):
                return self.own
            rounded = copy.deepcopy(self.own)
        for key, parameter in rounded.named_parameters():
            parameter.data = parameter.data.to(dtypes[key])
        return rounded.requires_grad_(False).eval()

    def has_buffers(self) -> bool:
        """Whether the module has more than parameters: statistics, or what it shares with the model."""
        return any(each._buffers for each in self.own.modules())


@torch.no_grad()
def _write_back(statistics: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Keep what a module in another dtype noted in its running statistics."""
    for key, value in statistics.items():
        if tensors[key] is not value:
            value.copy_(tensors[key])


def _tensor(module: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    return getattr(module.get_submodule(path), name)


def _plain(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same modules with the same parameters, without hooks, adapters and what else was put on them."""
    if module in made:
        return made[module]
    plain = made[module] = copy.copy(module)
    plain.__class__ = class_of(module)
    for attribute in _PUT_ON_MODULES:
        plain.__dict__.pop(attribute, None)
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
    plain._modules = {
        name: None if child is None else _plain(child, made)
        for name, child in module._modules.items()
        if not name.startswith("fa_")
    }
    return plain
