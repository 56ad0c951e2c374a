"""Inputs, runs and results of ``gated_prefix`` for tests, one shape record for all of them."""

import functools
from typing import NamedTuple

import pytest
import torch

from fastadapter import ops, reference
from fastadapter.ops.backends import extension_error

# For the tests of a pure Python install; CI builds with FASTADAPTER_BUILD=1, so there it is never skipped.
needs_extension = pytest.mark.skipif(
    extension_error() is not None, reason=f"no extension: {extension_error()}"
)
CPP = pytest.param("cpp", marks=needs_extension)
GRADS = ("base", "query", "prefix_key", "prefix_value", "gate")


class Shape(NamedTuple):
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    q_len: int = 7
    head_dim: int = 16
    prefix_len: int = 5
    num_prefixes: int = 1

    def __str__(self):
        return (
            f"b{self.batch}-h{self.num_heads}-kv{self.num_kv_heads}-t{self.q_len}-d{self.head_dim}"
            f"-p{self.prefix_len}-n{self.num_prefixes}"
        )


class Inputs(NamedTuple):
    base: torch.Tensor
    query: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    gate: torch.Tensor
    row_ids: torch.Tensor | None
    grad_out: torch.Tensor

    def cast(self, dtype):
        """Everything but the ids in ``dtype``, same values as far as it can hold them."""
        return Inputs(*(x if x is None or not x.is_floating_point() else x.to(dtype) for x in self))


def make_inputs(shape, dtype, *, seed=0, gate="random", prefix_dtype=None):
    """Inputs drawn in ``dtype``, so that every party sees the same rounded values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, of=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    activations = (shape.batch, shape.num_heads, shape.q_len, shape.head_dim)
    bank = (shape.num_prefixes, shape.num_kv_heads, shape.prefix_len, shape.head_dim)
    gates = draw(
        shape.num_prefixes, shape.num_heads, of=torch.float64 if dtype == torch.float64 else torch.float32
    )
    row_ids = None
    if shape.num_prefixes > 1:  # every entry and the absence of one, in no order
        pool = torch.arange(-1, shape.num_prefixes).repeat(shape.batch)[: shape.batch]
        row_ids = pool[torch.randperm(shape.batch, generator=generator)].to(torch.int32)
    return Inputs(
        draw(*activations),
        draw(*activations),
        draw(*bank, of=prefix_dtype or dtype),
        draw(*bank, of=prefix_dtype or dtype),
        gates if gate == "random" else torch.full_like(gates, gate),
        row_ids,
        draw(*activations),
    )


def device_of(backend):
    """Where a backend runs here; without a GPU, Triton's kernels run in its interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def on_device(x, device):
    """``x`` where the kernels run, laid out as it is."""
    return x if x is None or x.device.type == device else same_layout(x, device)


def where_kernels_run(eager):
    """Plain PyTorch is judged on the device whose kernels it judges: there its users would run it. fp64 stays here."""

    @functools.wraps(eager)
    def run(*args, **options):
        *_, inputs, compute_dtype = args
        device = "cpu" if compute_dtype == torch.float64 else device_of("triton")
        if device == "cpu":
            return eager(*args, **options)
        ids = inputs.row_ids
        moved = inputs.map(lambda x: on_device(x, device))
        if ids is not None:
            moved = moved._replace(row_ids=ids.to(device))
        results = eager(*args[:-2], moved, compute_dtype, **options)
        return {name: x if x is None else on_device(x, "cpu") for name, x in results.items()}

    return run


def same_layout(x, device):
    """A copy with the same strides and the same offset from an aligned address: ``.to`` would make a view dense.

    A broadcast axis is copied once, since nothing can be copied into an expanded tensor.
    """
    shared = [stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)]
    once = x[tuple(slice(0, 1) if axis else slice(None) for axis in shared)]
    extent = 1 + sum(stride * max(size - 1, 0) for stride, size in zip(once.stride(), once.shape))
    offset = x.data_ptr() % 64 // x.element_size()
    memory = torch.empty(offset + extent, dtype=x.dtype, device=device)
    memory.as_strided(once.shape, once.stride(), offset).copy_(once)
    return memory.as_strided(x.shape, x.stride(), offset)


def run(inputs, backend="auto", *, gate_fn="tanh", softmax_scale=None, frozen=()):
    """Output and gradients by name (``None`` for frozen inputs), computed where the backend runs."""
    inputs = Inputs(*(on_device(x, device_of(backend)) for x in inputs))
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name not in frozen) for name in GRADS}
    out = ops.gated_prefix(
        **leaves, row_ids=inputs.row_ids, gate_fn=gate_fn, softmax_scale=softmax_scale, backend=backend
    )
    out.backward(inputs.grad_out)
    results = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    return {name: on_device(x, "cpu") for name, x in results.items()}


def eager(inputs, compute_dtype, *, gate_fn="tanh", softmax_scale=None):
    """The reference formulas with every intermediate in ``compute_dtype``: fp64 for the truth, else plain PyTorch."""
    scale = softmax_scale or inputs.query.shape[-1] ** -0.5
    options = {
        "softmax_scale": scale,
        "gate_fn": gate_fn,
        "row_ids": inputs.row_ids,
        "compute_dtype": compute_dtype,
    }
    if compute_dtype == torch.float64:
        inputs = inputs.cast(torch.float64)
    operands = inputs[1:5]
    out = reference.gated_prefix(inputs.base, *operands, **options)
    grads = reference.gated_prefix_backward(inputs.grad_out, *operands, **options)
    return {"out": out, **dict(zip(GRADS, (inputs.grad_out, *grads)))}
