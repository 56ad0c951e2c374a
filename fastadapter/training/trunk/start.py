"""Begin a forward pass of a model behind some of its blocks, from hidden states that are known already.

The model's own forward runs: embeddings, masks and positions are made as ever, the blocks below hand on what they get,
and the last of them gives the states that are known. Which pass does so is said by a context variable, so passes of
other threads are as they were; the blocks are put back when the :class:`StartPoint` is left, also after an error.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class NoTrunk(Exception):
    """Why passes of a model cannot begin at a block, or need not; in words that follow a colon."""


class NotWorth(NoTrunk):
    """It could be done, and would save too little."""


class _Pass:
    """What one forward pass does with the blocks of a start point.

    Attributes:
        given: the states to begin with; ``None``: the pass ends behind the trunk, and keeps its states in ``found``.
    """

    def __init__(self, given: Tensor | None):
        self.given = given
        self.found: Tensor | None = None
        self.used = 0


_under_way: ContextVar[_Pass | None] = ContextVar("fastadapter_start", default=None)


@contextlib.contextmanager
def starting_from(states: Tensor) -> Iterator[None]:
    """Let the one forward pass in the context begin from ``states``, ``(batch, seq, width)``.

    The model's start point must be entered. Raises: RuntimeError: no pass, or more than one, began from the states.
    """
    run = _Pass(states)
    token = _under_way.set(run)
    try:
        yield
    finally:
        _under_way.reset(token)
    if run.used != 1:
        raise RuntimeError(f"{run.used} forward passes began from the states that were given, expected one")


class StartPoint:
    """Behind the first ``index`` blocks of a stack, while it is entered.

    Args:
        blocks: all of the stack, in the order in which the model calls them.
        index: how many of them form the trunk, at least one.
        lengths: of the tuple that each of them returns, whose first item are the states; ``None``: a tensor.
    """

    def __init__(self, blocks: Sequence[nn.Module], index: int, lengths: Sequence[int | None]):
        self.blocks, self.index, self.lengths = list(blocks), index, list(lengths)
        self._before: list[Any] = []

    def __enter__(self) -> "StartPoint":
        for number, block in enumerate(self.blocks):
            self._before.append(block.__dict__.get("forward"))
            block.__dict__["forward"] = _Passage(block.forward, number, self)
        return self

    def __exit__(self, *_: object) -> None:
        for block, before in zip(self.blocks, self._before):
            del block.__dict__["forward"]
            if before is not None:
                block.__dict__["forward"] = before
        self._before = []

    @torch.no_grad()
    def states(self, call: Callable[[], object]) -> Tensor:
        """The hidden states behind the trunk of the one pass that ``call`` makes; the blocks above do nothing."""
        run = _Pass(None)
        token = _under_way.set(run)
        try:
            call()
        finally:
            _under_way.reset(token)
        if run.found is None:
            raise NoTrunk("a forward pass did not come to the end of the trunk")
        return run.found


class _Passage:
    """Stands in for the forward of one block."""

    def __init__(self, inner: Callable[..., Any], number: int, point: StartPoint):
        self.inner, self.number, self.point = inner, number, point

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _under_way.get()
        index = self.point.index
        if run is None or (run.given is not None and self.number >= index):
            return self.inner(*args, **kwargs)
        if run.given is None and self.number < index:
            output = self.inner(*args, **kwargs)
            if self.number == index - 1:
                run.found = hidden_of(output)
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.number == index - 1:
            hidden = self._begin(run, hidden)
        length = self.point.lengths[self.number]
        return hidden if length is None else (hidden,) + (None,) * (length - 1)

    def _begin(self, run: _Pass, hidden: Tensor) -> Tensor:
        assert run.given is not None
        if run.given.shape != hidden.shape:
            raise RuntimeError(
                f"the states to begin with must have the shape {tuple(hidden.shape)}, got {tuple(run.given.shape)}"
            )
        run.used += 1
        return run.given.to(hidden.dtype)  # other than that of the model only where a user asked for it


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple) else output
