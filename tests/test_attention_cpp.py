"""What is special to the C++ attention ops: threads, instruction sets, paths by size, layouts, the registered ops.

The grid over dtypes, shapes and options that every backend passes is in test_attention_ops.py. A sequence with few
query rows reads its keys where they lie, one with many packs them; long ones are split. None of that may change what
a row or a packed sequence gives alone, nor may the number of threads.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from fastadapter import ops, reference
from tests.support.attention import (
    GATED,
    OPERANDS,
    SAVED,
    SHARED,
    Shape,
    check,
    eager,
    for_backward,
    make_inputs,
    packed,
    run,
)
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import needs_extension

pytestmark = needs_extension

BOTH = pytest.mark.parametrize("op", [GATED, SHARED])


def assert_same_results(op, actual, expected, label=""):
    for name in (name for name in ("out", *SAVED[op], *OPERANDS[op]) if name in expected):
        assert same_bits(actual[name], expected[name]), f"{label} {name}"


ODD_SHAPES = [
    *(Shape(1, 2, 1, 19, 21, head_dim, 3) for head_dim in (1, 33, 97, 256)),
    Shape(1, 3, 3, 53, 70, 59, 300, mask="float"),  # a prefix longer than a tile
    Shape(1, 4, 1, 130, 300, 40, 17, mask="causal", softcap=4.0),  # several blocks of keys
    Shape(1, 2, 1, 600, 600, 8, 4, mask="causal", window=70),  # blocks that are skipped; backward in parts
    Shape(2, 6, 2, 1, 1100, 24, 10, num_prefixes=2, mask="bool"),  # few query rows, keys in parts
    Shape(2, 4, 2, 3, 1030, 20, 10, num_prefixes=2, mask="causal"),  # parts that no query sees
    Shape(1, 4, 1, 60, 20, 16, 3, mask="causal", window=5),  # queries past all keys
    packed(5, 0, 60, 1, 17, num_prefixes=3, mask="causal", num_heads=6),
]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes_are_within_budget(op, shape, dtype):
    """Sizes that fill no vector, panel or tile, and every path by size."""
    inputs = make_inputs(shape, dtype)
    check(op, inputs, run(op, inputs, "cpp"), str(shape))


def forward_only(op, inputs):
    """The output where no gradient is needed: few query rows then read their keys where they lie."""
    with torch.no_grad():
        return getattr(ops, op)(*inputs.operands(op), **inputs.options(op), backend="cpp")


FEW_ROWS = [
    Shape(2, 6, 2, 1, 1100, 24, 10, num_prefixes=2, mask="bool"),  # keys in parts
    Shape(2, 4, 2, 3, 1030, 20, 10, num_prefixes=2, mask="causal"),  # parts that no query sees
    Shape(3, 7, 1, 2, 9, 33, 3, mask="float", softcap=4.0),
    Shape(2, 4, 1, 2, 2100, 16, 4, num_prefixes=2),
    packed(1, 0, 2, 3, num_prefixes=3, mask="causal", num_heads=6),
]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_few_query_rows(op, shape, dtype, default_threads):
    """Decoding: within budget, and equal for any number of threads."""
    inputs = make_inputs(shape, dtype)
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(forward_only(op, inputs))
    plain, exact = (eager(op, inputs, compute)["out"] for compute in (dtype, torch.float64))
    assert_within_budget(outs[0], plain, exact, str(shape))
    assert all(same_bits(outs[0], out) for out in outs[1:])


@BOTH
def test_backward_takes_the_scores_of_forward(op):
    """Where scores are 1e4, p = exp(score - lse) is off by the rounding of a score that is summed in another order.

    Few keys, so that no two scores are close: there the rounding of lse itself shows (docs/maths.md).
    """
    inputs = make_inputs(Shape(9, 7, 1, 1, 3, 17, 2, mask="float"), torch.float32)
    inputs = inputs._replace(query=inputs.query * 1e4)
    check(op, inputs, run(op, inputs, "cpp"))


THREADED = [
    Shape(3, 6, 2, 53, 70, 24, 10, num_prefixes=2, mask="causal"),
    Shape(1, 2, 1, 600, 600, 16, 4, mask="causal"),
    Shape(2, 4, 1, 2, 2100, 16, 4, num_prefixes=2),
    packed(30, 70, 1, 0, 90, 2, num_prefixes=3, mask="causal", head_dim=40),
]


@BOTH
@pytest.mark.parametrize("shape", THREADED, ids=str)
def test_threads_do_not_change_a_bit(op, shape, default_threads):
    """Work is split by the sizes of a sequence alone, and partial sums are added in a fixed order."""
    inputs = make_inputs(shape, torch.float32)
    torch.set_num_threads(1)
    expected = run(op, inputs, "cpp")
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_results(op, run(op, inputs, "cpp"), expected, f"{threads} threads:")


@BOTH
@pytest.mark.parametrize(
    "shape",
    [
        Shape(3, 4, 2, 50, 60, 16, 5, num_prefixes=2, mask="bool"),
        Shape(3, 4, 1, 520, 40, 16, 5, num_prefixes=2),
        Shape(3, 4, 2, 2, 1100, 16, 5, num_prefixes=2, mask="bool"),
    ],
    ids=str,
)
def test_a_row_has_the_bits_it_has_alone(op, shape):
    """On every path, whatever the neighbours hold."""
    inputs = make_inputs(shape, torch.float32)
    poisoned = inputs.map(lambda x: x.clone())
    poisoned.key[0] = poisoned.value[0] = poisoned.query[0] = float("nan")
    together = run(op, poisoned, "cpp")
    for row in (1, 2):
        alone = run(op, inputs.rows(slice(row, row + 1)), "cpp")
        for name in {"query", "key", "value", "out", *SAVED[op]} & alone.keys():
            assert same_bits(together[name][row : row + 1], alone[name]), f"row {row} {name}"


@BOTH
@pytest.mark.parametrize("mask", ["", "causal"])
def test_a_packed_sequence_has_the_bits_it_has_alone(op, mask):
    """Sequences of both paths in one batch, one of them full of NaN."""
    inputs = make_inputs(packed(3, 60, 1, 0, 40, num_prefixes=3, mask=mask, head_dim=24), torch.float32)
    poisoned = inputs.map(lambda x: x.clone())
    for x in (poisoned.query, poisoned.key, poisoned.value):
        x[:, :, 3:63] = float("nan")
    together = run(op, poisoned, "cpp")
    bounds = inputs.cu_seqlens.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if index == 1:
            continue
        alone = run(op, inputs.sequence(index), "cpp")
        for name in {"query", "key", "value", "out", *SAVED[op]} & alone.keys():
            assert same_bits(together[name][:, :, start:stop].contiguous(), alone[name]), f"{index} {name}"


@pytest.mark.parametrize(
    "shape", [Shape(num_prefixes=2, q_len=20), Shape(num_prefixes=2, kv_len=1100, q_len=1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_base_for_both_ops(shape, dtype):
    """A zero gate over a prefix of NaN, and rows of either op without an adapter: the same plain attention."""
    inputs = make_inputs(shape, dtype, gate=0.0)
    prefix_key = torch.full_like(inputs.prefix_key, float("nan"))
    none = torch.full((shape.batch,), -1, dtype=torch.int32)
    all_of_them = [
        run(GATED, inputs._replace(prefix_key=prefix_key), "cpp"),
        run(GATED, inputs._replace(row_ids=none), "cpp"),
        run(SHARED, inputs._replace(row_ids=none), "cpp"),
    ]
    for name in ("out", "query", "key", "value"):
        assert same_bits(all_of_them[0][name], all_of_them[1][name]), name
    for name in ("out", "lse"):
        assert same_bits(all_of_them[1][name], all_of_them[2][name]), name


@BOTH
@pytest.mark.parametrize("q_len", [2, 30])
def test_queries_that_see_nothing(op, q_len):
    """0 and -inf without the prefix, and no gradient from there; nothing is NaN."""
    inputs = make_inputs(Shape(q_len=q_len, mask="empty", num_prefixes=2), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([-1, 1], dtype=torch.int32))
    results = run(op, inputs, "cpp")
    assert (results["out"][0, :, 0] == 0).all()
    assert (results["lse"][0, :, 0] == float("-inf")).all()
    assert (results["query"][0, :, 0] == 0).all()
    for name in ("out", *OPERANDS[op]):
        assert results[name].isfinite().all(), name
    check(op, inputs, results)


def spread(x, dim, step):
    """The values of ``x`` with other strides: every ``step``-th slot of a NaN-filled tensor along ``dim``."""
    sizes = list(x.shape)
    sizes[dim] *= step
    wide = torch.full(sizes, float("nan"), dtype=x.dtype)
    view = wide[tuple(slice(None, None, step) if i == dim else slice(None) for i in range(x.dim()))]
    return view.copy_(x)


def shifted(x):
    """The values of ``x`` one element behind any alignment."""
    memory = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "heads-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "step-2-channels": lambda x: spread(x, 3, 2),
    "step-3-rows": lambda x: spread(x, 2, 3),
    "transposed": lambda x: x.mT.contiguous().mT,
    "shifted": shifted,
}


@BOTH
@pytest.mark.parametrize(
    "shape", [Shape(q_len=50, kv_len=40, head_dim=24), Shape(q_len=2, head_dim=37)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(op, layout, shape, dtype):
    """Neither strides, nor alignment, nor NaN in the memory between the rows; gradients keep their inputs' strides."""
    inputs = make_inputs(shape._replace(num_prefixes=2, mask="float"), dtype)
    names = ("query", "key", "value", "prefix_key", "prefix_value", "grad_out", "attn_mask")
    changed = inputs._replace(**{name: LAYOUTS[layout](getattr(inputs, name)) for name in names})
    actual = run(op, changed, "cpp")
    assert_same_results(op, actual, run(op, inputs, "cpp"))
    assert actual["out"].stride() == torch.empty_like(changed.query).stride()


