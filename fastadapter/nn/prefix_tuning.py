"""Parameters of one layer's prefix in prefix tuning, and of the network behind it."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.nn.masters import MasterLinear, Masters

# How keys and values are drawn.
INITS = ("random", "zero")


class PrefixReparam(Masters):
    """``tanh(down_proj(embedding))``, the layers' common part of Li & Liang's network (arXiv:2101.00190, section 4.3).

    Each layer's :class:`PrefixTuning` sends its output, ``(prefix_len, reparam_size)``, through an ``up_proj`` of its
    own. That is the paper's ``embedding -> linear -> tanh -> linear``, with the last linear cut into layers.

    Parameters: ``prefix_len * hidden_size + (hidden_size + 1) * reparam_size``.

    >>> PrefixReparam(prefix_len=4, hidden_size=32, reparam_size=8)().shape
    torch.Size([4, 8])
    """

    def __init__(
        self, prefix_len: int, hidden_size: int, reparam_size: int, device: torch.device | str | None = None
    ):
        super().__init__()
        self.embedding = nn.Parameter(
            torch.randn(prefix_len, hidden_size, dtype=torch.float32, device=device)
        )
        self.down_proj = MasterLinear(hidden_size, reparam_size, dtype=torch.float32, device=device)

    def reset_parameters(self) -> None:
        """An embedding from N(0, 1), and the linear layer as torch draws it."""
        nn.init.normal_(self.embedding)
        self.down_proj.reset_parameters()

    def forward(self) -> Tensor:
        """``(prefix_len, reparam_size)``, fp32."""
        return torch.tanh(self.down_proj(self.embedding))


class PrefixTuning(Masters):
    """Learned keys and values that every query of a layer attends to beside the real ones (arXiv:2101.00190).

    The caller joins them to the layer's attention in one softmax, :func:`fastadapter.ops.prefix_attention`. They are
    what the attention sees: no rotary embedding, norm or projection is applied to them. fp32 whatever the dtype of the
    model.

    Parameters: ``num_kv_heads * prefix_len * (head_dim + value_dim)``; with ``reparam`` instead
    ``num_kv_heads * (head_dim + value_dim) * (reparam_size + 1)`` of ``up_proj``.

    Args:
        num_kv_heads, head_dim: of the layer's attention.
        prefix_len: learned positions.
        value_dim: width of a value where it is not that of a key (latent attention).
        init: ``"random"``: N(0, ``init_std``); ``"zero"``: zeros (with ``reparam``: of ``up_proj``).
        init_std: standard deviation of the first keys and values; with ``reparam`` of ``up_proj``'s weight.
        reparam: the network that keys and values come from while training; owned by the caller.
        freeze_slots: how many of the first positions stay as they start; not with ``reparam``.

    >>> prefix = PrefixTuning(num_kv_heads=2, head_dim=8, prefix_len=3)
    >>> [tuple(each.shape) for each in prefix()]
    [(1, 2, 3, 8), (1, 2, 3, 8)]
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        prefix_len: int = 20,
        *,
        value_dim: int | None = None,
        init: str = "random",
        init_std: float = 0.02,
        reparam: PrefixReparam | None = None,
        freeze_slots: int = 0,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if freeze_slots and (reparam is not None or freeze_slots >= prefix_len):
            raise ValueError(
                f"freeze_slots must be less than prefix_len {prefix_len}, and 0 with reparam, got {freeze_slots}"
            )
        self.freeze_slots = freeze_slots
        self.num_kv_heads, self.head_dim, self.prefix_len = num_kv_heads, head_dim, prefix_len
        self.value_dim = head_dim if value_dim is None else value_dim
        self.init_std = std = init_std if init == "random" else 0.0
        # in a list: the network belongs to the model as a whole, not to each of its layers
        self._reparam = [] if reparam is None else [reparam]
        if reparam is None:
            draw = functools.partial(torch.randn, dtype=torch.float32, device=device)
            shape = (1, num_kv_heads, prefix_len - freeze_slots)
            self.key = nn.Parameter(draw(*shape, head_dim) * std)
            self.value = nn.Parameter(draw(*shape, self.value_dim) * std)
            if freeze_slots:
                shape = (1, num_kv_heads, freeze_slots)
                self.register_buffer("frozen_key", draw(*shape, head_dim) * std)
                self.register_buffer("frozen_value", draw(*shape, self.value_dim) * std)
        else:
            width = num_kv_heads * (head_dim + self.value_dim)
            self.up_proj = MasterLinear(
                reparam.down_proj.out_features, width, dtype=torch.float32, device=device
            )
            nn.init.normal_(self.up_proj.weight, std=std)
            nn.init.zeros_(self.up_proj.bias)

    def reset_parameters(self) -> None:
        """Keys and values, or what makes them, from N(0, ``init_std``)."""
        if self._reparam:
            nn.init.normal_(self.up_proj.weight, std=self.init_std)
            nn.init.zeros_(self.up_proj.bias)
        else:
            for tensor in (*self.parameters(), *self.buffers()):
                nn.init.normal_(tensor, std=self.init_std)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys ``(1, num_kv_heads, prefix_len, head_dim)`` and values ``(..., value_dim)``, fp32."""
        if self.freeze_slots:
            frozen: tuple[Any, Any] = self.frozen_key, self.frozen_value
            return torch.cat([frozen[0], self.key], dim=2), torch.cat([frozen[1], self.value], dim=2)
        if not self._reparam:
            return self.key, self.value
        rows = self.up_proj(self._reparam[0]())
        widths = [self.num_kv_heads * dim for dim in (self.head_dim, self.value_dim)]
        key, value = (part.unflatten(-1, (self.num_kv_heads, -1)) for part in rows.split(widths, dim=-1))
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]

    @torch.no_grad()
    def start_from(self, key: Tensor, value: Tensor) -> None:
        """Give these keys and values, of the shapes that :meth:`forward` returns, from now on.

        A network gives them by the smallest weights of ``up_proj`` that do, solved for in fp64.

        Raises: ValueError: the network is narrower than the prefix is long.
        """
        if not self._reparam:
            self.key.copy_(key[:, :, self.freeze_slots :])
            self.value.copy_(value[:, :, self.freeze_slots :])
            if self.freeze_slots:
                self.frozen_key.copy_(key[:, :, : self.freeze_slots])
                self.frozen_value.copy_(value[:, :, : self.freeze_slots])
            return
        with torch.autocast(key.device.type, enabled=False):
            inner = self._reparam[0]()  # (prefix_len, reparam_size)
        if inner.shape[1] < inner.shape[0]:
            raise ValueError(
                f"reparam must be at least prefix_len {inner.shape[0]} wide to give chosen keys, got {inner.shape[1]}"
            )
        rows = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (key, value)], dim=1)
        found = torch.linalg.lstsq(inner.double().cpu(), rows.double().cpu()).solution
        self.up_proj.weight.copy_(found.T)
        self.up_proj.bias.zero_()

    def sources(self) -> list[nn.Module]:
        """The modules that keys and values come from."""
        return [self, *self._reparam]

    @torch.no_grad()
    def fold(self) -> None:
        """Keep the keys and values that the network gives now as parameters, and drop the network."""
        if self._reparam:
            key, value = (tensor.contiguous() for tensor in self())
            requires_grad = self.up_proj.weight.requires_grad
            self._reparam = []
            del self.up_proj
            self.key, self.value = nn.Parameter(key, requires_grad), nn.Parameter(value, requires_grad)

    def extra_repr(self) -> str:
        return f"num_kv_heads={self.num_kv_heads}, prefix_len={self.prefix_len}, head_dim={self.head_dim}"
