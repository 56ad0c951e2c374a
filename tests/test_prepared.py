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
    base, query = random(3, 1, 4, 24, seed=3).to(dtype).transpose(1, 2), random(3, 4, 1, 24, seed=4).to(dtype)
    operands = (key.to(dtype), value.to(dtype), gate, row_ids, 0.3, "tanh")
    number = prepared.prepare_gated_prefix(base, query, *operands)
    longer = [random(3, 4, 7, 24, seed=seed).to(dtype) for seed in (5, 6)]
    for pair in ((base, query), (base, -query), (-base, query), (query, query), longer):
        expected = gated_prefix(*pair, *operands[:3], softmax_scale=0.3, row_ids=row_ids)
        assert same_bits(torch.ops.fastadapter.repeat_two(*pair, number), expected)


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
