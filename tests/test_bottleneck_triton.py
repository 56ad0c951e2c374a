"""The Triton launchers of ``bottleneck`` themselves, by the budget of tests/support/budget.py.

Without a GPU the kernels run in Triton's interpreter, which multiplies bf16 wrongly: fp32 and fp16 there, bf16 too
on a GPU. Up weights are random and non-zero unless a test says so.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import bottleneck as kernels

from tests.support.bottleneck import Shape, eager, make_inputs
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import device_of, on_device

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
# (shape, options of make_inputs, options of the op): the one-kernel route up to size 64, the other past it
CASES = [
    (Shape(1, 1, 60, 24), {"residual": "x", "norm": "layer_norm"}, {"activation": "gelu", "scale": 0.7}),
    (Shape(1, 35, 130, 33), {"biases": False}, {"activation": "relu"}),
    (Shape(3, 7, 577, 1), {"residual": None, "norm": "rms_norm"}, {"activation": "silu"}),
    (Shape(2, 33, 33, 64), {"residual": "x"}, {"activation": "tanh", "scale": -2.0}),
    (Shape(2, 3, 60, 150), {"residual": "x", "norm": "layer_norm"}, {"activation": "gelu_tanh"}),
    (Shape(1, 2, 17, 65), {"residual": None, "biases": False}, {"activation": "identity"}),
    (Shape(5, 3, 40, 24, 3), {"norm": "layer_norm"}, {"activation": "gelu"}),
    (Shape(4, 2, 40, 140, 2), {"norm": "rms_norm", "residual": "x"}, {"activation": "silu", "scale": 0.5}),
]
ONE = Shape(3, 3, 20, 5, 2)
TWO = ONE._replace(size=70)


def case_id(value):
    return "-".join(str(x) for x in value.values()) if isinstance(value, dict) else str(value)


def forward(inputs, *, activation="gelu", norm="none", norm_eps=1e-5, scale=1.0):
    tensors = [on_device(x, DEVICE) for x in inputs[:9]]
    return kernels.bottleneck_forward(*tensors, activation, norm, norm_eps, scale)


def launch(inputs, **options):
    """Output and gradients by name, from the launchers on this machine's device."""
    return {"out": forward(inputs, **options).cpu()}


def check(inputs, actual, plain_dtype=None, **options):
    plain = eager(inputs, plain_dtype or inputs.x.dtype, **options)
    exact = eager(inputs, torch.float64, **options)
    for name in actual:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize(("shape", "make", "options"), CASES, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_within_budget(dtype, shape, make, options):
    inputs = make_inputs(shape, dtype, **make)
    options = {**options, "norm": make.get("norm", "none")}
    check(inputs, launch(inputs, **options), **options)


@pytest.mark.parametrize("shape", [ONE, TWO], ids=str)
def test_fp32_masters_beside_half_activations(shape):
    """Judged against eager with fp32 intermediates: the masters' gradients have fp32 accuracy, not half's."""
    inputs = make_inputs(shape, torch.float16, parameter_dtype=torch.float32, norm="layer_norm")
    check(inputs, launch(inputs, norm="layer_norm"), torch.float32, norm="layer_norm")


def test_the_statistics_do_not_cancel():
    """A mean a thousand times the deviation: E[x^2] - E[x]^2 would keep no digit of the variance."""
    inputs = make_inputs(Shape(1, 3, 300, 4), torch.float32, norm="layer_norm")
    inputs = inputs._replace(x=inputs.x + 1000.0)
    check(inputs, {"out": forward(inputs, norm="layer_norm")}, norm="layer_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 70])
@pytest.mark.parametrize("cause", ["zero up", "zero scale"])
def test_a_channel_without_a_term_has_the_bits_of_the_residual(dtype, size, cause):
    """Also -0.0 and NaN, though down holds Inf and NaN; the other channels show them."""
    inputs = make_inputs(Shape(1, 5, 40, size), dtype)
    inputs.residual[:, 0] = -0.0
    inputs.residual[:, 1, ::2] = float("nan")
    inputs.down_weight[:, 0] = float("inf")
    inputs.down_weight[:, 1] = float("nan")
    if cause == "zero up":
        inputs.up_weight[:, ::2] = 0.0
        inputs.up_bias[:, ::2] = -0.0
    out = forward(inputs, scale=0.0 if cause == "zero scale" else 1.0).cpu()
    channels = slice(None, None, 2 if cause == "zero up" else 1)
    assert same_bits(out[..., channels], inputs.residual[..., channels])
    if cause == "zero up":
        assert out[..., 1::2].isnan().all()
    inputs.down_weight.zero_()
    out = forward(inputs, scale=0.0 if cause == "zero scale" else 1.0).cpu()
    assert same_bits(out[..., channels], inputs.residual[..., channels])


@pytest.mark.parametrize("size", [5, 70])
def test_ids_outside_the_bank_show_as_nan(size):
    """A device cannot raise; it must neither read past the bank nor return something that looks right."""
    inputs = make_inputs(Shape(5, 2, 20, size, 2), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 2, -2, 2**31 - 1, -1], dtype=torch.int32))
    inputs.residual[4, 0] = -0.0
    out = forward(inputs).cpu()
    assert out[0].isfinite().all()
    assert out[1:4].isnan().all()
    assert same_bits(out[4], inputs.residual[4])
    assert not forward(inputs._replace(residual=None))[4].any()
