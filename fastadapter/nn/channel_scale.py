"""Parameters that LLaMA-Adapter V2 adds to a linear layer."""

import torch
from torch import Tensor, nn

from fastadapter.nn.masters import Masters

CONVENTIONS = ("input", "output")


class ChannelScale(Masters):
    """A scale and a bias per channel of a frozen linear layer (LLaMA-Adapter V2, arXiv:2304.15010, section 3.1).

    Two published conventions: ``"input"``, the authors' code, ``W (x * scale) + b0 + bias``, with one scale per input
    channel, and ``"output"``, litgpt, ``scale * (W x + b0 + bias)``, with one per output channel. A fresh module
    changes nothing, bit for bit: the scales are 1 and the biases -0.0, which leaves even a -0.0 as it is. fp32 whatever
    the dtype of the model.

    Parameters: ``in_features + out_features`` (``"input"``) or ``2 * out_features`` (``"output"``).

    Args:
        in_features, out_features: of the linear layer.
        convention: ``"input"`` or ``"output"``.

    >>> scale, x = ChannelScale(4, 8, "output"), torch.randn(2, 8)
    >>> torch.equal(scale.after(x), x)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        convention: str = "input",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
        self.convention = convention
        size = in_features if convention == "input" else out_features
        self.scale = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.full((out_features,), -0.0, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """A scale of one and a bias of -0.0, which leaves every bit as it is."""
        nn.init.ones_(self.scale)
        nn.init.constant_(self.bias, -0.0)

    def before(self, x: Tensor) -> Tensor:
        """What the linear layer gets, ``(..., in_features)``, in the dtype of ``x``."""
        return scale_input(x, self.scale.to(x.dtype)) if self.convention == "input" else x

    def after(self, y: Tensor) -> Tensor:
        """What the linear layer's output becomes, ``(..., out_features)``, in the dtype of ``y``."""
        scale = self.scale.to(y.dtype) if self.convention == "output" else None
        return shift_output(y, self.bias.to(y.dtype), scale)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear layer that is the given one with this scale and bias.

            input:   W' = W diag(scale),   b' = b0 + bias
            output:  W' = diag(scale) W,   b' = scale * (b0 + bias)

        Computed in fp32 (fp64 beside fp64) and rounded once to the dtype: a weight is within one ulp of the exact one,
        a bias within two.

        Args:
            weight: ``(out_features, in_features)``.
            bias: ``(out_features,)``, or ``None``: zero.
        Returns: new tensors in the dtypes of ``weight`` and ``bias`` (without one, of ``weight``).

        >>> layer, scale = torch.nn.Linear(2, 1), ChannelScale(2, 1, "input")
        >>> torch.equal(scale.folded(layer.weight, layer.bias)[0], layer.weight)
        True
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale, shift = self.scale.to(wide), self.bias.to(wide)
        if bias is not None:
            shift = bias.to(wide) + shift
        if self.convention == "input":
            new = weight.to(wide) * scale
        else:
            new, shift = weight.to(wide) * scale[:, None], shift * scale
        return new.to(weight.dtype), shift.to(weight.dtype if bias is None else bias.dtype)

    def extra_repr(self) -> str:
        return f"convention={self.convention!r}, out_features={self.bias.numel()}"


def scale_input(x: Tensor, scale: Tensor) -> Tensor:
    """``x (..., in_features)`` by a scale of its dtype."""
    return x * scale


def shift_output(y: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    """``y (..., out_features)`` with a bias of its dtype, by a scale behind it if there is one."""
    y = y + bias
    return y if scale is None else y * scale
