"""The model's own RMS norms and gated feed-forwards through our kernels on a CPU, where these give the same bits.

A norm is six passes over its rows in PyTorch and a seventh and more backward; adapters are a few percent of a step, the
norms and activations of the frozen model around them a sixth. Modules are found by what they hold and proven by what
they give: the same bits forward, on random values, and the gradient of PyTorch within round-off. Whatever the kernels
are not for (a trainable weight, another device or dtype, a compiler, a transform) runs as it did.
"""

import copy
import functools
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
    """Let the parts of ``model`` that can do so use the kernels."""
    if extension_error("glu_backward"):
        return
    proven: dict[Any, Any] = {}
    for module in model.modules():
        install_in(module, proven)


def install_in(module: nn.Module, proven: dict[Any, Any] | None = None) -> None:
    """The same for one module; ``proven`` is what was found of others like it."""
    proven = {} if proven is None else proven
    eps = _norm_eps(module)
    if eps is None and not _is_feed_forward(module):
        return
    weight = _weight(module if eps else cast(nn.Module, module._modules["gate_proj"]))
    if weight is None or weight.dtype not in _DTYPES:
        return
    key = class_of(module), eps, weight.dtype, weight.shape[0], repr(module._modules.get("act_fn"))
    if key not in proven:
        proven[key] = _proves_norm(module, weight, eps) if eps else _proven_activation(module, weight)
    if proven[key] and eps:
        put_before(module, _Norm, FA_EPS=eps)
    elif proven[key]:
        put_before(module, _FeedForward, FA_ACTIVATION=proven[key])


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


def _weight(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.is_cpu and type(weight) is nn.Parameter else None


def _norm_eps(module: nn.Module) -> str | None:
    """The attribute with the number of an RMS norm, if the module can be one."""
    if set(module._parameters) != {"weight"} or module._buffers or "forward" in module.__dict__:
        return None
    if any(not name.startswith("fa_") for name in module._modules):
        return None
    weight = _weight(module)
    if weight is None or weight.dim() != 1 or not 0 < len(weight) <= _MOST_HIDDEN:
        return None
    return next((name for name in _EPS if isinstance(module.__dict__.get(name), float)), None)


def _is_feed_forward(module: nn.Module) -> bool:
    own = {name for name in module._modules if not name.startswith("fa_")}
    if own != {*_GLU, "act_fn"} or module._parameters or module._buffers:
        return False
    return "forward" not in module.__dict__


@torch.no_grad()
def _proves_norm(module: nn.Module, weight: Tensor, eps: str) -> bool:
    generator = torch.Generator(device="cpu").manual_seed(0)
    plain = _plain(module)
    random = torch.randn(len(weight), generator=generator, device="cpu").to(weight.dtype)
    plain._parameters = {"weight": nn.Parameter(random, requires_grad=False)}
    x = 3 * torch.randn(3, 5, len(weight), generator=generator, device="cpu").to(weight.dtype)
    return _agree(plain.forward, lambda each: rms_norm(each, random, getattr(module, eps)), x)


@torch.no_grad()
def _proven_activation(module: nn.Module, weight: Tensor) -> str | None:
    """The name of the activation with which a feed-forward is what we take it for."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    act = cast(nn.Module, module._modules["act_fn"])
    gate, up = (
        torch.randn(5, weight.shape[0], generator=generator, device="cpu").to(weight.dtype) for _ in range(2)
    )

    def theirs(each: Tensor) -> Tensor:
        plain = _plain(module)
        plain._modules = {
            "gate_proj": _Gives(each), "up_proj": _Gives(up), "down_proj": nn.Identity(), "act_fn": act
        }  # fmt: skip
        return plain.forward(torch.empty(0, device="cpu"))

    for activation in _ACTIVATIONS:
        if _agree(theirs, functools.partial(glu, up=up, act=act, activation=activation), gate):
            return activation
    return None


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


def _agree(theirs: Any, ours: Any, x: Tensor) -> bool:
    """The same bits, and gradients that differ by round-off."""
    try:
        if not torch.equal(theirs(x), ours(x)):
            return False
        grads = []
        for function in (theirs, ours):
            with torch.enable_grad():
                given = x.clone().requires_grad_()
                output = function(given)
                grads.append(
                    torch.autograd.grad(output, given, torch.ones_like(output).cumsum(-1) % 3 - 1)[0]
                )
    except Exception:  # whatever it needs that a norm or a feed-forward does not
        return False
    tolerance = 16 * torch.finfo(x.dtype).eps * grads[0].abs().max().item()
    return (grads[0] - grads[1]).abs().max().item() <= tolerance
