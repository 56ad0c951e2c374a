"""How far up a model's passes are the same in every epoch, found by watching one of them.

Nothing is concluded from names: autograd tells where the first trained number enters, the random generators tell where
chance does, and the order of the calls tells whose weights the trunk is made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts import discovery
from fastadapter.integrations.parts.sharding import is_sharded
from fastadapter.integrations.parts.wrappers import layers_around, unwrap
from fastadapter.integrations.verbs.record import adapter_modules, attachments
from fastadapter.training.state import random_states
from fastadapter.training.trunk.start import NoTrunk, hidden_of

_STACKS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, all of one list, and the list's path."""

    path: str
    blocks: list[nn.Module]


@dataclass(frozen=True)
class Behind:
    """What was seen behind one block.

    Attributes:
        trained: whether a gradient goes on below.
        random: whether random numbers had been drawn.
        length: of the tuple that the block returned; ``None``: a tensor.
        states: shape and dtype of the hidden states.
    """

    trained: bool
    random: bool
    length: int | None
    states: tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Observed:
    """One pass: what was behind each block, and how many blocks were through when each module was first called."""

    behind: list[Behind]
    first: dict[str, int]


def find_stack(model: nn.Module) -> Stack:
    """The one list of blocks of a model. Raises: NoTrunk: it has none or several, or is not an ordinary model."""
    inner = unwrap(model)
    if any(hasattr(each, "_orig_mod") for each in (*layers_around(model), *inner.modules())) or any(
        each._compiled_call_impl is not None for each in inner.modules()
    ):
        raise NoTrunk("the model is compiled")
    if getattr(inner, "is_quantized", False):
        raise NoTrunk("the model is quantised, and a digest of such weights is not defined here")
    tensors = [*inner.parameters(), *inner.buffers()]
    if any(is_sharded(each) or getattr(each, "_fsdp_flattened", False) for each in tensors):
        raise NoTrunk("the model's weights are sharded")
    if len({each.device for each in tensors}) > 1:
        raise NoTrunk("the model is spread over several devices")
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise NoTrunk("an encoder-decoder has two stacks of blocks")
    try:
        blocks = discovery.blocks(inner).values()
    except TypeError as error:
        raise NoTrunk(str(error)) from error
    stacks = {block.stack for block in blocks}
    if len(stacks) > 1:
        raise NoTrunk(f"the model has several stacks of blocks: {', '.join(sorted(stacks))}")
    path = stacks.pop()
    holder = inner.get_submodule(path)
    if not isinstance(holder, _STACKS) or any(block.path.rpartition(".")[0] != path for block in blocks):
        raise NoTrunk(f"the blocks of {path} are not the members of one list")
    return Stack(path, list(holder))


def observe(model: nn.Module, stack: Stack, device: torch.device, call: Callable[[], Any]) -> Observed:
    """Watch the one forward pass that ``call`` makes.

    Raises: NoTrunk: the blocks were not called one behind another, or hand each other more than hidden states.
    """
    behind: list[Behind] = []
    first: dict[str, int] = {}
    calls: list[int] = []
    start = _chance(device)

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            first.setdefault(path, len(behind))

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            calls.append(number)
            behind.append(_look_behind(output, start != _chance(device)))

        return hook

    inner = unwrap(model)
    handles = [
        module.register_forward_pre_hook(enter(path), prepend=True) for path, module in inner.named_modules()
    ] + [block.register_forward_hook(leave(number)) for number, block in enumerate(stack.blocks)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if calls != list(range(len(stack.blocks))):
        raise NoTrunk(
            f"the blocks of {stack.path} are not called once each, one behind another (a soft prompt is run through "
            "them by itself)"
        )
    return Observed(behind, first)


def _look_behind(output: Any, random: bool) -> Behind:
    hidden = hidden_of(output)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise NoTrunk("a block does not return hidden states (batch, seq, width)")
    length = len(output) if isinstance(output, tuple) else None
    if length is not None and any(each is not None for each in output[1:]):
        raise NoTrunk("the blocks hand each other more than hidden states")
    return Behind(hidden.requires_grad, random, length, (tuple(hidden.shape), hidden.dtype))


def _chance(device: torch.device) -> list[bytes]:
    return [each.numpy().tobytes() for each in random_states(device).values()]


def trunk_size(model: nn.Module, stack: Stack, seen: Observed, name: str | None) -> int:
    """How many blocks are the same in every pass: at least one.

    Args:
        name: of the adapter that is trained; ``None``: parameters of the model are.
    Raises: NoTrunk: not one is, with the reason.
    """
    frozen = sum(not each.trained for each in seen.behind)
    if not frozen:
        raise NoTrunk("what is trained acts from the first block on")
    steady = sum(not each.random for each in seen.behind)
    if not steady:
        config = getattr(unwrap(model), "config", None)
        fields = getattr(config, "__dict__", {})
        named = [f"{key} {each}" for key, each in fields.items() if "drop" in key and each]
        raise NoTrunk(f"it draws random numbers in training ({', '.join(named) or 'dropout'})")
    size = min(frozen, steady)
    # What is frozen of the adapter itself would be part of the trunk without a gradient to tell of it.
    if name is not None and attachments(model) is not None:
        for path in adapter_modules(model, name):
            if any(path == each or path.startswith(f"{each}.") for each in _paths(stack, size)):
                raise NoTrunk(f"adapter {name!r} acts in {path}, frozen")
    return size


def _paths(stack: Stack, size: int) -> list[str]:
    return [f"{stack.path}.{number}" for number in range(size)]


def below(model: nn.Module, stack: Stack, seen: Observed, size: int) -> dict[str, Tensor]:
    """The weights that the trunk's states are made of, by name: of all modules but those first called behind it.

    A module that is never called may lend its weights to one that is, so it counts; what is trained cannot be in the
    trunk, or a gradient would have gone on below.
    """
    inner = unwrap(model)
    above = [path for path, through in seen.first.items() if path and through >= size]
    found: dict[str, Tensor] = {}
    for path, module in inner.named_modules():
        if any(path == each or path.startswith(f"{each}.") for each in above):
            continue
        own: Sequence[tuple[str, Tensor]] = [
            *module.named_parameters(path, recurse=False),
            *module.named_buffers(path, recurse=False),
        ]
        found |= {name: tensor for name, tensor in own if not tensor.requires_grad}
    return found
