"""The Triton launchers of both attention ops, by the budget of tests/support/budget.py; their public ops: elsewhere.

Without a GPU the kernels run in Triton's interpreter, slowly and in fp32 and fp16 alone. Most tests use tiles of 16,
so that a few dozen positions already make several tiles, masked and unmasked, and several blocks of prefix; one runs
the tiles that are shipped.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import attention, gated_prefix_attention, prefix_attention, target

from fastadapter import reference
from tests.support.attention import GATED, OPERANDS, SAVED, SHARED, Shape, check, eager, make_inputs, packed
from tests.support.budget import assert_within_budget, same_bits
from tests.support.far import far_apart
from tests.support.gated_prefix import device_of, on_device
from tests.support.interpreter import products_by_element

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
KERNELS = {GATED: gated_prefix_attention, SHARED: prefix_attention}
BOTH = pytest.mark.parametrize("op", [GATED, SHARED])
# Tests whose subject both ops share: the second one is for the long run.
EITHER = pytest.mark.parametrize("op", [GATED, pytest.param(SHARED, marks=pytest.mark.slow)])
RATHER_SHARED = pytest.mark.parametrize("op", [SHARED, pytest.param(GATED, marks=pytest.mark.slow)])
# One block of prefix and several, each with one op; the other two for the long run.
CROSSED = pytest.mark.parametrize(
    ("op", "prefix_len"),
    [
        (GATED, 17),
        (SHARED, 5),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in [(GATED, 5), (SHARED, 17)]),
    ],
)
ACTIVATIONS = ("query", "key", "value")
SMALL = attention.Tiles(block_m=16, block_n=16, block_p=16, num_warps=4, num_stages=1)
SHAPES = [
    Shape(batch=1, num_heads=4, num_kv_heads=2, q_len=1, kv_len=3, head_dim=40, prefix_len=1),
    Shape(
        batch=1, num_heads=4, num_kv_heads=1, q_len=17, kv_len=18, head_dim=80, prefix_len=10, mask="causal"
    ),
    Shape(batch=2, num_heads=2, num_kv_heads=1, q_len=7, kv_len=20, head_dim=60, prefix_len=17, mask="float"),
    Shape(
        batch=2, num_heads=1, num_kv_heads=1, q_len=37, kv_len=18, num_prefixes=2, mask="causal", softcap=2.0
    ),
    Shape(batch=1, num_heads=2, num_kv_heads=2, q_len=40, kv_len=40, mask="causal", window=20, prefix_len=40),
    Shape(batch=2, num_heads=2, num_kv_heads=1, q_len=18, kv_len=16, mask="empty", num_prefixes=2),
    packed(5, 0, 17, 18, num_heads=2, num_kv_heads=1, prefix_len=17, num_prefixes=2),
    packed(0, 18, 1, num_heads=2, num_kv_heads=2, mask="causal", window=3, softcap=5.0),
]
# slow: the odd sizes of a whole grid
GRID = [
    Shape(batch=1, num_heads=4, num_kv_heads=2, q_len=q_len, kv_len=kv_len, head_dim=head_dim, prefix_len=prefix_len,
          mask=mask, window=window, softcap=softcap)
    for q_len, kv_len, head_dim, prefix_len, mask, window, softcap in [
        (63, 63, 40, 10, "causal", None, None), (111, 63, 60, 1, "causal", 17, None),
        (63, 111, 80, 40, "", None, 3.0), (111, 111, 16, 17, "causal", 64, 20.0),
        (17, 111, 128, 10, "bool", None, None), (63, 17, 96, 10, "float", None, 2.0),
        (7, 63, 256, 17, "float32", None, None), (111, 7, 1, 40, "causal", 200, None),
        (1, 111, 64, 128, "empty", None, None),
    ]
] + [
    packed(63, 0, 1, 47, 16, head_dim=80, prefix_len=40, num_prefixes=3, mask="causal", window=30),
    packed(0, 0, 111, 17, 0, head_dim=60, prefix_len=17, num_prefixes=2, softcap=4.0),
]  # fmt: skip
BANK = Shape(batch=3, num_heads=2, num_kv_heads=1, q_len=5, kv_len=18, num_prefixes=3)
PACKED = packed(18, 3, 0, 4, num_heads=2, num_kv_heads=1, mask="causal", num_prefixes=3)
SHIPPED = attention.config
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "config", lambda *_: SMALL)


def launch(op, inputs, *, needs=(True, True, True, True), save=True):
    """Output, what is saved, and the gradients by name, from the launchers on this machine's device."""
    inputs = inputs.map(lambda x: on_device(x, DEVICE))
    options = inputs.schema_options(op)
    forward = getattr(KERNELS[op], f"{op}_forward")
    backward = getattr(KERNELS[op], f"{op}_backward")
    out, *kept = forward(*inputs.operands(op), *options, save)
    results = {"out": out, **dict(zip(SAVED[op], kept, strict=True))}
    if save:
        kept = kept if op == GATED else (out, *kept)
        needs = needs if op == GATED else needs[:3]
        grads = backward(inputs.grad_out, *inputs.operands(op), *kept, *options, *needs)
        results |= dict(zip(OPERANDS[op], grads, strict=True))
    return {name: x.cpu() for name, x in results.items()}


