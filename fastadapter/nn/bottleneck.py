"""Parameters of one bottleneck adapter and the call that applies it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.ops import bottleneck
from fastadapter.ops.bottleneck import ACTIVATIONS, NORMS, Norm


class Bottleneck(nn.Module):
    """``residual + scale * up(act(down(norm(x))))``, a bottleneck adapter (Houlsby, arXiv:1902.00751, fig. 2).

    ``down_proj`` starts as ``nn.Linear`` does (Kaiming uniform with ``a = sqrt(5)``), ``up_proj`` and both biases from
    zero: the initialisation of He et al. (arXiv:2110.04366) that AdapterHub calls ``mam_adapter``. So a fresh module
    returns the bits of ``residual``, where Houlsby's own, N(0, 1e-2) truncated for both, is only close to it. All
    parameters are fp32 whatever the dtype of the model.

    Parameters: ``2 * hidden_size * bottleneck_size``, plus ``hidden_size + bottleneck_size`` of biases, plus
    ``2 * hidden_size`` (layer norm) or ``hidden_size`` (RMS norm) of an own norm.

    Args:
        hidden_size: width of the input.
        bottleneck_size: width of the hidden layer.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        scale: factor of the adapter's term.
        bias: whether the projections have biases.
        norm: ``None``, ``"layer_norm"`` or ``"rms_norm"`` of the adapter's own, applied to ``x`` alone.
        norm_eps: added to the variance or mean square.

    >>> adapter = Bottleneck(hidden_size=32, bottleneck_size=4)
    >>> x = torch.randn(2, 5, 32)
    >>> torch.equal(adapter(x, residual=x), x)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        *,
        activation: str = "gelu",
        scale: float = 1.0,
        bias: bool = True,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if norm is not None and norm not in NORMS:
            raise ValueError(f"norm must be None or one of {', '.join(NORMS)}, got {norm!r}")
        if hidden_size < 1 or bottleneck_size < 1:
            raise ValueError(
                f"hidden_size and bottleneck_size must be at least 1, got {hidden_size} and {bottleneck_size}"
            )
        self.activation, self.scale, self.norm_eps = activation, scale, norm_eps
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.down_proj = nn.Linear(hidden_size, bottleneck_size, bias=bias, **options)
        self.up_proj = nn.Linear(bottleneck_size, hidden_size, bias=bias, **options)
        self.norm: nn.Module | None = None
        if norm == "layer_norm":
            self.norm = nn.LayerNorm(hidden_size, norm_eps, **options)
        elif norm == "rms_norm":
            self.norm = nn.RMSNorm(hidden_size, norm_eps, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again from an adapter that changes nothing."""
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up_proj.weight)
        for projection in (self.down_proj, self.up_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the adapter.

        Args:
            x: ``(..., hidden_size)``.
            residual: shape and dtype of ``x``, often ``x`` itself; ``None``: the adapter's term alone.
        Returns: shape and dtype of ``x``.
        """
        down, up, norm = self.down_proj, self.up_proj, None
        operands: list[Any] = [down.weight, up.weight, down.bias, up.bias]
        if self.norm is not None:
            kind = "layer_norm" if isinstance(self.norm, nn.LayerNorm) else "rms_norm"
            operands += [getattr(self.norm, name, None) for name in ("weight", "bias")]
        if x.dtype == torch.float64:
            operands = [p if p is None else p.double() for p in operands]
        if self.norm is not None:
            norm = Norm(kind, operands[4], operands[5], self.norm_eps)
        return bottleneck(
            x,
            *operands[:4],
            residual=residual,
            activation=self.activation,
            scale=self.scale,
            norm=norm,
        )

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but keep every bit of the fp32 masters when it is cast."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scale={self.scale}"
