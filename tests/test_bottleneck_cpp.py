"""What is special to the C++ ``bottleneck``: instruction sets, threads, strides, tiles, odd sizes.

The grid over dtypes and shapes that every backend passes is in test_bottleneck.py. A layout, a batch or a number
of threads must not change a bit; an instruction set may, within the budget of tests/support/budget.py.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.bottleneck import Shape, call, eager, make_inputs, run
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import needs_extension

pytestmark = needs_extension

MIXED = Shape(batch=7, q_len=67, hidden=100, size=24, num_entries=3)  # several blocks, runs and strips
ODD_SHAPES = [
    *(Shape(batch=1, q_len=51, hidden=hidden, size=9) for hidden in (1, 7, 15, 17, 97, 260)),
    *(Shape(batch=1, q_len=13, hidden=40, size=size) for size in (2, 8, 16, 23, 40, 65)),
    Shape(batch=1, q_len=2000, hidden=20, size=3),
    Shape(batch=9, q_len=1, hidden=128, size=32, num_entries=4),
    Shape(batch=200, q_len=1, hidden=24, size=6, num_entries=2),
]


def assert_same_results(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert same_bits(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes_are_within_budget(shape, dtype):
    """Sizes that fill no vector, no tile or no strip, long sums, entries with one row and with many."""
    inputs = make_inputs(shape, dtype, norm="layer_norm", residual="x")
    options = {"norm": "layer_norm", "activation": "gelu_tanh"}
    actual, plain, exact = (
        run(inputs, "cpp", **options),
        eager(inputs, dtype, **options),
        eager(inputs, torch.float64, **options),
    )
    for name in actual:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("size", [1, 3, 24, 64, 100])
@pytest.mark.parametrize("hidden", [3, 33, 384, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grid(dtype, hidden, size, norm):
    for batch, q_len, num_entries in ((1, 300, 1), (9, 1, 3), (4, 40, 2)):
        inputs = make_inputs(Shape(batch, q_len, hidden, size, num_entries), dtype, norm=norm, residual="x")
        actual, plain = run(inputs, "cpp", norm=norm), eager(inputs, dtype, norm=norm)
        exact = eager(inputs, torch.float64, norm=norm)
        for name in actual:
            assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", [MIXED, Shape(batch=1, q_len=700, hidden=256, size=16)], ids=str)
def test_threads_do_not_change_a_bit(shape, threads, default_threads):
    """Every element is one sum in a fixed order, whichever thread forms it."""
    inputs = make_inputs(shape, torch.float32, norm="layer_norm", residual="x")
    torch.set_num_threads(1)
    expected = run(inputs, "cpp", norm="layer_norm")
    torch.set_num_threads(threads)
    assert_same_results(run(inputs, "cpp", norm="layer_norm"), expected)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("size", [5, 24, 64])
def test_a_token_has_the_same_bits_in_any_block(size, norm):
    """Decoding one token gives the bits of the same token in a long sequence, wherever it stands in a tile."""
    inputs = make_inputs(Shape(batch=2, q_len=61, hidden=48, size=size), torch.float32, norm=norm)
    whole = run(inputs, "cpp", norm=norm)
    for t in (0, 3, 17, 47, 48, 60):
        for b in (0, 1):
            part = (slice(b, b + 1), slice(t, t + 1))
            token = inputs._replace(
                **{name: getattr(inputs, name)[part] for name in ("x", "residual", "grad_out")}
            )
            alone = run(token, "cpp", norm=norm)
            for name in ("out", "x"):
                assert same_bits(alone[name], whole[name][part]), (name, t)


def test_gradients_of_an_entry_do_not_depend_on_other_rows():
    """The rows of one entry, alone, give the bits of its gradients in a mixed batch."""
    inputs = make_inputs(MIXED, torch.float32)
    mixed = run(inputs, "cpp")
    own = inputs.row_ids == 1
    alone = inputs._replace(
        **{name: getattr(inputs, name)[own] for name in ("x", "residual", "grad_out", "row_ids")}
    )
    results = run(alone, "cpp")
    for name in ("down_weight", "up_weight", "down_bias", "up_bias"):
        assert same_bits(results[name][1], mixed[name][1]), name


def spread(x, dim, step):
    """The values of ``x`` with other strides: every ``step``-th slot of a NaN-filled tensor along ``dim``."""
    sizes = list(x.shape)
    sizes[dim] *= step
    wide = torch.full(sizes, float("nan"), dtype=x.dtype)
    view = wide[tuple(slice(None, None, step) if i == dim else slice(None) for i in range(x.dim()))]
    return view.copy_(x)


LAYOUTS = {
    "step-2-channels": lambda x: spread(x, x.dim() - 1, 2),
    "step-3-rows": lambda x: spread(x, x.dim() - 2, 3),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [32, 37])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(layout, hidden, dtype):
    """Neither strides nor NaN in the memory between the rows."""
    inputs = make_inputs(MIXED._replace(hidden=hidden), dtype, norm="layer_norm")
    changed = inputs.map(LAYOUTS[layout])
    actual = run(changed, "cpp", norm="layer_norm")
    assert_same_results(actual, run(inputs, "cpp", norm="layer_norm"))
    assert actual["out"].stride() == torch.empty_like(changed.x).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_value_survives_a_zero_adapter(dtype):
    """All 65536 bit patterns, NaN payloads too: what is kept is copied, not computed."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1, 64)
    inputs = make_inputs(Shape(1, values.shape[1], 64, 4), dtype)
    inputs = inputs._replace(x=torch.ones_like(values), residual=values, grad_out=values)
    for weights in (inputs.up_weight, inputs.up_bias):
        weights.zero_()
    assert same_bits(run(inputs, "cpp")["out"], values)


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    """Rows of one tensor that lie more than 2^31 elements apart; only the pages in use are ever touched."""
    inputs = make_inputs(Shape(batch=2, q_len=3, hidden=16), torch.bfloat16)
    gap = 2**31 + 64
    memory = torch.empty(2 * gap, dtype=torch.bfloat16)
    far = torch.as_strided(memory, inputs.x.shape, (gap, 16, 1)).copy_(inputs.x)
    assert_same_results(run(inputs._replace(x=far), "cpp"), run(inputs, "cpp"))


