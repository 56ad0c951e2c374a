"""Parameters of one layer's LLaMA-Adapter prompt and the call that applies it."""

import torch
from torch import Tensor, nn

from fastadapter.nn.masters import Masters
from fastadapter.ops import gated_prefix
from fastadapter.ops.gated_prefix import GATE_FUNCTIONS


class GatedPrefix(Masters):
    """Zero-init gated attention over a learned prompt (LLaMA-Adapter, arXiv:2303.16199, section 3).

    ``prompt`` holds ``prefix_len`` rows in the layer's input space. The caller sends them through the layer's own
    frozen key and value projections, without rotary embedding, and hands the result to :meth:`forward`. ``prompt``
    starts from N(0, 1) and ``gate`` from zero as in the authors' code, so a fresh module changes nothing. Both are
    fp32 whatever the dtype of the model: a bf16 gate would lose small optimiser steps.

    Parameters: ``prefix_len * hidden_size + num_heads`` (``+ 1`` with one gate for all heads).

    Args:
        hidden_size: width of the layer's input.
        num_heads: query heads of the layer.
        prefix_len: learned positions.
        gate_fn: ``"tanh"`` or ``"identity"``, applied to the gate.
        gate_per_head: one gate per head, or one for the layer.

    >>> adapter = GatedPrefix(hidden_size=32, num_heads=4, prefix_len=3)
    >>> project = torch.nn.Linear(32, 2 * 32)  # the layer's frozen key and value projection
    >>> key, value = project(adapter.prompt).view(1, 3, 2, 4, 8).permute(2, 0, 3, 1, 4)
    >>> base, query = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    >>> torch.equal(adapter(base, query, key, value), base)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        prefix_len: int = 10,
        *,
        gate_fn: str = "tanh",
        gate_per_head: bool = True,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if gate_fn not in GATE_FUNCTIONS:
            raise ValueError(f"gate_fn must be one of {', '.join(GATE_FUNCTIONS)}, got {gate_fn!r}")
        self.num_heads = num_heads
        self.gate_fn = gate_fn
        self.prompt = nn.Parameter(torch.randn(prefix_len, hidden_size, dtype=torch.float32, device=device))
        gates = num_heads if gate_per_head else 1
        self.gate = nn.Parameter(torch.zeros(gates, dtype=torch.float32, device=device))

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """A prompt of these rows, ``(prefix_len, hidden_size)``; the gate stays."""
        self.prompt.copy_(rows)

    def reset_parameters(self) -> None:
        """A prompt from N(0, 1) and gates of zero."""
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(
        self,
        base: Tensor,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        *,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Add the gated term to ``base``.

        Args:
            base, query: ``(batch, num_heads, q_len, head_dim)``.
            prefix_key, prefix_value: the projected prompt, ``(1, num_kv_heads, prefix_len, head_dim)``.
            softmax_scale: what the layer's attention uses; ``head_dim ** -0.5`` unless given.
        Returns: shape, dtype and strides of ``base``.
        """
        gate = self.gate.expand(1, self.num_heads)
        if base.dtype == torch.float64:
            gate = gate.double()
        return gated_prefix(
            base, query, prefix_key, prefix_value, gate, softmax_scale=softmax_scale, gate_fn=self.gate_fn
        )

    def extra_repr(self) -> str:
        prefix_len, hidden_size = self.prompt.shape
        return (
            f"hidden_size={hidden_size}, num_heads={self.num_heads}, prefix_len={prefix_len}, "
            f"gate_fn={self.gate_fn!r}, gate_per_head={self.gate.numel() == self.num_heads}"
        )
