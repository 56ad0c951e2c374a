"""Positions of a padded batch whose caller gives none.

A model without positions of its own numbers the columns of a batch. With rotary embeddings padding on the left then
moves a row, which changes nothing among its tokens, but between them and a prompt that has no position, or a fixed one.
So the positions are counted from the mask, as ``generate`` does, and a row is what it is alone.
"""

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.choice import State
from fastadapter.integrations.passes.order import put_first
from fastadapter.integrations.passes.prefix import PrefixHost
from fastadapter.integrations.passes.soft_prompt import PromptHost
from fastadapter.nn import GatedPrefix

_NEEDED = {"attention_mask", "position_ids", "inputs_embeds"}


def hooks(model: nn.Module, state: State) -> list[RemovableHandle]:
    """What counts the positions of a model that has rotary embeddings; none for others."""
    names = tuple(inspect.signature(model.forward).parameters)
    rotary = any("RotaryEmbedding" in type(child).__name__ for child in model.children())
    if not rotary or not names or not _NEEDED <= set(names):
        return []
    hook = functools.partial(_count, state, names)
    return [put_first(model, model.register_forward_pre_hook(hook, with_kwargs=True))]


def _count(
    state: State, names: tuple[str, ...], model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Any:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    if given.get("position_ids") is not None or not torch.is_tensor(mask) or mask.dim() != 2:
        return None
    inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if inputs is None:
        return None
    batch, q_len = inputs.shape[:2]
    moves = _moves(model, state, batch, inputs.device)
    if moves is False or mask.shape[1] < q_len:
        return None
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -q_len:]
    if torch.is_tensor(moves):
        cache = given.get("cache", given.get("past_key_values"))
        start = 0 if cache is None else cache.get_seq_length()
        columns = torch.arange(q_len, device=inputs.device) + start
        positions = torch.where(moves, positions, columns)
    index = names.index("position_ids")
    if index < len(args):
        return (*args[:index], positions, *args[index + 1 :]), kwargs
    return args, {**kwargs, "position_ids": positions}


def _moves(model: nn.Module, state: State, batch: int, device: torch.device) -> "Tensor | bool":
    """Whether positions matter to all rows, to none, or to which, ``(1 or batch, 1)``.

    To a row with a prompt, unless all its gates are zero: then the prompt adds nothing, and the model stays itself, bit
    for bit. Looked at on the device, so that nobody waits for it.
    """
    choice = state.acting()
    found = {name: _gates(model, state, name) for name in choice.names()}
    rows = choice.row_names(batch)
    if not any(gates is None or gates for gates in found.values()):
        return False
    if rows is None and None in found.values():
        return True
    moved = {
        name: _any(gates, device) if gates else torch.full((), gates is None, device=device)
        for name, gates in found.items()
    }
    if rows is None:
        [only] = moved.values()
        return only.view(1, 1)
    still = torch.full((), False, device=device)
    return torch.stack([still if name is None else moved[name] for name in rows])[:, None]


def _any(gates: list[Tensor], device: torch.device) -> Tensor:
    sizes = torch._foreach_norm([gate.detach() for gate in gates], float("inf"))
    here = [size if size.device == device else size.to(device) for size in sizes]
    return torch.stack(here).ne(0).any()


def _gates(model: nn.Module, state: State, name: str) -> list[Tensor] | None:
    """The gates of an adapter's prompts; empty: it has no prompts; ``None``: prompts without gates."""
    hosts = state.known.get(("prompts", id(model)))
    if hosts is None:
        hosts = [each for each in model.modules() if isinstance(each, PrefixHost | PromptHost)]
        state.known["prompts", id(model)] = hosts
    adapters = [host.adapters[name] for host in hosts if name in host.adapters]
    if any(not isinstance(adapter, GatedPrefix) for adapter in adapters):
        return None
    gates = [cast(Tensor, adapter.gate) for adapter in adapters]
    return (
        None if any(hasattr(gate, "full_tensor") for gate in gates) else gates
    )  # sharded: not to be looked at here
