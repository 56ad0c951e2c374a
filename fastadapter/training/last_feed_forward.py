"""The feed-forward of the last block, for those tokens alone whose states the model's head is asked for.

Behind the last block nothing mixes tokens any more, so what its feed-forward makes of the others is thrown away: by
count of operations a fortieth of a step that trains 30 layers, a twelfth of one that trains the top 10 from cached
states, a tenth of one of an encoder of six. So is what their queries find there; these and the projection behind are
left out with it. That it is so is proven on a few tokens before it is made use of: the block's states are the same, and
what the head makes of them stays what it is when all that was left out is NaN.
"""

import contextlib
import contextvars
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.parts.discovery import blocks, device_of, floating_dtype
from fastadapter.integrations.passes.choice import by_row
from fastadapter.integrations.passes.order import put_first
from fastadapter.nn.classes import class_of

# From which part of a block on tokens are left out, and behind which they are put back: around dropout where it can be,
# which draws for all tokens then. BERT and its kin, DistilBERT, GPT-2; and the whole feed-forward of a decoder.
_FEED_FORWARD = (
    ("intermediate", "output.dense"),
    ("ffn.lin1", "ffn.lin2"),
    ("mlp.c_fc", "mlp.c_proj"),
    ("mlp", "mlp"),
)
# What else is of a token alone: its query, which only itself attends by, and the projection of what it found.
_BESIDE = (
    "attention.self.query",
    "attention.output.dense",
    "attention.q_lin",
    "attention.out_lin",
    "attn.c_proj",
    "self_attn.q_proj",
    "self_attn.o_proj",
)
_ADAPTERS = "fastadapter.integrations."  # where their hooks are
# Share of a pass's tokens from which on selecting them is not worth it.
_MOST = 0.75
# Attributes of parameters that are not here, or not whole: DeepSpeed's, and those of a DTensor.
_ELSEWHERE = ("ds_id", "placements")
_TROUBLE = {"OptimizedModule", "FSDPModule", "FullyShardedDataParallel"}
# By the model that calls the head, where its last block is; by that, in training mode or not, what the model was made
# of when it was tried, and where it can be spared.
_paths: "weakref.WeakKeyDictionary[nn.Module, str | None]" = weakref.WeakKeyDictionary()
_verdicts: "weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[tuple, Places]]]" = (
    weakref.WeakKeyDictionary()
)
Places = tuple[tuple[str, str], ...]


class Probe(NamedTuple):
    """A few tokens to try it on.

    Attributes:
        inputs: of the model; ``input_ids (batch, seq)`` are among them.
        positions: of the flattened tokens, those whose states are asked for.
        outcome: what the others must not change, of the model's output.
    """

    inputs: dict[str, Any]
    positions: list[int]
    outcome: Callable[[Any], Tensor]


@contextlib.contextmanager
def sparing(
    model: nn.Module,
    owner: nn.Module | None,
    shape: tuple[int, ...],
    positions: Tensor,
    probe: Callable[[], Probe],
    *,
    joined: bool = False,
) -> Iterator[None]:
    """Let the last block of a pass compute its feed-forward and queries at ``positions`` alone.

    Args:
        model: what is called.
        owner: the model of transformers in it that calls its head.
        shape: of the token ids, ``(batch, seq)``.
        positions: int64, of the flattened tokens, each once.
        probe: makes the tokens that it is tried on.
        joined: a soft prompt may stand in front of each row.
    """
    block = nn.Module()
    places: Places = ()
    if owner is not None and 0 < len(positions) <= _MOST * math.prod(shape) and _is_plain(model):
        block, places = _spared(owner, probe, joined)
    with _at(block, places, _Wanted(shape, positions, joined)) if places else contextlib.nullcontext():
        yield


def _spared(owner: nn.Module, probe: Callable[[], Probe], joined: bool) -> tuple[nn.Module, Places]:
    """The last block, and where in it tokens can be left out."""
    if owner not in _paths:
        _paths[owner] = _last_block(owner)
    path = _paths[owner]
    block = nn.Module() if path is None else owner.get_submodule(path)
    places = _places(block)
    if not places or any(map(_is_watched, block.modules())) or by_row():
        return block, ()
    known, parts = _verdicts.setdefault(block, {}), _parts(owner)
    if block.training not in known or known[block.training][0] != parts:
        if any(map(_is_watched, owner.modules())):  # who counts passes is not to see those of the proof
            return block, ()

        # whatever the pass under way is to do, such as begin behind some of its blocks, this one does not
        def prove(places: Places) -> bool:
            return contextvars.Context().run(_proves, owner, block, probe(), joined, places)

        known[block.training] = parts, next(filter(prove, dict.fromkeys((places, places[:1]))), ())
    return block, tuple(place for place in known[block.training][1] if place in places)


def _parts(owner: nn.Module) -> tuple:
    """What a model is made of: another one behind the same block may look at what was left out before."""
    return tuple(
        (weakref.ref(each), class_of(each), each.training, _reference(each.__dict__.get("forward")))
        for each in owner.modules()
    )


def _reference(forward: Any) -> Any:
    """A weak one: what is kept by the block must not hold it."""
    if forward is None:
        return None
    try:
        return weakref.WeakMethod(forward) if isinstance(forward, MethodType) else weakref.ref(forward)
    except TypeError:  # not of this one: equal to nothing
        return object()


