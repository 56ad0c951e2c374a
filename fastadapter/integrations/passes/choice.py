"""Who acts in a forward pass: chosen by the context that calls (a thread, a task), or else the model's default.

A model holds adapters and a default; nothing in it says what a call under way uses. What a context chooses with
``set_active`` or ``rows`` lives in a context variable; what one pass uses is decided when it begins (:class:`Pass`).
"""

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapter.integrations.passes.kept import Store
from fastadapter.integrations.passes.traffic import Traffic

# Small tensors kept for one model; serving switches between few mixes of rows.
_KEPT = 64
_KEYS = itertools.count()


class Choice(NamedTuple):
    """One adapter for all rows, or an adapter, or ``None``, for every row of the batch.

    Attributes:
        active: the adapter that acts on every row, if ``rows`` is ``None``.
        rows: by row.
        factor: how often beam search repeats every row, from the last call of ``generate``.
    """

    active: str | None = None
    rows: tuple[str | None, ...] | None = None
    factor: int = 1

    def names(self) -> list[str]:
        """The adapters that act, each once."""
        names = (self.active,) if self.rows is None else dict.fromkeys(self.rows)
        return [name for name in names if name is not None]

    def row_names(self, batch: int) -> tuple[str | None, ...] | None:
        """The adapter of every row of a batch; ``None`` when one acts on all.

        Raises: ValueError: the batch has another number of rows.
        """
        if self.rows is None:
            return None
        if batch == len(self.rows):
            return self.rows
        if batch == len(self.rows) * self.factor:
            return tuple(name for name in self.rows for _ in range(self.factor))
        raise ValueError(f"rows: {len(self.rows)} adapters were named for a batch of {batch} rows")


# By the key of the model's state. A compiler cannot read a context variable, so every thread has a copy for it.
_chosen: ContextVar[dict[int, Choice] | None] = ContextVar("fastadapter_choices", default=None)


class _Thread(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}
        self.passing: Pass | None = None
        self.left: dict[tuple[int, str], Any] = {}


this_thread = _Thread()


class Pass:
    """One forward pass of a model: who acts in it from its first layer to its last, also when it is recomputed.

    Attributes:
        choice: who acts.
        outer: what this thread was in before: a pass of another model, or :meth:`State.only`.
        forced: made by :meth:`State.only`.
        keeps: whether what is projected may be kept for later passes: no gradient can be needed through it.
        serials: which adapters these were, so that a recomputation does not take others of the same name.
        stamp: the same in all passes that may repeat what one of them did; ``None`` where each has to ask again.
    """

    __slots__ = ("choice", "forced", "keeps", "outer", "serials", "stamp", "state")

    def __init__(self, state: "State", choice: Choice, *, keeps: bool = False, forced: bool = False):
        self.state = state
        self.outer = this_thread.passing
        self.forced = forced
        self.choice = choice
        self.keeps = keeps
        self.stamp = state.store.stamp(choice) if keeps else None
        self.serials = {name: state.serials.get(name) for name in choice.names()}

    @classmethod
    def begun(cls, state: "State", keeps: bool) -> "Pass":
        """A pass that begins now, from this context."""
        outer = this_thread.passing
        while outer is not None and outer.state is state and not outer.forced:
            outer = this_thread.passing = outer.outer  # left behind by a pass that an interrupt ended
        if outer is not None and outer.state is state:
            return cls(state, outer.choice, keeps=keeps)
        return cls(state, state.choice(), keeps=keeps)

    def require_attached(self) -> None:
        """Raises: RuntimeError: an adapter that acted in the forward pass is gone, or is another one by now."""
        for name, serial in self.serials.items():
            if self.state.serials.get(name) != serial:
                raise RuntimeError(
                    f"adapter {name!r} was detached or replaced between a forward pass and its backward pass, which "
                    "recomputes the layers: detach it after backward"
                )


def under_way() -> Pass | None:
    """The innermost pass that this thread is in."""
    return this_thread.passing


@contextlib.contextmanager
def passing(run: Pass | None) -> Iterator[None]:
    """Be in a pass while the context lasts."""
    outer = this_thread.passing
    this_thread.passing = run
    try:
        yield
    finally:
        this_thread.passing = outer


def by_row() -> bool:
    """Whether this context chose adapters row by row, for any model: its modules then have to see all rows."""
    return any(choice.rows is not None for choice in (_chosen.get() or {}).values())


