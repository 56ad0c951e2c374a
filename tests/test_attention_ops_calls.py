"""How the two attention ops are called: registration, tracing, what is kept, and what a wrong call says."""

import pytest
import torch

from fastadapter import ops
from fastadapter.ops import backends
from tests.support.attention import (
    GATED,
    OPERANDS,
    SAVED,
    SHARED,
    Shape,
    for_backward,
    make_inputs,
    module_of,
    packed,
    run,
)
from tests.support.budget import same_bits

OPS = [GATED, SHARED]
of_both = pytest.mark.parametrize("op", OPS)


def sample_inputs():
    yield make_inputs(Shape(mask="causal", window=3), torch.float32)
    yield make_inputs(Shape(batch=4, num_prefixes=3, mask="bool", softcap=3.0), torch.bfloat16)
    yield make_inputs(packed(3, 2, num_prefixes=2), torch.float32)
    inputs = make_inputs(Shape(mask="float"), torch.float32)
    yield inputs._replace(query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2))


@of_both
def test_opcheck(op):
    """Schema, fake (strides too) and dispatch of the registered ops, with everything saved and needed and with less."""
    namespace = torch.ops.fastadapter
    forward, backward = getattr(namespace, op).default, getattr(namespace, f"{op}_backward").default
    quick = ("test_schema", "test_faketensor", "test_autograd_registration")
    for number, inputs in enumerate(sample_inputs()):
        utils = quick if number else (*quick, "test_aot_dispatch_dynamic")
        options = inputs.schema_options(op, softmax_scale=0.25)
        operands = inputs.operands(op)
        for save in (True, False):
            torch.library.opcheck(forward, (*operands, *options, save), test_utils=utils)
        out, *kept = forward(*operands, *options, True)
        saved = for_backward(op, out, kept)
        needs = len(OPERANDS[op]) - 2
        for needed in ((True,) * needs, (False, True) + (False,) * (needs - 2)):
            arguments = (inputs.grad_out, *operands, *saved, *options, *needed)
            torch.library.opcheck(backward, arguments, test_utils=utils)


@of_both
def test_nothing_is_kept_without_a_gradient(op, monkeypatch):
    """``save`` is false where no gradient is needed, and what is not saved comes back empty."""
    inputs = make_inputs(Shape(mask="causal"), torch.float32)
    module = module_of(op)
    asked = []
    run_forward = module.run_forward
    monkeypatch.setattr(module, "run_forward", lambda *args: asked.append(args[-1]) or run_forward(*args))
    operands = inputs.operands(op)
    getattr(ops, op)(*operands, **inputs.options(op))
    with torch.no_grad():
        getattr(ops, op)(*[x.requires_grad_() for x in operands], **inputs.options(op))
    assert asked == [False, False]
    getattr(ops, op)(*operands, **inputs.options(op))
    assert asked[-1] is True
    results = getattr(torch.ops.fastadapter, op)(
        *(x.detach() for x in operands), *inputs.schema_options(op), False
    )
    assert [tuple(x.shape) for x in results[1:]] == [(0,)] * len(SAVED[op])


@pytest.mark.parametrize(("op", "lengths"), [(GATED, False), (SHARED, True)], ids=["batch", "packed"])
def test_compiles_once_for_all_lengths(op, lengths):
    """``torch.compile(fullgraph=True)``, forward and backward: one graph, whatever the lengths."""

    def twice(*leaves, row_ids, cu_seqlens):
        out = getattr(ops, op)(*leaves, is_causal=True, window=4, row_ids=row_ids, cu_seqlens=cu_seqlens)
        return out * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=True)
    shapes = [Shape(batch=3, q_len=n, kv_len=n, num_prefixes=2) for n in (7, 12, 33)]
    if lengths:
        shapes = [packed(3, 4, num_prefixes=2), packed(5, 2, 4, num_prefixes=2), packed(9, 1, num_prefixes=2)]
    for number, shape in enumerate(shapes):
        inputs = make_inputs(shape, torch.float32)
        results = []
        for function in (twice, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs.operands(op)]
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                out = function(*leaves, row_ids=inputs.row_ids, cu_seqlens=inputs.cu_seqlens)
                out.backward(inputs.grad_out)
            results.append([out, *(leaf.grad for leaf in leaves)])
        for expected, traced in zip(*results):
            torch.testing.assert_close(traced, expected)


