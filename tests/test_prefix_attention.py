"""What is ``prefix_attention``'s own, and ``prefix_merge``; the rest is in test_attention_ops.py.

Judged against torch's attention over the concatenated keys, and the merge against the single pass, by the budget of
tests/support/budget.py; the merge's own gradients by finite differences.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from fastadapter import ops
from fastadapter.ops.attention import Options
from fastadapter.ops.prefix_attention import _base_of
from tests.support.attention import (
    OPERANDS,
    SHARED,
    Shape,
    backends_of,
    check,
    dtypes_of,
    eager,
    make_inputs,
    packed,
    run,
)
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import device_of, on_device

NAMES = OPERANDS[SHARED]
on_every_backend = pytest.mark.parametrize("backend", backends_of(SHARED))
merging = pytest.mark.parametrize("backend", backends_of("prefix_merge"))
# torch's attention is on the CPU here, and Triton's kernels beside it in the interpreter.
here = pytest.mark.skipif(device_of("triton") != "cpu", reason="the base of a merge differs on a GPU")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@on_every_backend
@pytest.mark.parametrize("mask", ["", "causal", "bool", "float"])
def test_equals_attention_over_concatenated_keys(backend, mask):
    """The usual way, with copies of prefix and mask: output and every gradient."""
    inputs = make_inputs(Shape(mask=mask), torch.float32)
    actual = run(SHARED, inputs, backend)

    def concatenated(dtype):
        device = "cpu" if dtype == torch.float64 else device_of(backend)
        given = inputs.cast(dtype).map(lambda x: on_device(x, device))
        leaves = [x.detach().clone().requires_grad_() for x in given.operands(SHARED)]
        query, key, value, prefix_key, prefix_value = leaves
        batch, heads, q_len, kv_len, prefix_len = *query.shape[:3], key.shape[2], prefix_key.shape[2]
        visible = given.attn_mask
        if visible is None:
            visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
            visible = visible.tril() if mask == "causal" else visible
        shown = visible.new_ones if visible.dtype == torch.bool else visible.new_zeros
        visible = visible.expand(batch, heads, q_len, kv_len)
        visible = torch.cat([shown(batch, heads, q_len, prefix_len), visible], dim=-1)
        keys = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
        values = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=True)
        out.backward(given.grad_out)
        return {"out": out.detach().cpu(), **{name: x.grad.cpu() for name, x in zip(NAMES, leaves)}}

    single, exact = concatenated(torch.float32), concatenated(torch.float64)
    for name in ("out", *NAMES):
        assert_within_budget(actual[name], single[name], exact[name], name)


@on_every_backend
def test_order_of_the_prefix_does_not_matter(backend):
    inputs = make_inputs(Shape(prefix_len=7, mask="causal"), torch.float32)
    order = torch.randperm(7)
    shuffled = inputs._replace(
        prefix_key=inputs.prefix_key[:, :, order], prefix_value=inputs.prefix_value[:, :, order]
    )
    torch.testing.assert_close(run(SHARED, inputs, backend)["out"], run(SHARED, shuffled, backend)["out"])


def run_merged(inputs, backend="auto", frozen=()):
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name not in frozen) for name in NAMES}
    out = ops.prefix_attention(**leaves, **inputs.options(SHARED), form="merge", backend=backend)
    if out.requires_grad:
        out.backward(inputs.grad_out)
    return {"out": out.detach(), "lse": None, **{name: leaf.grad for name, leaf in leaves.items()}}


MERGED = [
    Shape(mask="causal", num_prefixes=3, batch=4),
    Shape(mask="causal", q_len=12, kv_len=5),
    Shape(mask="bool", num_heads=6, num_kv_heads=3),
    Shape(mask="empty", num_prefixes=2, batch=3),
    Shape(mask="float", head_dim=40),
    Shape(mask="float32", q_len=70, kv_len=90, batch=1),
    Shape(q_len=1, kv_len=33, prefix_len=17),
]


@here
@merging
@pytest.mark.parametrize("shape", MERGED, ids=str)
def test_merge_form_is_within_budget(backend, shape):
    """Over torch's flash attention: the merged output and lse in its backward give the exact gradient."""
    for dtype in dtypes_of(backend):
        inputs = make_inputs(shape, dtype)
        actual = run_merged(inputs, backend)
        check(SHARED, inputs, actual, str(dtype))
        assert actual["out"].stride() == inputs.query.stride()