@BOTH
def test_keys_and_values_of_different_layouts(op):
    """Where few query rows walk over several blocks of keys, each tensor goes by its own strides."""
    inputs = make_inputs(Shape(2, 4, 2, 1, 300, 24, 3), torch.float32)
    expected = forward_only(op, inputs)
    for name in ("key", "value"):
        changed = inputs._replace(**{name: spread(getattr(inputs, name), 2, 3)})
        assert same_bits(forward_only(op, changed), expected), name


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("q_len", [2, 20])
def test_offsets_beyond_32_bits(op, q_len):
    """Rows of one tensor more than 2^31 elements apart; only the pages in use are ever touched."""
    inputs = make_inputs(Shape(q_len=q_len, kv_len=q_len), torch.bfloat16)
    gap = 2**31 + 64

    def far(x):
        memory = torch.empty(2 * gap, dtype=x.dtype)
        return torch.as_strided(memory, x.shape, (gap, *x.stride()[1:])).copy_(x)

    moved = inputs._replace(query=far(inputs.query), key=far(inputs.key), value=far(inputs.value))
    registered = getattr(torch.ops.fastadapter, op)
    results = registered(*moved.operands(op), *moved.schema_options(op), False)
    expected = registered(*inputs.operands(op), *inputs.schema_options(op), False)
    assert same_bits(results[0], expected[0])


