"""What ``gated_prefix_attention`` and ``prefix_attention`` promise alike, on every backend.

Results are judged against the fp64 reference by the budget of tests/support/budget.py; the reference itself against an
independent formulation (below: masks built pair by pair, autograd of plain PyTorch in fp64) and finite differences.
Gates are random and non-zero. A backend without kernels of an op is skipped by name.
"""

import contextlib
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from fastadapter import ops
from tests.support.attention import (
    GATED,
    OPERANDS,
    SHARED,
    Shape,
    backends_of,
    check,
    dtypes_of,
    make_inputs,
    packed,
    run,
)
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import device_of
from tests.support.interpreter import products_by_element

OPS = [GATED, SHARED]
SHAPES = [
    Shape(mask="causal", num_prefixes=2, batch=3),
    Shape(q_len=1, kv_len=33, prefix_len=10, head_dim=64, num_heads=9, num_kv_heads=3, num_prefixes=2),
    packed(3, 0, 5, 1, mask="causal", num_prefixes=2, window=2),
    Shape(mask="float", softcap=2.0, prefix_len=17),
    Shape(mask="bool", num_kv_heads=4, head_dim=40),
    Shape(mask="float32", q_len=33, kv_len=17, head_dim=80, num_kv_heads=1),
    Shape(mask="causal", window=5, softcap=3.0, q_len=40, kv_len=40, head_dim=60),
    Shape(mask="causal", q_len=12, kv_len=5),
    Shape(mask="causal", q_len=5, kv_len=12, prefix_len=1),
    Shape(mask="empty", num_prefixes=3, batch=4),
    Shape(batch=1, q_len=65, kv_len=70, head_dim=128, prefix_len=33),
    packed(17, 9),
]
FEW = 5  # of the shapes are computed in Triton's interpreter by default, in fp32
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def cases():
    """``op, backend, shape, dtype``; Triton's interpreter takes few of them, a slow run takes all."""
    for op in OPS:
        for parameter in backends_of(op, interpreted=None):
            (backend,) = parameter.values
            interpreted = backend == "triton" and device_of(backend) == "cpu"
            for number, shape in enumerate(SHAPES):
                for dtype in dtypes_of(backend):
                    quick = number < FEW and dtype == torch.float32
                    late = [pytest.mark.slow] if interpreted and not quick else []
                    label = f"{op}-{backend}-{shape}-{str(dtype).removeprefix('torch.')}"
                    yield pytest.param(op, backend, shape, dtype, marks=[*parameter.marks, *late], id=label)


on_every_backend = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, *parameter.values, marks=parameter.marks, id=f"{op}-{parameter.values[0]}")
        for op in OPS
        for parameter in backends_of(op)
    ],
)
of_both = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize(("op", "backend", "shape", "dtype"), list(cases()))
def test_results_are_within_budget(op, backend, shape, dtype):
    """Output, lse and every gradient."""
    inputs = make_inputs(shape, dtype)
    check(op, inputs, run(op, inputs, backend))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_prefix_beside_half_activations(op, backend, dtype):
    """The masters stay fp32: their gradients come back in fp32, the output in the activations' dtype."""
    if dtype not in dtypes_of(backend):
        pytest.skip("not computed by Triton's interpreter")
    inputs = make_inputs(SHAPES[0], dtype, prefix_dtype=torch.float32)
    actual = run(op, inputs, backend)
    assert actual["out"].dtype == dtype and actual["prefix_key"].dtype == torch.float32
    check(op, inputs, actual)


def visible_pairs(inputs):
    """``(batch, 1 or heads, q_len, kv_len)``, one pair of positions after the other, from the definitions."""
    q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
    if inputs.attn_mask is not None:
        return inputs.attn_mask if inputs.attn_mask.dtype == torch.bool else inputs.attn_mask > float("-inf")
    ends = [0, q_len] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        for j in range(kv_len):
            if inputs.cu_seqlens is not None:
                pairs[i, j] &= any(a <= i < b and a <= j < b for a, b in pairwise(ends))
            if inputs.is_causal:
                pairs[i, j] &= j <= i
            if inputs.window is not None:
                pairs[i, j] &= j > i - inputs.window
    return pairs[None, None]


