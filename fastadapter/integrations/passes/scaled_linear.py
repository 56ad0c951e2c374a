"""What a linear layer with the scale and bias of one adapter comes to, in a pass that has settled that they act.

In PyTorch three operations, of which each costs a token more than its arithmetic. A few rows of fp32 on a CPU are one
operation of ours, around PyTorch's product: the same bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapter.integrations.passes.choice import this_thread
from fastadapter.integrations.passes.shortcut import Shortened
from fastadapter.ops import prepared

_PLAIN = (Tensor, nn.Parameter)  # not sharded or quantised ones
_FLOAT = torch.float32


class Ready(NamedTuple):
    """One layer as one operation, for ``most`` numbers of input and fewer, as long as it is what it was."""

    weight: Tensor
    own_bias: Tensor | None
    kind: type[nn.Module]
    most: int
    number: prepared.Number


class ScaledLinear:
    """Called with the layer and its input, in place of the layer and its hooks.

    Args:
        scale, bias: of the adapter, in the dtype of the activations; the scale is of the input, or of the output.
        after: what the layer's output for an input becomes, whatever its dtype.

    Attributes:
        ready: after a pass of few rows, if one operation gave them the same bits.
    """

    def __init__(
        self,
        scale: Tensor,
        bias: Tensor,
        by_input: bool,
        after: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ):
        self._scale, self._bias, self._by_input, self._after = scale, bias, by_input, after
        self.ready: Ready | None = None
        self._refused: Any = None  # with what it was tried in vain

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        dtype = self._scale.dtype
        replaced = "forward" in layer.__dict__ or type(layer).forward is not nn.Linear.forward
        if x.dtype is not dtype or replaced:
            return nn.Module.__call__(layer, x)
        weight, own_bias = cast(Tensor, layer._parameters["weight"]), layer._parameters["bias"]
        y = F.linear(x * self._scale if self._by_input else x, weight, own_bias)
        if y.dtype is not dtype:  # autocast
            return self._after(layer, x, y)
        y += self._bias
        if not self._by_input:
            y *= self._scale
        most = prepared.MOST_ROWS * x.shape[-1]
        if x.numel() <= most and self._refused != (id(weight), id(own_bias)):
            self._prepare(layer, weight, own_bias, most, x, y)
        return y

    def _prepare(
        self,
        layer: nn.Module,
        weight: Tensor,
        own_bias: Tensor | None,
        most: int,
        x: Tensor,
        expected: Tensor,
    ) -> None:
        self._refused = (id(weight), id(own_bias))
        operands = (x, weight, self._scale, self._bias, *(() if own_bias is None else (own_bias,)))
        plain = all(type(each) in _PLAIN and each.dtype is _FLOAT and each.is_cpu for each in operands)
        if prepared.ERROR is not None or not plain or x.dim() > 4:
            return
        of = prepared.prepare_scaled_linear(weight, own_bias, self._scale, self._bias, self._by_input)
        number = prepared.Number(of)
        if torch.equal(prepared.repeat(x, of), expected):
            self.ready = Ready(weight, own_bias, layer.__class__, most, number)
            self._refused = None


class ShortenedLinear(Shortened):
    """A linear layer that is called as one operation where that is :class:`Ready`."""

    # Once per linear layer and token, with nothing in the caches: one function for all that is asked.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            inside = self.__dict__
            host = inside["_modules"].get(self.FA_HOST)
            step = None if host is None else host.__dict__["_step"]
            ready = None if step is None or step.whole is None else step.whole.ready
            if ready is not None and len(args) == 1 and not kwargs:
                run, parameters, x = this_thread.passing, inside["_parameters"], args[0]
                if (
                    run is not None
                    and run.stamp is step.stamp
                    and parameters["weight"] is ready.weight
                    and parameters["bias"] is ready.own_bias
                    and self.__class__ is ready.kind
                    and "forward" not in inside
                    and len(inside["_forward_hooks"]) + len(inside["_forward_pre_hooks"]) == host.HOOKS
                    and x.dtype is _FLOAT
                    and x.numel() <= ready.most
                    and not torch.is_autocast_enabled("cpu")
                ):
                    return prepared.repeat(x, ready.number.value)
        return super().__call__(*args, **kwargs)
