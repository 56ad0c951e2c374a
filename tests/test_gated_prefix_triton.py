"""The Triton launchers themselves, by the budget of tests/support/budget.py; what the public op adds is tested there.

Without a GPU the kernels run in Triton's interpreter, which multiplies bf16 wrongly: fp32 and fp16 there, bf16 too
on a GPU. Gates are random and non-zero unless a test says so.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import gated_prefix as kernels
from fastadapter.kernels import prefix_term, prefix_term_backward, prefix_tiles, target
from fastadapter.kernels.launch import forget

from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import Inputs, Shape, device_of, eager, make_inputs, on_device

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
GRADS = ("query", "prefix_key", "prefix_value", "gate")
SHAPES = [
    Shape(batch=1, num_heads=2, num_kv_heads=2, q_len=1, head_dim=40, prefix_len=1),
    Shape(batch=1, num_heads=3, num_kv_heads=1, q_len=63, head_dim=64, prefix_len=10),
    Shape(batch=2, num_heads=4, num_kv_heads=1, q_len=7, head_dim=60, prefix_len=17),
    Shape(batch=1, num_heads=1, num_kv_heads=1, q_len=111, head_dim=80, prefix_len=10),
    Shape(batch=1, num_heads=2, num_kv_heads=1, q_len=5, head_dim=128, prefix_len=100),
    Shape(batch=1, num_heads=4, num_kv_heads=2, q_len=3, head_dim=200, prefix_len=9),
    Shape(batch=5, num_heads=2, num_kv_heads=1, q_len=9, head_dim=16, prefix_len=10, num_prefixes=3),
    Shape(batch=3, num_heads=2, num_kv_heads=2, q_len=17, head_dim=1, prefix_len=40, num_prefixes=2),
]
BANK = Shape(batch=4, num_heads=2, num_kv_heads=1, q_len=5, head_dim=16, prefix_len=5, num_prefixes=3)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def launch(inputs, *, gate_fn="tanh", softmax_scale=None, needs=(True, True, True)):
    """Output and gradients by name, from the launchers on this machine's device."""
    base, *operands, grad_out = (on_device(x, DEVICE) for x in inputs)
    constants = (softmax_scale or inputs.query.shape[-1] ** -0.5, gate_fn)
    out = kernels.gated_prefix_forward(base, *operands, *constants)
    grads = kernels.gated_prefix_backward(grad_out, *operands, *constants, *needs)
    return {name: x.cpu() for name, x in zip(("out", *GRADS), (out, *grads))}


def check(inputs, actual, **options):
    plain = eager(inputs, inputs.query.dtype, **options)
    exact = eager(inputs, torch.float64, **options)
    for name in ("out", *GRADS):
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_within_budget(dtype, shape):
    inputs = make_inputs(shape, dtype)
    actual = launch(inputs)
    check(inputs, actual)
    assert [actual[name].dtype for name in GRADS] == [dtype, dtype, dtype, torch.float32]


@pytest.mark.parametrize("prefix_len", [5, 17])
def test_fp32_prefix_beside_half_activations(prefix_len):
    """Computed as under autocast, with the masters rounded; their gradients are sums in fp32 and stay that."""
    shape = Shape(batch=2, num_heads=2, num_kv_heads=1, q_len=5, head_dim=16, prefix_len=prefix_len)
    inputs = make_inputs(shape, torch.float16, prefix_dtype=torch.float32)
    actual = launch(inputs)
    check(inputs, actual)
    assert actual["out"].dtype == torch.float16 and actual["prefix_key"].dtype == torch.float32


@pytest.mark.parametrize("gate", [1e-6, 1e-3, 0.62, 0.63, 3.0, -0.4])
def test_gate_factor_is_accurate_over_its_range(gate):
    """Zero-init gates start tiny, where tanh by the exponential has no digit left."""
    inputs = make_inputs(Shape(num_heads=2, num_kv_heads=1, head_dim=16), torch.float32, gate=gate)
    check(inputs, launch(inputs))


def test_tiny_gates_keep_half_precision_gradients():
    """f p and dS lie below fp16's normal range here; flushing them would lose dKp and dVp of small gates."""
    inputs = make_inputs(Shape(batch=1, num_heads=1, num_kv_heads=1, q_len=40), torch.float16, gate=2e-5)
    inputs = inputs._replace(grad_out=inputs.grad_out * 64)
    actual, exact = launch(inputs), eager(inputs, torch.float64)
    for name in ("prefix_key", "prefix_value"):
        error = (actual[name].double() - exact[name]).abs().max()
        assert error <= exact[name].abs().max() * 2**-8, name