@pytest.mark.parametrize("row", [-2, 3])
def test_ids_out_of_range_never_reach_memory(row):
    """The registered op checks again: it can be called without the public function."""
    inputs = make_inputs(Shape(batch=2, num_entries=3), torch.float32)
    ids = torch.tensor([0, row], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"bottleneck: row_ids must be in \[-1, 3\), got {row}"):
        torch.ops.fastadapter.bottleneck(*inputs[:8], ids, "gelu", "none", 0.0, 1.0)


OPTIONS_OF_Z = [
    {"activation": "gelu", "norm": "none"},
    {"activation": "relu", "norm": "layer_norm"},
    {"activation": "identity", "norm": "rms_norm"},
]


def direct(inputs, z, *, activation, norm, needs=(True,) * 4):
    """The registered backward."""
    constants = (activation, norm, 1e-5, 0.7, False)
    return torch.ops.fastadapter.bottleneck_backward(
        inputs.grad_out, *inputs[:4], *inputs[6:9], z, *constants, *needs
    )


def kept(inputs, *, activation, norm):
    """Output and z of the registered forward that keeps it."""
    return torch.ops.fastadapter.bottleneck_saving(*inputs[:9], activation, norm, 1e-5, 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS_OF_Z, ids=str)
@pytest.mark.parametrize("shape", [MIXED, Shape(batch=1, q_len=51, hidden=40, size=9)], ids=str)
def test_kept_z_changes_no_bit(shape, options, dtype, poisoned_memory):
    """Gradients with z from forward and with z computed again, and both forwards, whatever else is needed."""
    inputs = make_inputs(shape, dtype, norm=options["norm"])
    out, z = kept(inputs, **options)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.shape == (*inputs.x.shape[:2], shape.size) and z.is_contiguous()
    plain = torch.ops.fastadapter.bottleneck(*inputs[:9], *options.values(), 1e-5, 0.7)
    assert same_bits(out, plain)
    if inputs.row_ids is not None:
        assert not z[inputs.row_ids == -1].any()
        z[inputs.row_ids == -1] = float("nan")  # is not read
    for needs in (
        (True,) * 4,
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, True),
    ):
        with_z, without = (
            direct(inputs, z, needs=needs, **options),
            direct(inputs, None, needs=needs, **options),
        )
        assert all(same_bits(a, b) for a, b in zip(with_z, without, strict=True))
        assert not any(grad.isnan().any() for grad in with_z)


def test_backward_uses_the_kept_z():
    """It takes what it is given, and autograd gives it what forward kept."""
    inputs = make_inputs(Shape(), torch.float32)
    options = {"activation": "gelu", "norm": "none"}
    z = kept(inputs, **options)[1]
    assert not same_bits(direct(inputs, z + 1, **options)[0], direct(inputs, z, **options)[0])
    x = inputs.x.requires_grad_()
    out = call(inputs._replace(x=x), "cpp")
    assert any(s is not None and same_bits(s, z) for s in out.grad_fn.saved_tensors)
    frozen = call(inputs._replace(x=x), "cpp", activation="identity")  # x alone, and a constant derivative
    assert frozen.grad_fn.saved_tensors[-1] is None
    for name in ("down_weight", "up_weight"):  # either has a gradient through z
        trained = inputs._replace(**{name: getattr(inputs, name).requires_grad_()})
        assert same_bits(call(trained, "cpp", activation="identity").grad_fn.saved_tensors[-1], z)
        getattr(inputs, name).requires_grad_(False)


