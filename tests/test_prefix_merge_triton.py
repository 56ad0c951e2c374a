"""The Triton launchers of ``prefix_merge`` themselves, by the budget of tests/support/budget.py.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16 alone. The public op, and the attention that
merges into one of torch's: test_prefix_attention.py and test_attention_ops.py.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import prefix_merge as kernels
from fastadapter.kernels import prefix_term
from fastadapter.kernels.launch import forget

from fastadapter import reference
from tests.support.attention import SHARED, Shape, eager, make_inputs
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import device_of, on_device

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
GRADS = ("query", "prefix_key", "prefix_value")
BANK = Shape(batch=3, num_heads=2, num_kv_heads=1, q_len=5, kv_len=0, num_prefixes=3)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def forward(inputs, base, lse):
    scale = inputs.query.shape[-1] ** -0.5
    args = (base, lse, inputs.query, inputs.prefix_key, inputs.prefix_value, inputs.row_ids)
    results = kernels.prefix_merge_forward(
        *(on_device(x, DEVICE) for x in args), scale, inputs.softcap or 0.0
    )
    return [x.cpu() for x in results]


def backward(inputs, merged, base_grad=None, needs=(True, True)):
    """Gradients by name, given the merged output and lse."""
    query, prefix = inputs.query, (inputs.prefix_key, inputs.prefix_value)
    args = (inputs.grad_out, query, *prefix, *merged, base_grad, inputs.row_ids)
    constants = (query.shape[-1] ** -0.5, inputs.softcap or 0.0, *needs)
    grads = kernels.prefix_merge_backward(*(on_device(x, DEVICE) for x in args), *constants)
    return {name: x.cpu() for name, x in zip(GRADS, grads, strict=True)}


def strided(x):
    """The values of ``x``, axes 1 and 2 swapped in memory and NaN between the elements."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    return wide.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2].copy_(x)


@pytest.mark.parametrize("q_len", [1, 18])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_extends_the_softmax_of_its_base(dtype, q_len):
    """Tokens of all heads in a tile, and tiles of one head; a base that saw no key may hold NaN; -1 keeps every bit."""
    shape = Shape(
        num_heads=4, num_kv_heads=2, batch=3, q_len=q_len, prefix_len=17, num_prefixes=2, softcap=3.0
    )
    inputs = make_inputs(shape, dtype)._replace(row_ids=torch.tensor([1, -1, 0], dtype=torch.int32))
    base, lse = strided(inputs.grad_out), torch.randn(3, q_len, 4).transpose(1, 2)
    lse[:, 1, 0] = float("-inf")
    base[:, 1, 0] = float("nan")
    base[1, 0, 0] = -0.0
    actual = forward(inputs, base, lse)
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
    outside = forward(inputs._replace(row_ids=torch.tensor([2, 0, -2], dtype=torch.int32)), base, lse)
    assert all(x[[0, 2]].isnan().all() and x[1].isfinite().all() for x in outside)


@pytest.mark.parametrize("prefix_len", [5, 40])
def test_runs_of_several_tiles_have_the_same_bits(prefix_len, monkeypatch):
    """The base's lse is read a tile ahead. A device that holds no program makes every run as long as can be."""
    shape = Shape(num_heads=4, num_kv_heads=2, batch=2, q_len=70, prefix_len=prefix_len)
    inputs = make_inputs(shape, torch.float32)
    lse = torch.randn(2, 4, 70)
    apart = forward(inputs, inputs.grad_out, lse)
    forget()
    monkeypatch.setattr(prefix_term, "PROCESSORS", dict.fromkeys(prefix_term.PROCESSORS, 0))
    together = forward(inputs, inputs.grad_out, lse)
    forget()
    assert all(same_bits(x, y) for x, y in zip(apart, together, strict=True))


@pytest.mark.parametrize("shape", [
    BANK, BANK._replace(batch=1, q_len=18, head_dim=64, prefix_len=40, num_prefixes=1), BANK._replace(head_dim=200),
    BANK._replace(q_len=1, softcap=2.0, num_heads=4, num_kv_heads=2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_a_prefix_alone(dtype, shape):
    """A merge into nothing is the attention over the prefix. A base's part of the gradient of query is added."""
    inputs = make_inputs(shape, dtype)
    plain, exact = eager(SHARED, inputs, dtype), eager(SHARED, inputs, torch.float64)
    nothing = torch.zeros_like(inputs.query), torch.full(inputs.query.shape[:3], float("-inf"))
    merged = forward(inputs, *nothing)  # its own: backward finds the scores that are in this lse
    actual, base_grad = backward(inputs, merged), make_inputs(shape, dtype, seed=1).query
    for name in GRADS:
        assert_within_budget(actual[name], plain[name], exact[name], name)
    added = backward(inputs, merged, strided(base_grad))
    expected, wanted = plain["query"] + base_grad, exact["query"] + base_grad.double()
    assert_within_budget(added["query"], expected, wanted, "query")
    assert all(same_bits(added[name], actual[name]) for name in GRADS[1:])


@pytest.mark.parametrize("prefix_len", [5, 40])
def test_a_gradient_has_the_same_bits_whichever_are_asked_for(prefix_len):
    inputs = make_inputs(BANK._replace(prefix_len=prefix_len), torch.float32)
    full = eager(SHARED, inputs, torch.float32)
    merged = full["out"], full["lse"]
    whole = backward(inputs, merged)
    for query, prefix in ((True, False), (False, True), (False, False)):
        some = backward(inputs, merged, needs=(query, prefix))
        for name, need in zip(GRADS, (query, prefix, prefix), strict=True):
            assert same_bits(some[name], whole[name]) if need else some[name].shape == (0,), name


def test_rows_and_entries_are_isolated():
    """NaN in a row and in its entry; a row alone has the bits that it has in a batch."""
    inputs = make_inputs(BANK, torch.float32)._replace(row_ids=torch.tensor([0, 2, -1], dtype=torch.int32))
    base, lse = inputs.grad_out.clone(), torch.randn(inputs.query.shape[:3])
    merged = forward(inputs, base, lse)
    expected = backward(inputs, merged)
    one = inputs.rows(slice(1, 2))
    alone = forward(one, base[1:2], lse[1:2])
    assert all(same_bits(x[0], y[1]) for x, y in zip(alone, merged, strict=True))
    assert same_bits(backward(one, alone)["prefix_key"][2], expected["prefix_key"][2])
    inputs = inputs.map(torch.clone)
    inputs.query[0], inputs.prefix_key[0], inputs.prefix_value[0] = (float("nan"),) * 3
    actual = forward(inputs, base, lse)
    assert all(same_bits(x[1:], y[1:]) and x[0].isnan().all() for x, y in zip(actual, merged, strict=True))
    grads = backward(inputs, actual)
    assert same_bits(grads["query"][1:], expected["query"][1:])
    for name in GRADS[1:]:
        assert same_bits(grads[name][1:], expected[name][1:]) and grads[name][0].isnan().all(), name


@pytest.mark.parametrize(
    ("head_dim", "dtype", "error", "message"),
    [
        (8, torch.float64, TypeError, "fp32, bf16 or fp16, got torch.float64"),
        (257, torch.float32, ValueError, "head_dim must be at most 256, got 257"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error(head_dim, dtype, error, message):
    inputs = make_inputs(BANK._replace(head_dim=head_dim), dtype)
    with pytest.raises(error, match=rf"prefix_merge \(Triton\): .*{message}"):
        forward(inputs, inputs.query, torch.zeros(inputs.query.shape[:3]))
