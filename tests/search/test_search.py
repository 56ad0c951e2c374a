"""Random shapes, strides, dtypes, masks, banks and gates on every backend, judged by tests/search/checks.py.

The default tests draw the same few cases in every run. ``-m slow`` draws new ones each time, thousands of them; a
failure prints the smallest case that still fails: ``check(Case(...), "cpp")`` reproduces it.
``python -m tests.search`` runs the long search and stores its summary.
"""

import pytest
import torch

from tests.search.attention import OPERANDS
from tests.search.cases import BottleneckCase, Case
from tests.search.checks import check
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


# One crowded case of every op: the interpreter takes seconds for it, and minutes for a search.
CROWDED = [
    Case(
        "gated_prefix",
        num_kv_heads=1,
        num_prefixes=2,
        ids=(1, -1),
        prefix_len=17,
        q_len=3,
        gate="one-zero",
        scale=0.7,
        layouts=("swapped", "cut", "every_other", "mirrored", "dense", "unaligned"),
        frozen=("prefix_value",),
    ),
    Case(
        "gated_prefix_attention",
        num_kv_heads=1,
        num_prefixes=2,
        ids=(1, 0, -1),
        lengths=(3, 0, 4),
        is_causal=True,
        window=2,
        softcap=5.0,
        layouts=("swapped", "cut", "every_other", "mirrored", "dense", "unaligned"),
        frozen=("key",),
    ),
    Case(
        "prefix_attention",
        num_kv_heads=1,
        num_prefixes=2,
        ids=(-1, 1),
        q_len=3,
        kv_len=18,
        mask="bool-b1ts",
        softcap=5.0,
        layouts=("every_other", "unaligned", "swapped", "cut", "mirrored", "spread_rows"),
        frozen=("prefix_key", "prefix_value"),
    ),
    BottleneckCase(
        num_prefixes=2,
        ids=(-1, 1),
        hidden=17,
        norm="layer_norm",
        absent=("residual",),
        tied=True,
        scale=0.3,
        zero_channels=True,
        layouts=("swapped", "mirrored", "cut"),
        frozen=("up_bias",),
    ),
]


@pytest.mark.parametrize("case", CROWDED, ids=[case.op for case in CROWDED])
def test_triton(case):
    check(case, *backends_of(case.op, TRITON))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_cpu_long(op):
    search(op, backends_of(op, CPU), 2000)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_triton_long(op):
    search(op, backends_of(op, TRITON), 300)
