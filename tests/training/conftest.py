"""The toy model is smaller than the cost of sharing it between threads."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)
