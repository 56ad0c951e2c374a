"""Calls of C++ ops that are checked and packed once and repeated with other activations, for decoding.

A call through PyTorch's dispatcher costs by what it touches, for between two layers the weights of a model push code
and data out of the caches: thirteen arguments and a packing of weights take 57 us in place, a tensor and a number 25.
Callers keep a call only as long as what it was made from is what they mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastadapter.ops.backends import extension_error, library

# Rows of activations up to which a call's overhead is worth a packed copy of its weights.
MOST_ROWS = 16

ERROR = extension_error("bottleneck_prepared")
if ERROR is None:
    _ops = torch.ops.fastadapter
    # without the Python function around each: one of the calls that every layer of every token makes
    repeat, _repeat_two, _release = (
        getattr(getattr(_ops, name).default, "_op", getattr(_ops, name).default)
        for name in ("repeat", "repeat_two", "release")
    )
    prepare_bottleneck = _ops.bottleneck_prepared.default
    prepare_gated_prefix = _ops.gated_prefix_prepared.default
    prepare_scaled_linear = _ops.scaled_linear_prepared.default
    for _name in ("repeat", "repeat_two"):
        torch.library.register_fake(f"fastadapter::{_name}", lambda x, *_: torch.empty_like(x), lib=library)


class Number:
    """Of a call that the extension keeps as long as this object lives; what :func:`repeat` takes is its ``value``."""

    __slots__ = ("_release", "value")

    def __init__(self, value: int):
        self.value, self._release = value, _release

    def __del__(self) -> None:
        self._release(self.value)


class Repeated:
    """An op over one or two activations, prepared when few rows come for the first time.

    Args:
        prepare: the number of a call for activations like those given.
    """

    __slots__ = ("_number", "_prepare")

    def __init__(self, prepare: Callable[..., int]):
        self._prepare = prepare
        self._number: Number | None = None

    def __call__(self, rows: int, x: Tensor, other: Tensor | None = None) -> Tensor | None:
        """The op's output; ``None``: for so many ``rows`` it is to be called as ever."""
        if rows > MOST_ROWS:
            return None
        number = self._number
        if number is None:
            operands = (x,) if other is None else (x, other)
            number = self._number = Number(self._prepare(*operands))
        return repeat(x, number.value) if other is None else _repeat_two(x, other, number.value)