def banks(op):
    return OPERANDS[op][3:]


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_within_budget(op, shape):
    inputs = make_inputs(shape, torch.float32)
    check(op, inputs, launch(op, inputs))


@EITHER
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_within_budget(op, dtype):
    inputs = make_inputs(SHAPES[3], dtype)
    actual = launch(op, inputs)
    check(op, inputs, actual)
    assert {actual[name].dtype for name in (*ACTIVATIONS, "prefix_key", "prefix_value")} == {dtype}
    assert {actual[name].dtype for name in SAVED[op] if name != "base"} == {torch.float32}


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_grid(op, shape, dtype):
    inputs = make_inputs(shape, dtype)
    # the gates stay: their slope scales the error of their gradient
    others = [make_inputs(shape, dtype, seed=seed)._replace(gate=inputs.gate) for seed in range(1, 10)]
    check(op, inputs, launch(op, inputs), neighbours=others)


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_tiles(op, dtype, monkeypatch):
    """Not the small ones of the other tests, and for one architecture each those of every route."""
    monkeypatch.setattr(attention, "config", SHIPPED)
    shape = Shape(batch=1, num_heads=1, num_kv_heads=1, q_len=70, kv_len=70, mask="causal", prefix_len=17)
    inputs = make_inputs(shape, dtype)
    with target.assume("sm_90"):
        check(op, inputs, launch(op, inputs))


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16)])
def test_masked_and_unmasked_tiles_meet(block_m, block_n, monkeypatch):
    """Tiles that are not square, so that the diagonal and the window's edge cut them at every offset."""
    monkeypatch.setattr(attention, "config", lambda *_: SMALL._replace(block_m=block_m, block_n=block_n))
    shape = Shape(batch=1, num_heads=1, num_kv_heads=1, q_len=70, kv_len=67, mask="causal", window=41)
    inputs = make_inputs(shape, torch.float32)
    check(SHARED, inputs, launch(SHARED, inputs))


@pytest.mark.parametrize(("op", "prefix_len"), [(GATED, 5), (GATED, 17), (SHARED, 5)])
def test_fp32_prefix_beside_half_activations(op, prefix_len):
    """Judged against eager with fp32 intermediates: the masters' gradients have fp32 accuracy, not half's."""
    shape = BANK._replace(batch=1, prefix_len=prefix_len, num_prefixes=1)
    inputs = make_inputs(shape, torch.float16, prefix_dtype=torch.float32)
    if op == SHARED:  # its delta is of the rounded output, which costs the bank's gradients their last bits
        inputs = inputs._replace(value=inputs.value * 0, prefix_value=inputs.prefix_value[:, :, :1].expand_as(
            inputs.prefix_value).contiguous() * 0 + 1)  # fmt: skip
    actual, plain, exact = (
        launch(op, inputs),
        eager(op, inputs, torch.float32),
        eager(op, inputs, torch.float64),
    )
    assert actual["prefix_key"].dtype == torch.float32
    for name in banks(op):
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("prefix_len", [5, 17])
def test_tiny_gates_keep_half_precision_gradients(prefix_len):
    """f p and dS lie below fp16's normal range here; flushing them would lose dKp and dVp of small gates."""
    shape = Shape(batch=1, num_heads=1, num_kv_heads=1, q_len=40, kv_len=3, prefix_len=prefix_len)
    inputs = make_inputs(shape, torch.float16, gate=2e-5)
    inputs = inputs._replace(grad_out=inputs.grad_out * 64)
    actual, exact = launch(GATED, inputs), eager(GATED, inputs, torch.float64)
    for name in ("prefix_key", "prefix_value"):
        error = (actual[name].double() - exact[name]).abs().max()
        assert error <= exact[name].abs().max() * 2**-8, name


