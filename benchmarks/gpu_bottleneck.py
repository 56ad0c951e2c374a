"""GPU cases of bottleneck adapters. The honest peer is a pair of library products with fused epilogues."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapter as fa
from fastadapter.ops.backends import automatic_backend

from .gpu_tools import Bench, Rows, compare, compiled, doubled, gradients


def eager(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What a user would write."""
    return x + F.linear(F.gelu(F.linear(x, down), approximate="tanh"), up)


def gemm_pair(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Two library calls: the activation in the epilogue of the first, the residual in that of the second."""
    rows = x.reshape(-1, x.shape[-1])
    bias = down.new_zeros(down.shape[0])
    hidden = torch._addmm_activation(bias, rows, down.mT, use_gelu=True)
    return torch.addmm(rows, hidden, up.mT).view_as(x)


def own(x: Tensor, down: Tensor, up: Tensor, **options) -> Tensor:
    return fa.ops.bottleneck(x, down, up, residual=x, activation="gelu_tanh", **options)


def _bottleneck(bench: Bench, c: int, r: int, direction: str) -> Rows:
    """8192 rows; with gradients of the weights as well."""
    b, t, c, r = (2, 16, 64, 8) if bench.dry else (4, 2048, c, r)
    grad = direction != "forward"
    x = bench.draw(b, t, c, grad=grad)
    down, up = bench.draw(r, c, scale=c**-0.5, grad=grad), bench.draw(c, r, scale=r**-0.5, grad=grad)
    operands = [x, down, up]
    forms: dict[str, Callable] = {"fastadapter": own, "eager": eager}
    if not grad:
        forms["gemm pair"] = gemm_pair
    if bench.compile:
        forms["eager-compiled"] = compiled(eager, bench)
    rows, size = b * t, bench.dtype.itemsize
    cost = {
        "bytes_moved": ((5 if grad else 2) * rows * c + (6 if grad else 2) * c * r) * size,
        "flops": (14 if grad else 4) * rows * c * r,
        "backend": automatic_backend(bench.device, bench.dtype, "bottleneck")[0],
    }
    entry, what = f"bottleneck {direction}", f"{rows} rows, {c} -> {r}"
    reference = functools.partial(own, backend="reference")
    if grad:
        grad_out = bench.draw(b, t, c)
        runs = {name: gradients(fn, operands, grad_out) for name, fn in forms.items()}
        masters = [x, *(w.detach().float().requires_grad_() for w in (down, up))]
        runs["fastadapter, fp32 masters"] = gradients(own, masters, grad_out)
        exact = gradients(reference, doubled(operands), grad_out.double())
        yield from compare(bench, entry, what, runs, exact=exact, **cost)
        return
    with torch.no_grad():
        runs = {name: functools.partial(fn, *operands) for name, fn in forms.items()}
        runs["fastadapter, fp32 masters"] = functools.partial(own, x, down.float(), up.float())
        exact = functools.partial(reference, x[:1].double(), down.double(), up.double())
        yield from compare(bench, entry, what, runs, exact=exact, **cost)


def _mixed(bench: Bench, batch: int) -> Rows:
    """One token a row, an adapter of its own in every row."""
    batch, c, r = (3, 64, 8) if bench.dry else (batch, 4096, 64)
    x = bench.draw(batch, 1, c)
    down, up = bench.draw(batch, r, c, scale=c**-0.5), bench.draw(batch, c, r, scale=r**-0.5)
    ids = torch.randperm(batch, device=bench.device).to(torch.int32)

    def gathered() -> Tensor:
        chosen = ids.long()
        hidden = F.gelu(torch.bmm(x, down[chosen].mT), approximate="tanh")
        return torch.baddbmm(x, hidden, up[chosen].mT)

    forms = {"fastadapter": functools.partial(own, x, down, up, row_ids=ids), "gather + bmm": gathered}
    exact = functools.partial(own, *doubled([x, down, up]), row_ids=ids, backend="reference")
    with torch.no_grad():
        yield from compare(
            bench, "bottleneck decode", f"batch {batch}, {c} -> {r}, an adapter per row", forms, exact=exact,
            bytes_moved=2 * batch * c * (r + 1) * bench.dtype.itemsize, flops=4 * batch * c * r,
            backend=automatic_backend(bench.device, bench.dtype, "bottleneck")[0],
        )  # fmt: skip


CASES: dict[str, Callable[[Bench], Rows]] = {
    "bn_fwd": functools.partial(_bottleneck, c=4096, r=64, direction="forward"),
    "bn256_fwd": functools.partial(_bottleneck, c=4096, r=256, direction="forward"),
    "bn_fb": functools.partial(_bottleneck, c=4096, r=64, direction="forward+backward"),
    "bn256_fb": functools.partial(_bottleneck, c=4096, r=256, direction="forward+backward"),
    "bn_bert": functools.partial(_bottleneck, c=768, r=48, direction="forward"),
    "bn_mixed": functools.partial(_mixed, batch=64),
}
