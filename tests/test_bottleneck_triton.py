"""The Triton launchers of ``bottleneck`` themselves, by the budget of tests/support/budget.py.

Without a GPU the kernels run in Triton's interpreter, which multiplies bf16 wrongly: fp32 and fp16 there, bf16 too
on a GPU. Up weights are random and non-zero unless a test says so.
"""

import itertools
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import bottleneck as kernels
from fastadapter.kernels import bottleneck_config, target
from fastadapter.kernels.activation import ACTIVATIONS
from fastadapter.kernels.bottleneck_config import narrow_config, weights_config, wide_config
from fastadapter.kernels.bottleneck_rows import TILES_PER_SLOT

from tests.support.bottleneck import Shape, eager, make_inputs, run
from tests.support.budget import assert_within_budget, same_bits
from tests.support.far import far_apart
from tests.support.gated_prefix import device_of, on_device

GRADS = ("x", "down_weight", "up_weight", "down_bias", "up_bias", "norm_weight", "norm_bias")
DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]
# (shape, options of make_inputs, options of the op): weights of the wide kernel that stay on chip, and that do not
CASES = [
    (Shape(1, 1, 60, 24), {"residual": "x", "norm": "layer_norm"}, {"activation": "gelu", "scale": 0.7}),
    (Shape(1, 35, 130, 33), {"biases": False}, {"activation": "relu"}),
    (Shape(2, 3, 577, 1), {"residual": None, "norm": "rms_norm"}, {"activation": "silu"}),
    (Shape(2, 33, 33, 64), {"residual": "x"}, {"activation": "tanh", "scale": -2.0}),
    (Shape(1, 3, 33, 130), {"residual": "x", "norm": "layer_norm"}, {"activation": "gelu_tanh"}),
    (Shape(1, 2, 17, 65), {"residual": None, "biases": False}, {"activation": "identity"}),
    (Shape(4, 3, 40, 24, 3), {"norm": "layer_norm"}, {"activation": "gelu"}),
    (Shape(3, 2, 17, 140, 2), {"norm": "rms_norm", "residual": "x"}, {"activation": "silu", "scale": 0.5}),
    (Shape(1, 3, 20, 300), {"residual": "x", "biases": False}, {"activation": "gelu"}),
    (Shape(2, 67, 20, 5, 2), {"residual": "x"}, {"activation": "gelu"}),  # several tiles of a row of a bank
    (Shape(1, 33, 300, 7), {"residual": "x"}, {"activation": "identity"}),  # several blocks of channels
]
ONE = Shape(3, 3, 20, 5, 2)
# past one block of hidden columns
TWO = ONE._replace(hidden=12, size=70)
BANKS = GRADS[1:]


def case_id(value):
    return "-".join(str(x) for x in value.values()) if isinstance(value, dict) else str(value)


def forward(inputs, *, activation="gelu", norm="none", norm_eps=1e-5, scale=1.0):
    tensors = [on_device(x, DEVICE) for x in inputs[:9]]
    return kernels.bottleneck_forward(*tensors, activation, norm, norm_eps, scale)


def backward(inputs, *, activation="gelu", norm="none", norm_eps=1e-5, scale=1.0, needs=(True,) * 4, z=None):
    """Gradients by name, as the registered op returns them."""
    x, down, up, down_bias, _, _, norm_weight, norm_bias, row_ids, grad_out = (
        on_device(x, DEVICE) for x in inputs
    )
    tensors = (grad_out, x, down, up, down_bias, norm_weight, norm_bias, row_ids, z)
    options = (activation, norm, norm_eps, scale, inputs.residual is inputs.x)
    grads = kernels.bottleneck_backward(*tensors, *options, *needs)
    return {name: grad.cpu() for name, grad in zip(GRADS, grads, strict=True)}