@BOTH
def test_huge_logits(op):
    """Scores of 1e4 in both softmaxes: without the running maximum exp overflows, with a wrong one p vanishes.

    A single key has all the weight, which backward has to find again: a score or an ``lse`` rounded once more is
    off by 1e-3.
    """
    inputs = make_inputs(Shape(q_len=9, mask="causal"), torch.float32)
    inputs = inputs._replace(query=inputs.query * 1e4)
    with products_by_element():
        check(op, inputs, launch(op, inputs))


@EITHER
def test_strided_inputs(op):
    """Same bits from transposed memory with gaps, and an output with the strides of the query."""
    inputs = make_inputs(BANK._replace(mask="float"), torch.float32)
    views = inputs.map(lambda x: strided(x) if x.dim() == 4 else x)
    expected, actual = launch(op, inputs), launch(op, views)
    assert {name for name, value in expected.items() if not same_bits(actual[name], value)} == set()
    like_bshd = inputs._replace(query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2))
    assert launch(op, like_bshd, save=False)["out"].stride() == like_bshd.query.stride()


def strided(x):
    """The values of ``x``, axes 1 and 2 swapped in memory and NaN between the elements."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    return wide.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2].copy_(x)


@CROSSED
def test_rows_and_entries_are_isolated(op, prefix_len):
    """NaN in a row and its bank entry leaves all others the bits that they have without it, alone or not."""
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 2, -1], dtype=torch.int32))
    expected, alone = launch(op, inputs), launch(op, inputs.rows(slice(1, 2)))
    for name in (*ACTIVATIONS, "grad_out"):
        getattr(inputs, name)[0] = float("nan")
    for name in banks(op):
        getattr(inputs, name)[:2] = float("nan")
    actual = launch(op, inputs)
    for name in ("out", "lse", *ACTIVATIONS):
        assert same_bits(actual[name][1:], expected[name][1:]), name
        assert same_bits(alone[name][0], expected[name][1]), name
        assert actual[name][0].isnan().all(), name
    for name in banks(op):
        assert same_bits(actual[name][2], expected[name][2]), name
        assert same_bits(alone[name][2], expected[name][2]), name
        assert actual[name][0].isnan().all() and not actual[name][1].any(), name


@CROSSED
def test_packed_sequences_are_isolated(op, prefix_len):
    """As for rows: a sequence has the bits that it has alone, its entry's gradients too, beside NaN."""
    inputs = make_inputs(PACKED._replace(prefix_len=prefix_len), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 1, 2, 2], dtype=torch.int32))
    alone = launch(op, inputs.sequence(3))
    for name in (*ACTIVATIONS, "grad_out"):
        getattr(inputs, name)[:, :, :18] = float("nan")
    for name in banks(op):
        getattr(inputs, name)[0] = float("nan")
    actual = launch(op, inputs)
    for name in ("out", "lse", *ACTIVATIONS):
        assert same_bits(actual[name][:, :, 21:], alone[name]), name
        assert actual[name][:, :, 18:].isfinite().all(), name
    for name in banks(op):
        assert same_bits(actual[name][2], alone[name][2]), name
        assert actual[name][1].isfinite().all(), name


@RATHER_SHARED
def test_another_id_is_another_result(op):
    """The inverse of isolation: one row's id counts, and for that row alone."""
    inputs = make_inputs(BANK, torch.float32)
    first, second = (
        launch(op, inputs._replace(row_ids=torch.tensor(ids, dtype=torch.int32)))
        for ids in ([0, 1, 2], [0, 1, 0])
    )
    for name in ("out", "query"):
        assert same_bits(first[name][:2], second[name][:2]), name
        assert (first[name][2] != second[name][2]).all(), name
    for name in banks(op):
        assert not second[name][2].any() and first[name][2].any(), name