def plain(op, inputs, leaves):
    """The op written again, for autograd: one row of the batch, one packed sequence, one head after another."""
    query, key, value, prefix_key, prefix_value, *gate = leaves
    scale = query.shape[-1] ** -0.5
    group = query.shape[1] // key.shape[1]
    pairs = visible_pairs(inputs).expand(*query.shape[:3], key.shape[2])

    def attend(q, k, v, bias, capped):
        scores = scale * q @ k.mT
        if capped and inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        weights = torch.exp(scores + bias - scores.detach().max()) if k.numel() else scores
        total = weights.sum(-1, keepdim=True)
        return weights @ v / torch.where(total == 0, 1, total)

    rows = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            bias = torch.zeros(pairs.shape[2:], dtype=query.dtype).masked_fill(~pairs[b, h], float("-inf"))
            if inputs.attn_mask is not None and inputs.attn_mask.dtype != torch.bool:
                bias = bias + inputs.attn_mask.expand(pairs.shape)[b, h].to(query.dtype)
            tokens = []
            for t in range(query.shape[2]):
                position = b
                if inputs.cu_seqlens is not None:
                    position = int((inputs.cu_seqlens[1:] <= t).sum())
                entry = 0 if inputs.row_ids is None else int(inputs.row_ids[position])
                q, k, v = query[b, h, t : t + 1], key[b, h // group], value[b, h // group]
                if op == SHARED and entry >= 0:
                    k = torch.cat([prefix_key[entry, h // group], k])
                    v = torch.cat([prefix_value[entry, h // group], v])
                visible = F.pad(bias[t : t + 1], (k.shape[0] - key.shape[2], 0))
                out = attend(q, k, v, visible, capped=True)
                if op == GATED and entry >= 0:
                    factor = gate[0][entry, h].tanh() if inputs.gate_fn == "tanh" else gate[0][entry, h]
                    none = torch.zeros((), dtype=query.dtype)
                    own = prefix_key[entry, h // group], prefix_value[entry, h // group]
                    out = out + factor * attend(q, *own, none, capped=False)
                tokens.append(out)
            heads.append(torch.cat(tokens))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@of_both
@pytest.mark.parametrize("gate_fn", ["tanh", "identity"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.q_len < 30 and s.kv_len < 30], ids=str)
def test_reference_against_an_independent_formulation(op, shape, gate_fn):
    """Output and gradients of the specification, in fp64, against autograd of loops."""
    if op == SHARED and gate_fn == "identity":
        pytest.skip("it has no gate")
    inputs = make_inputs(shape._replace(head_dim=6), torch.float64, gate_fn=gate_fn)
    actual = run(op, inputs, "reference")
    leaves = [x.clone().requires_grad_() for x in inputs.operands(op)]
    out = plain(op, inputs, leaves)
    out.backward(inputs.grad_out)
    torch.testing.assert_close(actual["out"], out.detach(), rtol=1e-10, atol=1e-12)
    for name, leaf in zip(OPERANDS[op], leaves, strict=True):
        torch.testing.assert_close(
            actual[name], leaf.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@on_every_backend
@pytest.mark.parametrize(
    "shape",
    [
        Shape(
            batch=3, num_heads=2, num_kv_heads=1, q_len=3, kv_len=4, head_dim=3, num_prefixes=2, mask="causal"
        ),
        Shape(batch=1, num_heads=2, q_len=2, kv_len=3, head_dim=3, prefix_len=2, mask="float", softcap=2.0),
        packed(2, 0, 3, num_heads=2, num_kv_heads=1, head_dim=2, prefix_len=2, num_prefixes=2),
    ],
    ids=str,
)
def test_gradcheck(op, backend, shape):
    """Finite differences in fp64, along random directions; backward may not vary at all."""
    if torch.float64 not in dtypes_of(backend):
        pytest.skip("has no fp64")
    inputs = make_inputs(shape, torch.float64)
    leaves = [x.requires_grad_() for x in inputs.operands(op)]
    function = getattr(ops, op)
    assert gradcheck(
        lambda *x: function(*x, **inputs.options(op), backend=backend), leaves, nondet_tol=0.0, fast_mode=True
    )


@on_every_backend
@pytest.mark.parametrize("mask", ["", "causal", "bool", "float"])
def test_rows_without_an_adapter_are_plain_attention(op, backend, mask):
    """Id -1 equals torch's attention, and no gradient reaches a bank that holds NaN."""
    inputs = make_inputs(Shape(num_prefixes=2, mask=mask), torch.float32)
    inputs = inputs._replace(row_ids=torch.full_like(inputs.row_ids, -1))
    for bank in (inputs.prefix_key, inputs.prefix_value):
        bank.fill_(float("nan"))
    actual = run(op, inputs, backend)

    def attend(dtype):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs[:3]]
        given = inputs.attn_mask
        given = given.to(dtype) if given is not None and given.is_floating_point() else given
        out = F.scaled_dot_product_attention(
            *leaves, attn_mask=given, is_causal=inputs.is_causal, enable_gqa=True
        )
        out.backward(inputs.grad_out.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    names = ("out", "query", "key", "value")
    for name, single, exact in zip(names, attend(torch.float32), attend(torch.float64)):
        assert_within_budget(actual[name], single, exact, name)
    for name in OPERANDS[op][3:]:
        assert same_bits(actual[name].abs(), torch.zeros_like(actual[name])), name


@on_every_backend
def test_rows_are_isolated(op, backend):
    """A row gives the bits it gives alone, whatever its neighbours and the entries they use hold."""
    inputs = make_inputs(Shape(batch=6, num_prefixes=3, mask="bool"), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([1, 0, -1, 2, 1, 0], dtype=torch.int32))
    row, entry = 4, 1
    alone, clean = run(op, inputs.rows(slice(row, row + 1)), backend), run(op, inputs, backend)
    poisoned = inputs.map(torch.clone)
    others = inputs.row_ids != entry
    for name in ("query", "key", "value", "grad_out"):
        getattr(poisoned, name)[others] = float("nan")
    for name in ("prefix_key", "prefix_value", "gate"):
        getattr(poisoned, name)[[0, 2]] = float("nan")
    mixed = run(op, poisoned, backend)
    for name in ("out", "query", "key", "value"):
        assert same_bits(mixed[name][row], alone[name][0]), name
    for name in OPERANDS[op][3:]:
        assert same_bits(mixed[name][entry], clean[name][entry]), name
    # and the inverse: another id must give another result
    swapped = inputs._replace(row_ids=inputs.row_ids.clone())
    swapped.row_ids[row] = 2
    assert not same_bits(run(op, swapped, backend)["out"][row], clean["out"][row])


@on_every_backend
def test_entries_that_no_row_uses(op, backend):
    """They get zeros, and the others what a bank without the unused ones gives them."""
    inputs = make_inputs(Shape(batch=3, num_prefixes=4), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([3, 1, 3], dtype=torch.int32))
    used, bank = [1, 3], ("prefix_key", "prefix_value", "gate")
    fewer = inputs._replace(
        **{name: getattr(inputs, name)[used] for name in bank},
        row_ids=torch.tensor([1, 0, 1], dtype=torch.int32),
    )
    results, expected = run(op, inputs, backend), run(op, fewer, backend)
    for name in ("out", "query", "key", "value"):
        assert same_bits(results[name], expected[name]), name
    for name in OPERANDS[op][3:]:
        assert same_bits(results[name][used], expected[name]), name
        assert same_bits(results[name][[0, 2]], torch.zeros_like(expected[name])), name


@on_every_backend
@pytest.mark.parametrize("mask", ["causal", ""])
def test_packed_sequences_are_isolated(op, backend, mask):
    """A packed sequence gives the bits it gives alone, beside NaN and sequences of no length."""
    inputs = make_inputs(packed(3, 0, 6, 1, mask=mask, num_prefixes=3), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 2, 1, -1], dtype=torch.int32))
    whole = run(op, inputs, backend)
    for index in range(4):
        start, stop = inputs.cu_seqlens[index : index + 2].tolist()
        span = slice(start, stop)
        poisoned = inputs.map(torch.clone)
        for name in ("query", "key", "value", "grad_out"):
            getattr(poisoned, name)[:, :, :start] = float("nan")
            getattr(poisoned, name)[:, :, stop:] = float("nan")
        mixed, alone = run(op, poisoned, backend), run(op, inputs.sequence(index), backend)
        for name in ("out", "query", "key", "value"):
            assert same_bits(mixed[name][:, :, span], whole[name][:, :, span]), (index, name)
            if backend == "triton":  # torch has other attentions for packed sequences
                torch.testing.assert_close(mixed[name][:, :, span], alone[name], rtol=1e-5, atol=1e-5)
            else:
                assert same_bits(mixed[name][:, :, span], alone[name]), (index, name)
        entry = int(inputs.row_ids[index])
        for name in OPERANDS[op][3:]:
            assert entry < 0 or same_bits(mixed[name][entry], whole[name][entry]), (index, name)
    swapped = inputs._replace(row_ids=torch.tensor([0, 2, 2, -1], dtype=torch.int32))
    out = run(op, swapped, backend)["out"]
    assert same_bits(out[:, :, :3], whole["out"][:, :, :3])
    assert not same_bits(out[:, :, 3:9], whole["out"][:, :, 3:9])


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_that_see_no_key(op, backend, dtype):
    """The term of the keys is 0 and its lse -inf; gradients are finite. Without a prefix the output is 0."""
    inputs = make_inputs(Shape(mask="empty", batch=3, num_prefixes=2), dtype)
    inputs = inputs._replace(row_ids=torch.tensor([-1, 0, 1], dtype=torch.int32))
    actual = run(op, inputs, backend)
    assert not actual["out"][0, :, 0].any()
    assert all(actual[name].isfinite().all() for name in ("out", *OPERANDS[op]))
    assert (actual["lse"][0, :, 0] == float("-inf")).all() and actual["lse"][0, :, 1:].isfinite().all()
    check(op, inputs, actual)
    inputs.attn_mask[:] = False
    actual = run(op, inputs, backend)
    assert not any(actual[name].any() for name in ("key", "value"))
    check(op, inputs, actual)


@on_every_backend
def test_large_logits(op, backend):
    """Scores of 1e4 neither overflow nor leave the budget: backward finds the scores that forward had, bit for bit."""
    inputs = make_inputs(Shape(q_len=9, mask="causal"), torch.float32)
    inputs = inputs._replace(query=inputs.query * 1e4)
    with products_by_element() if backend == "triton" else contextlib.nullcontext():
        actual = run(op, inputs, backend)
    assert all(actual[name].isfinite().all() for name in ("out", *OPERANDS[op]))
    if (
        device_of(backend) == "cpu"
    ):  # a GPU's attention is torch's, whose backward has scores again within 1e-3
        check(op, inputs, actual)


def transposed(x):  # (batch, seq, heads, head_dim) in memory, what models hold
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]


def unaligned(x):
    storage = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    storage[1:] = x.reshape(-1)
    return storage[1:].view_as(x)


@on_every_backend
@pytest.mark.parametrize("change", [transposed, every_other, unaligned], ids=lambda f: f.__name__)
def test_any_strides(op, backend, change):
    """Strided inputs give what their copies give, to rounding; the output is strided as the query."""
    inputs = make_inputs(Shape(mask="float", head_dim=12), torch.float32)
    names = ("query", "key", "value", "prefix_key", "prefix_value", "grad_out", "attn_mask")
    expected = run(op, inputs, backend)
    for some in (names, names[::2], names[1::2]):  # of two neighbours both, the one and the other
        changed = inputs._replace(**{name: change(getattr(inputs, name)) for name in some})
        actual = run(op, changed, backend)
        for name in ("out", "lse", *OPERANDS[op]):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    plain_query = make_inputs(Shape(), torch.float32)
    plain_query = plain_query._replace(query=transposed(plain_query.query))
    assert run(op, plain_query, backend)["out"].stride() == plain_query.query.stride()


@on_every_backend
def test_broadcast_inputs(op, backend):
    """Expanded masks, keys and banks are the same as their copies."""
    inputs = make_inputs(Shape(), torch.float32)
    for mask in (torch.rand(7, 9) < 0.7, torch.rand(2, 1, 1, 9) < 0.7, torch.randn(1, 9), torch.randn(9)):
        small = inputs._replace(attn_mask=mask)
        full = inputs._replace(attn_mask=mask.expand(2, 4, 7, 9).contiguous())
        actual, expected = run(op, small, backend), run(op, full, backend)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])
    names = ("key", "value", "prefix_key", "prefix_value")
    one_head = inputs._replace(**{x: getattr(inputs, x)[:, :1].expand_as(getattr(inputs, x)) for x in names})
    copied = one_head.map(torch.Tensor.contiguous)
    actual, expected = run(op, one_head, backend), run(op, copied, backend)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@on_every_backend
@pytest.mark.parametrize(
    "shape",
    [Shape(batch=0), Shape(q_len=0), Shape(kv_len=0), packed(0, 0), Shape(q_len=0, kv_len=0)],
    ids=str,
)
def test_empty_inputs(op, backend, shape):
    """No rows, no tokens, no keys: right shapes, zero gradients where nothing was used."""
    inputs = make_inputs(shape, torch.float32)
    actual = run(op, inputs, backend)
    if shape.q_len and shape.batch:  # without keys, the prefix is all there is
        check(op, inputs, actual)
    for name in ("out", *OPERANDS[op]):
        expected = inputs.query if name == "out" else getattr(inputs, name)
        assert actual[name].shape == expected.shape
        assert (shape.q_len and shape.batch) or not actual[name].any(), name
    nothing = inputs._replace(cu_seqlens=torch.zeros(1, dtype=torch.int32))
    if shape.lengths:
        assert run(op, nothing, backend)["out"].numel() == 0


@on_every_backend
def test_deterministic(op, backend):
    """Bitwise equal from run to run, forward and backward."""
    inputs = make_inputs(Shape(batch=5, q_len=17, kv_len=17, num_prefixes=3, mask="causal"), torch.float32)
    first = run(op, inputs, backend)
    for _ in range(2 if backend == "triton" else 8):
        again = run(op, inputs, backend)
        assert all(same_bits(again[name], first[name]) for name in first)


@on_every_backend
def test_frozen_inputs_get_no_gradient(op, backend):
    """And the others get the same bits as when all are trained."""
    inputs = make_inputs(Shape(batch=2, num_prefixes=2, mask="causal"), torch.float32)
    everything = run(op, inputs, backend)
    names = OPERANDS[op]
    for frozen in (names[:1], names[1:3], names[3:], names[:3], ("key", "prefix_value")):
        some = run(op, inputs, backend, frozen=frozen)
        for name in names:
            right = some[name] is None if name in frozen else same_bits(some[name], everything[name])
            assert right, (frozen, name)
    assert all(run(op, inputs, backend, frozen=names)[name] is None for name in names)