def launch(inputs, **options):
    """Output and gradients of what is there, by name, from the launchers on this machine's device."""
    grads = backward(inputs, **options)
    present = {name: grad for name, grad in grads.items() if getattr(inputs, name) is not None}
    return {"out": forward(inputs, **options).cpu(), **present}


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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_keep_clear_of_wgmma(arch):
    """Fewer than 64 rows in every product, whatever the sizes: ptxas before 13.3 may corrupt operands of wgmma.

    But for the wide kernel on sm_90, whose operands are loaded and not computed.
    """
    for dtype, size, seq_len in itertools.product(
        (torch.float32, torch.bfloat16), (1, 24, 64, 250, 300), (1, 2048)
    ):
        assert narrow_config(arch, dtype, size, seq_len)["BLOCK_M"] < 64
        assert wide_config(arch, dtype, size, seq_len)["BLOCK_M"] < 64 or arch == "sm_90"
        # rows of the transposed products
        assert weights_config(arch, dtype, size)["BLOCK_C"] < 64


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_program_walks_over_several_tiles(arch, monkeypatch):
    """As many programs as the device holds: here three, for two blocks of channels and nine tiles of rows."""
    real = bottleneck_config.wide_config

    def few(*args):
        return real(*args) | {"programs": 6}

    monkeypatch.setattr(bottleneck_config, "wide_config", few)
    inputs = make_inputs(Shape(1, 140, 100, 5), torch.float16, residual="x")
    with target.assume(arch):
        check(inputs, launch(inputs))


@pytest.mark.parametrize(
    "shape", [Shape(3, 9, 40, 24, 2), Shape(2, 33, 20, 24), Shape(1, 9, 33, 130)], ids=str
)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
def test_fp32_masters_beside_half_activations(shape, norm):
    """Rounded once to half for the products; judged as all in half, gradients come back in fp32."""
    inputs = make_inputs(shape, torch.float16, parameter_dtype=torch.float32, norm=norm)
    actual = launch(inputs, norm=norm)
    assert all(actual[name].dtype == getattr(inputs, name).dtype for name in actual if name != "out")
    check(inputs, actual, norm=norm)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_input_of_the_activation_is_kept(dtype, norm):
    """In the dtype of x; output and gradients have the bits that they have without it."""
    inputs = make_inputs(Shape(2, 19, 40, 24), dtype, norm=norm, residual="x")
    tensors = [on_device(x, DEVICE) for x in inputs[:9]]
    out, z = kernels.bottleneck_saving(*tensors, "gelu", norm, 1e-5, 0.5)
    assert z.shape == (2, 19, 24) and z.dtype == dtype
    expected = launch(inputs, norm=norm, scale=0.5)
    actual = {"out": out.cpu()} | backward(inputs, norm=norm, scale=0.5, z=z)
    for name in expected:
        assert same_bits(actual[name], expected[name]), name
    with pytest.raises(ValueError, match="row_ids must be None where z is kept"):
        tensors[8] = on_device(torch.zeros(2, dtype=torch.int32), DEVICE)
        kernels.bottleneck_saving(*tensors, "gelu", norm, 1e-5, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(2, 33, 70, 33), Shape(3, 5, 96, 140, 2)], ids=str)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_with_every_norm(dtype, activation, norm, shape):
    inputs = make_inputs(shape, dtype, norm=norm, residual="x")
    options = {"activation": activation, "norm": norm, "scale": 0.8}
    check(inputs, launch(inputs, **options), **options)


def test_the_statistics_do_not_cancel():
    """A mean a thousand times the deviation: E[x^2] - E[x]^2 would keep no digit of the variance."""
    inputs = make_inputs(Shape(1, 3, 300, 4), torch.float32, norm="layer_norm")
    inputs = inputs._replace(x=inputs.x + 1000.0)
    check(inputs, {"out": forward(inputs, norm="layer_norm").cpu()}, norm="layer_norm")


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
@pytest.mark.parametrize(("scale", "norm"), [(1.0, "layer_norm"), (0.0, "layer_norm"), (1.0, "none")])
def test_nothing_passes_a_zero_up_projection(scale, norm, size):
    """Neither Inf or NaN in down and x, nor NaN in grad_out through columns of zeros; U itself gets its gradient."""
    inputs = make_inputs(Shape(2, 3, 20, size), torch.float32, norm=norm, residual="x")
    if scale:
        inputs.up_weight.zero_()
    exact = eager(inputs, torch.float64, norm=norm, scale=scale)
    actual = launch(inputs, norm=norm, scale=scale)
    assert same_bits(actual["x"], inputs.grad_out)
    check(inputs, {"up_weight": actual["up_weight"]}, norm=norm, scale=scale)
    assert bool(exact["up_weight"].any()) == bool(scale)
    inputs.down_weight[:, 0], inputs.down_weight[:, 1] = float("inf"), float("nan")
    inputs.grad_out[0, 0, 0], inputs.grad_out[0, 1, 0], inputs.x[1, 2, 3] = float("nan"), -0.0, float("nan")
    actual = launch(inputs, norm=norm, scale=scale)
    assert same_bits(actual["x"], inputs.grad_out)
    for name in ("down_weight", "down_bias", "norm_weight", "norm_bias"):
        assert name not in actual or not actual[name].any(), name


