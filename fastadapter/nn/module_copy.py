"""A trainable copy of one of the model's own modules."""

import copy
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.func import functional_call

from fastadapter.nn.masters import Masters


class ModuleCopy(Masters):
    """The parameters of a norm or a classification head as an adapter's own, starting from the model's.

    fp32 whatever the dtype of the model, computed with in the model's dtype, so that a fresh copy gives the same bits.

    Args:
        module: the model's.

    >>> norm, x = torch.nn.LayerNorm(8), torch.randn(2, 8)
    >>> torch.equal(ModuleCopy(norm)(norm, x), norm(x))
    True
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.own = copy.deepcopy(_plain(module))
        for parameter in self.own.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` gives with these parameters in place of its own."""
        dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        buffers = dict(module.named_buffers())
        own = {name: buffers[name] for name, _ in self.own.named_buffers()}
        own |= {name: parameter.to(dtypes[name]) for name, parameter in self.own.named_parameters()}
        # Not a copy of the module made for the call: a compiler cannot follow that.
        return functional_call(self.own, own, args, kwargs)


def _plain(module: nn.Module) -> nn.Module:
    """The same module without hooks and without the adapters in it."""
    plain = copy.copy(module)
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
    plain._modules = {name: child for name, child in module._modules.items() if not name.startswith("fa_")}
    return plain