def left_behind() -> dict[tuple[int, str], Any]:
    """What hooks leave to later hooks of the same pass, by host and name: a pass stays in its thread."""
    return this_thread.left


def be_in(run: Pass | None) -> None:
    """What :func:`passing` does, for hooks."""
    this_thread.passing = run


class State:
    """What all hosts of a model share: its default adapter, the passes under way, small tensors of theirs.

    Attributes:
        default: the adapter that acts where a context chose none.
        newest: one that a thread attached beside it, for itself alone, if nobody chose since.
        serials: the attached adapters, each with a number of its own.
        traffic: passes under way, and verbs that have to wait for them.
        store: what is kept between passes.
        known: what was looked up in the model's structure; every verb empties it.
    """

    def __init__(self) -> None:
        self.default: str | None = None
        self.newest: str | None = None
        self.serials: dict[str, int] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.key = next(_KEYS)
        self.traffic = Traffic()
        self.store = Store()
        self.known: dict[Any, Any] = {}
        self._tensors: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled model is one of its own: what acts here is its default."""
        chosen = self.chosen()
        default = self.default if chosen is None or chosen.rows is not None else chosen.active
        return {"default": default, "newest": None, "serials": self.serials}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    def remember(self) -> Callable[[], None]:
        """How to go back to the adapters, the default and this context's choice of now."""
        default, newest, serials, chosen = self.default, self.newest, dict(self.serials), self.chosen()

        def go_back() -> None:
            self.default, self.newest, self.serials = default, newest, serials
            self.choose(chosen)

        return go_back

    def chosen(self) -> Choice | None:
        """What this context chose; ``None``: nothing."""
        if torch.compiler.is_compiling():
            return this_thread.choices.get(self.key)
        found = _chosen.get()
        return None if found is None else found.get(self.key)

    def choose(self, choice: Choice | None) -> None:
        """Choose for this context, from now on; ``None``: the model's default again."""
        mine = dict(_chosen.get() or {})
        mine.pop(self.key, None)
        if choice is not None:
            mine[self.key] = choice
        _chosen.set(mine)
        this_thread.choices = mine

    def choice(self) -> Choice:
        """Who acts on a call from this context.

        Raises: RuntimeError: an adapter that this context chose was detached elsewhere.
        """
        chosen = self.chosen()
        if chosen is None:
            if self.newest is not None and not torch.compiler.is_compiling():
                self._say_which()
            return Choice(self.default)
        for name in chosen.names():
            if name not in self.serials:
                raise RuntimeError(
                    f"adapter {name!r}, which this thread or task chose, was detached: call set_active with another"
                )
        return chosen

    def _say_which(self) -> None:
        """Once: a thread that chose nothing may expect what another one attached last."""
        newest, self.newest = self.newest, None
        warnings.warn(
            f"a thread that chose no adapter uses {self.default!r}, the model's default; {newest!r} was attached or "
            "loaded by another thread and acts in that one alone: set_active makes it everybody's",
            stacklevel=2,
        )

    def acting(self) -> Choice:
        """Who acts in the pass under way, or on a part of the model that is called by itself."""
        run = this_thread.passing
        return run.choice if run is not None and run.state is self else self.choice()

    @contextlib.contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Let one adapter act in this thread, whatever was chosen."""
        with passing(Pass(self, Choice(name), forced=True)):
            yield

    def tensor(self, values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Some numbers on a device, the same tensor for every host that asks for them; not to be written to.

        Raises: RuntimeError: a CUDA graph is being recorded, and the numbers are new.
        """
        key = (values, dtype, device)
        found = self._tensors.get(key)
        if found is not None:
            return found
        found = torch.tensor(values, dtype=dtype, device="cpu")
        if torch.compiler.is_compiling():
            return found.to(device)
        if not may_keep(device):
            raise RuntimeError(
                "rows: enter rows(...) and call the model once before a CUDA graph is captured"
            )
        if device.type == "cuda":  # without waiting for it
            found = found.pin_memory()
        found = found.to(device, non_blocking=True)
        if len(self._tensors) >= _KEPT:
            self._tensors = {}
        self._tensors[key] = found
        return found


def may_keep(device: torch.device) -> bool:
    """Whether what is made now can be used by later calls.

    Not in a compiled graph, and not while a CUDA graph is recorded: nothing is computed then, and the memory is the
    graph's own.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not is_captured()


def is_captured() -> bool:
    """Whether this thread records a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
