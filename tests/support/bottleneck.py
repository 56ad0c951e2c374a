"""Inputs, runs and results of ``bottleneck`` for tests, one shape record for all of them."""

from typing import NamedTuple

import torch

from fastadapter import ops, reference
from tests.support.budget import assert_within_budget, assert_within_budget_of
from tests.support.gated_prefix import device_of, on_device, where_kernels_run

PARAMETERS = ("down_weight", "up_weight", "down_bias", "up_bias")
NORM = ("norm_weight", "norm_bias")
GRADS = ("x", *PARAMETERS, "residual", *NORM)


class Shape(NamedTuple):
    batch: int = 2
    q_len: int = 7
    hidden: int = 24
    size: int = 5
    num_entries: int = 1

    def __str__(self):
        return f"b{self.batch}-t{self.q_len}-c{self.hidden}-r{self.size}-n{self.num_entries}"


class Inputs(NamedTuple):
    x: torch.Tensor
    down_weight: torch.Tensor
    up_weight: torch.Tensor
    down_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    residual: torch.Tensor | None  # the same object as ``x`` where that is the residual
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    row_ids: torch.Tensor | None
    grad_out: torch.Tensor

    def map(self, change):
        """Every tensor but the ids changed; ``residual`` stays ``x`` where it is."""
        new = [x if x is None or not x.is_floating_point() else change(x) for x in self]
        if self.residual is self.x:
            new[5] = new[0]
        return Inputs(*new)

    def cast(self, dtype):
        return self.map(lambda x: x.to(dtype))


def make_inputs(
    shape, dtype, *, seed=0, biases=True, residual="other", norm="none", parameter_dtype=None, bank=True
):
    """Inputs drawn in ``dtype``, so that every party sees the same rounded values.

    ``residual`` is ``"x"``, ``"other"`` or ``None``; ``bank=False`` gives the parameters of a bank of one in the
    form of ``nn.Linear``. Weights are scaled so that pre-activations are of the order of one.
    """
    generator = torch.Generator().manual_seed(seed)
    n, lead = shape.num_entries, () if not bank else (shape.num_entries,)

    def draw(*size, of=parameter_dtype or dtype, factor=1.0, shift=0.0):
        values = torch.randn(*size, generator=generator, dtype=torch.float64)
        return (values * factor + shift).to(of)

    activations = (shape.batch, shape.q_len, shape.hidden)
    row_ids = None
    if n > 1:  # every entry and the absence of one, in no order
        pool = torch.arange(-1, n).repeat(shape.batch)[: shape.batch]
        row_ids = pool[torch.randperm(shape.batch, generator=generator)].to(torch.int32)
    x = draw(*activations, of=dtype)
    return Inputs(
        x,
        draw(*lead, shape.size, shape.hidden, factor=shape.hidden**-0.5),
        draw(*lead, shape.hidden, shape.size, factor=shape.size**-0.5),
        draw(*lead, shape.size, factor=0.5) if biases else None,
        draw(*lead, shape.hidden, factor=0.5) if biases else None,
        {"x": x, "other": draw(*activations, of=dtype), None: None}[residual],
        draw(*lead, shape.hidden, factor=0.3, shift=1.0) if norm != "none" else None,
        draw(*lead, shape.hidden, factor=0.3) if norm == "layer_norm" else None,
        row_ids,
        draw(*activations, of=dtype),
    )


def call(inputs, backend="auto", *, activation="gelu", norm="none", norm_eps=1e-5, scale=1.0):
    """The public function on the inputs as they are."""
    return ops.bottleneck(
        *inputs[:5],
        residual=inputs.residual,
        activation=activation,
        scale=scale,
        norm=None if norm == "none" else ops.Norm(norm, inputs.norm_weight, inputs.norm_bias, norm_eps),
        row_ids=inputs.row_ids,
        backend=backend,
    )


def run(inputs, backend="auto", *, frozen=(), **options):
    """Output and gradients by name (only of what is there and not frozen), computed where the backend runs."""
    device = device_of(backend)
    tied = inputs.residual is inputs.x
    inputs = inputs.map(lambda x: on_device(x, device))
    leaves = {
        name: leaf.detach().requires_grad_(name not in frozen)
        for name in GRADS
        if (leaf := getattr(inputs, name)) is not None and not (name == "residual" and tied)
    }
    inputs = inputs._replace(**leaves, row_ids=on_device(inputs.row_ids, device))
    if tied:
        inputs = inputs._replace(residual=inputs.x)
    out = call(inputs, backend, **options)
    out.backward(inputs.grad_out)
    results = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    return {name: on_device(x, "cpu") for name, x in results.items() if x is not None}


@where_kernels_run
def eager(inputs, compute_dtype, *, activation="gelu", norm="none", norm_eps=1e-5, scale=1.0):
    """The reference formulas with every intermediate in ``compute_dtype``: fp64 for the truth, else plain PyTorch."""
    if compute_dtype == torch.float64:
        inputs = inputs.cast(torch.float64)
    tied = inputs.residual is inputs.x
    options = {
        "row_ids": inputs.row_ids,
        "activation": activation,
        "norm": norm,
        "norm_eps": norm_eps,
        "scale": scale,
        "compute_dtype": compute_dtype,
    }
    banks = [
        p if p is None or p.dim() == dims else p[None]
        for p, dims in zip((*inputs[1:5], *inputs[6:8]), (3, 3, 2, 2, 2, 2))
    ]
    down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias = banks
    normalization = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    out = reference.bottleneck(
        inputs.x,
        down_weight,
        up_weight,
        down_bias,
        up_bias,
        residual=inputs.residual,
        **normalization,
        **options,
    )
    grads = reference.bottleneck_backward(
        inputs.grad_out,
        inputs.x,
        down_weight,
        up_weight,
        down_bias,
        **normalization,
        add_grad_out=tied,
        **options,
    )
    x, down, up, down_b, up_b, norm_w, norm_b = grads
    named = dict(zip(GRADS, (x, down, up, down_b, up_b, inputs.grad_out, norm_w, norm_b)))
    results = {}
    for name, grad in named.items():
        value = getattr(inputs, name)
        if value is not None and not (name == "residual" and tied):
            results[name] = grad.view(value.shape) if name != "x" else grad
    return {"out": out, **results}


def others(inputs, dtype, name, options):
    """What eager makes of inputs like these, and what would be right."""
    for seed in range(3):
        torch.manual_seed(seed)
        like = inputs.map(lambda x: torch.randn_like(x) * x.float().std())
        yield eager(like, dtype, **options)[name], eager(like, torch.float64, **options)[name]


def assert_results_within_budget(inputs, backend, dtype, **options):
    actual = run(inputs, backend, **options)
    plain_result, exact = eager(inputs, dtype, **options), eager(inputs, torch.float64, **options)
    assert actual.keys() == exact.keys()
    for name in actual:
        parts = (actual[name], plain_result[name], exact[name])
        if device_of(backend) == "cpu":
            assert_within_budget(*parts, name)
        else:  # products of a library, which sums in another order than eager's call of it
            assert_within_budget_of(lambda name=name: others(inputs, dtype, name, options), *parts, name)
    return actual
