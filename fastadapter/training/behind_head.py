"""What a causal language model makes of the states that its output head is given, piece by piece.

Softcapping and scaling stand in each family's own forward, behind the head. None of it is repeated here: that forward
itself is run again, on a copy of the outermost module whose backbone gives nothing and whose head gives the logits of
the piece. Nothing of the model is changed or computed twice but a few operations on a single token.
"""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.passes import choice
from fastadapter.integrations.passes.order import put_first
from fastadapter.training.last_feed_forward import Probe, sparing

# Tokens of which the model itself makes logits, against which the copy is held.
PROBE = 2
# By the module that calls the head: why its forward cannot be run again; empty: it can.
_verdicts: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_plain: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


class Seen:
    """What one forward pass showed.

    Attributes:
        states: ``(num_positions, hidden)``, of the chosen positions, as the head is given them.
        backbone: the module whose output the head's owner goes on with, if it was called.
        output: what it gave.
        run: the adapters' pass.
    """

    states: Tensor
    backbone: nn.Module | None = None
    output: Any = None
    run: choice.Pass | None = None


def head_of(model: nn.Module) -> nn.Module:
    """The output head. Raises: TypeError: the model has none."""
    causal_lm: Any = model
    while not hasattr(causal_lm, "get_output_embeddings") and hasattr(causal_lm, "module"):
        causal_lm = causal_lm.module  # DistributedDataParallel passes nothing on
    head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings, expected a causal language model")
    return head


@contextmanager
def watching(
    model: nn.Module, head: nn.Module, shape: tuple[int, ...], positions: Tensor, most: int | None = None
) -> Iterator[Seen]:
    """Let the head see the states at ``positions`` alone, or the first ``most`` of them; shows all of them.

    The last feed-forward computes at ``positions`` alone too, where that is the same (last_feed_forward.py).

    Args:
        shape: of the token ids.
    Raises: TypeError: the head is not called once on the states of all tokens.
    """
    seen, calls = Seen(), 0

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        nonlocal calls
        calls += 1
        name, hidden = (None, args[0]) if args else next(iter(kwargs.items()))
        if hidden.shape[:-1] != shape:
            raise TypeError(
                f"the output head was given {tuple(hidden.shape)} states for input_ids {tuple(shape)}; "
                "supervised tokens cannot be told apart in them"
            )
        seen.states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        seen.run = choice.under_way()
        given = seen.states[:most].unsqueeze(0)
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, str(name): given})

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not calls:  # the last one before the head is the outermost
            seen.backbone, seen.output = module, output

    owner = _owner(model, head)
    probe = functools.partial(_probe, owner)
    with sparing(model, owner, shape, positions, probe), ExitStack() as stack:
        # First in line: hooks of others (quantisation, device placement) then see what the head will see.
        handles = [put_first(head, head.register_forward_pre_hook(select, with_kwargs=True))]
        if most is not None and owner is not None:
            handles += [each.register_forward_hook(note) for each in _backbones(owner)]
        for handle in handles:
            stack.callback(handle.remove)
        yield seen
    if calls != 1:
        raise TypeError(f"the output head was called {calls} times in one forward pass, expected once")


class BehindHead:
    """Logits of states, as the model makes them: ``(num_states, hidden)`` to ``(num_states, vocabulary)``."""

    def __init__(self, model: nn.Module, head: nn.Module, seen: Seen):
        self.head, self.run = head, seen.run
        self.owner, self.backbone, self.output = _owner(model, head), seen.backbone, seen.output

    def __call__(self, states: Tensor) -> Tensor:
        if self.owner is None or self.backbone is None:
            raise TypeError("what calls the head, or the backbone before it, is not known")
        first = self.output[0]
        nothing = first.new_zeros(1, 1, first.shape[-1])
        output = (
            (nothing,) if isinstance(self.output, tuple) else type(self.output)(last_hidden_state=nothing)
        )
        twin = _with(self.owner, {self.backbone: _Gives(output), self.head: _Heads(self.head, states)})
        ids = torch.zeros(1, 1, dtype=torch.int64, device=states.device)
        # In backward, perhaps in another thread, the adapters of the forward pass act again.
        with choice.passing(self.run):
            return twin(input_ids=ids, use_cache=False).logits[0]

    def adds_nothing(self, states: Tensor) -> bool:
        """Whether the logits are the head's output, which is tried once for a model."""
        if self.owner is None:
            return False
        if self.owner not in _plain:
            with torch.no_grad():
                _plain[self.owner] = torch.equal(self(states), self.head(states.unsqueeze(0))[0])
        return _plain[self.owner]


