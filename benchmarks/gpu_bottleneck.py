"""Goals on bottleneck adapters. The honest peer is a pair of library products with fused epilogues."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapter as fa

from .gpu_tools import Bench, Cases, comparison, compiled, doubled, gradients


def eager(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What a user would write."""
    return x + F.linear(F.gelu(F.linear(x, down), approximate="tanh"), up)


def gemm_pair(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Two library calls: the activation in the epilogue of the first, the residual in that of the second."""
    rows = x.reshape(-1, x.shape[-1])
    bias = down.new_zeros(down.shape[0])
    hidden = torch._addmm_activation(bias, rows, down.mT, use_gelu=True)
    return torch.addmm(rows, hidden, up.mT).view_as(x)


def _own(bench: Bench, backend: str | None = None) -> Callable:
    chosen = backend or ("reference" if bench.dry else "triton")

    def call(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return fa.ops.bottleneck(x, down, up, residual=x, activation="gelu_tanh", backend=chosen)

    return call


def _operands(bench: Bench, c: int, r: int, *, grad: bool) -> list[Tensor]:
    b, t = (2, 16) if bench.dry else (4, 2048)
    x = bench.draw(b, t, c, grad=grad)
    weights = [bench.draw(*shape, scale=shape[1] ** -0.5) for shape in ((r, c), (c, r))]
    return [x, *(weight.requires_grad_(grad) for weight in weights)]


def forward(bench: Bench) -> Cases:
    """G11, G12, G14: two sizes at 8B's width, and BERT's."""
    small = ((64, 8, False),) if bench.dry else ((4096, 64, False), (4096, 256, False), (768, 48, True))
    for (c, r, graph), goal in zip(small, ("G11", "G12", "G14")):
        operands = _operands(bench, c, r, grad=False)
        forms = {
            "fastadapter": _own(bench), "gemm pair": gemm_pair, "compiled": compiled(eager, bench.dry), "eager": eager
        }  # fmt: skip
        runs = {name: functools.partial(fn, *operands) for name, fn in forms.items()}
        rows, size = operands[0].numel() // c, bench.dtype.itemsize
        with torch.no_grad():
            yield comparison(
                bench, f"{goal} bottleneck forward", f"{rows} rows, C {c}, r {r}" + (", in a graph" if graph else ""),
                runs, floor="copy", bytes_moved=(2 * rows * c + 2 * c * r) * size, flops=4 * rows * c * r,
                exact=functools.partial(_own(bench, "reference"), *doubled(operands)), graph=graph,
            )  # fmt: skip


def training(bench: Bench) -> Cases:
    """G13: forward and backward, weights trained."""
    c, r = (64, 8) if bench.dry else (4096, 64)
    operands = _operands(bench, c, r, grad=True)
    grad_out = bench.draw(*operands[0].shape)
    forms = {"fastadapter": _own(bench), "compiled": compiled(eager, bench.dry), "eager": eager}
    runs = {name: gradients(fn, operands, grad_out) for name, fn in forms.items()}
    rows, size = operands[0].numel() // c, bench.dtype.itemsize
    yield comparison(
        bench, "G13 bottleneck forward+backward", f"{rows} rows, C {c}, r {r}", runs, floor="copy",
        bytes_moved=(5 * rows * c + 6 * c * r) * size, flops=14 * rows * c * r,
        exact=gradients(_own(bench, "reference"), doubled(operands), grad_out.double()),
    )  # fmt: skip


def mixed(bench: Bench) -> Cases:
    """G15: one token of 64 rows, an adapter of its own in every row."""
    batch, c, r = (3, 64, 8) if bench.dry else (64, 4096, 64)
    x = bench.draw(batch, 1, c)
    down, up = bench.draw(batch, r, c, scale=c**-0.5), bench.draw(batch, c, r, scale=r**-0.5)
    ids = torch.randperm(batch, device=bench.device).to(torch.int32)

    def own(x: Tensor, down: Tensor, up: Tensor, backend: str) -> Tensor:
        return fa.ops.bottleneck(
            x, down, up, residual=x, activation="gelu_tanh", row_ids=ids, backend=backend
        )

    def gathered() -> Tensor:
        chosen = ids.long()
        hidden = F.gelu(torch.bmm(x, down[chosen].mT), approximate="tanh")
        return torch.baddbmm(x, hidden, up[chosen].mT)

    forms = {
        "fastadapter": functools.partial(own, x, down, up, "reference" if bench.dry else "triton"),
        "gather + bmm": gathered,
    }
    with torch.no_grad():
        yield comparison(
            bench, "G15 bottleneck, mixed adapters", f"batch {batch}, C {c}, r {r}, in a graph", forms, floor="copy",
            bytes_moved=2 * batch * c * (r + 1) * bench.dtype.itemsize, flops=4 * batch * c * r,
            exact=functools.partial(own, *doubled([x, down, up]), "reference"), graph=True,
        )  # fmt: skip
