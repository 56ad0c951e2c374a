"""Choose the adapter that acts: for the calling thread or task, and as the model's default."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastadapter.integrations.parts.sharding import reshard
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.choice import Choice, State
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.verbs.record import (
    require_attachments,
    require_name,
    require_no_rows,
    require_unfolded,
)

_EXPAND = "_expand_inputs_for_generation"
_expanding = threading.Lock()


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require gradients, in the model's order; hand the second to an optimiser.

    Names are those in the adapted model, whatever is wrapped around it. What a module around it adds of its own (a
    head over a backbone) comes last.
    """
    inner = unwrap(model)
    reshard(inner)
    inside = list(inner.named_parameters())
    own = {id(parameter) for _, parameter in inside}
    around = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in own]
    return [(name, parameter) for name, parameter in inside + around if parameter.requires_grad]


def set_active(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that acts from now on; ``None`` is the base model.

    For calls from this thread (under asyncio: this task), whatever others choose, and as the model's default: what acts
    in threads that chose nothing themselves. A forward pass under way goes on with what it began with.

    Raises: ValueError: no adapter of that name, or the weights hold another, folded.
    """
    record = require_attachments(unwrap(model))
    require_no_rows(record)
    if name is not None:
        require_name(record, name)
    require_unfolded(record, unless=name)
    record.state.default, record.state.newest = name, None
    record.state.choose(Choice(name))


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Give every row of a batch an adapter of its own while the context lasts: forward, training step, ``generate``.

    Adapters of different methods and sizes go together. Under beam search and ``num_return_sequences`` a row's copies
    keep its adapter. In fp32, a row is bit for bit what it is in any other batch of the same shape where it has the
    same adapter; a batch of another shape may round the model's own matrix products differently. An encoder's soft
    prompts are part of the shape: all rows are longer by the longest prompt of the batch, those without one too.

    Args:
        names: an adapter, or ``None`` for the base model, for every row.
    Raises: ValueError: no adapter of that name, no names, a context in a context, rows without an adapter that is
        folded into the weights; and in the forward pass a batch of another number of rows.

    >>> with rows(model, ["reviews", None, "legal"]):  # doctest: +SKIP
    ...     model.generate(**batch)
    """
    inner = unwrap(model)
    record = require_attachments(inner)
    require_no_rows(record)
    if isinstance(names, str) or not names:
        raise ValueError(f"rows must be a list of names, one per row of the batch, got {names!r}")
    state = record.state
    chosen = tuple(None if each is None else require_name(record, each) for each in names)
    for each in chosen:
        require_unfolded(record, unless=each)
    before = state.chosen()
    state.choose(Choice(rows=chosen))
    try:
        with _counting_copies(inner, state):
            for module in inner.modules():
                if isinstance(module, Host):
                    module.prepare_rows(chosen)
            yield model
    finally:
        state.choose(before)


@contextlib.contextmanager
def _counting_copies(model: nn.Module, state: State) -> Iterator[None]:
    """Notice how often ``generate`` repeats every row for beams and return sequences, while the context lasts.

    The models inside are hooked once, however many threads are in a context.
    """
    generating = [module for module in model.modules() if hasattr(type(module), _EXPAND)]
    with _expanding:
        for module in generating:
            _Expanding.enter(module, state)
    try:
        yield
    finally:
        with _expanding:
            for module in generating:
                _Expanding.leave(module)


class _Expanding:
    """Stands in for the method of ``generate`` that repeats the rows of a batch."""

    def __init__(self, original: Any, state: State):
        self.original = original
        self.state = state
        self.users = 0

    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        chosen = self.state.chosen()
        if chosen is not None and chosen.rows is not None:
            self.state.choose(chosen._replace(factor=expand_size))
        return self.original(expand_size, *args, **kwargs)

    @classmethod
    def enter(cls, module: nn.Module, state: State) -> None:
        found = module.__dict__.get(_EXPAND)
        if not isinstance(found, cls):
            found = module.__dict__[_EXPAND] = cls(getattr(module, _EXPAND), state)
        found.users += 1

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        found = module.__dict__.get(_EXPAND)
        if isinstance(found, cls):
            found.users -= 1
            if not found.users:
                del module.__dict__[_EXPAND]
