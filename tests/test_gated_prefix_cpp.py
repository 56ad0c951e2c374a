"""What is special to the C++ ``gated_prefix``: instruction sets, threads, strides, padding, odd sizes.

The grid over dtypes and shapes that every backend passes is in test_gated_prefix.py. A layout or a number of
threads must not change a bit; an instruction set may, within the budget of tests/support/budget.py.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import GRADS, Shape, eager, make_inputs, needs_extension, run

pytestmark = needs_extension

RESULTS = ("out", *GRADS)
ODD_SHAPES = [
    *(Shape(q_len=5, head_dim=head_dim, prefix_len=3) for head_dim in (1, 40, 59, 111, 257)),
    Shape(batch=1, q_len=70, prefix_len=300, head_dim=24),
    Shape(batch=1, num_heads=2, num_kv_heads=1, q_len=2000, prefix_len=4, head_dim=16),
    Shape(batch=9, num_heads=9, num_kv_heads=3, q_len=1, prefix_len=10, head_dim=64, num_prefixes=3),
]
MIXED = Shape(batch=7, num_heads=6, num_kv_heads=2, q_len=67, prefix_len=10, head_dim=40, num_prefixes=3)


def assert_same_results(actual, expected):
    for name in RESULTS:
        assert same_bits(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes_are_within_budget(shape, dtype):
    """Sizes that fill no vector, a prefix longer than any tile, one row per head, long sums."""
    inputs = make_inputs(shape, dtype)
    actual, plain, exact = run(inputs, "cpp"), eager(inputs, dtype), eager(inputs, torch.float64)
    for name in RESULTS:
        assert_within_budget(actual[name], plain[name], exact[name], name)


@pytest.mark.parametrize("threads", [2, 3, 4, 7])
@pytest.mark.parametrize("shape", [MIXED, Shape(q_len=500, head_dim=64)], ids=str)
def test_threads_do_not_change_a_bit(shape, threads, default_threads):
    """Work is split by shapes alone, and partial sums are added in a fixed order."""
    inputs = make_inputs(shape, torch.float32)
    torch.set_num_threads(1)
    expected = run(inputs, "cpp")
    torch.set_num_threads(threads)
    assert_same_results(run(inputs, "cpp"), expected)


def test_a_token_has_the_same_bits_in_any_block():
    """Decoding one token gives the bits of the same token in a long sequence, wherever it stands in a vector."""
    inputs = make_inputs(Shape(batch=2, num_heads=6, num_kv_heads=2, q_len=37, head_dim=48), torch.float32)
    whole = run(inputs, "cpp")
    for t in (0, 3, 17, 36):
        token = inputs._replace(
            **{name: getattr(inputs, name)[:, :, t : t + 1] for name in ("base", "query", "grad_out")}
        )
        alone = run(token, "cpp")
        for name in ("out", "query"):
            assert same_bits(alone[name], whole[name][:, :, t : t + 1]), (name, t)


def test_gradients_of_an_entry_do_not_depend_on_other_rows():
    """The rows of one entry, alone, give the bits of its gradients in a mixed batch."""
    inputs = make_inputs(MIXED, torch.float32)
    mixed = run(inputs, "cpp")
    own = inputs.row_ids == 1
    alone = run(
        inputs._replace(
            **{name: getattr(inputs, name)[own] for name in ("base", "query", "grad_out", "row_ids")}
        ),
        "cpp",
    )
    for name in ("prefix_key", "prefix_value", "gate"):
        assert same_bits(alone[name][1], mixed[name][1]), name


def test_nan_of_a_head_without_a_gate_stays_there():
    """Heads of a group share the sums of the prefix gradients: one whose gate is zero adds nothing, not 0 * NaN."""
    inputs = make_inputs(Shape(), torch.float32)
    inputs.gate[0, 1] = 0.0
    expected = run(inputs, "cpp")
    for name in ("query", "grad_out"):
        poisoned = inputs._replace(**{name: getattr(inputs, name).clone()})
        getattr(poisoned, name)[:, 1] = float("nan")
        actual = run(poisoned, "cpp")
        for grad in ("prefix_key", "prefix_value"):
            assert same_bits(actual[grad], expected[grad]), (name, grad)


def spread(x, dim, step):
    """The values of ``x`` with other strides: every ``step``-th slot of a NaN-filled tensor along ``dim``."""
    sizes = list(x.shape)
    sizes[dim] *= step
    wide = torch.full(sizes, float("nan"), dtype=x.dtype)
    view = wide[tuple(slice(None, None, step) if i == dim else slice(None) for i in range(x.dim()))]
    return view.copy_(x)


LAYOUTS = {
    "heads-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "step-2-channels": lambda x: spread(x, x.dim() - 1, 2),
    "step-3-rows": lambda x: spread(x, x.dim() - 2, 3),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 37])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(layout, head_dim, dtype):
    """Neither strides nor NaN in the memory between the rows."""
    inputs = make_inputs(MIXED._replace(head_dim=head_dim), dtype)
    change = LAYOUTS[layout]
    names = ("base", "query", "prefix_key", "prefix_value", "grad_out")
    changed = inputs._replace(
        **{name: change(getattr(inputs, name)) for name in names}, gate=spread(inputs.gate, 1, 2)
    )
    actual = run(changed, "cpp")
    assert_same_results(actual, run(inputs, "cpp"))
    assert actual["out"].stride() == torch.empty_like(changed.base).stride()


def test_expanded_operands():
    """Stride 0, as broadcast activations and the gradient of a sum have it."""
    inputs = make_inputs(Shape(q_len=9), torch.float32)
    wide = inputs._replace(
        base=inputs.base[:1].expand(2, -1, -1, -1),
        query=inputs.query[:, :, :1].expand(-1, -1, 9, -1),
        grad_out=torch.ones(()).expand(inputs.grad_out.shape),
    )
    dense = wide._replace(
        **{name: getattr(wide, name).contiguous() for name in ("base", "query", "grad_out")}
    )
    actual, expected = run(wide, "cpp"), run(dense, "cpp")
    assert actual["out"].stride() == torch.empty_like(wide.base).stride()
    assert_same_results(actual, expected)


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    """Rows of one tensor that lie more than 2^31 elements apart; only the pages in use are ever touched."""
    inputs = make_inputs(Shape(q_len=3, head_dim=16), torch.bfloat16)
    gap = 2**31 + 64
    memory = torch.empty(2 * gap, dtype=torch.bfloat16)
    far = torch.as_strided(memory, inputs.query.shape, (gap, 48, 16, 1)).copy_(inputs.query)
    assert_same_results(run(inputs._replace(query=far), "cpp"), run(inputs, "cpp"))


def test_every_output_element_is_written():
    """The allocator hands freed memory back: an element that is left out would show the NaN put there before."""
    inputs = make_inputs(MIXED, torch.float32)
    for _ in range(3):
        junk = [torch.full_like(x, float("nan")) for x in (*inputs[:5], inputs.query)]
        del junk
        for name, result in run(inputs, "cpp").items():
            assert result.isfinite().all(), name


@pytest.mark.parametrize("row", [-2, 3])
def test_ids_out_of_range_never_reach_memory(row):
    """The registered op checks again: it can be called without the public function."""
    inputs = make_inputs(Shape(batch=2, num_prefixes=3), torch.float32)
    ids = torch.tensor([0, row], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"gated_prefix: row_ids must be in \[-1, 3\), got {row}"):
        torch.ops.fastadapter.gated_prefix(*inputs[:5], ids, 1.0, "tanh")


def test_wrong_operands_are_named():
    inputs = make_inputs(Shape(), torch.float32)
    base, query, key, value, gate = inputs[:5]
    op = torch.ops.fastadapter.gated_prefix
    with pytest.raises(RuntimeError, match="base must have size 16 in dim 3, got 15"):
        op(base[..., 1:], query, key, value, gate, None, 1.0, "tanh")
    with pytest.raises(RuntimeError, match="prefix_value must have size 5 in dim 2, got 4"):
        op(base, query, key, value[:, :, 1:], gate, None, 1.0, "tanh")
    with pytest.raises(RuntimeError, match=r"gate must have shape \(1, 4\)"):
        op(base, query, key, value, gate[:, 1:], None, 1.0, "tanh")
    with pytest.raises(RuntimeError, match="base must have the dtype of query"):
        op(base.half(), query, key, value, gate, None, 1.0, "tanh")
    with pytest.raises(RuntimeError, match="gate_fn must be 'tanh' or 'identity', got 'relu'"):
        op(base, query, key, value, gate, None, 1.0, "relu")


# What this machine can run; PyTorch itself dies when it is asked for more.
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
CAPABILITIES = CAPABILITIES[: CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1]

# Runs in a process of its own: the instruction set is chosen once, when the first op runs.
CAPABILITY_PROGRAM = """
import json, sys, torch
from fastadapter import ops
from tests.support.budget import assert_within_budget
from tests.support.gated_prefix import GRADS, Shape, eager, make_inputs, needs_extension, run

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in (Shape(), Shape(batch=5, q_len=67, prefix_len=17, head_dim=59, num_prefixes=2)):
        inputs = make_inputs(shape, dtype)
        actual, plain, exact = run(inputs, "cpp"), eager(inputs, dtype), eager(inputs, torch.float64)
        for name in ("out", *GRADS):
            assert_within_budget(actual[name], plain[name], exact[name], f"{dtype} {shape} {name}")