@of_both
def test_second_backward_is_refused(op):
    """Double backward is not supported and says so, rather than returning zeros."""
    inputs = make_inputs(Shape(), torch.float32)
    leaves = [x.requires_grad_() for x in inputs.operands(op)]
    (grad,) = torch.autograd.grad(getattr(ops, op)(*leaves).square().sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@of_both
def test_inputs_are_not_changed(op):
    inputs = make_inputs(Shape(num_prefixes=2, mask="float"), torch.float32)
    before = inputs.map(torch.clone)
    run(op, inputs)
    for now, then in zip(inputs, before):
        assert not isinstance(now, torch.Tensor) or same_bits(now, then)


@of_both
def test_a_backend_without_kernels_is_an_error(op, monkeypatch):
    """Named backends that cannot run say why; ``auto`` says which one it takes instead."""
    inputs = make_inputs(Shape(), torch.float32)
    monkeypatch.setitem(backends_module()._LACKING, (op, "cpp"), "the compiled extension has no such kernel")
    with pytest.raises(ValueError, match=f"backend='cpp' cannot run here: .*({op}|no such kernel)"):
        getattr(ops, op)(*inputs.operands(op), backend="cpp")
    (row,) = (row for row in backends() if row["op"] == op and row["device"] == "cpu")
    assert row["backend"] == "reference" and "C++" in row["reason"]
    with pytest.raises(ValueError, match="backend must be one of auto, triton, cpp, reference, got 'cuda'"):
        getattr(ops, op)(*inputs.operands(op), backend="cuda")
    with pytest.raises(ValueError, match="backend='triton' cannot run"):
        getattr(ops, op)(*inputs.cast(torch.float64).operands(op), backend="triton")


def backends_module():
    import sys

    return sys.modules["fastadapter.ops.backends"]


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


CAUSAL = {"is_causal": True}
PACKED = {"cu_seqlens": ids(0, 3, 7)}
BAD_CALLS = [
    ("query must be a torch.Tensor, got list", TypeError, {"query": [1.0]}),
    ("query must have 4 dims", ValueError, {"query": lambda x: x[0]}),
    ("query must be torch.float32 or", TypeError, {"query": lambda x: x.int()}),
    ("key must have 4 dims", ValueError, {"key": lambda x: x[0]}),
    ("key must be .*, got", ValueError, {"key": lambda x: x[:1]}),
    ("key must be .*, got", ValueError, {"key": lambda x: x[..., :8]}),
    ("key must be torch.float32, got torch.float16", TypeError, {"key": lambda x: x.half()}),
    ("value must be the shape of key", ValueError, {"value": lambda x: x[:, :, 1:]}),
    ("value must be torch.float32, got torch.float64", TypeError, {"value": lambda x: x.double()}),
    ("value must be on cpu like query, got meta", ValueError, {"value": lambda x: x.to("meta")}),
    ("num_heads of query must be a multiple", ValueError, {"query": lambda x: x[:, :3]}),
    ("prefix_key must have 4 dims", ValueError, {"prefix_key": lambda x: x[0]}),
    ("prefix_key must be .*, got", ValueError, {"prefix_key": lambda x: x[:, :1]}),
    ("prefix_key must be .*, got", ValueError, {"prefix_key": lambda x: x[..., :8]}),
    ("prefix_key must be torch.float32, got torch.float16", TypeError, {"prefix_key": lambda x: x.half()}),
    ("prefix_value must be the shape of prefix_key", ValueError, {"prefix_value": lambda x: x[:, :, 1:]}),
    ("prefix_value must be torch.float32, got", TypeError, {"prefix_value": lambda x: x.half()}),
    (
        "prefix_len and head_dim must be at least 1",
        ValueError,
        dict.fromkeys(("prefix_key", "prefix_value"), lambda x: x[:, :, :0]),
    ),
    ("attn_mask must be torch.bool or torch.float32, got torch.int32", TypeError, {"attn_mask": ids(1)}),
    ("attn_mask must be a torch.Tensor, got str", TypeError, {"attn_mask": "causal"}),
    ("attn_mask must broadcast to", ValueError, {"attn_mask": torch.ones(8, 7, dtype=torch.bool)}),
    ("attn_mask must broadcast to", ValueError, {"attn_mask": torch.ones(1, 1, 1, 1, 7, dtype=torch.bool)}),
    ("attn_mask is not differentiable", ValueError, {"attn_mask": torch.zeros(7, 7, requires_grad=True)}),
    ("attn_mask must be None with is_causal=True", ValueError, {"attn_mask": torch.zeros(7, 7), **CAUSAL}),
    ("attn_mask must be on cpu", ValueError, {"attn_mask": torch.zeros(7, 7, device="meta")}),
    ("is_causal must be a bool, got int", TypeError, {"is_causal": 1}),
    ("window must be an int or None, got float", TypeError, {"window": 2.0, **CAUSAL}),
    ("window must be at least 1, got 0", ValueError, {"window": 0, **CAUSAL}),
    ("window needs is_causal=True", ValueError, {"window": 3}),
    ("softcap must be a float or None, got str", TypeError, {"softcap": "30"}),
    ("softcap must be positive and finite in fp32, got 0.0", ValueError, {"softcap": 0.0}),
    ("softcap must be positive and finite in fp32, got inf", ValueError, {"softcap": float("inf")}),
    ("softcap must be positive and finite in fp32, got nan", ValueError, {"softcap": float("nan")}),
    ("softmax_scale must be a float or None, got Tensor", TypeError, {"softmax_scale": torch.ones(())}),
    ("a bank of 2 entries needs row_ids", ValueError, {"row_ids": None}),
    (
        "row_ids must be torch.int32, got torch.int64",
        TypeError,
        {"row_ids": torch.zeros(2, dtype=torch.int64)},
    ),
    (r"row_ids must have 1 dims \(batch,\)", ValueError, {"row_ids": ids(0, 1)[None]}),
    (r"row_ids must be \(batch,\) = \(2,\), got \(3,\)", ValueError, {"row_ids": ids(0, 1, 0)}),
    (r"row_ids must be in \[-1, 2\), got values from 0 to 2", ValueError, {"row_ids": ids(0, 2)}),
    (r"row_ids must be in \[-1, 2\), got values from -2 to 0", ValueError, {"row_ids": ids(0, -2)}),
    ("with cu_seqlens, query must have batch 1, got 2", ValueError, PACKED),
]
BAD_PACKED = [
    ("cu_seqlens must be a torch.Tensor, got list", TypeError, {"cu_seqlens": [0, 7]}),
    ("cu_seqlens must be torch.int32, got torch.int64", TypeError, {"cu_seqlens": torch.tensor([0, 3, 7])}),
    (r"cu_seqlens must be \(num_seqs \+ 1,\), got \(1, 3\)", ValueError, {"cu_seqlens": ids(0, 3, 7)[None]}),
    (r"cu_seqlens must be \(num_seqs \+ 1,\), got \(0,\)", ValueError, {"cu_seqlens": ids()}),
    ("cu_seqlens must ascend from 0 to q_len 7, got", ValueError, {"cu_seqlens": ids(1, 3, 7)}),
    ("cu_seqlens must ascend from 0 to q_len 7, got", ValueError, {"cu_seqlens": ids(0, 3, 6)}),
    ("cu_seqlens must ascend from 0 to q_len 7, got", ValueError, {"cu_seqlens": ids(0, 8, 7)}),
    (
        "with cu_seqlens, key must have kv_len 7",
        ValueError,
        dict.fromkeys(("key", "value"), lambda x: x[:, :, 1:]),
    ),
    ("attn_mask must be None with cu_seqlens", ValueError, {"attn_mask": torch.zeros(7, 7)}),
    (r"row_ids must be \(num_seqs,\) = \(2,\), got \(1,\)", ValueError, {"row_ids": ids(0)}),
]
BAD_GATES = [
    ("gate must be a torch.Tensor, got float", TypeError, {"gate": 1.0}),
    (
        r"gate must be \(num_prefixes, num_heads\) = \(2, 4\), got \(1, 4\)",
        ValueError,
        {"gate": lambda x: x[:1]},
    ),
    ("gate must be torch.float32, got torch.float64", TypeError, {"gate": lambda x: x.double()}),
    ("gate must be on cpu", ValueError, {"gate": lambda x: x.to("meta")}),
    ("gate_fn must be one of tanh, identity, got 'relu'", ValueError, {"gate_fn": "relu"}),
]


def call(op, inputs, changes):
    given = dict(zip(OPERANDS[op], inputs.operands(op))) | inputs.options(op)
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    return getattr(ops, op)(**given)


@of_both
@pytest.mark.parametrize(
    ("message", "error", "changes"), BAD_CALLS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_calls(op, message, error, changes):
    """The message names the op, the argument, what was expected and what came; the call without the fault works."""
    inputs = make_inputs(Shape(kv_len=7, num_prefixes=2), torch.float32)._replace(row_ids=ids(1, 0))
    call(op, inputs, {})
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        call(op, inputs, changes)


@of_both
@pytest.mark.parametrize(
    ("message", "error", "changes"), BAD_PACKED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_packed_calls(op, message, error, changes):
    inputs = make_inputs(packed(3, 4, num_prefixes=2), torch.float32)._replace(row_ids=ids(1, 0))
    call(op, inputs, {})
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        call(op, inputs, changes)


@pytest.mark.parametrize(
    ("message", "error", "changes"), BAD_GATES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_gates(message, error, changes):
    inputs = make_inputs(Shape(num_prefixes=2), torch.float32)
    with pytest.raises(error, match=f"^{GATED}: .*{message}"):
        call(GATED, inputs, changes)
