"""Attention under a mask on a GPU: torch's own attention as it is, with the term on top or the prefix joined.

A CPU takes another way, so here it is told to take this one. Judged against the fp64 reference by the budget.
"""

import pytest
import torch

from fastadapter.ops import base_attention, composed
from tests.support.attention import GATED, SHARED, Shape, check, make_inputs, run


@pytest.mark.parametrize("row_ids", [False, True], ids=["one", "bank"])
@pytest.mark.parametrize("mask", ["bool", "float", "empty"])
@pytest.mark.parametrize("op", [GATED, SHARED])
def test_results_are_within_budget(op, mask, row_ids, monkeypatch):
    """``empty``: a query that sees no key gets 0 from the keys, and finite gradients."""
    monkeypatch.setattr(composed, "takes_masks", lambda query, options: options.attn_mask is not None)
    inputs = make_inputs(Shape(batch=3, num_prefixes=2 if row_ids else 1, mask=mask), torch.float32)
    found = run(op, inputs, "triton")
    check(op, inputs, found)


def test_a_row_without_an_adapter_reads_no_entry():
    """Entry 0 stands in for it, and NaN plus a mask of -inf is NaN."""
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    prefix = torch.full((1, 2, 3, 16), float("nan"))
    ids = torch.tensor([-1, -1], dtype=torch.int32)
    alone = torch.nn.functional.scaled_dot_product_attention(query, key, key, scale=0.25, enable_gqa=True)
    for mask in (torch.ones(2, 4, 5, 5, dtype=torch.bool), torch.zeros(2, 4, 5, 5)):
        out = composed.masked_joined(query, key, key, prefix, prefix, ids, mask, 0.25)
        assert torch.allclose(out, alone, atol=1e-6)


def test_a_mask_that_is_infinite_in_half_alone_hides_a_query_from_every_key():
    query, key = torch.randn(1, 2, 3, 16).half(), torch.randn(1, 2, 4, 16).half()
    mask = torch.zeros(1, 1, 3, 4)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    out = base_attention.masked_attention(query, key, key, mask, 0.25)
    assert out.isfinite().all() and not out[:, :, 1].any() and out[:, :, 0].any()


def test_an_id_outside_the_bank_is_nan_and_no_index():
    """A device cannot raise: indexing with it would end the process's use of the device."""
    query, key = torch.randn(3, 4, 5, 16), torch.randn(3, 2, 5, 16)
    prefix = torch.randn(2, 2, 3, 16)
    ids, mask = torch.tensor([0, 7, -1], dtype=torch.int32), torch.ones(3, 4, 5, 5, dtype=torch.bool)
    out = composed.masked_joined(query, key, key, prefix, prefix, ids, mask, 0.25)
    assert out[1].isnan().all() and out[::2].isfinite().all()
    alone = torch.nn.functional.scaled_dot_product_attention(
        query[2:], key[2:], key[2:], scale=0.25, enable_gqa=True
    )
    assert torch.allclose(out[2:], alone, atol=1e-6)


def test_addresses_that_the_kernels_of_torch_cannot_read_are_told():
    """On a card an unaligned query ended in "misaligned address" and took the process's device with it."""
    x = torch.zeros(2, 4, 8, 64, dtype=torch.bfloat16)
    assert base_attention.aligned(x) and base_attention.aligned(x.transpose(1, 2))
    assert base_attention.aligned(x[:1].expand(2, -1, -1, -1))
    assert not base_attention.aligned(torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape))
    assert not base_attention.aligned(torch.zeros(2, 4, 8, 65, dtype=x.dtype)[..., :64])
