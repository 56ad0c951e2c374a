"""How an error is judged: against an fp64 result, relative to what plain PyTorch in the same dtype achieves."""

import math

import torch

# Units in the last place of the largest value that are granted on top, for results that eager gets exactly right.
_FLOOR_ULP = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1, torch.float64: 64}


def assert_within_budget(actual, eager, exact, label=""):
    """``max|actual - exact| <= 2 max|eager - exact| + floor``, with the floor in ulp of the largest exact value."""
    assert actual.shape == exact.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    dtype = actual.dtype
    error = _largest(actual.double() - exact.double())
    eager_error = _largest(eager.double() - exact.double())
    allowed = 2 * eager_error + _FLOOR_ULP[dtype] * _ulp(_largest(exact.double()), dtype)
    assert error <= allowed, (
        f"{label}: error {error:.3g} of {dtype}, allowed {allowed:.3g} (eager {eager_error:.3g})"
    )


def assert_within_budget_of(neighbours, actual, eager, exact, label=""):
    """For long runs: a miss is held against eager's largest error over neighbouring problems, too.

    A result of a few numbers is one that eager can get exactly right by luck. ``neighbours()`` gives pairs of eager and
    exact results; it is called on a miss only.
    """
    try:
        assert_within_budget(actual, eager, exact, label)
    except AssertionError:
        if not actual.isfinite().all():
            raise
        # their values stand beside the problem's own, with no error on our side
        every = [(actual, eager, exact), *((e.to(actual.dtype), p, e) for p, e in neighbours())]
        columns = [torch.cat([x.flatten() for x in column]) for column in zip(*every)]
        assert_within_budget(*columns, f"{label} (pooled)")


def same_bits(a, b):
    """Equal as integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x):
    # a copy: an axis of size one may have any stride in a contiguous tensor, and then has no view as bytes
    return x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _largest(x):
    return x.abs().max().item()


def _ulp(value, dtype):
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(value, info.tiny)))