@pytest.mark.parametrize("prefix_len", [10, 40, 150])
@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_every_table_has_results_within_budget(arch, prefix_len):
    """Runs over tiles and heads; base in any layout, and a prefix of one block and of several."""
    shape = Shape(batch=1, num_heads=4, num_kv_heads=2, q_len=37, head_dim=40, prefix_len=prefix_len)
    inputs = make_inputs(shape, torch.float16)
    bshd = inputs._replace(base=inputs.base.transpose(1, 2).contiguous().transpose(1, 2))
    with target.assume(arch):
        out, again = (
            kernels.gated_prefix_forward(*(on_device(x, DEVICE) for x in case[:6]), 0.2, "tanh").cpu()
            for case in (inputs, bshd)
        )
    assert same_bits(again, out) and again.stride() == bshd.base.stride()
    plain, exact = (eager(inputs, dtype, softmax_scale=0.2) for dtype in (torch.float16, torch.float64))
    assert_within_budget(out, plain["out"], exact["out"], "out")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_tiles_stay_clear_of_wgmma(arch):
    """Fewer than 64 rows in every product whose left operand comes from registers; backward agrees on its rows."""
    for dtype in prefix_tiles.DTYPES:
        for head_dim in (1, 64, 96, 128, 256):
            for prefix_len, q_len in [(1, 1), (16, 512), (17, 512), (64, 1), (128, 512), (1000, 512)]:
                forward, merge, *backward = (
                    prefix_tiles.config(arch, head_dim, prefix_len, dtype, launch, q_len)
                    for launch in ("forward", "merge", "backward", "backward-query", "backward-prefix")
                )
                assert 16 <= forward.block_m < 64 and 16 <= merge.block_m < 64
                assert {x.block_m for x in backward} == {16}
                assert all(x.block_p < 64 for x in backward) and backward[1].block_p and backward[2].block_p


def test_identity_gate_and_scale():
    inputs = make_inputs(BANK, torch.float32)
    options = {"gate_fn": "identity", "softmax_scale": 0.7}
    check(inputs, launch(inputs, **options), **options)


def strided(x):
    """The values of ``x`` with other strides: axes 1 and 2 swapped in memory, every second innermost element."""
    if x is None or x.dim() < 4:
        return x
    wide = (
        torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype).transpose(1, 2).contiguous()
    )
    return wide.transpose(1, 2)[..., ::2].copy_(x)


def test_strided_inputs():
    inputs = make_inputs(BANK, torch.float32)
    views = Inputs(*(strided(x) for x in inputs))
    views = views._replace(gate=inputs.gate.t().contiguous().t())
    expected, actual = launch(inputs), launch(views)
    for name, value in expected.items():
        assert same_bits(actual[name], value), name
    like_bshd = inputs.base.transpose(1, 2).contiguous().transpose(1, 2)
    assert kernels.gated_prefix_forward(
        *(on_device(x, DEVICE) for x in (like_bshd, *inputs[1:6])), 0.25, "tanh"
    ).stride() == like_bshd.stride()  # fmt: skip
    expanded = inputs._replace(grad_out=inputs.grad_out[:1, :1].expand_as(inputs.grad_out))
    check(expanded, launch(expanded))


@pytest.mark.parametrize("prefix_len", [5, 17])
@pytest.mark.parametrize("poisoned_rows", [[0], [1, 2]], ids=str)
def test_rows_and_entries_are_isolated(poisoned_rows, prefix_len):
    """NaN in some rows and in their bank entries leaves every other row and entry with the same bits."""
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 1, 1, 2], dtype=torch.int32))
    expected = launch(inputs)
    entries = sorted({int(inputs.row_ids[row]) for row in poisoned_rows})
    for name in ("base", "query", "grad_out"):
        getattr(inputs, name)[poisoned_rows] = float("nan")
    for name in ("prefix_key", "prefix_value", "gate"):
        getattr(inputs, name)[entries] = float("nan")
    actual = launch(inputs)
    rows = [row for row in range(4) if row not in poisoned_rows]
    others = [entry for entry in range(3) if entry not in entries]
    for name in ("out", "query"):
        assert same_bits(actual[name][rows], expected[name][rows]), name
    for name in ("prefix_key", "prefix_value", "gate"):
        assert same_bits(actual[name][others], expected[name][others]), name
        assert actual[name][entries].isnan().all(), name