@pytest.mark.parametrize("channel", [0, 149, 299])
def test_a_small_part_of_the_up_projection_counts(channel):
    """Wherever it is, one weight that is not zero opens the way down."""
    inputs = make_inputs(Shape(1, 3, 300, 5), torch.float32, residual="x")
    inputs.up_weight.zero_()
    inputs.up_weight[0, channel, 4] = 1.0
    actual, exact = launch(inputs), eager(inputs, torch.float64)
    for name, value in actual.items():
        torch.testing.assert_close(value, exact[name].float(), msg=lambda text, name=name: f"{name}: {text}")


def test_a_zero_entry_among_others():
    """Its rows send nothing below its up projection, though they and its down projection hold NaN."""
    inputs = make_inputs(Shape(3, 3, 20, 5, 2), torch.float32, residual="x")
    inputs = inputs._replace(row_ids=torch.tensor([0, 1, 0], dtype=torch.int32))
    inputs.up_weight[0] = 0.0
    inputs.down_weight[0, 1], inputs.x[0, 1, 2], inputs.grad_out[2, 0] = float("nan"), float("nan"), -0.0
    actual = launch(inputs)
    assert same_bits(actual["x"][[0, 2]], inputs.grad_out[[0, 2]])
    for name in ("down_weight", "down_bias"):
        assert not actual[name][0].any() and actual[name][1].any(), name
        assert actual[name].isfinite().all(), name


@pytest.mark.parametrize("size", [5, 70])
def test_ids_outside_the_bank_show_as_nan(size):
    """A device cannot raise; it must neither read past the bank nor return something that looks right."""
    inputs = make_inputs(Shape(5, 2, 20, size, 2), torch.float32, norm="rms_norm")
    inputs = inputs._replace(row_ids=torch.tensor([0, 2, -2, 2**31 - 1, -1], dtype=torch.int32))
    inputs.residual[4, 0] = -0.0
    actual = launch(inputs, norm="rms_norm")
    assert actual["out"][0].isfinite().all() and actual["x"][0].isfinite().all()
    assert actual["out"][1:4].isnan().all() and actual["x"][1:4].isnan().all()
    assert same_bits(actual["out"][4], inputs.residual[4])
    assert not actual["x"][4].any()
    for name in BANKS[:5]:
        assert actual[name][0].isfinite().all() and not actual[name][1].any(), name
    assert not forward(inputs._replace(residual=None), norm="rms_norm")[4].any()


@pytest.mark.parametrize(("shape", "tied"), [(ONE, False), (ONE, True), (TWO, True)], ids=str)
def test_rows_without_an_adapter(shape, tied):
    """-1 gives the residual, and grad_out to it, whatever the bank and x hold; an unused entry gets zeros."""
    inputs = make_inputs(shape, torch.float32, norm="layer_norm", residual="x" if tied else "other")
    inputs = inputs._replace(row_ids=torch.tensor([-1, 1, -1], dtype=torch.int32))
    for name in BANKS:
        getattr(inputs, name)[0] = float("nan")
    inputs.x[0, 0], inputs.residual[0, 1], inputs.grad_out[2, 0] = float("nan"), -0.0, -0.0
    actual = launch(inputs, norm="layer_norm")
    assert same_bits(actual["out"][[0, 2]], inputs.residual[[0, 2]])
    expected = inputs.grad_out if tied else torch.zeros_like(inputs.grad_out)
    assert same_bits(actual["x"][[0, 2]], expected[[0, 2]])
    for name in BANKS:
        assert not actual[name][0].any(), name
        assert actual[name][1].isfinite().all() and actual[name][1].any(), name


@pytest.mark.parametrize(("shape", "poisoned"), [(ONE, [0]), (ONE, [1, 2]), (TWO, [1, 2])], ids=str)
def test_rows_and_entries_are_isolated(poisoned, shape):
    """NaN in some rows and in their bank entries leaves every other row and entry with the same bits."""
    inputs = make_inputs(shape._replace(num_entries=3), torch.float32, norm="layer_norm")
    inputs = inputs._replace(row_ids=torch.tensor([2, 0, 1], dtype=torch.int32))
    expected = launch(inputs, norm="layer_norm")
    entries = [int(inputs.row_ids[row]) for row in poisoned]
    for name in ("x", "residual", "grad_out"):
        getattr(inputs, name)[poisoned] = float("nan")
    for name in BANKS:
        getattr(inputs, name)[entries] = float("nan")
    actual = launch(inputs, norm="layer_norm")
    rows = [row for row in range(3) if row not in poisoned]
    others = [entry for entry in range(3) if entry not in entries]
    for name in ("out", "x"):
        assert same_bits(actual[name][rows], expected[name][rows]), name
        assert actual[name][poisoned].isnan().all(), name
    for name in BANKS:
        assert same_bits(actual[name][others], expected[name][others]), name
        assert actual[name][entries].isnan().all(), name


