"""LLaMA-Adapter V2 folded into the weights of a model, and the weights put back as they were."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.parts.linear import layers_of
from fastadapter.integrations.passes.channel_scale import CopyHost, ScaleHost
from fastadapter.integrations.passes.host import Place, child_name, host_of
from fastadapter.integrations.passes.shortcut import Handle
from fastadapter.nn.classes import class_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Folded:
    """An adapter that the weights of its model hold, or a part of it while it is put there.

    Attributes:
        name: of the adapter.
        originals: the weights it replaced, in main memory, by their names in the model; ``None``: a bias that was not
            there.
        trained: names of the adapter's parameters that were trainable; they wait until it is unfolded.
    """

    name: str
    originals: dict[str, Tensor | None] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)


def foldable(places: Sequence[Place]) -> list[Place]:
    """Of the places of an adapter, those whose effect is one of the weights; the gated prompts are none of them."""
    return [place for place in places if place[1] in (ScaleHost, CopyHost)]


def require_foldable(
    model: nn.Module, name: str, places: Sequence[Place], handles: dict[Place, Sequence[Handle]]
) -> None:
    """Check that folding gives the same model; nothing is changed.

    Raises:
        TypeError: a module or a weight is of a kind whose weights cannot be exchanged for others.
        ValueError: a weight is used elsewhere too, hooks of others are in between, or values overflow.
    """
    users = _users(model)
    for place in places:
        path, kind = place
        module = model.get_submodule(path)
        _require_unwrapped(path, module)
        if kind is ScaleHost and not _is_plain_linear(module):
            raise TypeError(
                f"{path} is a {type(module).__module__}.{type(module).__name__}: scales fold only into torch.nn.Linear "
                "and transformers' Conv1D themselves, not into quantised or otherwise derived layers"
            )
        if "forward" in module.__dict__:
            raise TypeError(f"{path} is wrapped by another library: remove its wrapper before folding")
        if kind is CopyHost and (kept := host_of(module, kind).adapter(name).statistics()):
            raise ValueError(
                f"{path} keeps {', '.join(kept)} of its own, which no weight holds: it cannot be folded"
            )
        own = {handle.id for handle in handles[place] if isinstance(handle, RemovableHandle)}
        if foreign := {*module._forward_hooks, *module._forward_pre_hooks} - own:
            raise ValueError(
                f"{path} has {len(foreign)} forward hooks besides the adapter's, which would see other values: "
                "remove them before folding"
            )
        for key in _targets(module, host_of(module, kind).adapter(name), kind):
            _require_plain_parameter(module.get_submodule(key.rpartition(".")[0]), f"{path}.{key}", users)
        for key, value in _values(model, name, place):
            if not torch.isfinite(value).all():
                raise ValueError(f"{key} would hold NaN or Inf when folded, in {value.dtype}")


@torch.no_grad()
def fold_weights(model: nn.Module, folded: Folded, places: Sequence[Place]) -> None:
    """Put the effect of an adapter at ``places``, which :func:`require_foldable` accepted, into the weights.

    One layer at a time, so that no second model is needed on its device. The adapter's own parameters stay, frozen.
    ``folded`` says what was done so far, at every moment.
    """
    with torch.inference_mode(False), torch.no_grad():  # the first allows gradients again
        for place in places:
            for key, value in list(_values(model, folded.name, place)):
                before = _parameter(model, key)
                folded.originals[key] = None if before is None else before.detach().to("cpu", copy=True)
                _put(model, key, value)
    for path, kind in places:
        adapter = host_of(model.get_submodule(path), kind).adapter(folded.name)
        for key, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                folded.trained.append(f"{path}.{kind.CHILD}.adapters.{child_name(folded.name)}.{key}")
                parameter.requires_grad_(False)


@torch.no_grad()
def restore_weights(model: nn.Module, folded: Folded) -> None:
    """Put the weights back, bit for bit; in a model that was cast since, what casting them gives."""
    with torch.inference_mode(False), torch.no_grad():  # the first allows gradients again
        for key, value in folded.originals.items():
            _put(model, key, value)
    for key in folded.trained:
        model.get_parameter(key).requires_grad_(True)


def require_restorable(model: nn.Module, folded: Folded) -> None:
    """Raises: TypeError: a layer was wrapped since its weights were folded into."""
    for key in folded.originals:
        path = key.rpartition(".")[0]
        _require_unwrapped(path, model.get_submodule(path))


def _require_unwrapped(path: str, module: nn.Module) -> None:
    """Weights under a wrapper are not all of the layer's effect, and LoRA may be merged into them."""
    if len(layers_of(module)) > 1:
        raise TypeError(
            f"{path} is wrapped in a {type(module).__module__}.{type(module).__name__}: unload it first "
            "(merge_and_unload, unload)"
        )


def _is_plain_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return class_of(module) in (nn.Linear, Conv1D)


def _targets(module: nn.Module, adapter: nn.Module, kind: type) -> list[str]:
    """Names within the module of what folding writes to."""
    if kind is CopyHost:
        return [key for key, _ in adapter.own.named_parameters()]
    return ["weight"] if module.bias is None else ["weight", "bias"]


def _values(model: nn.Module, name: str, place: Place) -> Iterator[tuple[str, Tensor]]:
    """What the weights of one module become, by their names in the model."""
    path, kind = place
    module = model.get_submodule(path)
    adapter = host_of(module, kind).adapter(name)
    if kind is CopyHost:
        for key, parameter in adapter.own.named_parameters():
            yield f"{path}.{key}", parameter.detach().to(module.get_parameter(key).dtype)
        return
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            weight, bias = adapter.folded(module.weight, module.bias)
        else:  # GPT-2's Conv1D holds the transpose
            weight, bias = adapter.folded(module.weight.T, module.bias)
            weight = weight.T
    yield f"{path}.weight", weight
    yield f"{path}.bias", bias


def _users(model: nn.Module) -> dict[int, list[str]]:
    """The names of the parameters at every address; a module that is reached by two paths counts once."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter.data_ptr(), []).append(f"{path}.{key}")
    return found


def _require_plain_parameter(owner: nn.Module, key: str, users: dict[int, list[str]]) -> None:
    parameter = owner._parameters.get(key.rpartition(".")[2])
    if parameter is None or type(parameter) is not nn.Parameter or parameter.dtype not in _DTYPES:
        found = "computed" if parameter is None else f"a {type(parameter).__name__} of {parameter.dtype}"
        raise TypeError(
            f"{key} is {found}: only parameters in fp64, fp32, bf16 or fp16 can be folded into, not quantised, "
            "sharded or computed ones"
        )
    if parameter.is_meta or parameter.is_inference():
        state = "on the meta device" if parameter.is_meta else "made under inference mode"
        raise TypeError(f"{key} is {state}: it cannot be written to")
    others = [each for each in users[parameter.data_ptr()] if each != key]
    if others:
        raise ValueError(f"{key} is tied to {', '.join(others)}: folding into it would change that too")


def _parameter(model: nn.Module, key: str) -> nn.Parameter | None:
    path, _, name = key.rpartition(".")
    return model.get_submodule(path)._parameters[name]


def _put(model: nn.Module, key: str, value: Tensor | None) -> None:
    """Make a parameter hold ``value``; written in place, so that what was kept from its older version is noticed."""
    parameter = _parameter(model, key)
    path, _, name = key.rpartition(".")
    if value is None or parameter is None:
        new = None if value is None else nn.Parameter(value.clone(), requires_grad=False)
        model.get_submodule(path).register_parameter(name, new)
    else:
        parameter.copy_(value)