def test_a_row_in_a_batch_has_the_bits_it_has_alone():
    """Also its gradients: how a row is cut into slots does not depend on the batch."""
    shape = BANK._replace(batch=2, q_len=260, num_heads=1, prefix_len=3)
    inputs = make_inputs(shape, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([2, 0], dtype=torch.int32))
    batch = launch(inputs)
    check(inputs, batch)  # several slots to a row
    alone = launch(
        Inputs(*(x[:1] for x in inputs[:2]), *inputs[2:5], inputs.row_ids[:1], inputs.grad_out[:1])
    )
    for name in ("out", "query"):
        assert same_bits(alone[name][0], batch[name][0]), name
    for name in ("prefix_key", "prefix_value", "gate"):
        assert same_bits(alone[name][2], batch[name][2]), name


def test_rows_without_an_adapter():
    """-1 copies base, also -0.0 and NaN, whatever the bank holds; a bank entry that no row uses gets zeros."""
    inputs = make_inputs(BANK, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([-1, 1, -1, 1], dtype=torch.int32))
    inputs.base[0, :, 0] = -0.0
    inputs.base[2, :, 1] = float("nan")
    inputs.prefix_key[0] = float("nan")
    inputs.query[0] = float("nan")
    actual = launch(inputs)
    assert same_bits(actual["out"][[0, 2]], inputs.base[[0, 2]])
    assert not actual["query"][[0, 2]].any()
    for name in ("prefix_key", "prefix_value", "gate"):
        assert not actual[name][[0, 2]].any(), name
        assert actual[name][1].abs().min() > 0, name


def test_ids_outside_the_bank_show_as_nan():
    """A device cannot raise; it must neither read past the bank nor return something that looks right."""
    inputs = make_inputs(BANK, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 3, -2, 2**31 - 1], dtype=torch.int32))
    actual = launch(inputs)
    for name in ("out", "query"):
        assert actual[name][1:].isnan().all(), name
        assert actual[name][0].isfinite().all(), name
    assert all(actual[name].isfinite().all() for name in ("prefix_key", "prefix_value", "gate"))