def test_positions_behind_the_last_sequence_are_zero():
    """Buffers of a fixed size that are not full; their padding may hold anything."""
    inputs = make_inputs(packed(18, 7, num_heads=2, num_kv_heads=1), torch.float32)
    inputs = inputs._replace(cu_seqlens=torch.tensor([0, 3, 18], dtype=torch.int32))
    for name in (*ACTIVATIONS, "grad_out"):
        getattr(inputs, name)[:, :, 18:] = float("nan")
    for op in (GATED, SHARED):
        actual = launch(op, inputs)
        for name in ("out", *ACTIVATIONS):
            assert not actual[name][:, :, 18:].any(), name
            assert actual[name][:, :, :18].isfinite().all(), name
        assert all(actual[name].isfinite().all() for name in banks(op))


@EITHER
def test_no_adapter_is_plain_attention(op):
    """Id -1 has the bits of an attention without prefix, whatever the bank holds, and zero gradients for the bank."""
    inputs = make_inputs(BANK, torch.float32)._replace(row_ids=torch.full((3,), -1, dtype=torch.int32))
    inputs.prefix_key[:] = float("nan")
    actual = launch(op, inputs)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (inputs.query, inputs.key, inputs.value)), enable_gqa=True
    )
    torch.testing.assert_close(actual["out"].double(), plain, rtol=1e-5, atol=1e-6)
    assert not any(actual[name].any() for name in banks(op))
    if op == GATED:
        assert same_bits(actual["out"], actual["base"])
        zero = launch(
            op, inputs._replace(row_ids=torch.tensor([0, 1, 2], dtype=torch.int32), gate=inputs.gate * 0)
        )
        for name in ("out", *ACTIVATIONS):
            assert same_bits(zero[name], actual[name]), name
        assert not zero["prefix_key"].any() and not zero["prefix_value"].any()


@RATHER_SHARED
def test_ids_outside_the_bank_show_as_nan(op):
    """A device cannot raise; it must neither read past the bank nor return something that looks right."""
    inputs = make_inputs(BANK, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 3, -2], dtype=torch.int32))
    actual = launch(op, inputs)
    for name in ("out", "query"):
        assert actual[name][1:].isnan().all(), name
        assert actual[name][0].isfinite().all(), name
    assert all(actual[name].isfinite().all() for name in banks(op))


@pytest.mark.parametrize("prefix_len", [17, pytest.param(5, marks=pytest.mark.slow)])
def test_only_needed_gradients_are_computed(prefix_len):
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len, batch=1, num_prefixes=1), torch.float32)
    full = launch(GATED, inputs)
    for query, key_value, prefix, gate in (
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (1, 0, 1, 1),
    ):
        actual = launch(GATED, inputs, needs=(bool(query), bool(key_value), bool(prefix), bool(gate)))
        wanted = dict(zip(OPERANDS[GATED], (query, key_value, key_value, prefix, prefix, gate)))
        for name, want in wanted.items():
            assert same_bits(actual[name], full[name]) if want else actual[name].shape == (0,), name


@EITHER
def test_nothing_is_saved_unless_asked(op):
    inputs = make_inputs(BANK, torch.float32)
    saved, unsaved = launch(op, inputs), launch(op, inputs, save=False)
    assert same_bits(saved["out"], unsaved["out"])
    assert all(unsaved[name].shape == (0,) for name in SAVED[op])


def test_runs_are_equal_bit_for_bit():
    """Several rows and tiles meet in one slot, and several slots in one bank entry."""
    shape = Shape(batch=3, num_heads=4, num_kv_heads=1, q_len=17, kv_len=3, head_dim=8)
    inputs = make_inputs(shape, torch.float32)
    first, second = launch(GATED, inputs), launch(GATED, inputs)
    check(GATED, inputs, first)
    assert all(same_bits(first[name], second[name]) for name in first)


@EITHER
@pytest.mark.parametrize("axis", [0, 2])
def test_strides_beyond_32_bits(op, axis):
    """Rows and positions whose offsets need 64 bits, forward and backward."""
    inputs = make_inputs(BANK._replace(q_len=3, kv_len=3), torch.float16)
    far = {name: far_apart(getattr(inputs, name), axis) for name in (*ACTIVATIONS, "grad_out")}
    actual, expected = launch(op, inputs._replace(**far)), launch(op, inputs)
    for name in expected:
        assert same_bits(actual[name], expected[name]), name


