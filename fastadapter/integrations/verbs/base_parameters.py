"""Parameters of the model itself that are trained beside an adapter, such as embeddings of new tokens."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.sharding import all_or_none, reshard, whole, write
from fastadapter.integrations.parts.wrappers import plain
from fastadapter.integrations.passes.host import Host

_FLOATING = ("F64", "F32", "F16", "BF16")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that require gradients and belong to no adapter, by their names."""
    hosts = (module for module in model.modules() if isinstance(module, Host))
    adapters = {id(parameter) for host in hosts for parameter in host.parameters()}
    return {
        plain(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters
    }


def require_fitting(model: nn.Module, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse a parameter of a file that the model has no place for.

    Raises: ValueError: there is no such parameter, it has another shape, or it cannot be written to.
    """
    own = {plain(key): each for key, each in model.named_parameters(remove_duplicate=False)}.get(name)
    if own is None:
        raise ValueError(
            f"it holds the trained parameter {name} of a base model, which {type(model).__name__} has not; what was "
            "added to that base before the adapter was saved (LoRA, a head) must be there first"
        )
    if dtype not in _FLOATING or not own.is_floating_point():
        raise ValueError(f"it holds {name}, trained, in {dtype}; this model has it in {own.dtype}")
    if tuple(own.shape) != shape:
        raise ValueError(
            f"it holds {name}, trained, with the shape {shape}; this model's has {tuple(own.shape)}"
            + _how_to_resize(model, own, shape)
        )
    if own.is_meta:
        raise ValueError(f"it holds {name}, trained, which is offloaded or on the meta device in this model")


def _how_to_resize(model: nn.Module, own: Tensor, shape: tuple[int, ...]) -> str:
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return ""
    if own.shape[0] != vocabulary or shape[1:] != tuple(own.shape[1:]):
        return ""
    return f": the vocabulary was resized; call model.resize_token_embeddings({shape[0]}) before loading"


def put(model: nn.Module, values: dict[str, Tensor], originals: dict[str, Tensor]) -> None:
    """Write ``values`` into parameters of the model, trainable from now on; what they held goes to ``originals``.

    All of them or none.
    """
    reshard(model)
    # In one order in every process: sharded parameters are gathered, and a file is read in any.
    parameters = {name: model.get_parameter(name) for name in sorted(values)}
    with all_or_none(parameters) as before:
        for name, parameter in parameters.items():
            write(parameter, values[name])
    originals |= {name: value for name, value in before.items() if name not in originals}
    for parameter in parameters.values():
        parameter.requires_grad_(True)


@torch.no_grad()
def differing(model: nn.Module, values: dict[str, Tensor]) -> list[str]:
    """Names of the parameters of the model that :func:`put` would change."""
    reshard(model)
    own = {name: whole(model.get_parameter(name)).cpu() for name in sorted(values)}
    return [name for name, value in values.items() if not torch.equal(own[name], value.to(own[name].dtype))]


def restore(
    model: nn.Module, originals: dict[str, Tensor], on_failure: Callable[[Callable[[], Any]], None]
) -> None:
    """Take back what :func:`put` did, bit for bit; in a model that was cast since, what casting them gives.

    ``on_failure`` is told how to write the trained values again, should the verb fail later on.
    """
    reshard(model)
    for name, value in originals.items():
        parameter = model.get_parameter(name)
        if parameter.shape == value.shape:
            trained = whole(parameter).to("cpu", copy=True)
            on_failure(functools.partial(write, parameter, trained))
            write(parameter, value)
        else:
            warnings.warn(
                f"fastadapter: {name} was resized from {tuple(value.shape)} to {tuple(parameter.shape)} since the "
                "adapter was loaded, so it keeps its trained values",
                stacklevel=3,
            )
    originals.clear()
