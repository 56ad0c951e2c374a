"""The same values in other memory: what a caller may hand in, with NaN wherever an op has no business to read."""

import torch


def dense(x):
    return x.contiguous()


def swapped(x):
    """The axes before the last two swapped in memory, as (batch, seq, heads, head_dim) models hold theirs."""
    axes = (1, 2) if x.dim() > 3 else (0, 1)
    return x.transpose(*axes).contiguous().transpose(*axes)


def mirrored(x):
    """Column-major in the last two axes."""
    return x.mT.contiguous().mT


def every_other(x):
    """Every second element of rows with NaN between."""
    return _sparse(x, x.dim() - 1, 2)


def spread_rows(x):
    """Every third row, NaN rows between."""
    return _sparse(x, max(x.dim() - 2, 0), 3)


def unaligned(x):
    """One element past where the allocator put the storage, NaN before and behind."""
    storage = torch.full((x.numel() + 2,), float("nan"), dtype=x.dtype)
    return storage[1:-1].view(x.shape).copy_(x)


def cut(x):
    """A slice of a larger tensor in every axis, so that no stride is a product of sizes."""
    wide = torch.full([size + 3 for size in x.shape], float("nan"), dtype=x.dtype)
    return wide[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)


def broadcast(x):
    """One slice of the second axis (heads, tokens) for all: stride 0. The only layout that changes values."""
    return x[:, :1].expand_as(x)


def _sparse(x, axis, step):
    sizes = list(x.shape)
    sizes[axis] *= step
    wide = torch.full(sizes, float("nan"), dtype=x.dtype)
    return wide[(slice(None),) * axis + (slice(None, None, step),)].copy_(x)


LAYOUTS = {
    function.__name__: function
    for function in (dense, swapped, mirrored, every_other, spread_rows, unaligned, cut, broadcast)
}


def storage_bits(x):
    """A copy of all bytes of the storage ``x`` lives in, the gaps included."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()