@BOTH
def test_every_element_is_written(op, poisoned_memory):
    """Also for entries that no row uses, rows without an adapter, sequences without tokens and unseen keys."""
    for shape in (
        Shape(num_prefixes=5, kv_len=20, mask="causal"),
        packed(0, 40, 0, 3, num_prefixes=2),
        Shape(q_len=0, num_prefixes=2),
        Shape(1, 2, 1, 520, 530, 8, 3, mask="causal"),
    ):
        results = run(op, make_inputs(shape, torch.float32), "cpp")
        for name in ("out", *OPERANDS[op]):
            assert results[name].isfinite().all(), f"{shape} {name}"


@BOTH
def test_the_value_of_a_hidden_key_may_be_any_number(op):
    """A cache may hold what it likes behind a mask: also a value whose product with the gradient overflows."""
    inputs = make_inputs(Shape(2, 4, 2, 20, 40, 16, 3, mask="bool"), torch.float32)
    inputs = inputs._replace(grad_out=inputs.grad_out.abs() + 1)
    inputs.attn_mask[..., 5] = False
    value = inputs.value.clone()
    inputs.value[:, :, 5] = 0.0
    value[:, :, 5] = torch.finfo(torch.float32).max / 2
    expected = run(op, inputs, "cpp")
    assert_same_results(op, run(op, inputs._replace(value=value), "cpp"), expected)


