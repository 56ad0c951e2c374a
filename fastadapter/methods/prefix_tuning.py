"""Prefix tuning: learned keys and values in every layer (Li & Liang, arXiv:2101.00190)."""

from dataclasses import dataclass, field
from typing import ClassVar

from fastadapter.methods.config import (
    MAX_PREFIX_LEN,
    TEXT,
    MethodConfig,
    require_count,
    require_number,
    settle_init,
)
from fastadapter.nn.prefix_tuning import INITS


@dataclass(frozen=True)
class PrefixTuningConfig(MethodConfig):
    """What to attach, and where.

    The prefix shares one softmax with the real keys and every query sees it, whatever the mask or the sliding window.
    Real tokens keep their own positions (PEFT moves them up by the prefix's length).

    Args:
        prefix_len: learned positions per adapted layer, 1 to 1024.
        layers: how many of the top blocks get a prefix; ``None``: all of them.
        reparam_size: width of Li & Liang's network that keys and values come from while training; ``None``: they are
            parameters themselves. :func:`fastadapter.fold` replaces the network by what it gives.
        init: ``"random"``, N(0, ``init_std``); ``"zero"``; or ``"text"``, the keys and values that the frozen model
            computes for ``init_text``, so that a decoder starts from what it does with that text in front. ``None``:
            ``"text"`` where there is one, else ``"random"``. No start leaves the model as it was: an empty slot takes
            its share of the softmax too.
        init_std: standard deviation of the first keys and values, or of the network's last weight.
        init_text: a text, or several that are put one after another, whose tokens are repeated or cut to
            ``prefix_len``; :func:`fastadapter.attach` then needs the tokenizer. With ``reparam_size``, which must be
            at least ``prefix_len``, the network is fitted to give the text's keys and values.
        freeze_slots: how many of the first positions stay as they start. The first token of a text draws much attention
            with next to no value, so small steps of that slot move all outputs. Not with ``reparam_size``.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> PrefixTuningConfig(prefix_len=5, reparam_size=64).init
    'random'
    """

    prefix_len: int = 20
    layers: int | None = None
    reparam_size: int | None = None
    init: str | None = None
    init_std: float = 0.02
    init_text: str | tuple[str, ...] | None = field(default=None, kw_only=True)
    freeze_slots: int = field(default=0, kw_only=True)

    method: ClassVar[str] = "prefix-tuning"

    def __post_init__(self):
        super().__post_init__()
        require_count("prefix_len", self.prefix_len, MAX_PREFIX_LEN)
        require_count("layers", self.layers, optional=", or None for all")
        require_count("reparam_size", self.reparam_size, optional=", or None for no network")
        if self.init == "normal":  # the name of "random" in files of before
            object.__setattr__(self, "init", "random")
        settle_init(self, INITS)
        require_number("init_std", self.init_std, above=0)
        if not isinstance(self.freeze_slots, int) or isinstance(self.freeze_slots, bool):
            raise TypeError(f"freeze_slots must be an int, got {self.freeze_slots!r}")
        if not 0 <= self.freeze_slots < self.prefix_len:
            raise ValueError(
                f"freeze_slots must be between 0 and {self.prefix_len - 1}, less than prefix_len, got "
                f"{self.freeze_slots}"
            )
        if self.freeze_slots and self.reparam_size is not None:
            raise ValueError(
                f"freeze_slots must be 0 with reparam_size: one network gives all slots, got {self.freeze_slots}"
            )
        if self.init == TEXT and self.reparam_size is not None and self.reparam_size < self.prefix_len:
            raise ValueError(
                f"reparam_size must be at least prefix_len {self.prefix_len} with init='text': a narrower network "
                f"cannot give the keys and values of a text, got {self.reparam_size}"
            )
