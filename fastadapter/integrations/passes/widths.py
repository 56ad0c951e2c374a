"""Heads whose values are not as wide as their keys, as in latent attention, for ops that know one width."""

from torch import Tensor
from torch.nn.functional import pad


def widened(tensor: Tensor, width: int) -> Tensor:
    """``tensor`` with zeros behind its last axis, up to ``width``: they add nothing to a score or a sum."""
    missing = width - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing else tensor