@pytest.mark.parametrize("prefix_len", [5, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gate(dtype, prefix_len):
    """Base bit for bit and exactly zero gradients though the prefix holds Inf; the gate keeps its own gradient."""
    inputs = make_inputs(BANK._replace(num_prefixes=1, prefix_len=prefix_len), dtype, gate=0.0)
    inputs.base[:, :, 0] = -0.0
    check(inputs, launch(inputs))
    assert launch(inputs)["gate"].abs().min() > 0
    inputs.prefix_key[..., 0], inputs.prefix_value[..., 0] = float("inf"), float("nan")
    actual = launch(inputs)
    assert same_bits(actual["out"], inputs.base)
    for name in ("query", "prefix_key", "prefix_value"):
        assert not actual[name].any(), name


def test_minus_inf_score_is_a_zero_probability():
    """A prefix position that no query attends to contributes nothing, also from the padded query positions."""
    inputs = make_inputs(BANK._replace(num_prefixes=1), torch.float32)
    inputs.query[..., 0] = 1.0
    inputs.prefix_key[:, :, 2, 0] = float("-inf")
    actual = launch(inputs)
    exact = eager(inputs, torch.float64)
    torch.testing.assert_close(actual["out"].double(), exact["out"], rtol=1e-5, atol=1e-6)
    assert actual["prefix_key"].isfinite().all() and actual["prefix_value"].isfinite().all()
    assert not actual["prefix_value"][:, :, 2].any()


def test_strides_beyond_32_bits():
    """Rows more than 2^31 elements apart; pages that are never touched cost nothing."""
    inputs = make_inputs(BANK._replace(batch=2, num_prefixes=1), torch.float16)
    expected = launch(inputs)
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty(2**31 + 2**16, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    query = far.as_strided(inputs.query.shape, (2**31, *inputs.query.stride()[1:])).copy_(inputs.query)
    actual = launch(inputs._replace(query=query))
    for name in ("out", "prefix_key"):
        assert same_bits(actual[name], expected[name]), name


@pytest.mark.parametrize("shape", [BANK._replace(batch=0), BANK._replace(q_len=0)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_empty_batches(shape, shared):
    inputs = make_inputs(shape._replace(num_prefixes=1) if shared else shape, torch.float32)
    inputs = inputs if shared else inputs._replace(row_ids=torch.zeros(shape.batch, dtype=torch.int32))
    actual = launch(inputs)
    assert actual["out"].shape == inputs.base.shape and actual["query"].shape == inputs.query.shape
    for name in ("prefix_key", "prefix_value", "gate"):
        assert actual[name].shape == getattr(inputs, name).shape and not actual[name].any(), name


@pytest.mark.parametrize("prefix_len", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_base_is_added(dtype, prefix_len):
    """Its part of the gradient of query, of any strides; the other gradients keep their bits."""
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len), dtype)
    inputs = inputs._replace(row_ids=torch.tensor([-1, 0, 2, 1], dtype=torch.int32))
    _, *operands, grad_out = (on_device(x, DEVICE) for x in inputs)
    base_grad = make_inputs(BANK, dtype, seed=1).base
    moved, constants = on_device(strided(base_grad), DEVICE), (0.25, "tanh", True, True, True)
    found = kernels.gated_prefix_backward_onto(grad_out, moved, *operands, *constants)
    alone = kernels.gated_prefix_backward(grad_out, *operands, *constants)
    assert same_bits(found[0][0].cpu(), base_grad[0])
    plain, exact = (eager(inputs, x, softmax_scale=0.25)["query"] for x in (dtype, torch.float64))
    assert_within_budget(found[0].cpu(), plain + base_grad, exact + base_grad.double(), "query")
    assert all(same_bits(one.cpu(), other.cpu()) for one, other in zip(found[1:], alone[1:], strict=True))


@pytest.mark.parametrize("prefix_len", [5, 40])
@pytest.mark.parametrize("by_row", [True, False])
def test_the_same_kernels_run_whichever_gradients_are_asked_for(prefix_len, by_row, monkeypatch):
    """On a GPU a kernel compiled without one of the gradients contracted other multiply-adds, and rounded elsewhere.

    The interpreter compiles nothing, so what a kernel would be compiled for is compared: all of its arguments but
    lengths, which are given at run time.
    """
    seen = []

    class Watched(prefix_term_backward.Launch):
        def __init__(self, kernel, grid, tensors, constants):
            super().__init__(kernel, grid, tensors, constants)
            module = prefix_term_backward
            lengths = {*prefix_tiles.LENGTHS, *module.RUN_LENGTHS, *module.REDUCE_LENGTHS}
            compiled_for = {name: value for name, value in constants.items() if name not in lengths}
            seen.append((kernel.__name__, tensors, compiled_for))

    monkeypatch.setattr(prefix_term_backward, "Launch", Watched)
    forget()  # on a GPU launches of a layout are kept
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len), torch.float16)
    if not by_row:
        inputs = inputs._replace(row_ids=None, **{name: getattr(inputs, name)[:1] for name in GRADS[1:]})
    launch(inputs)
    everything = list(seen)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        seen.clear()
        launch(inputs, needs=needs)
        assert seen and all(each in everything for each in seen), needs


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("prefix_len", [5, 17])
def test_only_needed_gradients_are_computed(needs, prefix_len):
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len, batch=2), torch.float32)
    full = launch(inputs)
    actual = launch(inputs, needs=tuple(map(bool, needs)))
    wanted = dict(zip(GRADS, (needs[0], needs[1], needs[1], needs[2])))
    for name, needed in wanted.items():
        expected = full[name] if needed else torch.empty(0, dtype=full[name].dtype)
        assert same_bits(actual[name], expected), name


def test_shared_prefix_over_a_large_batch():
    """More tiles than the programs of a shared prefix: several tiles and rows fall into one slot."""
    inputs = make_inputs(Shape(batch=9, num_heads=2, num_kv_heads=1, q_len=17, head_dim=8), torch.float32)
    slots = 3 * prefix_tiles.PROCESSORS["sm_90"] // 2
    assert prefix_term_backward._tiles_per_slot("sm_90", 3, 10**6, 4, 2, by_row=False) * slots >= 10**6
    assert (
        prefix_term._tiles_per_run("sm_90", 8, 2, 10**6) * 8 * prefix_tiles.PROCESSORS["sm_90"] >= 2 * 10**6
    )
    actual = launch(inputs)
    check(inputs, actual)
    again = launch(inputs)
    assert all(same_bits(actual[name], again[name]) for name in actual)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "fp32, bf16 or fp16, got torch.float64"),
        ({"head_dim": 257}, ValueError, "head_dim must be at most 256, got 257"),
        ({"gate_fn": "relu"}, ValueError, "gate_fn must be 'tanh' or 'identity', got 'relu'"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error(change, error, message):
    inputs = make_inputs(
        BANK._replace(head_dim=change.get("head_dim", 8)), change.get("dtype", torch.float32)
    )
    with pytest.raises(error, match=message):
        launch(inputs, gate_fn=change.get("gate_fn", "tanh"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
def test_bf16_in_the_interpreter_is_refused():
    with pytest.raises(TypeError, match="under TRITON_INTERPRET=1"):
        launch(make_inputs(BANK, torch.bfloat16))
