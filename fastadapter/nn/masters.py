"""Parameters that stay fp32 whatever the dtype of the model they sit in."""

from torch import Tensor, nn


class Masters(nn.Module):
    """Base of every adapter's module.

    Its parameters follow the model to another device, but keep every bit when the model is cast: half types lose the
    small steps of an optimiser.
    """

    def _apply(self, fn, recurse=True):
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
