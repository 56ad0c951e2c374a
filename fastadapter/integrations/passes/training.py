"""What training an adapter needs of the model around it, and what is said where that is missing."""

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.discovery import floating_dtype
from fastadapter.integrations.parts.linear import layers_of, linear_layers
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.passes.replacement import PlaceHost
from fastadapter.integrations.passes.shortcut import Handle
from fastadapter.nn.classes import class_of


class _NoBackward(torch.autograd.Function):
    """The output of a layer that computes without a backward: right as it is, until a gradient is asked for."""

    @staticmethod
    def forward(ctx, x, output, layer):
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            f"{ctx.layer} of the model has no backward, so adapters would get gradients that lack its part, or none: "
            "torchao's dynamic quantisation of activations never has one, bitsandbytes' 4-bit weights on a CPU lose it "
            "in the first pass of inference; train on a base that is quantised otherwise, anew or not at all"
        )


def refuse_backward(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """The ``output`` of a linear layer for ``x``; backward through it raises if the layer lost the gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return output
    inner = layers_of(module)[-1]
    weight = getattr(inner, "weight", None)
    if output.requires_grad and (type(weight) is nn.Parameter or not _ends_in_a_stub(output.grad_fn)):
        return output
    return _NoBackward.apply(
        x, output, f"{type(inner).__name__} with a weight of type {type(weight).__name__}"
    )


def _ends_in_a_stub(node: Any) -> bool:
    """Whether the last steps of a layer lead to what PyTorch puts behind kernels that have no backward."""
    for _ in range(4):  # casts and a bias
        if node is None or "NotImplemented" in node.name():
            return node is not None
        node = node.next_functions[0][0] if node.next_functions else None
    return False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def linear_as_in_training(model: nn.Module) -> Iterator[None]:
    """bitsandbytes packs 4-bit weights on a CPU for good in a pass of inference, and then they have no backward."""
    layers = [layers_of(model.get_submodule(path))[-1] for path in linear_layers(model)]
    kept = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, kept, strict=True):
            layer.training = mode


class Nothing(nn.Module):
    """The adapter of a layer that is only watched."""


class WatchHost(PlaceHost):
    """Sits in a linear layer without a backward and raises where one is needed."""

    CHILD: ClassVar[str] = "fa_watch"
    GROUPED: ClassVar[bool] = False

    def act_in(self, module: nn.Module) -> Sequence[Handle]:
        return [module.register_forward_hook(_watch)]


def _watch(module: nn.Module, args: tuple, output: Any) -> Any:
    return refuse_backward(module, args[0], output) if args and torch.is_tensor(output) else None


def layers_without_backward(model: nn.Module) -> list[str]:
    """The paths of the linear layers that give no gradient for their input, tried once for each kind of them."""
    tried: dict[Any, bool] = {}
    found = []
    for path, (width, _) in linear_layers(model).items():
        module = model.get_submodule(path)
        inner = layers_of(module)[-1]
        weight = getattr(inner, "weight", None)
        kind = class_of(inner), type(weight), "forward" in inner.__dict__, getattr(weight, "dtype", None)
        if kind not in tried:
            tried[kind] = _loses_gradient(inner, width)
        if tried[kind] or getattr(
            inner, "support_avx512bf16_for_cpu", False
        ):  # bitsandbytes may pack it later
            found.append(path)
    return found


def _loses_gradient(layer: nn.Module, width: int) -> bool:
    device = next((each.device for each in (*layer.parameters(), *layer.buffers())), None)
    replaced = "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook")
    if class_of(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not replaced:
        return False
    with torch.enable_grad():
        x = torch.zeros(1, width, dtype=floating_dtype(layer), device=device, requires_grad=True)
        try:
            output = layer(x)
            return not output.requires_grad or _ends_in_a_stub(output.grad_fn)
        except (
            Exception
        ):  # whatever it needs that this row lacks; the watch decides in the model's own passes
            return True


def accept_in_trainer() -> None:
    """Let transformers' Trainer take a quantised model with adapters of ours, as it takes one with PEFT's.

    It asks for adapters by PEFT's marks. Setting one would make save_pretrained write PEFT's format, so the question
    is answered instead; what it asks about the quantisation itself still counts.
    """
    import transformers.trainer as trainer

    check = getattr(trainer, "validate_quantization_for_training", None)
    if check is None or hasattr(check, "fa_adapters"):
        return

    @functools.wraps(check)
    def with_adapters(model: Any) -> None:
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is None or not _trains_adapter(model):
            return check(model)
        seen = types.SimpleNamespace(
            is_trainable=quantizer.is_trainable,
            is_qat_trainable=True,  # "can be trained although no adapter of PEFT's is on it"
            quantization_config=getattr(quantizer, "quantization_config", None),
        )
        compiled = {"_orig_mod": model} if hasattr(model, "_orig_mod") else {}
        return check(types.SimpleNamespace(is_quantized=True, hf_quantizer=seen, **compiled))

    with_adapters.fa_adapters = True  # type: ignore[attr-defined]
    trainer.validate_quantization_for_training = with_adapters


def _trains_adapter(model: nn.Module) -> bool:
    hosts = [module for module in model.modules() if isinstance(module, Host)]
    return any(parameter.requires_grad for host in hosts for parameter in host.parameters())