@here
@merging
def test_merge_form_on_strided_inputs(backend):
    """The layout of models, a last dimension that is not dense, and an expanded gradient."""
    inputs = make_inputs(Shape(mask="causal"), torch.float32)
    expected = run_merged(inputs, backend)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    ):
        changed = inputs._replace(
            **{name: change(getattr(inputs, name)) for name in (*NAMES[:3], "grad_out")}
        )
        actual = run_merged(changed, backend)
        assert actual["out"].stride() == torch.empty_like(changed.query).stride()
        for name in ("out", *NAMES):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    leaves = [x.clone().requires_grad_() for x in inputs.operands(SHARED)]
    ops.prefix_attention(*leaves, is_causal=True, form="merge", backend=backend).sum().backward()
    ones = run_merged(inputs._replace(grad_out=torch.ones_like(inputs.grad_out)), backend)
    for name, leaf in zip(NAMES, leaves):
        torch.testing.assert_close(leaf.grad, ones[name])


@here
@merging
def test_merge_form_honours_frozen_inputs(backend):
    inputs = make_inputs(Shape(mask="causal", num_prefixes=2), torch.float32)
    everything = run_merged(inputs, backend)
    for frozen in (NAMES[:1], NAMES[1:3], NAMES[3:], NAMES[:3], NAMES[:4], NAMES):
        some = run_merged(inputs, backend, frozen)
        for name in NAMES:
            right = some[name] is None if name in frozen else same_bits(some[name], everything[name])
            assert right, (frozen, name)