@EITHER
@pytest.mark.parametrize("change", [{"batch": 0}, {"q_len": 0}], ids=str)
def test_empty_batches(op, change):
    inputs = make_inputs(BANK._replace(num_prefixes=1, **change), torch.float32)
    actual = launch(op, inputs)
    assert actual["out"].shape == inputs.query.shape
    for name in OPERANDS[op]:
        assert actual[name].shape == getattr(inputs, name).shape and not actual[name].any(), name


@RATHER_SHARED
def test_zero_keys(op):
    """The merge of a prefix into another attention runs its backward with no keys at all."""
    for prefix_len in (5, 17):
        inputs = make_inputs(
            Shape(batch=2, kv_len=0, q_len=18, prefix_len=prefix_len, num_prefixes=3), torch.float32
        )
        actual = launch(op, inputs)
        check(op, inputs, actual)
        assert actual["key"].shape == inputs.key.shape


def merge(inputs, base, lse):
    scale = inputs.query.shape[-1] ** -0.5
    args = (base, lse, inputs.query, inputs.prefix_key, inputs.prefix_value, inputs.row_ids)
    out, lse = prefix_attention.prefix_merge_forward(
        *(on_device(x, DEVICE) for x in args), scale, inputs.softcap or 0.0
    )
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_extends_the_softmax_of_its_base(dtype):
    """Against the reference of the merge; a base that saw no key may hold NaN, and id -1 keeps every bit."""
    shape = Shape(num_heads=2, num_kv_heads=1, batch=3, q_len=18, kv_len=3, prefix_len=17, num_prefixes=2)
    inputs = make_inputs(shape._replace(softcap=3.0), dtype)
    inputs = inputs._replace(row_ids=torch.tensor([1, -1, 0], dtype=torch.int32))
    base = strided(inputs.grad_out)
    lse = torch.randn(3, 18, 2).transpose(1, 2)
    lse[:, :, 1] = float("-inf")
    base[:, :, 1] = float("nan")
    base[1, :, 0] = -0.0
    actual = merge(inputs, base, lse)
    plain, exact = (
        reference.prefix_merge(
            base.to(wide), lse.to(statistic), inputs.query.to(wide), inputs.prefix_key.to(wide),
            inputs.prefix_value.to(wide),
            softmax_scale=0.25, softcap=3.0, row_ids=inputs.row_ids, compute_dtype=wide,
        )
        for wide, statistic in ((dtype, torch.float32), (torch.float64, torch.float64))
    )  # fmt: skip
    for name, parts in zip(("out", "lse"), zip(actual, plain, exact)):
        assert_within_budget(*(x[[0, 2]] for x in parts), name)
    assert same_bits(actual[0][1], base[1]) and same_bits(actual[1][1], lse[1])
    assert actual[0].stride() == torch.empty_like(base).stride() and actual[1].is_contiguous()
    outside = merge(inputs._replace(row_ids=torch.tensor([2, 0, -2], dtype=torch.int32)), base, lse)
    assert all(x[[0, 2]].isnan().all() and x[1].isfinite().all() for x in outside)


@BOTH
@pytest.mark.parametrize(
    ("head_dim", "dtype", "error", "message"),
    [
        (8, torch.float64, TypeError, "fp32, bf16 or fp16, got torch.float64"),
        (257, torch.float32, ValueError, "head_dim must be at most 256, got 257"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error(op, head_dim, dtype, error, message):
    inputs = make_inputs(BANK._replace(head_dim=head_dim), dtype)
    with pytest.raises(error, match=rf"{op} \(Triton\): .*{message}"):
        launch(op, inputs)


def test_unknown_gate_function_is_an_error():
    with pytest.raises(ValueError, match="gate_fn must be 'tanh' or 'identity', got 'relu'"):
        launch(GATED, make_inputs(BANK, torch.float32, gate_fn="relu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
@BOTH
def test_bf16_in_the_interpreter_is_refused(op):
    with pytest.raises(TypeError, match="under TRITON_INTERPRET=1"):
        launch(op, make_inputs(BANK, torch.bfloat16))