GRAD_SHAPES = [
    Shape(2, 2, 1, 5, 6, 3, 2, num_prefixes=2, mask="float", softcap=1.5),
    Shape(1, 4, 2, 6, 6, 4, 3, mask="causal", window=3),
    packed(4, 0, 1, 3, num_heads=2, num_kv_heads=1, head_dim=3, prefix_len=2, num_prefixes=2, mask="causal"),
]


@BOTH
@pytest.mark.parametrize("shape", GRAD_SHAPES, ids=str)
def test_gradcheck(op, shape):
    """Numerical derivatives of the registered forward against the registered backward."""
    from fastadapter import ops

    inputs = make_inputs(shape, torch.float64)
    leaves = [x.requires_grad_() for x in inputs.operands(op)]
    function = getattr(ops, op)
    assert torch.autograd.gradcheck(lambda *x: function(*x, **inputs.options(op), backend="cpp"), leaves)


@BOTH
def test_needs(op):
    """An unneeded gradient has shape (0,), a needed one the bits it has when all are needed."""
    inputs = make_inputs(Shape(q_len=60, kv_len=50, num_prefixes=2, head_dim=24), torch.float32)
    options = inputs.schema_options(op)
    out, *kept = getattr(torch.ops.fastadapter, op)(*inputs.operands(op), *options, True)
    saved = for_backward(op, out, kept)
    backward = getattr(torch.ops.fastadapter, f"{op}_backward")

    def gradients(needs):
        return backward(inputs.grad_out, *inputs.operands(op), *saved, *options, *needs)

    groups = [0, 1, 1, 2, 2, 3][: len(OPERANDS[op])]  # which flag each gradient hangs on
    everything = gradients([True] * (groups[-1] + 1))
    for flags in range(2 ** (groups[-1] + 1)):
        needs = [bool(flags >> i & 1) for i in range(groups[-1] + 1)]
        for name, group, grad, full in zip(OPERANDS[op], groups, gradients(needs), everything):
            expected = full if needs[group] else full.new_empty(0)
            assert same_bits(grad, expected), f"{name} with {needs}"


@BOTH
@pytest.mark.parametrize("row", [-2, 3])
def test_ids_out_of_range_never_reach_memory(op, row):
    """The registered op checks again: it can be called without the public function."""
    inputs = make_inputs(Shape(num_prefixes=3), torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, row], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=rf"{op}: row_ids must be in \[-1, 3\), got {row}"):
        getattr(torch.ops.fastadapter, op)(*inputs.operands(op), *inputs.schema_options(op), False)


