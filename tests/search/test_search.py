"""Random shapes, strides, dtypes, masks, banks and gates on every backend, judged by tests/search/checks.py.

The default tests draw the same few cases in every run. ``-m slow`` draws new ones each time, thousands of them; a
failure prints the smallest case that still fails: ``check(Case(...), "cpp")`` reproduces it.
``python -m tests.search`` runs the long search and stores its summary.
"""

import pytest
import torch

from tests.search.attention import OPERANDS
from tests.search.search import CPU, TRITON, search
from tests.support.attention import runs_here

OPS = [*OPERANDS, "bottleneck"]
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "one_thread"),
    # numpy's, from the interpreter, where NaN neighbours are multiplied on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture
def one_thread(default_threads):
    """Problems are tiny: a second thread only waits."""
    torch.set_num_threads(1)


def backends_of(op, wanted):
    """Those of ``wanted`` that have kernels of ``op`` and can run here."""
    found = [backend for backend in wanted if runs_here(op, backend)]
    return found or pytest.skip(f"no {wanted[0]} kernel of {op} runs here")


@pytest.mark.parametrize("op", OPS)
def test_cpu(op):
    search(op, backends_of(op, CPU), 40, derandomize=True)


@pytest.mark.parametrize("op", OPS)
def test_triton(op):
    search(op, backends_of(op, TRITON), 3, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_cpu_long(op):
    search(op, backends_of(op, CPU), 2000)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_triton_long(op):
    search(op, backends_of(op, TRITON), 300)
