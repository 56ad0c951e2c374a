"""The toy model is smaller than the cost of sharing it between threads."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hangups_are_not_ignored():
    """As in a terminal: what runs the tests may ignore them (nohup), and a run leaves it at that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
