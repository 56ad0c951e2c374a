"""The toy model is smaller than the cost of sharing it between threads."""

import contextlib
import signal

import pytest
import torch

from fastadapter.training import last_feed_forward


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hangups_are_not_ignored():
    """As in a terminal: what runs the tests may ignore them (nohup), and a run leaves it at that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def tokens(monkeypatch):
    """How many tokens the last feed-forward computes for, in every pass in which it is spared, but those of proofs."""
    seen = []
    at = last_feed_forward._at

    @contextlib.contextmanager
    def watched(block, places, wanted):
        with at(block, places, wanted):
            yield
        if wanted.shape not in {(1, 8), (2, 8)}:
            seen.append(len(wanted.positions) if wanted.spared else 0)

    monkeypatch.setattr(last_feed_forward, "_at", watched)
    return seen