@here
def test_merge_form_compiles_into_one_graph():
    def twice(*leaves):
        return ops.prefix_attention(*leaves, is_causal=True, form="merge") * 2

    inputs = make_inputs(Shape(), torch.float32)
    results = []
    for function in (twice, torch.compile(twice, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs.operands(SHARED)]
        function(*leaves).backward(inputs.grad_out)
        results.append([leaf.grad for leaf in leaves])
    for expected, traced in zip(*results):
        torch.testing.assert_close(traced, expected)


def test_form_is_chosen_by_shapes_and_options():
    """Never by values; a form that is named and cannot run says why."""
    inputs = make_inputs(Shape(), torch.float32)

    def choose(form, backend="cpp", given=inputs, query=None):
        options = Options(*given.schema_options(SHARED))
        return _base_of(form, backend, given.query if query is None else query, given.key, options)

    assert choose("auto") is None and choose("single") is None and choose("merge") == "flash_cpu"
    assert choose("auto", "triton") == choose("merge", "triton") == "flash_cpu"
    assert choose("auto", "triton", query=inputs.query.to("meta")) == "reference"
    with pytest.raises(
        ValueError, match="form='single' cannot run here: Triton merges into another attention"
    ):
        choose("single", "triton")
    cannot = {
        "window or softcap is given": make_inputs(Shape(softcap=3.0), torch.float32),
        "cu_seqlens is given": make_inputs(packed(3, 4), torch.float32),
        "there are no queries or no keys": make_inputs(Shape(kv_len=0), torch.float32),
    }
    for reason, given in cannot.items():
        assert choose("auto", "triton", given) == "reference"
        with pytest.raises(ValueError, match=f"form='merge' cannot run here: flash_cpu: {reason}"):
            ops.prefix_attention(*given.operands(SHARED), **given.options(SHARED), form="merge")
    with pytest.raises(ValueError, match="no attention that returns lse on meta"):
        choose("merge", query=inputs.query.to("meta"))
    with pytest.raises(ValueError, match="form must be one of auto, single, merge, got 'best'"):
        ops.prefix_attention(*inputs.operands(SHARED), form="best")


def base_of(inputs, dtype=None):
    """An attention with its lse, in plain PyTorch."""
    query, key, value = (x if dtype is None else x.to(dtype) for x in inputs[:3])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query.shape[-1] ** -0.5 * query @ key.mT
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@merging
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_merge_is_the_attention_over_both_parts(backend, softcap):
    """A base over the keys and a prefix, two halves of a prefix one after the other, and the merged lse."""
    inputs = make_inputs(Shape(num_prefixes=2, prefix_len=6, batch=4, softcap=softcap), torch.float32)
    plain, exact = eager(SHARED, inputs, torch.float32), eager(SHARED, inputs, torch.float64)
    nobody = inputs._replace(row_ids=torch.full_like(inputs.row_ids, -1))
    alone = eager(SHARED, nobody, torch.float32)
    options = {"row_ids": inputs.row_ids, "softcap": softcap, "backend": backend}
    device = device_of(backend)

    def merge(out, lse, keys, values):
        given = (x.to(device) for x in (out, lse, inputs.query, keys, values))
        moved = options | {"row_ids": inputs.row_ids.to(device)}
        return [x.cpu() for x in ops.prefix_merge(*given, **moved)]

    whole = merge(alone["out"], alone["lse"], inputs.prefix_key, inputs.prefix_value)
    first = merge(alone["out"], alone["lse"], inputs.prefix_key[:, :, :2], inputs.prefix_value[:, :, :2])
    halves = merge(*first, inputs.prefix_key[:, :, 2:], inputs.prefix_value[:, :, 2:])
    for out, lse in (whole, halves):
        assert_within_budget(out, plain["out"], exact["out"], "out")
        assert_within_budget(lse, plain["lse"], exact["lse"], "lse")
    kept = inputs.row_ids == -1
    assert same_bits(whole[0][kept], alone["out"][kept]) and same_bits(whole[1][kept], alone["lse"][kept])


@merging
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merge_into_a_base_that_saw_nothing(backend, dtype):
    """lse -inf: the prefix alone, though the base holds NaN there; without an adapter the base stays."""
    inputs = make_inputs(Shape(kv_len=0, num_prefixes=2, batch=3), dtype)
    inputs = inputs._replace(row_ids=torch.tensor([0, -1, 1], dtype=torch.int32)).map(
        lambda x: x.to(device_of(backend))
    )
    base = torch.full_like(inputs.query, float("nan"))
    nothing = torch.full(inputs.query.shape[:3], float("-inf"), device=base.device)
    merged = ops.prefix_merge(
        base, nothing, *inputs[:1], *inputs[3:5], row_ids=inputs.row_ids, backend=backend
    )
    expected = run(SHARED, inputs, backend)
    out, lse = merged.out.cpu(), merged.lse.cpu()
    assert same_bits(out[1], base[1].cpu()) and same_bits(lse[1], nothing[1].cpu())
    for row in (0, 2):
        torch.testing.assert_close(out[row], expected["out"][row], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[row], expected["lse"][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", backends_of("prefix_merge")[:2])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_a_merge(backend, softcap):
    """Finite differences for both outputs and all five inputs, with rows without an adapter, in fp64."""
    inputs = make_inputs(
        Shape(
            batch=3, num_heads=2, num_kv_heads=1, q_len=2, kv_len=3, head_dim=3, prefix_len=2, num_prefixes=2
        ),
        torch.float64,
    )
    leaves = [*base_of(inputs), inputs.query, inputs.prefix_key, inputs.prefix_value]
    leaves = [x.detach().requires_grad_() for x in leaves]
    options = {"row_ids": inputs.row_ids, "softcap": softcap, "backend": backend}
    for part in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both outputs, out, lse
        assert gradcheck(
            lambda *x, p=part: ops.prefix_merge(*x, **options)[p], leaves, nondet_tol=0.0, fast_mode=True
        )


@merging
def test_gradients_through_nested_merges(backend):
    """Autograd through a base in plain PyTorch and two merges gives the gradient of one attention."""
    inputs = make_inputs(Shape(prefix_len=6), torch.float32)
    exact, plain = eager(SHARED, inputs, torch.float64), eager(SHARED, inputs, torch.float32)
    moved = inputs.map(lambda x: x.to(device_of(backend)))
    leaves = {name: getattr(moved, name).detach().requires_grad_() for name in NAMES}
    query, prefix_key, prefix_value = leaves["query"], leaves["prefix_key"], leaves["prefix_value"]
    merged = base_of(moved._replace(**leaves))
    for half in (slice(0, 2), slice(2, 6)):
        merged = ops.prefix_merge(
            *merged, query, prefix_key[:, :, half], prefix_value[:, :, half], backend=backend
        )
    merged.out.backward(moved.grad_out)
    for name, leaf in leaves.items():
        assert_within_budget(leaf.grad.cpu(), plain[name], exact[name], name)


def test_merge_opcheck():
    inputs = make_inputs(Shape(num_prefixes=2), torch.float32)
    base, lse = base_of(inputs)
    arguments = (base, lse, inputs.query, inputs.prefix_key, inputs.prefix_value, inputs.row_ids, 0.25, 0.0)
    torch.library.opcheck(torch.ops.fastadapter.prefix_merge.default, arguments)


BAD_MERGES = [
    ("base must be a torch.Tensor, got NoneType", TypeError, {"base": None}),
    ("base must be the shape of query", ValueError, {"base": lambda x: x[:, 1:]}),
    ("base must be torch.float32, got torch.float16", TypeError, {"base": lambda x: x.half()}),
    (
        r"base_lse must have 3 dims \(batch, num_heads, q_len\)",
        ValueError,
        {"base_lse": lambda x: x[..., None]},
    ),
    (r"base_lse must be \(batch, num_heads, q_len\)", ValueError, {"base_lse": lambda x: x.transpose(1, 2)}),
    ("base_lse must be torch.float32, got torch.float64", TypeError, {"base_lse": lambda x: x.double()}),
    ("base_lse must be on cpu like query, got meta", ValueError, {"base_lse": lambda x: x.to("meta")}),
    ("query must have 4 dims", ValueError, {"query": lambda x: x[0]}),
    ("query must be", TypeError, {"query": lambda x: x.int()}),
    ("prefix_key must have 4 dims", ValueError, {"prefix_key": lambda x: x[0]}),
    ("prefix_key must be .*, got", ValueError, {"prefix_key": lambda x: x[..., 1:]}),
    ("prefix_value must be the shape of prefix_key", ValueError, {"prefix_value": lambda x: x[:1]}),
    (
        "num_heads of query must be a multiple",
        ValueError,
        dict.fromkeys(("query", "base", "base_lse"), lambda x: x[:, 1:]),
    ),
    ("softcap must be positive", ValueError, {"softcap": -1.0}),
    ("softmax_scale must be a float", TypeError, {"softmax_scale": "1"}),
    ("a bank of 2 entries needs row_ids", ValueError, {"row_ids": None}),
    (r"row_ids must be in \[-1, 2\)", ValueError, {"row_ids": lambda x: x + 2}),
]


@pytest.mark.parametrize(
    ("message", "error", "changes"), BAD_MERGES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_merges(message, error, changes):
    inputs = make_inputs(Shape(num_prefixes=2), torch.float32)._replace(
        row_ids=torch.tensor([0, 1], dtype=torch.int32)
    )
    base, base_lse = base_of(inputs)
    given = dict(
        zip(("base", "base_lse", *NAMES[:1], *NAMES[3:]), (base, base_lse, inputs.query, *inputs[3:5]))
    )
    given["row_ids"] = inputs.row_ids
    ops.prefix_merge(**given)
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    with pytest.raises(error, match=f"^prefix_merge: .*{message}"):
        ops.prefix_merge(**given)