# Every half value survives the way to fp32 and back: the prefix adds an exact zero.
kept = {}
for dtype in (torch.float16, torch.bfloat16):
    base = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, -1, 64)
    zeros = torch.zeros(1, 1, 2, 64)
    out = ops.gated_prefix(base, torch.zeros_like(base), zeros, zeros, torch.ones(1, 1), backend="cpp")
    kept[str(dtype)] = torch.equal(out.float().nan_to_num(nan=1e9), base.float().nan_to_num(nan=1e9))
    # and sums round to nearest even: random values and ties
    steps = torch.randn(1, 1, 2048, 64, generator=torch.Generator().manual_seed(0))
    term = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(1))
    base = steps.to(dtype)
    out = ops.gated_prefix(base, base, zeros[:, :, :1], term, torch.ones(1, 1), gate_fn="identity", backend="cpp")
    kept[f"{dtype} rounding"] = torch.equal(out, (base.float() + term).to(dtype))
json.dump({"capability": torch.ops.fastadapter.cpu_capability(), "kept": kept}, sys.stdout)
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_is_within_budget(capability):
    """ATEN_CPU_CAPABILITY caps what is used, as in PyTorch; every choice keeps the budget and rounds alike."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    process = subprocess.run(
        [sys.executable, "-c", CAPABILITY_PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["capability"] == capability
    assert all(result["kept"].values()), result["kept"]