def test_positions_of_a_shared_adapter_are_isolated():
    """Rows of the whole batch share tiles here; NaN at one position stays there."""
    inputs = make_inputs(Shape(3, 5, 20, 5), torch.float32, norm="rms_norm")
    expected = launch(inputs, norm="rms_norm")
    for name in ("x", "grad_out"):
        getattr(inputs, name)[1, 2] = float("nan")
    actual = launch(inputs, norm="rms_norm")
    clean = torch.ones(3, 5, dtype=torch.bool)
    clean[1, 2] = False
    for name in ("out", "x"):
        assert same_bits(actual[name][clean], expected[name][clean]), name
        assert actual[name][1, 2].isnan().all(), name


@pytest.mark.parametrize("size", [3, pytest.param(70, marks=pytest.mark.slow)])
def test_a_row_in_a_batch_has_the_bits_it_has_alone(size):
    """With ids, its gradients too: how a row is cut into tiles and slots does not depend on the batch."""
    inputs = make_inputs(Shape(2, 35, 12, size, 3), torch.float32, norm="layer_norm")
    ids = torch.tensor([2, 0], dtype=torch.int32)
    inputs = inputs._replace(row_ids=ids)
    batch = launch(inputs, norm="layer_norm")
    for row in range(2):
        own = {name: getattr(inputs, name)[row : row + 1] for name in ("x", "residual", "grad_out")}
        alone = launch(inputs._replace(**own, row_ids=ids[row : row + 1]), norm="layer_norm")
        for name in ("out", "x"):
            assert same_bits(alone[name][0], batch[name][row]), name
        for name in BANKS:
            assert same_bits(alone[name][ids[row]], batch[name][ids[row]]), name


def spread(x, offset=1):
    """The values of ``x`` with every stride doubled and swapped, one element off the alignment of its storage."""
    if x is None or x.dim() < 2:
        return x
    shape = torch.Size((*x.shape[:-2], x.shape[-1], 2 * x.shape[-2]))
    storage = torch.full((offset + shape.numel(),), float("nan"), dtype=x.dtype)
    return storage[offset:].view(shape).transpose(-1, -2)[..., ::2, :].copy_(x)


@pytest.mark.parametrize("shape", [ONE, pytest.param(TWO, marks=pytest.mark.slow)], ids=str)
def test_strided_and_unaligned_inputs(shape):
    """Same bits as from contiguous tensors; out and grad_x like ``torch.empty_like(x)``."""
    inputs = make_inputs(shape, torch.float32, norm="layer_norm")
    expected = launch(inputs, norm="layer_norm")
    views = inputs.map(spread)
    assert not views.x.is_contiguous() and views.down_weight.storage_offset() == 1
    actual = launch(views, norm="layer_norm")
    for name, value in expected.items():
        assert same_bits(actual[name], value), name
    assert forward(views, norm="layer_norm").stride() == torch.empty_like(views.x).stride()
    expanded = inputs._replace(grad_out=inputs.grad_out[:1, :1].expand_as(inputs.grad_out))
    dense = inputs._replace(grad_out=expanded.grad_out.contiguous())
    expected, actual = (backward(x, norm="layer_norm") for x in (dense, expanded))
    for name, value in expected.items():
        assert same_bits(actual[name], value), name


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [ONE, TWO], ids=["one", "two"])
def test_strides_beyond_32_bits(shape, axis):
    """Rows and positions whose offsets need 64 bits, forward and backward."""
    inputs = make_inputs(shape, torch.float16, norm="layer_norm")
    far = {name: far_apart(getattr(inputs, name), axis) for name in ("x", "residual", "grad_out")}
    actual, expected = launch(inputs._replace(**far), norm="layer_norm"), launch(inputs, norm="layer_norm")
    for name in expected:
        assert same_bits(actual[name], expected[name]), name


