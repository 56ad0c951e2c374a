"""Products of a frozen model by oneDNN where PyTorch's own library for them is slow: fp32 on CPUs that are not Intel's.

PyTorch multiplies fp32 matrices by MKL, which does not use what an AMD CPU has: at the sizes of a training step oneDNN,
which is in PyTorch too, takes a fifth less. The results differ by round-off, so it is for training runs, not for a
model that somebody compares with its base bit for bit.
"""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.frozen_parts import is_for_kernel
from fastadapter.nn.classes import class_of, put_before, take_away
from fastadapter.ops.backends import extension_error


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, with ``weight`` as it lies."""
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return _multiply(grad, weight.t()), None, None


class _Linear(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        x = args[0]
        frozen = not torch.is_grad_enabled() or not any(
            each is not None and each.requires_grad for each in (weight, bias)
        )
        plain = is_for_kernel(x, weight) and x.dtype is torch.float32 and x.numel() > 0
        if not (frozen and plain) or torch.is_autocast_enabled("cpu"):
            return super().forward(*args)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, weight, bias)
        return _multiply(x, cast(Tensor, weight), bias)


def why_not() -> str | None:
    """Why PyTorch's own products are used on this machine; ``None``: oneDNN is faster."""
    if error := extension_error():
        return error
    if torch.ops.fastadapter.cpu_vendor() != "amd":
        return "MKL is for this CPU, or there is none"
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return "PyTorch was built without MKL or oneDNN"
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "oneDNN is switched off"
    return None


@contextlib.contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Let the frozen linear layers of ``model`` multiply by the faster of PyTorch's two libraries in the context.

    Only fp32 on CPUs that MKL was not made for; elsewhere, and for a layer that is trained, nothing changes. Results
    differ by round-off. :func:`finetune` does it for its runs.

    >>> model = torch.nn.Linear(4, 2).requires_grad_(False)
    >>> with fast_products(model):
    ...     model(torch.ones(1, 4)).shape
    torch.Size([1, 2])
    """
    # those that an outer context lets do so already are its own to stop
    layers = [] if why_not() else [each for each in unwrap(model).modules() if _can(each)]
    for layer in layers:
        put_before(layer, _Linear)
    try:
        yield
    finally:
        for layer in layers:
            take_away(layer, _Linear)


def _can(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        class_of(module) is nn.Linear
        and not isinstance(module, _Linear)
        and "forward" not in module.__dict__
        and type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.dtype is torch.float32
    )
