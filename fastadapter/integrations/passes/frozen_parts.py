"""The model's own RMS norms and gated feed-forwards through our kernels on a CPU, where these give the same bits.

A norm is six passes over its rows in PyTorch and a seventh and more backward; adapters are a few percent of a step, the
norms and activations of the frozen model around them a sixth. Modules are found by what they hold and proven by what
they give: the same bits forward, on random values, and the gradient of PyTorch within round-off. Whatever the kernels
are not for (a trainable weight, another device or dtype, a compiler, a transform) runs as it did.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastadapter.nn.classes import class_of, put_before, take_away
from fastadapter.ops.backends import extension_error
from fastadapter.ops.frozen import glu, rms_norm, run_rms_norm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)  # not sharded, quantised or traced ones
_EPS = ("variance_epsilon", "eps")
_MOST_HIDDEN = 1 << 14  # PyTorch sums longer rows in parallel
_GLU = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class _Norm(nn.Module):
    FA_EPS: ClassVar[str]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])
        if len(args) == 1 and not kwargs and is_for_kernel(args[0], weight):  # a gated norm takes more
            eps = self.__dict__[self.FA_EPS]
            if not torch.is_grad_enabled():
                return run_rms_norm("cpp", args[0].contiguous(), weight, eps)
            if not weight.requires_grad:
                return rms_norm(args[0], weight, eps)
        return super().forward(*args, **kwargs)


class _FeedForward(nn.Module):
    FA_ACTIVATION: ClassVar[str]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not torch.is_grad_enabled() or not is_for_kernel(args[0]):
            return super().forward(*args, **kwargs)
        children = cast(dict[str, nn.Module], self._modules)
        gate, up, act = children["gate_proj"](*args), children["up_proj"](*args), children["act_fn"]
        if gate.shape == up.shape and is_for_kernel(gate, up):
            return children["down_proj"](glu(gate, up, act, self.FA_ACTIVATION))
        return children["down_proj"](act(gate) * up)


def is_for_kernel(x: Tensor, other: Tensor | None = None) -> bool:
    """Whether kernels can take ``x``, and ``other`` beside it: plain tensors of a CPU that nothing looks into."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in _DTYPES
        and (other is None or (type(other) in _PLAIN and other.dtype is x.dtype and other.is_cpu))
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def install(model: nn.Module) -> None:
    """Let the parts of ``model`` that can do so use the kernels.

    Each is proven by itself: modules of one class can differ in what their attributes switch on.
    """
    if extension_error("glu_backward"):
        return
    for module in model.modules():
        eps = _norm_eps(module)
        if eps is not None:
            if not isinstance(module, _Norm) and _proves_norm(module, eps):
                put_before(module, _Norm, FA_EPS=eps)
        elif not isinstance(module, _FeedForward) and _is_feed_forward(module):
            activation = _proven_activation(module)
            if activation is not None:
                put_before(module, _FeedForward, FA_ACTIVATION=activation)


def count(model: nn.Module) -> dict[str, int]:
    """How many modules use the kernels, by kind; none of that kind: no entry."""
    modules = list(model.modules())
    kinds = {"norms": _Norm, "feed-forwards": _FeedForward}
    found = {name: sum(isinstance(each, kind) for each in modules) for name, kind in kinds.items()}
    return {name: number for name, number in found.items() if number}


def remove(model: nn.Module) -> None:
    for module in model.modules():
        take_away(module, _Norm)
        take_away(module, _FeedForward)


def _norm_eps(module: nn.Module) -> str | None:
    """The attribute with the number of an RMS norm, if the module can be one."""
    if set(module._parameters) != {"weight"} or module._buffers or "forward" in module.__dict__:
        return None
    if any(not name.startswith("fa_") for name in module._modules):
        return None
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter or not weight.is_cpu or weight.dtype not in _DTYPES:
        return None
    if weight.dim() != 1 or not 0 < len(weight) <= _MOST_HIDDEN:
        return None
    return next((name for name in _EPS if isinstance(module.__dict__.get(name), float)), None)


def _is_feed_forward(module: nn.Module) -> bool:
    own = {
        name for name, child in module._modules.items() if child is not None and not name.startswith("fa_")
    }
    if own != {*_GLU, "act_fn"} or module._parameters or module._buffers or "forward" in module.__dict__:
        return False
    return all(each.is_cpu for name in _GLU for each in cast(nn.Module, module._modules[name]).parameters())


@torch.no_grad()
def _proves_norm(module: nn.Module, eps: str) -> bool:
    plain, weight = _plain(module), cast(Tensor, module._parameters["weight"])
    random = _random(len(weight)).to(weight.dtype)
    plain._parameters = {"weight": nn.Parameter(random, requires_grad=False)}
    ours = functools.partial(rms_norm, weight=random, eps=module.__dict__[eps])
    return _agree(plain.forward, ours, 3 * _random(3, 5, len(weight)).to(weight.dtype))


@torch.no_grad()
def _proven_activation(module: nn.Module) -> str | None:
    """The name of the activation with which a feed-forward is what we take it for.

    In fp32 whatever the weights are: an activation is told from another by its gradient, which bf16 rounds to 3 digits.
    """
    gate, up = 3 * _random(5, 256), _random(5, 256, seed=1)
    act = cast(nn.Module, module._modules["act_fn"])

    def theirs(each: Tensor) -> Tensor:
        plain = _plain(module)
        plain._modules = {
            "gate_proj": _Gives(each), "up_proj": _Gives(up), "down_proj": nn.Identity(), "act_fn": act
        }  # fmt: skip
        return plain.forward(torch.empty(0, device="cpu"))

    ours = functools.partial(glu, up=up, act=act)
    found = (name for name in _ACTIVATIONS if _agree(theirs, functools.partial(ours, activation=name), gate))
    return next(found, None)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


def _plain(module: nn.Module) -> nn.Module:
    """The module with the forward of its own class, to be given other children."""
    plain = copy.copy(module)
    plain.__class__ = class_of(module)
    return plain


class _Gives(nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def _agree(theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """The same bits, and gradients that differ by round-off."""
    try:
        expected = _with_gradient(theirs, x)
    except Exception:  # only its own code knows what it needs: it is none of these
        return False
    found = _with_gradient(ours, x)
    tolerance = 16 * torch.finfo(x.dtype).eps * expected[1].abs().max().item()
    return torch.equal(found[0], expected[0]) and (found[1] - expected[1]).abs().max().item() <= tolerance


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        output = function(given)
        (gradient,) = torch.autograd.grad(output, given, torch.ones_like(output).cumsum(-1) % 3 - 1)
    return output.detach(), gradient
