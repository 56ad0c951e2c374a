"""Calls that are prepared once: the bits of the op, for whatever comes."""

import gc

import pytest
import torch

from fastadapter.ops import bottleneck, gated_prefix, prepared
from tests.support.budget import same_bits
from tests.support.gated_prefix import needs_extension

pytestmark = needs_extension


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(row_ids=None):
    n = 1 if row_ids is None else 3
    return random(n, 12, 40), random(n, 40, 12, seed=1), random(n, 12, seed=2), random(n, 40, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ids", [None, [0, 2, -1, 2]])
def test_a_bottleneck_has_the_bits_of_the_op(ids, dtype):
    row_ids = None if ids is None else torch.tensor(ids, dtype=torch.int32)
    operands = [each.double() if dtype == torch.float64 else each for each in weights(row_ids)]
    x = random(4, 1, 40).to(dtype)
    number = prepared.prepare_bottleneck(x, *operands, row_ids, "gelu", 0.5)
    # as it was prepared, other values, other sizes and strides
    for each in (x, -x, random(4, 3, 40, seed=5).to(dtype), random(4, 40, 2).to(dtype).transpose(1, 2)):
        expected = bottleneck(each, *operands, residual=each, activation="gelu", scale=0.5, row_ids=row_ids)
        found = torch.ops.fastadapter.repeat(each, number)
        assert same_bits(found, expected) and found.stride() == expected.stride()
    assert torch.ops.fastadapter.release(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_prefix_has_the_bits_of_the_op(dtype):
    key, value, gate = random(2, 2, 5, 24), random(2, 2, 5, 24, seed=1), random(2, 4, seed=2)
    row_ids = torch.tensor([1, -1, 0], dtype=torch.int32)
    output, query = random(3, 1, 4, 24, seed=3).to(dtype), random(3, 4, 1, 24, seed=4).to(dtype)
    operands = (key.to(dtype), value.to(dtype), gate, row_ids, 0.3, "tanh")
    number = prepared.prepare_gated_prefix(output, query, *operands)
    longer = [random(3, 7, 4, 24, seed=5).to(dtype), random(3, 4, 7, 24, seed=6).to(dtype)]
    strided = query.transpose(1, 2)
    for pair in ((output, query), (output, -query), (-output, query), (strided, query), longer):
        by_head = pair[0].transpose(1, 2)
        expected = gated_prefix(by_head, pair[1], *operands[:3], softmax_scale=0.3, row_ids=row_ids)
        found = torch.ops.fastadapter.repeat_two(*pair, number)
        assert same_bits(found, expected.transpose(1, 2)) and found.shape == pair[0].shape


@pytest.mark.parametrize("by_input", [True, False], ids=["input", "output"])
@pytest.mark.parametrize("own", [True, False], ids=["own bias", "no own bias"])
@torch.no_grad()
def test_a_scaled_linear_has_the_bits_of_three_operations(own, by_input):
    weight = torch.nn.Parameter(random(24, 40))
    own_bias = random(24, seed=1) if own else None
    scale, bias = random(40 if by_input else 24, seed=2), random(24, seed=3)
    number = prepared.prepare_scaled_linear(weight, own_bias, scale, bias, by_input)

    def look():
        rows = [random(*shape, seed=4) for shape in ((1, 1, 40), (8, 1, 40), (2, 3, 40), (5, 40))]
        for x in (*rows, random(40, 6).T.expand(2, 6, 40)):
            y = torch.nn.functional.linear(x * scale if by_input else x, weight, own_bias) + bias
            found = torch.ops.fastadapter.repeat(x, number)
            assert same_bits(found, y if by_input else y * scale) and found.is_contiguous()

    look()
    for values in (weight.data, scale, bias):
        values.mul_(1.5)
    look()
    weight.data = random(40, 24, seed=5).T  # other memory, which lies otherwise
    look()
    with pytest.raises(RuntimeError, match="the last of size 40"):
        torch.ops.fastadapter.repeat(random(1, 1, 24), number)
    assert torch.ops.fastadapter.release(number)


def test_numbers_end_with_what_holds_them():
    numbers = []

    def prepare(x):
        numbers.append(prepared.prepare_bottleneck(x, *weights(), None, "relu", 1.0))
        return numbers[-1]

    repeated = prepared.Repeated(prepare)
    x = random(2, 1, 40)
    assert repeated(prepared.MOST_ROWS + 1, x) is None and not numbers
    assert same_bits(repeated(2, x), repeated(2, x)) and len(numbers) == 1
    del repeated
    gc.collect()
    with pytest.raises(RuntimeError, match=f"no prepared call {numbers[0]}"):
        torch.ops.fastadapter.repeat(x, numbers[0])


def test_what_does_not_fit_is_refused_when_it_is_prepared():
    with pytest.raises(RuntimeError, match="up_weight must have size 40 in dim 1"):
        prepared.prepare_bottleneck(
            random(1, 1, 40), random(1, 12, 40), random(1, 39, 12), None, None, None, "relu", 1.0
        )
