"""Cases that go wrong in every way, for tests/benchmarks/test_gpu.py."""

import os
import threading

import torch

from benchmarks.gpu_tools import compare


def _compare(bench, **forms):
    yield from compare(
        bench, "gated_prefix fake", "3 numbers", forms, bytes_moved=24, exact=torch.ones(3).double
    )


def good(bench):
    yield from _compare(bench, fastadapter=lambda: torch.ones(3), eager=lambda: torch.ones(3))


def wrong(bench):
    yield from _compare(bench, fastadapter=lambda: torch.full((3,), 2.0), eager=lambda: torch.ones(3))


def hangs_after_a_row(bench):
    yield from good(bench)
    if not bench.warm:
        wait_for_ever()


def hangs_at_once(bench):
    wait_for_ever()
    yield


def wait_for_ever():
    threading.Event().wait()


def dies(bench):
    os._exit(3)
    yield


CASES = {case.__name__: case for case in (wrong, hangs_after_a_row, hangs_at_once, dies, good)}
