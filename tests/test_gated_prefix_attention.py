"""What is ``gated_prefix_attention``'s own; the rest is in test_attention_ops.py.

Judged against the two ops it joins (attention, ``gated_prefix``) by the budget of tests/support/budget.py, and bit for
bit where the gate is zero.
"""

import pytest
import torch

from fastadapter import ops
from tests.support.attention import GATED, OPERANDS, Shape, backends_of, check, make_inputs, packed, run
from tests.support.budget import assert_within_budget, same_bits

on_every_backend = pytest.mark.parametrize("backend", backends_of(GATED))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [Shape(mask="causal", batch=3), packed(3, 5)], ids=str)
def test_zero_gate_is_the_attention_bit_for_bit(backend, dtype, shape):
    """Also when the prefix holds Inf and NaN; then only the gate gets a gradient from the prefix."""
    inputs = make_inputs(shape, dtype, gate=0.0)
    rows = len(shape.lengths) or shape.batch
    without = run(GATED, inputs._replace(row_ids=torch.full((rows,), -1, dtype=torch.int32)), backend)
    zero = run(GATED, inputs, backend)
    assert same_bits(zero["out"], without["out"]) and same_bits(zero["out"], zero["base"].to(dtype))
    assert zero["gate"].abs().min() > 0
    inputs.prefix_value[:] = float("inf")
    inputs.prefix_key[:, :, 0] = float("nan")
    poisoned = run(GATED, inputs, backend)
    for name in ("out", "query", "key", "value"):
        assert same_bits(poisoned[name], without[name]), name
    for name in ("prefix_key", "prefix_value"):
        assert same_bits(poisoned[name].abs(), torch.zeros_like(poisoned[name])), name


@on_every_backend
def test_one_zero_gate_among_others(backend):
    """A head whose gate is zero keeps the bits of the base beside heads that change."""
    inputs = make_inputs(Shape(mask="causal"), torch.float32)
    inputs.gate[0, 1] = 0.0
    results = run(GATED, inputs, backend)
    assert same_bits(results["out"][:, 1], results["base"][:, 1])
    assert not same_bits(results["out"][:, 0], results["base"][:, 0])


@on_every_backend
def test_base_is_the_same_with_and_without_an_adapter(backend):
    """Output minus term: the saved base has the bits of the output of rows without an adapter."""
    inputs = make_inputs(Shape(batch=4, num_prefixes=2, mask="bool"), torch.float32)
    without = inputs._replace(row_ids=torch.full_like(inputs.row_ids, -1))
    assert same_bits(run(GATED, inputs, backend)["base"], run(GATED, without, backend)["out"])


@on_every_backend
@pytest.mark.parametrize("gate_fn", ["tanh", "identity"])
def test_equals_attention_and_the_separate_term(backend, gate_fn):
    """In fp32, ``gated_prefix`` on top of torch's attention, forward and every gradient."""
    inputs = make_inputs(Shape(mask="causal", num_prefixes=2, batch=3), torch.float32, gate_fn=gate_fn)
    actual = run(GATED, inputs, backend)
    check(GATED, inputs, actual)

    def separate(dtype):
        given = inputs.cast(dtype)
        leaves = [x.detach().clone().requires_grad_() for x in given.operands(GATED)]
        base = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], is_causal=True, enable_gqa=True)
        options = {"row_ids": given.row_ids, "gate_fn": gate_fn, "backend": "reference"}
        out = ops.gated_prefix(base, leaves[0], *leaves[3:], **options)
        out.backward(given.grad_out)
        return {"out": out.detach(), **{n: x.grad for n, x in zip(OPERANDS[GATED], leaves)}}

    single, exact = separate(torch.float32), separate(torch.float64)
    for name in ("out", *OPERANDS[GATED]):
        assert_within_budget(actual[name], single[name], exact[name], name)


@on_every_backend
def test_mask_window_and_softcap_are_the_base_s_alone(backend):
    """The term stays what it is when the base sees less: the difference of outputs is that of the bases."""
    inputs = make_inputs(Shape(q_len=9, kv_len=9), torch.float64 if backend != "triton" else torch.float32)
    free = run(GATED, inputs, backend)
    for options in ({"is_causal": True}, {"is_causal": True, "window": 2}, {"softcap": 0.5}):
        bound = run(GATED, inputs._replace(**options), backend)
        assert not torch.allclose(bound["base"], free["base"], rtol=1e-2)
        term, free_term = bound["out"] - bound["base"], free["out"] - free["base"]
        torch.testing.assert_close(term, free_term, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bound["prefix_value"], free["prefix_value"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bound["gate"], free["gate"], rtol=1e-4, atol=1e-5)


@on_every_backend
def test_order_of_the_prefix_does_not_matter(backend):
    inputs = make_inputs(Shape(prefix_len=7, mask="causal"), torch.float32)
    order = torch.randperm(7)
    shuffled = inputs._replace(
        prefix_key=inputs.prefix_key[:, :, order], prefix_value=inputs.prefix_value[:, :, order]
    )
    torch.testing.assert_close(run(GATED, inputs, backend)["out"], run(GATED, shuffled, backend)["out"])
