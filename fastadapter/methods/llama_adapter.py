"""LLaMA-Adapter: gated attention over a learned prompt in the top layers (arXiv:2303.16199)."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from fastadapter.nn import GatedPrefix
from fastadapter.ops.gated_prefix import GATE_FUNCTIONS

MAX_PREFIX_LEN = 1024


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class LlamaAdapterConfig:
    """What to attach, and where.

    Args:
        prefix_len: learned positions per adapted layer, 1 to 1024.
        layers: how many of the top blocks get the adapter (of each stack, in an encoder-decoder model); ``None``:
            all of them.
        gate: ``"tanh"`` as in the paper's training code, or ``"identity"`` as in litgpt and PEFT.
        gate_per_head: one gate per head, or one per layer as in PEFT.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> LlamaAdapterConfig(prefix_len=4, layers=2).gate
    'tanh'
    """

    prefix_len: int = 10
    layers: int | None = None
    gate: str = "tanh"
    gate_per_head: bool = True

    method: ClassVar[str] = "llama-adapter"

    def __post_init__(self):
        if not _is_count(self.prefix_len):
            raise TypeError(f"prefix_len must be an int, got {self.prefix_len!r}")
        if not 1 <= self.prefix_len <= MAX_PREFIX_LEN:
            raise ValueError(f"prefix_len must be between 1 and {MAX_PREFIX_LEN}, got {self.prefix_len}")
        if self.layers is not None and not _is_count(self.layers):
            raise TypeError(f"layers must be an int or None, got {self.layers!r}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers must be at least 1, or None for all, got {self.layers}")
        if self.gate not in GATE_FUNCTIONS:
            raise ValueError(f"gate must be one of {', '.join(GATE_FUNCTIONS)}, got {self.gate!r}")
        if not isinstance(self.gate_per_head, bool):
            raise TypeError(f"gate_per_head must be a bool, got {self.gate_per_head!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict."""
        return asdict(self)

    def build(self, hidden_size: int, num_heads: int, device: torch.device) -> GatedPrefix:
        """A fresh module for one attention layer."""
        return GatedPrefix(
            hidden_size,
            num_heads,
            self.prefix_len,
            gate_fn=self.gate,
            gate_per_head=self.gate_per_head,
            device=device,
        )
