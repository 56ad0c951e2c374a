"""Parameters of one bottleneck adapter and the call that applies it."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastadapter.nn.masters import MasterLinear, Masters
from fastadapter.ops import bottleneck
from fastadapter.ops.bottleneck import ACTIVATIONS, NORMS, Norm

# How the weights of a fresh module are drawn.
INITS = ("zero", "houlsby")


class Bottleneck(Masters):
    """``residual + scale * up(act(down(norm(x))))``, a bottleneck adapter (Houlsby, arXiv:1902.00751, fig. 2).

    By default ``down_proj`` starts as ``nn.Linear`` does (Kaiming uniform with ``a = sqrt(5)``), ``up_proj`` and both
    biases from zero: the initialisation of He et al. (arXiv:2110.04366) that AdapterHub calls ``mam_adapter``. So a
    fresh module returns the bits of ``residual``. Houlsby's own, N(0, 1e-2) cut off at two standard deviations for both
    projections, is only close to it. All parameters are fp32 whatever the dtype of the model.

    Parameters: ``2 * hidden_size * bottleneck_size``, plus ``hidden_size + bottleneck_size`` of biases, plus
    ``2 * hidden_size`` (layer norm) or ``hidden_size`` (RMS norm) of an own norm.

    Args:
        hidden_size: width of the input.
        bottleneck_size: width of the hidden layer.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        scale: factor of the adapter's term, or ``"learned"``: a parameter that starts from 1.
        bias: whether the projections have biases.
        norm: ``None``, ``"layer_norm"`` or ``"rms_norm"`` of the adapter's own, applied to ``x`` alone.
        norm_eps: added to the variance or mean square.
        init: ``"zero"`` (no effect at all at the start) or ``"houlsby"`` (nearly none).
    Raises: ValueError: naming the argument, what was expected and what came.

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
        scale: float | str = 1.0,
        bias: bool = True,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        init: str = "zero",
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
        if isinstance(scale, str) and scale != "learned":
            raise ValueError(f"scale must be a number or 'learned', got {scale!r}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        self.activation, self.norm_eps, self.init = activation, norm_eps, init
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        # One dimension: FSDP2 shards no scalars.
        self.scale = nn.Parameter(torch.ones(1, **options)) if isinstance(scale, str) else scale
        self.down_proj = MasterLinear(hidden_size, bottleneck_size, bias=bias, **options)
        self.up_proj = MasterLinear(bottleneck_size, hidden_size, bias=bias, **options)
        self.norm: nn.Module | None = None
        if norm == "layer_norm":
            self.norm = nn.LayerNorm(hidden_size, norm_eps, **options)
        elif norm == "rms_norm":
            self.norm = nn.RMSNorm(hidden_size, norm_eps, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        if self.init == "houlsby":
            for projection in (self.down_proj, self.up_proj):
                nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_proj.weight)
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)
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
        return bottleneck(x, residual=residual, **operands([self], x.dtype, stacked=False))

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, nn.Parameter) else self.scale
        return f"activation={self.activation!r}, scale={scale}"


def operands(
    bank: "list[Bottleneck]", dtype: torch.dtype, *, stacked: bool, rounded: bool = False
) -> dict[str, Any]:
    """The arguments of :func:`fastadapter.ops.bottleneck` that come from adapters of equal sizes and options.

    Args:
        bank: the adapters.
        dtype: of the activations.
        stacked: as banks, one entry per adapter; otherwise those of the one adapter there is.
        rounded: weights in ``dtype``, as a GPU multiplies them, for calls that need no gradient; beside a norm they
            stay as they are, since its weight goes into them first.
    """
    first = bank[0]
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def joined(tensors: list[Tensor]) -> Tensor:
        tensors = [x if x.dtype is weights_dtype else x.to(weights_dtype) for x in tensors]
        return torch.stack(tensors) if stacked else tensors[0]

    def of(module: str, name: str) -> Any:
        found = [getattr(getattr(each, module), name, None) for each in bank]
        return None if found[0] is None else joined(cast("list[Tensor]", found))

    up, up_bias, scale = of("up_proj", "weight"), of("up_proj", "bias"), first.scale
    if torch.is_tensor(scale):  # a parameter, or what functional_call puts in its place
        factors = joined([cast(Tensor, each.scale) for each in bank])
        up = up * factors[..., None]
        up_bias = None if up_bias is None else up_bias * factors
        scale = 1.0
    norm = None
    if first.norm is not None:
        kind = "layer_norm" if isinstance(first.norm, nn.LayerNorm) else "rms_norm"
        norm = Norm(kind, of("norm", "weight"), of("norm", "bias"), first.norm_eps)
    weights = {
        "down_weight": of("down_proj", "weight"),
        "up_weight": up,
        "down_bias": of("down_proj", "bias"),
        "up_bias": up_bias,
    }
    if rounded and norm is None:
        weights = {name: None if weight is None else weight.to(dtype) for name, weight in weights.items()}
    return {
        **weights,
        "activation": first.activation,
        "scale": scale,
        "norm": norm,
    }
