"""Cases that go wrong, for tests/benchmarks/test_gpu.py."""

import os
import threading

import torch

from benchmarks.gpu_tools import compare


def _compare(bench, name, result=1.0):
    forms = {"fastadapter": lambda: torch.full((3,), result), "eager": lambda: torch.ones(3)}
    exact = torch.ones(3).double
    yield from compare(bench, f"gated_prefix {name}", "3 numbers", forms, bytes_moved=24, exact=exact)


def wrong(bench):
    yield from _compare(bench, "wrong", 2.0)


def hangs_after_a_row(bench):
    yield from _compare(bench, "hangs_after_a_row")
    if not bench.warm:
        wait_for_ever()


def hangs_at_once(bench):
    wait_for_ever()
    yield


def wait_for_ever():
    threading.Event().wait(30)  # longer than any limit here: without one the tests are red, and end


def dies(bench):
    os._exit(3)
    yield


CASES = {case.__name__: case for case in (hangs_after_a_row, wrong, hangs_at_once, dies)}
