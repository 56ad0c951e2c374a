"""LLaMA-Adapter: gated attention over a learned prompt in the top layers (arXiv:2303.16199), and its second version.

Version 2 (arXiv:2304.15010) adds a scale and a bias to every linear layer and trains the norms.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from fastadapter.methods.config import (
    MAX_PREFIX_LEN,
    MethodConfig,
    require_bool,
    require_choice,
    require_count,
    settle_init,
)
from fastadapter.nn.channel_scale import CONVENTIONS
from fastadapter.ops.gated_prefix import GATE_FUNCTIONS

INITS = ("random",)


@dataclass(frozen=True)
class LlamaAdapterConfig(MethodConfig):
    """What to attach, and where.

    Args:
        prefix_len: learned positions per adapted layer, 1 to 1024.
        layers: how many of the top blocks get the adapter (of each stack, in an encoder-decoder model); ``None``:
            all of them.
        gate: ``"tanh"`` as in the paper's training code, or ``"identity"`` as in litgpt and PEFT.
        gate_per_head: one gate per head, or one per layer as in PEFT.
        init: ``"random"``, N(0, 1), or ``"text"``: each layer's prompt starts from what that layer gets for the
            tokens of ``init_text``. ``None``: ``"text"`` where there is one, else ``"random"``. The gates are zero
            either way, so a fresh adapter changes nothing.
        init_text: a text, or several that are put one after another, whose tokens are repeated or cut to
            ``prefix_len``; :func:`fastadapter.attach` then needs the tokenizer.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> LlamaAdapterConfig(prefix_len=4, layers=2).gate
    'tanh'
    """

    prefix_len: int = 10
    layers: int | None = None
    gate: str = "tanh"
    gate_per_head: bool = True
    init: str | None = field(default=None, kw_only=True)
    init_text: str | tuple[str, ...] | None = field(default=None, kw_only=True)

    method: ClassVar[str] = "llama-adapter"

    def __post_init__(self):
        super().__post_init__()
        require_count("prefix_len", self.prefix_len, MAX_PREFIX_LEN)
        require_count("layers", self.layers, optional=", or None for all")
        require_choice("gate", self.gate, GATE_FUNCTIONS)
        require_bool("gate_per_head", self.gate_per_head)
        settle_init(self, INITS)


@dataclass(frozen=True)
class LlamaAdapterV2Config(LlamaAdapterConfig):
    """LLaMA-Adapter V2 for text: the gated prompts of :class:`LlamaAdapterConfig`, and in all blocks more.

    Every linear layer of the blocks gets a scale and a bias per channel, every norm of the blocks and after them
    parameters of its own.

    Args:
        prefix_len, layers, gate, gate_per_head, init, init_text: of the gated prompts; scale, bias and norms are in
            all blocks.
        scale: ``"input"``: ``W (x * scale) + b0 + bias``, the authors' code; ``"output"``:
            ``scale * (W x + b0 + bias)``, litgpt; the two are different maps.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> LlamaAdapterV2Config(scale="output").prefix_len
    10
    """

    scale: str = "input"

    method: ClassVar[str] = "llama-adapter-v2"

    def __post_init__(self):
        super().__post_init__()
        require_choice("scale", self.scale, CONVENTIONS)