@pytest.mark.parametrize("shape", [Shape(0, 3, 20, 5), Shape(2, 0, 20, 70)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(shape, shared):
    inputs = make_inputs(shape if shared else shape._replace(num_entries=2), torch.float32, norm="layer_norm")
    inputs = inputs if shared else inputs._replace(row_ids=torch.zeros(shape.batch, dtype=torch.int32))
    actual = launch(inputs, norm="layer_norm")
    for name in ("out", "x"):
        assert actual[name].shape == inputs.x.shape, name
    for name in BANKS:
        assert actual[name].shape == getattr(inputs, name).shape and not actual[name].any(), name


@pytest.mark.parametrize("shape", [ONE, TWO], ids=str)
def test_only_needed_gradients_are_computed(shape):
    inputs = make_inputs(shape._replace(batch=2), torch.float32, norm="layer_norm")
    full = backward(inputs, norm="layer_norm")
    for needs in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 0, 0, 0)):
        actual = backward(inputs, norm="layer_norm", needs=tuple(map(bool, needs)))
        x, weights, biases, norm = needs
        for name, needed in zip(GRADS, (x, weights, weights, biases, biases, norm, norm), strict=True):
            expected = full[name] if needed else torch.empty(0, dtype=full[name].dtype)
            assert same_bits(actual[name], expected), (needs, name)


@pytest.mark.parametrize("residual", ["x", "other"])
def test_the_public_op_runs_these_kernels(residual):
    """Output and every gradient of ``backend="triton"`` have the bits of the launchers."""
    inputs = make_inputs(ONE, torch.float32, norm="layer_norm", residual=residual)
    results = run(inputs, "triton", activation="silu", norm="layer_norm", scale=0.5)
    for name, value in launch(inputs, activation="silu", norm="layer_norm", scale=0.5).items():
        assert same_bits(results[name], value), name


def test_absent_arguments_have_empty_gradients():
    inputs = make_inputs(ONE, torch.float32, biases=False)
    grads = backward(inputs)
    for name in ("down_bias", "norm_weight", "norm_bias"):
        assert grads[name].shape == (0,), name
    # the registered backward is not told whether there was one
    assert grads["up_bias"].shape == inputs.up_weight.shape[:2]


@pytest.mark.parametrize("num_entries", [1, 2])
def test_many_rows(num_entries):
    """Several tiles and batch rows in one run, several slots of a row; twice the same bits."""
    shape = Shape(2, 32 * TILES_PER_SLOT + 5, 17, 3, num_entries)
    inputs = make_inputs(shape, torch.float32, residual="x")
    actual = launch(inputs)
    check(inputs, actual)
    again = backward(inputs)
    assert all(same_bits(actual[name], grad) for name, grad in again.items() if name in actual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(activation):
    """Where z is tiny, the exponential form of tanh has no digit left; where it is large, exp overflows."""
    inputs = make_inputs(Shape(1, 8, 16, 16), torch.float32, biases=False, residual=None)
    eye = torch.eye(16)[None]
    steps = torch.logspace(-7, 2, 64)
    x = torch.cat([-steps, steps]).view(1, 8, 16)
    inputs = inputs._replace(x=x, down_weight=eye, up_weight=eye, grad_out=torch.ones_like(x))
    actual = launch(inputs, activation=activation)
    exact = eager(inputs, torch.float64, activation=activation)
    plain = eager(inputs, torch.float32, activation=activation)
    for name in ("out", "x"):
        error = (actual[name] - exact[name]).abs()
        allowed = (
            2 * (plain[name] - exact[name]).abs() + 8 * torch.finfo(torch.float32).eps * exact[name].abs()
        )
        assert (error <= allowed + 1e-10).all(), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "x must be fp32, bf16 or fp16, got torch.float64"),
        ({"activation": "swish"}, ValueError, "activation must be one of relu, .*, got 'swish'"),
        (
            {"norm": "batch_norm"},
            ValueError,
            "norm must be one of none, layer_norm, rms_norm, got 'batch_norm'",
        ),
        ({"norm": "none"}, ValueError, "norm_weight and norm_bias need a norm, got norm 'none'"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error(change, error, message):
    change = dict(change)
    inputs = make_inputs(ONE, change.pop("dtype", torch.float32), norm="layer_norm")
    for launcher in (forward, backward):
        with pytest.raises(error, match=message):
            launcher(inputs, **{"norm": "layer_norm", **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
def test_bf16_in_the_interpreter_is_refused():
    with pytest.raises(TypeError, match="under TRITON_INTERPRET=1"):
        forward(make_inputs(ONE, torch.bfloat16))