@pytest.mark.parametrize("hidden", [236, 4096])
def test_long_rows_round_as_in_a_blas(hidden):
    """Products are sums of short chains: one over all columns had several times the error of eager PyTorch."""
    inputs = make_inputs(Shape(batch=1, q_len=64, hidden=hidden, size=64), torch.float32)
    z = kept(inputs, activation="identity", norm="none")[1]
    x, weight, bias = inputs.x, inputs.down_weight, inputs.down_bias[:, None]
    plain = torch.baddbmm(bias, x, weight.mT)
    exact = torch.baddbmm(bias.double(), x.double(), weight.double().mT)
    assert_within_budget(z, plain, exact, "z")


def test_z_of_the_wrong_form_is_named():
    inputs = make_inputs(Shape(), torch.float32)
    options = {"activation": "gelu", "norm": "none"}
    z = kept(inputs, **options)[1]
    for wrong, message in (
        (z[0], "z must have 3 dims, got 2"),
        (z[..., 1:], "z must have size 5 in dim 2, got 4"),
        (z.half(), "z must be what bottleneck_saving returned"),
        (z.transpose(0, 1).contiguous().transpose(0, 1), "z must be what bottleneck_saving returned"),
    ):
        with pytest.raises(RuntimeError, match=f"bottleneck: {message}"):
            direct(inputs, wrong, **options)


def test_opcheck_of_the_saving_forms():
    for shape, dtype in ((Shape(), torch.float32), (Shape(batch=4, num_entries=3), torch.bfloat16)):
        inputs = make_inputs(shape, dtype)
        torch.library.opcheck(
            torch.ops.fastadapter.bottleneck_saving.default, (*inputs[:9], "gelu", "none", 0.0, 0.7)
        )
        z = kept(inputs, activation="gelu", norm="none")[1]
        arguments = (inputs.grad_out, *inputs[:4], *inputs[6:9], z, "gelu", "none", 0.0, 0.7, True)
        torch.library.opcheck(torch.ops.fastadapter.bottleneck_backward.default, (*arguments, *(True,) * 4))


def test_wrong_operands_are_named():
    inputs = make_inputs(Shape(), torch.float32, norm="layer_norm")
    op = torch.ops.fastadapter.bottleneck

    def attempt(message, options=("gelu", "layer_norm", 1e-5, 1.0), **changes):
        with pytest.raises(RuntimeError, match=f"bottleneck: {message}"):
            op(*inputs._replace(**changes)[:8], None, *options)

    attempt("x must have 3 dims, got 2", x=inputs.x[0])
    attempt("down_weight must have size 24 in dim 2, got 23", down_weight=inputs.down_weight[..., 1:])
    attempt("up_weight must have size 5 in dim 2, got 4", up_weight=inputs.up_weight[..., 1:])
    attempt("down_bias must have size 5 in dim 1, got 4", down_bias=inputs.down_bias[:, 1:])
    attempt("residual must have size 7 in dim 1, got 6", residual=inputs.residual[:, 1:])
    attempt("residual must have the dtype of x", residual=inputs.residual.half())
    attempt("norm_weight must have the dtype of x or float32", norm_weight=inputs.norm_weight.half())
    attempt("up_weight, down_bias and up_bias must have the dtype", x=inputs.x.half(), residual=None,
            up_bias=inputs.up_bias.half())  # fmt: skip
    attempt("activation must be one of .* got 'sin'", options=("sin", "layer_norm", 1e-5, 1.0))
    attempt("norm must be one of .* got 'batch'", options=("gelu", "batch", 1e-5, 1.0))
    attempt("norm_weight and norm_bias must be None", options=("gelu", "none", 1e-5, 1.0))


# What this machine can run; PyTorch itself dies when it is asked for more.
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
CAPABILITIES = CAPABILITIES[: CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1]

# Runs in a process of its own: the instruction set is chosen once, when the first op runs.
CAPABILITY_PROGRAM = """
import json, sys, torch
from fastadapter.ops.bottleneck import ACTIVATIONS
from tests.support.budget import assert_within_budget
from tests.support.bottleneck import Shape, eager, make_inputs, run

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in (Shape(), Shape(batch=5, q_len=67, hidden=59, size=17, num_entries=2)):
        for activation in ACTIVATIONS:
            inputs = make_inputs(shape, dtype, norm="layer_norm")
            options = {"activation": activation, "norm": "layer_norm", "scale": 0.5}
            actual, plain, exact = (run(inputs, "cpp", **options), eager(inputs, dtype, **options),
                                    eager(inputs, torch.float64, **options))
            for name in actual:
                label = f"{dtype} {shape} {activation} {name}"
                assert_within_budget(actual[name], plain[name], exact[name], label)
json.dump({"capability": torch.ops.fastadapter.cpu_capability()}, sys.stdout)
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_is_within_budget(capability):
    """ATEN_CPU_CAPABILITY caps what is used, as in PyTorch; every choice keeps the budget."""
    process = subprocess.run(
        [sys.executable, "-c", CAPABILITY_PROGRAM],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["capability"] == capability
