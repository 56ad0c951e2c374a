"""``bottleneck`` on every backend against the fp64 reference, by the budget of tests/support/budget.py.

The reference itself is checked against autograd through the plain modules, and by finite differences. Up
projections are random and non-zero unless a test says so: at zero, only their own gradient is non-zero.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import gradcheck

from fastadapter import ops
from fastadapter.ops.bottleneck import ACTIVATIONS
from tests.support.bottleneck import (
    GRADS,
    NORM,
    PARAMETERS,
    Inputs,
    Shape,
    assert_results_within_budget,
    call,
    make_inputs,
    run,
)  # fmt: skip
from tests.support.budget import same_bits
from tests.support.gated_prefix import CPP, device_of, needs_extension

BACKENDS = ["reference", CPP, "triton"]
SHAPES = [
    Shape(),
    Shape(batch=5, q_len=9, hidden=60, size=17, num_entries=3),
    Shape(batch=1, q_len=70, hidden=33, size=64),
    Shape(batch=4, q_len=1, hidden=96, size=24, num_entries=2),
]


def dtypes_of(backend):
    """What a backend can run here; Triton's interpreter computes bf16 wrongly, a GPU does not."""
    if backend != "triton":
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    return [torch.float32, torch.float16] + [torch.bfloat16] * (device_of("triton") == "cuda")


