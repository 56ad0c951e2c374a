"""Settings that every test needs before torch, triton or transformers are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What cuBLAS needs where torch is asked for deterministic algorithms, as poisoned_memory does.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the cores. A thread that spins while it waits for one would take it from another worker.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from tests.support import interpreter, launches

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before any kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


RECORDER = launches.Recorder()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN, in Python and in C++, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def device_memory():
    """Give back what a test with gigabytes of gaps took on a GPU: workers share it."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()


@pytest.fixture
def default_threads():
    """Restore the number of threads after a test that changes it."""
    threads = torch.get_num_threads()
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick_interpreter():
    with interpreter.quick_interpreter(), launches.recorded(RECORDER):
        yield


def pytest_collection_modifyitems(items):
    """What looks at the other tests' launches runs last."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
