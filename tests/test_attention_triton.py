"""The Triton launchers of both attention ops, by the budget of tests/support/budget.py; their public ops: elsewhere.

Without a GPU the kernels run in Triton's interpreter, slowly and in fp32 and fp16 alone. Most tests use tiles of 16,
so that a few dozen positions already make several tiles, masked and unmasked, and several blocks of prefix; one runs
the tiles that are shipped.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import attention, gated_prefix_attention, prefix_attention

from tests.support.attention import GATED, OPERANDS, SAVED, SHARED, Shape, check, make_inputs, packed
from tests.support.gated_prefix import device_of, on_device

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
KERNELS = {GATED: gated_prefix_attention, SHARED: prefix_attention}
BOTH = pytest.mark.parametrize("op", [GATED, SHARED])
ACTIVATIONS = ("query", "key", "value")
SMALL = attention.Tiles(block_m=16, block_n=16, block_p=16, num_warps=4, num_stages=1)
SHAPES = [
    Shape(batch=1, num_heads=4, num_kv_heads=2, q_len=1, kv_len=3, head_dim=40, prefix_len=1),
    Shape(batch=2, num_heads=4, num_kv_heads=2, q_len=7, kv_len=20, head_dim=60, prefix_len=17, mask="float"),
    Shape(
        batch=1, num_heads=4, num_kv_heads=1, q_len=17, kv_len=18, head_dim=80, prefix_len=10, mask="causal"
    ),
    Shape(
        batch=3, num_heads=1, num_kv_heads=1, q_len=37, kv_len=18, num_prefixes=3, mask="causal", softcap=2.0
    ),
    Shape(batch=1, num_heads=2, num_kv_heads=2, q_len=63, kv_len=63, mask="causal", window=20, prefix_len=40),
    Shape(batch=2, num_heads=2, num_kv_heads=1, q_len=18, kv_len=16, mask="empty", num_prefixes=2),
    packed(5, 0, 17, 20, num_heads=2, num_kv_heads=1, prefix_len=17, num_prefixes=2),
    packed(0, 33, 1, num_heads=2, num_kv_heads=2, mask="causal", window=3, softcap=5.0),
]
BANK = Shape(batch=4, num_heads=2, num_kv_heads=1, q_len=18, kv_len=18, mask="causal", num_prefixes=3)
PACKED = packed(18, 3, 0, 20, num_heads=2, num_kv_heads=1, mask="causal", num_prefixes=3)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Small tiles, or what a test assigns to ``tiles["all"]``."""
    chosen = {"all": SMALL}
    monkeypatch.setattr(attention, "config", lambda kernel, *_: chosen.get(kernel, chosen["all"]))
    return chosen


def launch(op, inputs, *, needs=(True, True, True, True), save=True):
    """Output, what is saved, and the gradients by name, from the launchers on this machine's device."""
    inputs = inputs.map(lambda x: on_device(x, DEVICE))
    options = inputs.schema_options(op)
    forward = getattr(KERNELS[op], f"{op}_forward")
    backward = getattr(KERNELS[op], f"{op}_backward")
    out, *kept = forward(*inputs.operands(op), *options, save)
    results = {"out": out, **dict(zip(SAVED[op], kept, strict=True))}
    if save:
        kept = kept if op == GATED else (out, *kept)
        needs = needs if op == GATED else needs[:3]
        grads = backward(inputs.grad_out, *inputs.operands(op), *kept, *options, *needs)
        results |= dict(zip(OPERANDS[op], grads, strict=True))
    return {name: x.cpu() for name, x in results.items()}


def banks(op):
    return OPERANDS[op][3:]


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_within_budget(op, shape):
    inputs = make_inputs(shape, torch.float32)
    check(op, inputs, launch(op, inputs))


@BOTH
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[6]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_within_budget(op, shape, dtype):
    inputs = make_inputs(shape, dtype)
    actual = launch(op, inputs)
    check(op, inputs, actual)
    assert {actual[name].dtype for name in (*ACTIVATIONS, "prefix_key", "prefix_value")} == {dtype}
    assert {actual[name].dtype for name in SAVED[op] if name != "base"} == {torch.float32}


@BOTH
def test_zero_keys(op):
    """The merge of a prefix into another attention runs its backward with no keys at all."""
    for prefix_len in (5, 17):
        inputs = make_inputs(
            Shape(batch=2, kv_len=0, q_len=18, prefix_len=prefix_len, num_prefixes=3), torch.float32
        )
        actual = launch(op, inputs)
        check(op, inputs, actual)
        assert actual["key"].shape == inputs.key.shape