CASES = [
    pytest.param(backend, dtype, marks=needs_extension if backend == "cpp" else ())
    for backend in ("reference", "cpp", "triton")
    for dtype in dtypes_of(backend)
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")

FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


def plain(leaves, row_ids, activation, norm, scale):
    """What a user would write, row by row, with autograd's own gradients."""
    rows = []
    for b, x in enumerate(leaves["x"]):
        entry = 0 if row_ids is None else int(row_ids[b])
        of = {name: leaf[max(entry, 0)] for name, leaf in leaves.items() if name not in ("x", "residual")}
        y = x
        if norm == "layer_norm":
            y = F.layer_norm(x, x.shape[-1:], of["norm_weight"], of["norm_bias"])
        elif norm == "rms_norm":
            y = F.rms_norm(x, x.shape[-1:], of["norm_weight"], 1e-5)
        hidden = FUNCTIONS[activation](F.linear(y, of["down_weight"], of.get("down_bias")))
        term = scale * F.linear(hidden, of["up_weight"], of.get("up_bias")) * (entry >= 0)
        rows.append(term + (leaves["residual"][b] if "residual" in leaves else 0))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_reference_is_what_autograd_says(activation, norm, residual):
    """Against the plain modules in fp64, with and without biases, one entry and a bank."""
    for biases, num_entries in ((True, 1), (False, 3)):
        inputs = make_inputs(
            Shape(batch=5, num_entries=num_entries),
            torch.float64,
            biases=biases,
            residual=residual,
            norm=norm,
        )
        leaves = {
            name: getattr(inputs, name).detach().requires_grad_()
            for name in GRADS
            if getattr(inputs, name) is not None
        }
        if residual == "x":
            leaves["residual"] = leaves["x"]
        out = plain(leaves, inputs.row_ids, activation, norm, 0.7)
        out.backward(inputs.grad_out)
        expected = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
        actual = run(inputs, "reference", activation=activation, norm=norm, scale=0.7)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_results_are_within_budget(backend, dtype, shape):
    """Output and every gradient, in every dtype; norms, residuals and biases take turns."""
    for norm, residual, biases in (
        ("none", "x", True),
        ("layer_norm", "other", True),
        ("rms_norm", None, False),
    ):
        inputs = make_inputs(shape, dtype, norm=norm, residual=residual, biases=biases)
        assert_results_within_budget(inputs, backend, dtype, norm=norm, scale=0.7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations(backend, activation):
    """Also far from zero, where exponentials end."""
    inputs = make_inputs(SHAPES[0], torch.float32, residual="x")
    assert_results_within_budget(inputs, backend, torch.float32, activation=activation)
    far = inputs._replace(down_weight=inputs.down_weight * 40)
    assert_results_within_budget(far, backend, torch.float32, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_fp32_parameters_beside_half_activations(backend, dtype, norm):
    """The masters stay fp32: gradients come back in fp32, the output in the activations' dtype."""
    if dtype not in dtypes_of(backend):
        pytest.skip("not computed by Triton's interpreter")
    inputs = make_inputs(
        Shape(batch=5, num_entries=3), dtype, parameter_dtype=torch.float32, norm=norm, residual="x"
    )
    actual = assert_results_within_budget(inputs, backend, dtype, norm=norm)
    assert actual["out"].dtype == dtype and actual["down_weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_in_another_dtype_than_the_projections(backend):
    """The frozen norm of a half-precision model beside fp32 projections."""
    inputs = make_inputs(Shape(), torch.float16, parameter_dtype=torch.float32, norm="layer_norm")
    inputs = inputs._replace(norm_weight=inputs.norm_weight.half(), norm_bias=inputs.norm_bias.half())
    actual = assert_results_within_budget(inputs, backend, torch.float16, norm="layer_norm")
    assert actual["norm_weight"].dtype == torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_without_weight(backend):
    """Weight and bias of a norm may be left out; then only the statistics act."""
    inputs = make_inputs(Shape(), torch.float32, norm="layer_norm")
    plain_norm = run(inputs._replace(norm_weight=None, norm_bias=None), backend, norm="layer_norm")
    ones = inputs._replace(
        norm_weight=torch.ones_like(inputs.norm_weight), norm_bias=torch.zeros_like(inputs.norm_bias)
    )
    expected = run(ones, backend, norm="layer_norm")
    for name in plain_norm:
        torch.testing.assert_close(plain_norm[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_zero_up_is_the_residual_bit_for_bit(backend, dtype, residual):
    """Also negative zeros on either side, and when the down projection holds Inf and NaN; only up gets a gradient."""
    inputs = make_inputs(Shape(batch=4, num_entries=2), dtype, residual=residual)
    inputs.up_weight.zero_()
    inputs.up_bias.zero_()
    inputs.up_weight[:, ::2] = -0.0
    inputs.up_bias[:, 1::2] = -0.0
    kept = torch.zeros_like(inputs.x) if residual is None else inputs.residual
    if residual is not None:
        kept[:, 0] = -0.0
    results = run(inputs, backend)
    assert same_bits(results["out"], kept)
    assert results["up_weight"].abs().max() > 0 and results["up_bias"].abs().max() > 0
    inputs.down_weight[0, :, 0] = float("inf")
    inputs.down_weight[1] = float("nan")
    inputs.down_bias[:, 0] = float("nan")
    results = run(inputs, backend)
    assert same_bits(results["out"], kept)
    passed = inputs.grad_out if residual == "x" else torch.zeros_like(inputs.x)
    assert same_bits(results["x"] + 0.0, passed + 0.0)
    for name in ("down_weight", "down_bias"):
        assert results[name].count_nonzero() == 0, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_channels_among_others(backend):
    """A channel whose weights and bias are zero keeps its bits beside channels that change, and that are NaN."""
    inputs = make_inputs(Shape(hidden=40), torch.float32)
    inputs.up_weight[0, [3, 5, 39]] = 0.0
    inputs.up_bias[0, [3, 6, 39]] = 0.0
    inputs.residual[..., 3] = -0.0
    inputs.residual[0, 0, 39] = float("nan")
    for poison in (False, True):
        if poison:
            inputs.down_weight[0, 2] = float("nan")
        out = run(inputs, backend)["out"]
        assert same_bits(out[..., [3, 39]], inputs.residual[..., [3, 39]])
        assert not same_bits(out[..., 4], inputs.residual[..., 4])
    assert out[..., [4, 5, 6]].isnan().all()  # weights or bias: not a channel without a term


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_scale_is_the_residual(backend):
    inputs = make_inputs(Shape(), torch.float32)
    inputs.down_weight[0, 1] = float("nan")
    results = run(inputs, backend, scale=0.0)
    assert same_bits(results["out"], inputs.residual)
    for name in ("x", "down_weight", "up_weight", "down_bias"):
        assert results[name].count_nonzero() == 0, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_rows_are_isolated(backend, norm, default_threads):
    """A row gives the bits it gives alone, whatever its neighbours and the entries they use hold."""
    if (
        backend == "reference"
    ):  # torch shares a batched product among threads in another way for another batch
        torch.set_num_threads(1)
    inputs = make_inputs(Shape(batch=6, num_entries=3, q_len=5), torch.float32, norm=norm)
    inputs = inputs._replace(row_ids=torch.tensor([1, 0, -1, 2, 1, 0], dtype=torch.int32))
    row, entry = 4, 1
    activations = ("x", "residual", "grad_out")
    single = inputs._replace(
        **{name: getattr(inputs, name)[row : row + 1] for name in activations},
        row_ids=inputs.row_ids[row : row + 1],
    )
    poisoned = inputs.map(torch.clone)
    for name in activations:
        getattr(poisoned, name)[inputs.row_ids != entry] = float("nan")
    parameters = [name for name in (*PARAMETERS, *NORM) if getattr(inputs, name) is not None]
    for name in parameters:
        getattr(poisoned, name)[[0, 2]] = float("nan")
    alone, mixed, clean = (run(x, backend, norm=norm) for x in (single, poisoned, inputs))
    assert same_bits(mixed["out"][row], alone["out"][0]) and same_bits(mixed["x"][row], alone["x"][0])
    for name in parameters:
        assert same_bits(mixed[name][entry], clean[name][entry]), name
    # and the inverse: another id must give another result
    swapped = inputs._replace(row_ids=inputs.row_ids.clone())
    swapped.row_ids[row] = 2
    assert not same_bits(run(swapped, backend, norm=norm)["out"][row], clean["out"][row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_rows_without_an_adapter(backend, residual):
    """Id -1 leaves the residual, or zero, and sends no gradient anywhere else."""
    inputs = make_inputs(Shape(num_entries=2), torch.float32, residual=residual)
    inputs = inputs._replace(row_ids=torch.full_like(inputs.row_ids, -1))
    results = run(inputs, backend)
    kept = torch.zeros_like(inputs.x) if residual is None else inputs.residual
    assert same_bits(results["out"], kept)
    passed = inputs.grad_out if residual == "x" else torch.zeros_like(inputs.x)
    assert same_bits(results["x"], passed)
    for name in PARAMETERS:
        assert results[name].count_nonzero() == 0, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """Transposed, step-2, unaligned and expanded inputs give what their copies give; out is strided as x."""
    inputs = make_inputs(Shape(), torch.float32, norm="layer_norm")

    def transposed(x):
        return x.mT.contiguous().mT if x.dim() > 1 else x

    def every_other(x):
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]

    def unaligned(x):
        storage = torch.full((x.numel() + 1,), float("nan"))
        storage[1:] = x.reshape(-1)
        return storage[1:].view_as(x)

    expected = run(inputs, backend, norm="layer_norm")
    for change in (transposed, every_other, unaligned):
        actual = run(inputs.map(change), backend, norm="layer_norm")
        for name in expected:
            # not bitwise: the matrix products of the reference round by alignment
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    x = inputs.x.transpose(0, 1).contiguous().transpose(0, 1)
    assert run(inputs._replace(x=x), backend)["out"].stride() == x.stride()
    wide = inputs._replace(x=inputs.x[:, :1].expand_as(inputs.x), grad_out=torch.ones(()).expand_as(inputs.x))
    dense = wide.map(lambda x: x.contiguous())
    torch.testing.assert_close(run(wide, backend)["out"], run(dense, backend)["out"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(6,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("ids", [False, True])
def test_leading_dims(backend, lead, ids):
    """x of 2, 3 and 4 dims, parameters as in nn.Linear or as a bank; ids count the first dim."""
    shape = Shape(batch=lead[0], q_len=math.prod(lead[1:]), num_entries=3 if ids else 1)
    inputs = make_inputs(shape, torch.float32, bank=ids, norm="rms_norm", residual="x")
    expected = run(inputs, backend, norm="rms_norm")
    x = inputs.x.reshape(*lead, shape.hidden)
    changed = inputs._replace(x=x, residual=x, grad_out=inputs.grad_out.reshape(x.shape))
    actual = run(changed, backend, norm="rms_norm")
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name].reshape(actual[name].shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape(batch=0), Shape(q_len=0), Shape(batch=0, num_entries=2)], ids=str)
def test_empty_inputs(backend, shape):
    """No rows or no tokens: empty output, zero gradients for the parameters."""
    inputs = make_inputs(shape, torch.float32, norm="layer_norm")
    results = run(inputs, backend, norm="layer_norm")
    assert results["out"].shape == inputs.x.shape
    for name in (*PARAMETERS, *NORM):
        assert results[name].count_nonzero() == 0, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    """Bitwise equal from run to run, forward and backward."""
    inputs = make_inputs(Shape(batch=8, q_len=33, num_entries=3), torch.float32, norm="layer_norm")
    first = run(inputs, backend, norm="layer_norm")
    for _ in range(3 if backend == "triton" else 30):
        again = run(inputs, backend, norm="layer_norm")
        assert all(same_bits(again[name], first[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "frozen",
    [
        ("x",),
        PARAMETERS,
        ("x", "down_weight", "up_weight"),
        NORM,
        ("x", *PARAMETERS, "residual"),
        ("up_bias",),
        ("up_weight", "norm_bias"),
    ],
    ids=str,
)
def test_frozen_inputs_get_no_gradient(backend, frozen):
    """And the others get the same bits as when all are trained."""
    inputs = make_inputs(Shape(batch=3, num_entries=2), torch.float32, norm="layer_norm")
    everything = run(inputs, backend, norm="layer_norm")
    some = run(inputs, backend, norm="layer_norm", frozen=frozen)
    for name in GRADS:
        assert name not in some if name in frozen else same_bits(some[name], everything[name]), name


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_gradcheck(backend, norm, activation):
    """Finite differences in fp64, a bank and every operand included; backward may not vary at all."""
    inputs = make_inputs(Shape(3, 2, 4, 2, 2), torch.float64, norm=norm)
    names = [name for name in GRADS if getattr(inputs, name) is not None]
    leaves = [getattr(inputs, name).requires_grad_() for name in names]

    def function(*tensors):
        changed = inputs._replace(**dict(zip(names, tensors)))
        return call(changed, backend, activation=activation, norm=norm, scale=0.7)

    assert gradcheck(function, leaves, nondet_tol=0.0)


def test_opcheck():
    """Schema, fake and dispatch of the registered ops."""
    namespace = torch.ops.fastadapter
    for shape, dtype, norm in (
        (Shape(), torch.float32, "none"),
        (Shape(batch=4, num_entries=3), torch.bfloat16, "layer_norm"),
    ):
        inputs = make_inputs(shape, dtype, norm=norm)
        x = inputs.x.transpose(0, 1).contiguous().transpose(0, 1)
        constants = ("gelu", norm, 1e-5, 0.5)
        torch.library.opcheck(namespace.bottleneck.default, (x, *inputs[1:9], *constants))
        for needs in ((True,) * 4, (False, True, False, True)):
            arguments = (inputs.grad_out, x, *inputs[1:4], *inputs[6:9], None, *constants, True, *needs)
            torch.library.opcheck(namespace.bottleneck_backward.default, arguments)


@pytest.mark.parametrize("residual", ["x", "other", None])
def test_compiles_into_one_graph(residual):
    """``torch.compile(fullgraph=True)``, forward and backward, with other lengths after the first."""
    compiles = of_first = 0

    def counting(graph, example_inputs):
        nonlocal compiles
        compiles += 1
        return aot_eager(graph, example_inputs)

    def term(*tensors):
        inputs = Inputs(*tensors, grad_out=None)
        if residual == "x":
            inputs = inputs._replace(residual=inputs.x)
        return call(inputs) * 2

    compiled = torch.compile(term, fullgraph=True, backend=counting, dynamic=True)
    for q_len in (7, 12, 33):
        inputs = make_inputs(Shape(q_len=q_len), torch.float32, residual=residual)
        results = []
        for function in (term, compiled):
            leaves = [x if x is None else x.clone().requires_grad_() for x in inputs[:9]]
            out = function(*leaves)
            out.backward(inputs.grad_out)
            results.append(
                [out, *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)]
            )
        for plain_result, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, plain_result)
        of_first = of_first or compiles
    assert compiles == of_first


def test_second_backward_is_refused():
    """Double backward is not supported and says so, rather than returning zeros."""
    inputs = make_inputs(Shape(), torch.float32)
    x = inputs.x.requires_grad_()
    out = call(inputs._replace(x=x))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_are_not_changed():
    inputs = make_inputs(Shape(num_entries=2), torch.float32, norm="layer_norm")
    before = [x.clone() for x in inputs]
    run(inputs, norm="layer_norm")
    assert all(same_bits(a, b) for a, b in zip(inputs, before))


BAD_CALLS = [
    ("x must have at least 2 dims", ValueError, lambda x: x._replace(x=x.x[0, 0])),
    ("x must be torch.float32", TypeError, lambda x: x._replace(x=x.x.int())),
    ("down_weight must be", ValueError, lambda x: x._replace(down_weight=x.down_weight[0, 0])),
    ("down_weight must be", ValueError, lambda x: x._replace(down_weight=x.down_weight[..., 1:])),
    ("down_weight must be torch.float32", TypeError, lambda x: x._replace(down_weight=x.down_weight.half())),
    ("up_weight must be", ValueError, lambda x: x._replace(up_weight=x.up_weight.mT)),
    ("up_weight must have 3 dims", ValueError, lambda x: x._replace(up_weight=x.up_weight[0])),
    ("up_weight must be torch.float32", TypeError, lambda x: x._replace(up_weight=x.up_weight.double())),
    ("down_bias must be", ValueError, lambda x: x._replace(down_bias=x.down_bias[:, 1:])),
    ("up_bias must have 2 dims", ValueError, lambda x: x._replace(up_bias=x.up_bias[0])),
    ("up_bias must be torch.float32", TypeError, lambda x: x._replace(up_bias=x.up_bias.half())),
    ("residual must be", ValueError, lambda x: x._replace(residual=x.residual[:1])),
    ("residual must be torch.float32", TypeError, lambda x: x._replace(residual=x.residual.half())),
    ("norm.weight must be", ValueError, lambda x: x._replace(norm_weight=x.norm_weight[:, 1:])),
    ("norm.bias must be torch.float32", TypeError, lambda x: x._replace(norm_bias=x.norm_bias.double())),
    ("at least 1", ValueError, lambda x: x._replace(down_weight=x.down_weight[:, :0])),
    ("needs row_ids", ValueError, lambda x: x._replace(row_ids=None)),
    ("row_ids must be torch.int32", TypeError, lambda x: x._replace(row_ids=x.row_ids.long())),
    ("row_ids must be", ValueError, lambda x: x._replace(row_ids=x.row_ids[:1])),
    ("row_ids must be in", ValueError, lambda x: x._replace(row_ids=x.row_ids + 7)),
    ("row_ids must be in", ValueError, lambda x: x._replace(row_ids=x.row_ids - 2)),
    ("must be on", ValueError, lambda x: x._replace(up_weight=x.up_weight.to("meta"))),
    ("up_bias must be a torch.Tensor", TypeError, lambda x: x._replace(up_bias=0.5)),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS, ids=[case[0] for case in BAD_CALLS])
def test_bad_calls_name_the_argument(message, error, change):
    """Before anything runs, and the next good call works."""
    inputs = make_inputs(Shape(num_entries=2), torch.float32, norm="layer_norm")
    with pytest.raises(error, match=f"bottleneck: .*{message}"):
        call(change(inputs), norm="layer_norm")
    call(inputs, norm="layer_norm")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "softmax"}, ValueError, "activation must be one of"),
        ({"norm": "batch_norm"}, ValueError, "norm.kind must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        call(make_inputs(Shape(), torch.float32), **options)
    x, down, up = torch.ones(2, 4), torch.ones(2, 4), torch.ones(4, 2)
    with pytest.raises(TypeError, match="norm must be a Norm or None, got str"):
        ops.bottleneck(x, down, up, norm="layer_norm")


def test_named_backend_that_cannot_run_says_why():
    """A named backend never falls back."""
    inputs = make_inputs(Shape(), torch.float64)
    with pytest.raises(ValueError, match="have no fp64"):
        call(inputs, "triton")
    with pytest.raises(ValueError, match="runs on cpu tensors, got meta"):
        call(inputs.map(lambda x: x.to("meta")), "cpp")
