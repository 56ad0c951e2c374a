"""``gated_prefix`` on every backend against the fp64 reference, by the budget of tests/support/budget.py.

The gates are random and non-zero unless a test says so: at gate zero only the gate's gradient is non-zero, so such
a test proves nothing about the others.
"""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from fastadapter import ops
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import CPP, GRADS, Shape, device_of, eager, make_inputs, needs_extension, run

BACKENDS = ["reference", CPP, "triton"]
SHAPES = [
    Shape(),
    Shape(q_len=1, prefix_len=10, head_dim=64, num_heads=9, num_kv_heads=3),
    Shape(q_len=63, prefix_len=17, head_dim=40),
    Shape(batch=1, q_len=111, prefix_len=1, head_dim=80, num_heads=2, num_kv_heads=2),
    Shape(batch=5, q_len=9, prefix_len=10, head_dim=60, num_kv_heads=1, num_prefixes=3),
    Shape(batch=3, q_len=5, prefix_len=33, head_dim=128, num_prefixes=2),
]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


@pytest.mark.parametrize("gate_fn", ["tanh", "identity"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_results_are_within_budget(backend, dtype, shape, gate_fn):
    """Output and every gradient, in every dtype."""
    inputs = make_inputs(shape, dtype)
    actual = run(inputs, backend, gate_fn=gate_fn)
    plain, exact = eager(inputs, dtype, gate_fn=gate_fn), eager(inputs, torch.float64, gate_fn=gate_fn)
    for name in ("out", *GRADS):
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_prefix_beside_half_activations(backend, dtype):
    """The masters stay fp32: gradients come back in fp32, the output in the activations' dtype."""
    if dtype not in dtypes_of(backend):
        pytest.skip("not computed by Triton's interpreter")
    inputs = make_inputs(SHAPES[4], dtype, prefix_dtype=torch.float32)
    actual = run(inputs, backend)
    plain, exact = eager(inputs, dtype), eager(inputs, torch.float64)
    assert actual["out"].dtype == dtype and actual["prefix_key"].dtype == torch.float32
    for name in ("out", *GRADS):
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_gate_is_base_bit_for_bit(backend, dtype):
    """Also for negative zeros, and when the prefix holds Inf and NaN; then only the gate gets a gradient."""
    inputs = make_inputs(Shape(batch=4, num_prefixes=2), dtype, gate=0.0)
    inputs.base[:, :, 0] = -0.0
    gate_grad = run(inputs, backend)["gate"]
    assert gate_grad.abs().min() > 0
    inputs.prefix_value[:] = float("inf")
    inputs.prefix_key[:, :, 0] = float("nan")
    results = run(inputs, backend)
    assert same_bits(results["out"], inputs.base)
    for name in ("query", "prefix_key", "prefix_value"):
        assert same_bits(results[name].abs(), torch.zeros_like(results[name])), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_zero_gate_among_others(backend):
    """A head whose gate is zero keeps its bits beside heads that change."""
    inputs = make_inputs(Shape(), torch.float32)
    inputs.gate[0, 1] = 0.0
    out = run(inputs, backend)["out"]
    assert same_bits(out[:, 1], inputs.base[:, 1])
    assert not same_bits(out[:, 0], inputs.base[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_isolated(backend):
    """A row gives the bits it gives alone, whatever its neighbours and the entries they use hold."""
    shape = Shape(batch=6, num_prefixes=3, q_len=5)
    inputs = make_inputs(shape, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([1, 0, -1, 2, 1, 0], dtype=torch.int32))
    row, entry = 4, 1
    single = inputs._replace(
        **{name: getattr(inputs, name)[row : row + 1] for name in ("base", "query", "grad_out")},
        row_ids=inputs.row_ids[row : row + 1],
    )
    alone = run(single, backend)
    poisoned = inputs._replace(
        **{
            name: getattr(inputs, name).clone()
            for name in ("base", "query", "prefix_key", "prefix_value", "grad_out")
        }
    )
    others = inputs.row_ids != entry
    for name in ("base", "query", "grad_out"):
        getattr(poisoned, name)[others] = float("nan")
    for name in ("prefix_key", "prefix_value"):
        getattr(poisoned, name)[[0, 2]] = float("nan")
    mixed, clean = run(poisoned, backend), run(inputs, backend)
    assert same_bits(mixed["out"][row], alone["out"][0]) and same_bits(mixed["query"][row], alone["query"][0])
    for name in ("prefix_key", "prefix_value", "gate"):
        assert same_bits(mixed[name][entry], clean[name][entry]), name
    # and the inverse: another id must give another result
    swapped = inputs._replace(row_ids=inputs.row_ids.clone())
    swapped.row_ids[row] = 2
    assert not same_bits(run(swapped, backend)["out"][row], clean["out"][row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_an_adapter(backend):
    """Id -1 leaves the base as it is and sends no gradient anywhere."""
    inputs = make_inputs(Shape(num_prefixes=2), torch.float32)
    inputs = inputs._replace(row_ids=torch.full_like(inputs.row_ids, -1))
    results = run(inputs, backend)
    assert same_bits(results["out"], inputs.base)
    for name in ("query", "prefix_key", "prefix_value", "gate"):
        assert same_bits(results[name].abs(), torch.zeros_like(results[name])), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_no_row_uses(backend):
    """They get zeros, and the others what a bank without the unused ones gives them."""
    inputs = make_inputs(Shape(batch=3, num_prefixes=4), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([3, 1, 3], dtype=torch.int32))
    used, bank = [1, 3], ("prefix_key", "prefix_value", "gate")
    fewer = inputs._replace(
        **{name: getattr(inputs, name)[used] for name in bank},
        row_ids=torch.tensor([1, 0, 1], dtype=torch.int32),
    )
    results, expected = run(inputs, backend), run(fewer, backend)
    for name in ("out", "query"):
        assert same_bits(results[name], expected[name]), name
    for name in bank:
        assert same_bits(results[name][used], expected[name]), name
        assert same_bits(results[name][[0, 2]], torch.zeros_like(expected[name])), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """Transposed, sliced, step-2, expanded and unaligned inputs give what their copies give; out is strided as base."""
    shape = Shape(head_dim=16, q_len=6)
    inputs = make_inputs(shape, torch.float32)

    def transposed(x):  # (batch, seq, heads, head_dim) in memory, what models hold
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_other(x):
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]

    def unaligned(x):
        storage = torch.full((x.numel() + 1,), float("nan"))
        storage[1:] = x.reshape(-1)
        return storage[1:].view_as(x)

    expected = run(inputs, backend)
    names = (*GRADS[:4], "grad_out")
    for change, some in itertools.product(
        (transposed, every_other, unaligned), (names, names[::2], names[1::2])
    ):
        changed = inputs._replace(**{name: change(getattr(inputs, name)) for name in some})
        actual = run(changed, backend)
        for name in ("out", *GRADS):
            # not bitwise: the matrix products of the reference round by alignment
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    base = transposed(inputs.base)
    assert run(inputs._replace(base=base), backend)["out"].stride() == base.stride()
    one_head = inputs._replace(
        prefix_key=inputs.prefix_key[:, :1].expand_as(inputs.prefix_key),
        prefix_value=inputs.prefix_value[:, :1].expand_as(inputs.prefix_value),
    )
    copied = one_head._replace(
        prefix_key=one_head.prefix_key.contiguous(), prefix_value=one_head.prefix_value.contiguous()
    )
    torch.testing.assert_close(run(one_head, backend)["out"], run(copied, backend)["out"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape(batch=0), Shape(q_len=0), Shape(batch=0, num_prefixes=1)], ids=str)
def test_empty_inputs(backend, shape):
    """No rows or no tokens: empty output, zero gradients for the prefix."""
    results = run(make_inputs(shape, torch.float32), backend)
    assert results["out"].numel() == 0
    assert results["prefix_key"].abs().max() == 0 and results["gate"].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Scores of 1e4 neither overflow nor leave the budget."""
    inputs = make_inputs(Shape(q_len=9), torch.float32)
    inputs = inputs._replace(query=inputs.query * 1e4)
    actual = run(inputs, backend)
    plain, exact = eager(inputs, torch.float32), eager(inputs, torch.float64)
    for name in ("out", "prefix_value", "gate"):
        assert torch.isfinite(actual[name]).all()
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_properties_of_the_softmax(backend):
    """The order of the prefix does not matter, and equal values come through whole: probabilities sum to one."""
    inputs = make_inputs(Shape(prefix_len=7), torch.float32)
    order = torch.randperm(7)
    shuffled = inputs._replace(
        prefix_key=inputs.prefix_key[:, :, order], prefix_value=inputs.prefix_value[:, :, order]
    )
    torch.testing.assert_close(run(inputs, backend)["out"], run(shuffled, backend)["out"])
    constant = inputs._replace(prefix_value=torch.ones_like(inputs.prefix_value))
    expected = inputs.base + inputs.gate.tanh()[:, :, None, None]
    torch.testing.assert_close(run(constant, backend)["out"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    """Bitwise equal from run to run, forward and backward."""
    interpreted = backend == "triton" and device_of(backend) == "cpu"  # nothing runs side by side there
    shape = Shape(batch=4 if interpreted else 8, q_len=33, num_prefixes=3)
    inputs = make_inputs(shape, torch.float32)
    first = run(inputs, backend)
    for _ in range(2 if interpreted else 50):
        again = run(inputs, backend)
        assert all(same_bits(again[name], first[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "frozen", [GRADS[:2], GRADS[2:4], GRADS[:4], ("gate",), ("query",), ("prefix_value",)], ids=str
)
def test_frozen_inputs_get_no_gradient(backend, frozen):
    """And the others get the same bits as when all are trained."""
    inputs = make_inputs(Shape(batch=3, num_prefixes=2), torch.float32)
    everything, some = run(inputs, backend), run(inputs, backend, frozen=frozen)
    for name in GRADS:
        assert some[name] is None if name in frozen else same_bits(some[name], everything[name]), name


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("gate_fn", ["tanh", "identity"])
def test_gradcheck(backend, gate_fn):
    """Finite differences in fp64, GQA and a bank included; backward may not vary at all."""
    shape = Shape(batch=3, num_heads=2, num_kv_heads=1, q_len=2, head_dim=3, prefix_len=2, num_prefixes=2)
    inputs = make_inputs(shape, torch.float64)
    leaves = [x.requires_grad_() for x in inputs[:5]]
    assert gradcheck(
        lambda *args: ops.gated_prefix(*args, row_ids=inputs.row_ids, gate_fn=gate_fn, backend=backend),
        leaves,
        nondet_tol=0.0,
    )


def sample_operands():
    for shape, dtype in (
        (Shape(), torch.float32),
        (Shape(batch=4, num_prefixes=3), torch.bfloat16),
        (Shape(q_len=1, num_kv_heads=4), torch.float32),
    ):
        inputs = make_inputs(shape, dtype)
        yield inputs._replace(base=inputs.base.transpose(1, 2).contiguous().transpose(1, 2))


def test_opcheck():
    """Schema, fake and dispatch of both registered ops."""
    namespace = torch.ops.fastadapter
    for inputs in sample_operands():
        operands = (*inputs[1:5], inputs.row_ids, 0.25, "tanh")
        torch.library.opcheck(namespace.gated_prefix.default, (inputs.base, *operands))
        for needs in ((True, True, True), (False, True, False)):
            arguments = (inputs.grad_out, *operands, *needs)
            torch.library.opcheck(namespace.gated_prefix_backward.default, arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_into_one_graph(backend):
    """``torch.compile(fullgraph=True)``, forward and backward, with another length after the first."""

    def term(*args):
        return ops.gated_prefix(*args, backend=backend) * 2

    compiled = torch.compile(term, fullgraph=True, backend="aot_eager", dynamic=backend == "auto")
    for q_len in (7, 12) if backend == "auto" else (7,):
        inputs = make_inputs(Shape(q_len=q_len), torch.float32)
        results = []
        for function in (term, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs[:5]]
            out = function(*leaves)
            out.backward(inputs.grad_out)
            results.append([out, *(leaf.grad for leaf in leaves)])
        for plain, traced in zip(*results):
            torch.testing.assert_close(traced, plain)


def test_second_backward_is_refused():
    """Double backward is not supported and says so, rather than returning zeros."""
    inputs = make_inputs(Shape(), torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:5]]
    (grad,) = torch.autograd.grad(ops.gated_prefix(*leaves).square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_are_not_changed():
    inputs = make_inputs(Shape(num_prefixes=2), torch.float32)
    before = [x.clone() for x in inputs]
    run(inputs)
    assert all(same_bits(a, b) for a, b in zip(inputs, before))


def test_input_changed_before_backward_is_noticed():
    """torch's own version check sees a saved input that was overwritten."""
    inputs = make_inputs(Shape(), torch.float32)
    key = inputs.prefix_key.clone().requires_grad_()
    copy = key * 1
    out = ops.gated_prefix(inputs.base, inputs.query, copy, inputs.prefix_value, inputs.gate)
    copy.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


BAD_CALLS = [
    ("query must have 4 dims", ValueError, lambda x: x._replace(query=x.query[0])),
    ("base must be", ValueError, lambda x: x._replace(base=x.base[:, :, 1:])),
    ("base must be torch.float32", TypeError, lambda x: x._replace(base=x.base.half())),
    ("query must be", TypeError, lambda x: x._replace(query=x.query.int())),
    ("prefix_key must have 4 dims", ValueError, lambda x: x._replace(prefix_key=x.prefix_key[0])),
    ("prefix_key must have head_dim 16", ValueError, lambda x: x._replace(prefix_key=x.prefix_key[..., :8])),
    ("prefix_key must be torch.float32", TypeError, lambda x: x._replace(prefix_key=x.prefix_key.half())),
    ("prefix_value must be", ValueError, lambda x: x._replace(prefix_value=x.prefix_value[:, :, 1:])),
    (
        "prefix_value must be torch.float32",
        TypeError,
        lambda x: x._replace(prefix_value=x.prefix_value.half()),
    ),
    ("multiple of num_kv_heads", ValueError, lambda x: x._replace(query=x.query[:, :3], base=x.base[:, :3])),
    (
        "prefix_len and head_dim must be at least 1",
        ValueError,
        lambda x: x._replace(prefix_key=x.prefix_key[:, :, :0], prefix_value=x.prefix_value[:, :, :0]),
    ),
    ("gate must be", ValueError, lambda x: x._replace(gate=x.gate[:, :1])),
    ("gate must be torch.float32", TypeError, lambda x: x._replace(gate=x.gate.half())),
    ("needs row_ids", ValueError, lambda x: x._replace(row_ids=None)),
    ("row_ids must be torch.int32", TypeError, lambda x: x._replace(row_ids=x.row_ids.float())),
    ("row_ids must be", ValueError, lambda x: x._replace(row_ids=x.row_ids[:1])),
    ("row_ids must be in", ValueError, lambda x: x._replace(row_ids=torch.tensor([0, 2], dtype=torch.int32))),
    (
        "row_ids must be in",
        ValueError,
        lambda x: x._replace(row_ids=torch.tensor([-2, 0], dtype=torch.int32)),
    ),
    ("must be on", ValueError, lambda x: x._replace(gate=x.gate.to("meta"))),
    ("must be a torch.Tensor", TypeError, lambda x: x._replace(gate=0.5)),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD_CALLS, ids=[case[0] for case in BAD_CALLS])
def test_bad_calls_name_the_argument(message, error, change):
    """Before anything runs, and the next good call works."""
    inputs = make_inputs(Shape(num_prefixes=2), torch.float32)
    with pytest.raises(error, match=message):
        bad = change(inputs)
        ops.gated_prefix(*bad[:5], row_ids=bad.row_ids)
    ops.gated_prefix(*inputs[:5], row_ids=inputs.row_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_fn": "relu"}, "gate_fn must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_options(options, message):
    inputs = make_inputs(Shape(), torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.gated_prefix(*inputs[:5], **options)


def test_named_backend_that_cannot_run_says_why():
    """A named backend never falls back."""
    inputs = make_inputs(Shape(), torch.float64)
    with pytest.raises(ValueError, match="have no fp64"):
        ops.gated_prefix(*inputs[:5], backend="triton")
    meta = [x.to("meta") for x in inputs[:5]]
    with pytest.raises(ValueError, match="runs on cpu tensors, got meta"):
        ops.gated_prefix(*meta, backend="cpp")