def _places(block: nn.Module) -> Places:
    """Where in ``block`` tokens can be left out, the feed-forward first; none: not in that."""

    def is_there(name: str) -> bool:
        try:
            return not _drops(block.get_submodule(name))
        except AttributeError:
            return False

    found = [place for place in _FEED_FORWARD if all(map(is_there, place))][:1]
    beside = [(name, name) for name in _BESIDE if is_there(name)]
    return (*found, *beside) if found else ()


@dataclass
class _Wanted:
    """Which states of a pass are wanted.

    Attributes:
        shape, positions, joined: as of :func:`sparing`.
        fill: what stands for the others.
        spared: how many these were, each time.
    """

    shape: tuple[int, ...]
    positions: Tensor
    joined: bool
    fill: float = 0.0
    spared: list[int] = field(default_factory=list)

    def among(self, states: Any) -> Tensor | None:
        """Their positions in ``states (batch, [prompt_len +] seq, width)``, flattened; ``None``: it is other states."""
        if not torch.is_tensor(states) or states.dim() != 3 or states.device != self.positions.device:
            return None
        (batch, seq), (rows, columns, _) = self.shape, states.shape
        if rows != batch or columns < seq or (columns > seq and not self.joined):
            return None
        if columns == seq:
            return self.positions
        return self.positions + (self.positions // seq + 1) * (columns - seq)


@contextlib.contextmanager
def _at(block: nn.Module, places: Places, wanted: _Wanted) -> Iterator[None]:
    """Have ``block`` compute for some tokens at ``places``, and give ``fill`` for the others."""
    handles = []
    try:
        for first, last in places:
            handles += _hooks(block.get_submodule(first), block.get_submodule(last), wanted)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(first: nn.Module, last: nn.Module, wanted: _Wanted) -> list[RemovableHandle]:
    """Leave tokens out in front of ``first``, and put them back behind ``last``, in passes of this thread."""
    selected: list[tuple[Tensor, torch.Size]] = []
    thread = threading.get_ident()

    def select(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != thread:
            return None
        selected.clear()
        positions = wanted.among(args[0]) if len(args) == 1 and not _is_recomputed() else None
        if positions is None:
            return None
        selected.append((positions, args[0].shape[:-1]))
        states = args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions)
        return (states.unsqueeze(0),)

    def spread(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread or not selected:
            return None
        positions, shape = selected.pop()
        wanted.spared.append(shape.numel() - len(positions))
        others = output.new_full((shape.numel(), output.shape[-1]), wanted.fill)
        return others.index_copy(0, positions, output[0]).view(*shape, -1)

    # the last to see the input and the first to see the output: for all others the shapes are what they were
    return [first.register_forward_pre_hook(select), put_first(last, last.register_forward_hook(spread))]


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


def _proves(owner: Any, block: nn.Module, probe: Probe, joined: bool, places: Places) -> bool:
    """Whether leaving tokens out at ``places`` changes no state that is asked for and nothing that comes of it."""
    if any(hasattr(each, name) for each in block.parameters() for name in _ELSEWHERE):
        return False
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    generators = [torch.get_rng_state(), *cuda]
    try:
        states, outcomes, drawn = [], [], []
        for fill in (None, 0.0, float("nan")):
            _put_back(generators)
            found = _try(owner, block, probe, joined, places, fill)
            states.append(found[0])
            outcomes.append(found[1])
            drawn.append(torch.get_rng_state())
        bound = 16 * torch.finfo(floating_dtype(block)).eps * float(states[0].abs().max())
        same = float((states[1] - states[0]).abs().max()) <= bound and torch.equal(drawn[1], drawn[0])
        return same and torch.equal(outcomes[1], outcomes[2])
    except Exception:  # only a model's own code knows what it needs
        return False
    finally:
        _put_back(generators)


@torch.no_grad()
def _try(
    owner: Any, block: nn.Module, probe: Probe, joined: bool, places: Places, fill: float | None
) -> tuple[Tensor, Tensor]:
    """The block's states of the tokens that are asked for, and what comes of them; ``None``: nothing is spared."""
    device = device_of(block)
    positions = torch.tensor(probe.positions, device=device)
    wanted = _Wanted(tuple(probe.inputs["input_ids"].shape), positions, joined, fill or 0.0)
    seen: list[Tensor] = []
    thread = threading.get_ident()

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states = output if torch.is_tensor(output) else output[0]
        # not those of another thread, nor of a prompt that is run before the text
        if threading.get_ident() == thread and (at := wanted.among(states)) is not None:
            seen.append(states.reshape(-1, states.shape[-1])[at])

    handle = block.register_forward_hook(see)
    spared = contextlib.nullcontext() if fill is None else _at(block, places, wanted)
    inputs = {name: each.to(device) if torch.is_tensor(each) else each for name, each in probe.inputs.items()}
    try:
        # the dtype of the weights decides how far apart two ways may be
        with torch.autocast(device.type, enabled=False), spared:
            output = owner(**inputs)
    finally:
        handle.remove()
    if fill is not None and len(wanted.spared) != len(places):
        raise RuntimeError(f"tokens were left out {len(wanted.spared)} times, expected once at {places}")
    (states,) = seen
    return states.cpu().double(), probe.outcome(output).cpu()


def _put_back(generators: list[Tensor]) -> None:
    torch.set_rng_state(generators[0])
    if len(generators) > 1:
        torch.cuda.set_rng_state_all(generators[1:])
