"""Tensors whose offsets need 64 bits though every stride fits in 32."""

import torch


def far_apart(x, axis):
    """The values of ``x`` with the positions of one axis 2^30 elements apart; there must be three of them.

    Pages that are never touched cost nothing, so gigabytes of half precision are affordable.
    """
    assert x.shape[axis] == 3 and x.element_size() == 2
    strides = list(x.contiguous().stride())
    strides[axis] = 2**30
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(2**31 + x.numel(), dtype=x.dtype)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    return storage.as_strided(x.shape, strides).copy_(x)
