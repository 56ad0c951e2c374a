"""Random shapes, strides, dtypes, masks, banks and gates on every backend, judged by tests/search/checks.py.

The default tests draw the same few cases in every run. ``-m slow`` draws new ones each time, thousands of them; a
failure prints the smallest case that still fails: ``check(Case(...), "cpp")`` reproduces it.
``python -m tests.search`` runs the long search and stores its summary.
"""

import pytest
import torch

from tests.search.cases import STRATEGIES
from tests.search.search import CPU, TRITON, search
from tests.support.gated_prefix import needs_extension

OPS = list(STRATEGIES)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "one_thread"),
    # numpy's, from the interpreter, where NaN neighbours are multiplied on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture
def one_thread(default_threads):
    """Problems are tiny: a second thread only waits."""
    torch.set_num_threads(1)


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_cpu(op):
    search(op, CPU, 40, derandomize=True)


@pytest.mark.parametrize("op", OPS)
def test_triton(op):
    pytest.importorskip("triton")
    search(op, TRITON, 3, derandomize=True)


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_cpu_long(op):
    search(op, CPU, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_triton_long(op):
    pytest.importorskip("triton")
    search(op, TRITON, 300)
