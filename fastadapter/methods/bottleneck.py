"""Bottleneck adapters: small networks after or beside a block's parts (arXiv:1902.00751, 2005.00052, 2110.04366)."""

from dataclasses import dataclass
from typing import ClassVar

from fastadapter.methods.config import (
    MethodConfig,
    require_bool,
    require_choice,
    require_count,
    require_names,
    require_number,
)
from fastadapter.nn.bottleneck import INITS
from fastadapter.ops.bottleneck import ACTIVATIONS, NORMS

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
PARALLEL_INPUTS = ("ffn", "residual")


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """What to attach, and where.

    With ``h`` the output of a part of the block, before dropout's sum with the residual: ``h + f(h)``,
    ``f(x) = scale * up(act(down(norm(x))))``, after attention and feed-forward (``"houlsby"``) or feed-forward alone
    (``"pfeiffer"``). ``"parallel"`` (He et al.): ``h + f(x)`` of the feed-forward, where ``x`` is what it is given.

    Args:
        placement: ``"houlsby"``, ``"pfeiffer"`` or ``"parallel"``.
        reduction_factor: hidden size over the adapter's width, which is rounded down.
        bottleneck_size: that width itself; instead of ``reduction_factor``.
        layers: how many of the top blocks get adapters; ``None``: all of them.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        scale: of the adapter's term; He et al. use 4 in parallel; ``"learned"``: a parameter, from 1.
        init: ``"zero"``: no effect at the start, bit for bit; ``"houlsby"``: nearly none.
        norm: of the adapter's own, ``None``, ``"layer_norm"`` or ``"rms_norm"``.
        bias: whether the projections have biases.
        parallel_input: what the feed-forward is given: ``"ffn"``, behind the norm before it, or ``"residual"``, the
            stream before that norm, as in AdapterHub. The same in models that norm after the sum.
        modules: dotted names, or their ends, of modules whose output is adapted instead of the family's own points.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> BottleneckConfig(placement="pfeiffer", bottleneck_size=24).activation
    'gelu'
    """

    placement: str = "houlsby"
    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    layers: int | None = None
    activation: str = "gelu"
    scale: float | str = 1.0
    init: str = "zero"
    norm: str | None = None
    bias: bool = True
    parallel_input: str = "ffn"
    modules: tuple[str, ...] | None = None

    method: ClassVar[str] = "bottleneck"

    def __post_init__(self):
        super().__post_init__()
        require_choice("placement", self.placement, PLACEMENTS)
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            raise ValueError("reduction_factor and bottleneck_size exclude each other, got both")
        if self.reduction_factor is None and self.bottleneck_size is None:
            object.__setattr__(self, "reduction_factor", 16)
        if self.reduction_factor is not None:
            require_number("reduction_factor", self.reduction_factor, above=0)
        require_count("bottleneck_size", self.bottleneck_size, optional=", or None for reduction_factor")
        require_count("layers", self.layers, optional=", or None for all")
        require_choice("activation", self.activation, tuple(ACTIVATIONS))
        if isinstance(self.scale, str):
            require_choice("scale", self.scale, ("learned",))
        else:
            require_number("scale", self.scale)
        require_choice("init", self.init, INITS)
        if self.norm is not None:
            require_choice("norm", self.norm, tuple(NORMS))
        require_bool("bias", self.bias)
        require_choice("parallel_input", self.parallel_input, PARALLEL_INPUTS)
        if self.modules is not None:
            object.__setattr__(
                self, "modules", require_names("modules", self.modules)
            )  # from JSON it is a list
            if self.placement == "parallel":
                raise ValueError("modules goes with placement houlsby or pfeiffer alone, got parallel")

    def size_for(self, hidden_size: int) -> int:
        """Width of the adapter in a layer of ``hidden_size``.

        Raises: ValueError: nothing would be left of it.
        """
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        size = int(hidden_size / self.reduction_factor)
        if size < 1:
            raise ValueError(
                f"reduction_factor must be at most the hidden size {hidden_size}, got {self.reduction_factor}"
            )
        return size