def doubt(model: nn.Module, head: nn.Module) -> str | None:
    """Why the model's logits cannot be made in pieces; empty: they can; ``None``: that has not been tried yet."""
    owner = _owner(model, head)
    if owner is None:
        return "its head is in no model of transformers"
    if any(each.__name__ == "FSDPModule" for each in type(owner).__mro__):
        return "its head is sharded by FSDP"
    return _verdicts.get(owner)


def prove(behind: BehindHead, states: Tensor, logits: Tensor) -> str:
    """Hold ``behind`` against logits that the model made of ``states`` itself, and remember what came of it.

    Returns: as :func:`doubt`.
    """
    reason = ""
    try:
        with torch.no_grad():
            found = behind(states)
        if not bool(logits.isfinite().all()):
            return ""  # the caller will say so; another batch may tell
        # The same operations on the same numbers: a part that is missing or doubled is far beyond this.
        bound = 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
        if found.shape != logits.shape or float((found - logits).abs().max()) > bound:
            reason = "run again behind its head, its forward gives other logits"
    except Exception as error:  # whatever its forward needs that is not there
        reason = f"its forward cannot be run again behind its head ({type(error).__name__}: {error})"
    if behind.owner is not None:
        _verdicts[behind.owner] = reason
    return reason


def vocabulary(model: Any, head: Any) -> int:
    """Width of the logits."""
    width = getattr(head, "out_features", None)
    if width is None and getattr(head, "weight", None) is not None and head.weight.dim() == 2:
        width = head.weight.shape[0]
    if width is None:
        width = model.config.get_text_config().vocab_size
    return int(width)


def _owner(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The innermost model of transformers that holds the head: what calls it."""
    found = None
    for module in model.modules():
        if hasattr(type(module), "base_model_prefix") and any(each is head for each in module.modules()):
            found = module
    return found


def _probe(owner: Any) -> Probe:
    ids, at = torch.arange(8, device="cpu")[None] % owner.config.get_text_config().vocab_size, [2, 5]
    return Probe({"input_ids": ids, "use_cache": False}, at, lambda output: output[0][0, at])


def _backbones(owner: Any) -> list[nn.Module]:
    """What may give the states that the head gets: the model of transformers in its owner, or the decoder in that."""
    named = [child for child in owner.children() if hasattr(type(child), "base_model_prefix")]
    named += [
        getattr(owner, "base_model", None),
        owner.get_decoder() if hasattr(owner, "get_decoder") else None,
    ]
    found = {id(each): each for each in named if isinstance(each, nn.Module) and each is not owner}
    return list(found.values())


class _Gives(nn.Module):
    """A module that gives one and the same output, whatever it is called with."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _Heads(nn.Module):
    """A head that gives the logits of other states than those it is called with."""

    def __init__(self, head: nn.Module, states: Tensor):
        super().__init__()
        self.__dict__["head"], self.states = head, states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)  # its weight's dtype, its bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.head(self.states.unsqueeze(0))


def _with(module: nn.Module, instead: Mapping[nn.Module, nn.Module]) -> Any:
    """A shallow copy of a module with others in place of some that it holds: the same parameters, no hooks."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = {
        name: OrderedDict() if "_hooks" in name else value
        for name, value in vars(module).items()
        if name not in ("forward", "_hf_hook", "_old_forward")  # accelerate's, bound to the module
    }
    children: dict[str, Any] = {}
    for name, child in module._modules.items():
        if child is not None and child in instead:
            child = instead[child]
        elif child is not None and any(each in instead for each in child.modules()):
            child = _with(child, instead)
        children[name] = child
    twin.__dict__["_modules"] = children
    return twin
