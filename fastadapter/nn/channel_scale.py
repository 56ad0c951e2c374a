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

    def before(self, x: Tensor) -> Tensor:
        """What the linear layer gets, ``(..., in_features)``, in the dtype of ``x``."""
        return x * self.scale.to(x.dtype) if self.convention == "input" else x

    def after(self, y: Tensor) -> Tensor:
        """What the linear layer's output becomes, ``(..., out_features)``, in the dtype of ``y``."""
        y = y + self.bias.to(y.dtype)
        return y * self.scale.to(y.dtype) if self.convention == "output" else y

    def extra_repr(self) -> str:
        return f"convention={self.convention!r}, out_features={self.bias.numel()}"
