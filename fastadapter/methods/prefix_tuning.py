"""Prefix tuning: learned keys and values in every layer (Li & Liang, arXiv:2101.00190)."""

from dataclasses import dataclass
from typing import ClassVar

from fastadapter.methods.config import (
    MAX_PREFIX_LEN,
    MethodConfig,
    require_choice,
    require_count,
    require_number,
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
        init: ``"normal"``, N(0, ``init_std``), or ``"zero"``. No start leaves the model as it was: an empty slot takes
            its share of the softmax too.
        init_std: standard deviation of the first keys and values, or of the network's last weight.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> PrefixTuningConfig(prefix_len=5, reparam_size=64).init
    'normal'
    """

    prefix_len: int = 20
    layers: int | None = None
    reparam_size: int | None = None
    init: str = "normal"
    init_std: float = 0.02

    method: ClassVar[str] = "prefix-tuning"

    def __post_init__(self):
        super().__post_init__()
        require_count("prefix_len", self.prefix_len, MAX_PREFIX_LEN)
        require_count("layers", self.layers, optional=", or None for all")
        require_count("reparam_size", self.reparam_size, optional=", or None for no network")
        require_choice("init", self.init, INITS)
        require_number("init_std", self.init_std, above=0)
