"""Parameters that stay fp32 whatever the dtype of the model they sit in."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# A linear layer of an adapter. It is torch's own by another name, the one that quantisers leave alone: the weights are
# masters, and ops cannot read packed ones.
MasterLinear = NonDynamicallyQuantizableLinear

_OWN = "fa_own"


class Masters(nn.Module):
    """Base of every adapter's module.

    Its parameters follow the model to another device, but keep every bit when the model is cast: half types lose the
    small steps of an optimiser. Made on the meta device, they get their first values when the model gets memory. The
    modules in it can be told from the model's (:func:`is_own`).
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            for module in value.modules():
                module.__dict__[_OWN] = True
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        waiting = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(move, recurse)
        if waiting and not any(parameter.is_meta for parameter in self.parameters()):
            self.reset_parameters()  # to_empty leaves whatever was in the memory
        return self

    def reset_parameters(self) -> None:
        """Draw the first values anew.

        Raises: RuntimeError: they are a copy of somebody else's.
        """
        raise RuntimeError(
            f"{type(self).__name__} starts from values that it was made with, and has none of its own"
        )


def is_own(module: nn.Module) -> bool:
    """Whether a module is part of an adapter, in a copy too."""
    return _OWN in module.__dict__
