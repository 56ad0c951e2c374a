"""The blocks of a model, found by structure: members of a list that hold a self-attention."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


class Block(NamedTuple):
    """One block, and the stack of blocks that it is in, by their dotted paths.

    A list of blocks within a member of another list of blocks goes on where the one before it ended, so ``stack`` is
    the outermost of them: the blocks of Swin's stages are one stack.
    """

    path: str
    stack: str


def blocks_of(model: nn.Module, attentions: Iterable[str]) -> dict[str, Block]:
    """The block around each of a model's self-attentions that is in one, by the attention's path.

    Of the lists that a path leads through, the blocks are the members of the innermost one in which each member holds
    a self-attention, so neither T5's parts of a block nor experts or branches count as blocks. Where there is none
    (a model some of whose blocks have other layers in attention's place), it is the list with the most such members;
    not one around blocks that were found, as a self-attention there is beside the blocks.

    Args:
        attentions: the paths of all self-attentions of ``model``.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, _LISTS)}
    around = {path: [name for name in ancestors(path) if name in lists] for path in attentions}
    holding: dict[str, set[str]] = {}
    for path, names in around.items():
        for name in names:
            holding.setdefault(name, set()).add(_member(path, name))
    whole = {name for name, members in holding.items() if len(members) == len(lists[name])}
    inner = {path: next((name for name in names if name in whole), None) for path, names in around.items()}
    outside = {above for name in inner.values() if name is not None for above in ancestors(name)}
    found = {}
    for path, names in around.items():
        holder = inner[path]
        if holder is None:
            left = [name for name in names if name not in outside]
            holder = max(left, key=lambda name: len(holding[name]), default=None)
        if holder is None:
            continue
        stack = holder
        for above in names[names.index(holder) + 1 :]:
            if above not in whole:
                break
            stack = above
        found[path] = Block(_member(path, holder), stack)
    return found


def ancestors(path: str) -> list[str]:
    """The paths of what holds the module at ``path``, the nearest first, the model itself last."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def _member(path: str, holder: str) -> str:
    """The child of ``holder`` that ``path`` leads through."""
    start = f"{holder}." if holder else ""
    return start + path.removeprefix(start).partition(".")[0]
