"""What the tests themselves rely on where there is a GPU, as far as a machine without one can tell."""

import pytest
import torch

from tests.search.layouts import LAYOUTS
from tests.support.gated_prefix import on_device, same_layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (4, 6), (2, 0, 3, 4)], ids=str)
def test_a_copy_for_a_device_is_laid_out_alike(layout, shape):
    """Copying into an expanded tensor raises, and a copy from an odd address to an even one hides what it is for."""
    x = LAYOUTS[layout](torch.randn(shape))
    copy = same_layout(x, "cpu")
    assert copy.data_ptr() != x.data_ptr() or not x.numel()
    assert torch.equal(copy, x) and copy.stride() == x.stride()
    assert copy.data_ptr() % 64 == x.data_ptr() % 64


def test_what_is_there_already_is_not_copied():
    x = torch.ones(2)
    assert on_device(x, "cpu") is x and on_device(None, "cuda") is None