@BOTH
@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens must end at q_len 7, got 5"),
        (
            {"cu_seqlens": torch.tensor([1, 7], dtype=torch.int32)},
            "must start at 0 and never decrease, got 1 at 0",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9, 7], dtype=torch.int32)},
            "cu_seqlens must end|never decrease, got 7 at 2",
        ),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens must be int32, got"),
        ({"value": torch.zeros(1, 2, 8, 16)}, "value must have size 7 in dim 2, got 8"),
        ({"key": torch.zeros(1, 2, 7, 16).half()}, "key and value must have the dtype of query"),
        ({"prefix_value": torch.zeros(1, 2, 4, 16)}, "prefix_value must have size 5 in dim 2, got 4"),
        ({"window": 2}, "window must be at least 0, and needs is_causal, got 2"),
        ({"softcap": -1.0}, "softcap must be at least 0, got -1"),
        ({"attn_mask": torch.zeros(1, 1, 7, 7, dtype=torch.int32)}, "attn_mask must be float64, float32"),
        (
            {"attn_mask": torch.zeros(1, 1, 7, 7), "is_causal": True},
            "attn_mask cannot be combined with is_causal",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_operands_are_named(op, change, message):
    inputs = make_inputs(Shape(batch=1, kv_len=7), torch.float32)._replace(**change)
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        getattr(torch.ops.fastadapter, op)(*inputs.operands(op), *inputs.schema_options(op), False)


def test_merge_keeps_the_bits_of_rows_without_an_adapter():
    """-0.0 and NaN too, on both paths by size."""
    for q_len in (1, 40):
        inputs = make_inputs(Shape(num_prefixes=2, q_len=q_len), torch.bfloat16)
        base = torch.full_like(inputs.query, -0.0)
        base[..., 3] = float("nan")
        lse = torch.full(base.shape[:3], float("-inf"))
        ids = torch.full((2,), -1, dtype=torch.int32)
        prefix = (inputs.query, inputs.prefix_key, inputs.prefix_value)
        out, merged = torch.ops.fastadapter.prefix_merge(base, lse, *prefix, ids, 0.25, 0.0)
        assert same_bits(out, base)
        assert same_bits(merged, lse)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("q_len", [1, 70])
def test_merge_is_within_budget(q_len, dtype, softcap):
    """Strided log-sum-exps, a base that saw nothing, and one far above or below the prefix."""
    inputs = make_inputs(Shape(q_len=q_len, num_prefixes=2, head_dim=40), dtype)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    lse = spread(torch.randn(2, 4, q_len, dtype=statistic), 2, 2)
    lse[0, 0, 0], lse[0, 1, 0], lse[1, 0, 0] = float("-inf"), 90.0, -90.0
    prefix = (inputs.query, inputs.prefix_key, inputs.prefix_value)
    results = torch.ops.fastadapter.prefix_merge(inputs.grad_out, lse, *prefix, inputs.row_ids, 0.3, softcap)
    options = {"softmax_scale": 0.3, "softcap": softcap or None, "row_ids": inputs.row_ids}
    plain = reference.prefix_merge(inputs.grad_out, lse, *prefix, compute_dtype=dtype, **options)
    wide = (x.double() for x in (inputs.grad_out, lse, *prefix))
    exact = reference.prefix_merge(*wide, **options)
    for name, actual, rounded, true in zip(("out", "lse"), results, plain, exact):
        visible = true.isfinite()
        assert_within_budget(*(torch.where(visible, x, 0) for x in (actual, rounded, true)), name)


# What this machine can run; PyTorch itself dies when it is asked for more.
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
CAPABILITIES = CAPABILITIES[: CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1]

# Runs in a process of its own: the instruction set is chosen once, when the first op runs.
CAPABILITY_PROGRAM = """
import json, sys, torch
from tests.support.attention import GATED, SHARED, Shape, check, make_inputs, packed, run

torch.set_num_threads(1)
shapes = (
    Shape(1, 4, 2, 67, 300, 59, 17, mask="float", softcap=2.0),
    Shape(3, 6, 2, 2, 30, 20, 5, num_prefixes=2, mask="bool"),
    packed(5, 0, 60, 1, num_prefixes=3, mask="causal", window=9),
)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in shapes:
        for op in (GATED, SHARED):
            inputs = make_inputs(shape, dtype)
            check(op, inputs, run(op, inputs, "cpp"), f"{op} {dtype} {shape}")
json.dump(torch.ops.fastadapter.cpu_capability(), sys.stdout)
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_is_within_budget(capability):
    """ATEN_CPU_CAPABILITY caps what is used, as in PyTorch; every choice keeps the budget."""
    process = subprocess.run(
        [sys.executable, "-c", CAPABILITY_PROGRAM],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == capability
