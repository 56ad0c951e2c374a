"""The feed-forward of the last block, for those tokens alone whose states the output head is asked for.

Behind the last block nothing mixes tokens any more, so what its feed-forward makes of the others is thrown away: by
count of operations a fortieth of a step that trains 30 layers, a twelfth of one that trains the top 10 from cached
states. That it is so is proven on a few tokens before it is made use of: the states that the head is given are the
same, and stay what they are when all that was left out is NaN.
"""

import contextlib
import contextvars
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.discovery import blocks, device_of, floating_dtype
from fastadapter.integrations.passes.choice import by_row
from fastadapter.integrations.passes.order import put_first

_NAME = "mlp"  # of the feed-forward in a block
_ADAPTERS = "fastadapter.integrations."  # where their hooks are
# Share of a pass's tokens from which on selecting them is not worth it.
_MOST = 0.75
_PROBE = 8
# Attributes of parameters that are not here, or not whole: DeepSpeed's, and those of a DTensor.
_ELSEWHERE = ("ds_id", "placements")
_TROUBLE = {"OptimizedModule", "FSDPModule", "FullyShardedDataParallel"}
# By the model that calls the head, where its last block is; by the feed-forward in that, whether it can be spared.
_paths: "weakref.WeakKeyDictionary[nn.Module, str | None]" = weakref.WeakKeyDictionary()
_verdicts: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def sparing(
    model: nn.Module, owner: nn.Module | None, head: nn.Module, shape: tuple[int, ...], positions: Tensor
) -> Iterator[None]:
    """Let the last feed-forward of a pass see the states at ``positions`` alone.

    Args:
        model: what is called.
        owner: the model of transformers in it that calls ``head``.
        shape: of the token ids.
        positions: int64, of the flattened tokens, each once.
    """
    part = None
    if owner is not None and 0 < len(positions) <= _MOST * math.prod(shape) and _is_plain(model):
        part = _spared(owner, head)
    with contextlib.nullcontext() if part is None else _at(part, shape, positions):
        yield


def _spared(owner: nn.Module, head: nn.Module) -> nn.Module | None:
    if owner not in _paths:
        _paths[owner] = _last_block(owner)
    path = _paths[owner]
    block = nn.Module() if path is None else owner.get_submodule(path)
    part = block._modules.get(_NAME)
    if part is None or _is_watched(block) or _is_watched(part) or _drops(part) or by_row():
        return None
    if part not in _verdicts:
        if any(map(_is_watched, owner.modules())):  # who counts passes is not to see those of the proof
            return None
        # whatever the pass under way is to do, such as begin behind some of its blocks, this one does not
        _verdicts[part] = contextvars.Context().run(_proves, owner, head, part)
    return part if _verdicts[part] else None


@contextlib.contextmanager
def _at(part: nn.Module, shape: tuple[int, ...], positions: Tensor, fill: float = 0.0) -> Iterator[list[int]]:
    """Have ``part`` compute at ``positions`` and give ``fill`` elsewhere; shows how many tokens it was spared."""
    selected = False
    spared: list[int] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> Any:
        nonlocal selected
        selected = (
            len(args) == 1
            and torch.is_tensor(args[0])
            and args[0].shape[:-1] == shape
            and args[0].device == positions.device
            and not _is_recomputed()
        )
        if not selected:
            return None
        states = args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions)
        return (states.unsqueeze(0),)

    def spread(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not selected:
            return None
        spared.append(math.prod(shape) - len(positions))
        empty = output.new_full((math.prod(shape), output.shape[-1]), fill)
        return empty.index_copy(0, positions, output[0]).view(*shape, -1)

    # the last to see the input and the first to see the output: for all others the shapes are what they were
    handles = [part.register_forward_pre_hook(select), put_first(part, part.register_forward_hook(spread))]
    try:
        yield spared
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(model: nn.Module) -> bool:
    """Whether hooks of one pass are no trouble: compilers trace them anew, shards are gathered in an order."""
    plain = all(
        each._compiled_call_impl is None and _is_plain_kind(cast(Any, type(each))) for each in model.modules()
    )
    return plain and not torch.compiler.is_compiling()


@functools.cache  # of all modules in every step
def _is_plain_kind(kind: type[nn.Module]) -> bool:
    return not _TROUBLE & {each.__name__ for each in kind.__mro__}


def _is_watched(module: nn.Module) -> bool:
    """Whether others than adapters look at what comes and goes: they are to see that of all tokens."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(
        not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(_ADAPTERS)
        for hook in hooks
    )


def _is_recomputed() -> bool:
    """Whether the pass is run again in backward, when the hooks are gone; where torch does not say: yes."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    except (AttributeError, TypeError):
        return True


def _drops(part: nn.Module) -> bool:
    """Whether it draws random numbers: for fewer tokens others than for all."""
    return any(isinstance(each, nn.Dropout) and each.p > 0 and each.training for each in part.modules())


def _last_block(owner: nn.Module) -> str | None:
    try:
        found = list(blocks(owner).values())
    except TypeError:  # it has none
        return None
    return found[-1].path if len({block.stack for block in found}) == 1 else None


def _proves(owner: Any, head: nn.Module, part: nn.Module) -> bool:
    """Whether sparing ``part`` changes nothing that the head sees."""
    if any(hasattr(each, name) for each in part.parameters() for name in _ELSEWHERE):
        return False
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    generators = [torch.get_rng_state(), *cuda]
    try:
        found = []
        for fill in (None, 0.0, float("nan")):
            _put_back(generators)
            found.append(_states(owner, head, part, fill))
        bound = 16 * torch.finfo(floating_dtype(part)).eps * float(found[0].abs().max())
        return float((found[1] - found[0]).abs().max()) <= bound and torch.equal(found[1], found[2])
    except Exception:  # only a model's own code knows what it needs
        return False
    finally:
        _put_back(generators)


@torch.no_grad()
def _states(owner: Any, head: nn.Module, part: nn.Module, fill: float | None) -> Tensor:
    """What the head is given of a few tokens at two positions."""
    device = device_of(part)
    ids = torch.arange(_PROBE, device=device)[None] % owner.config.get_text_config().vocab_size
    positions = torch.tensor([2, 5], device=device)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    spared = contextlib.nullcontext([1]) if fill is None else _at(part, tuple(ids.shape), positions, fill)
    try:
        # the dtype of the weights decides how far apart two ways may be
        with torch.autocast(device.type, enabled=False), spared as times:
            owner(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    if len(times) != 1:
        raise RuntimeError(
            f"the last feed-forward was called {len(times)} times on the tokens, expected once"
        )
    (states,) = seen
    return states[positions].cpu().double()


def _put_back(generators: list[Tensor]) -> None:
    torch.set_rng_state(generators[0])
    if len(generators) > 1:
        torch.cuda.set_rng_state_all(generators[1:])
