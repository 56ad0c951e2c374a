"""The split-key decode kernels of both attention ops, by the budget of tests/support/budget.py.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16. Splits are made short, so that a few keys
make several of them. Gates are random and non-zero unless a test says so.
"""

import os
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before the import below.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from fastadapter.kernels import decode as kernels
from fastadapter.kernels import gated_prefix_attention, prefix_attention, target

from fastadapter import reference
from tests.support.budget import assert_within_budget, same_bits
from tests.support.far import far_apart
from tests.support.gated_prefix import device_of, on_device

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
OPS = ["gated_prefix_attention", "prefix_attention"]
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, from the interpreter, where a test multiplies Inf and NaN on purpose
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture
def short_splits(monkeypatch):
    """64 keys each."""
    monkeypatch.setattr(kernels, "MIN_SPLIT_ELEMENTS", 1)


class Shape(NamedTuple):
    batch: int = 2
    num_heads: int = 2
    num_kv_heads: int = 1
    q_len: int = 1
    kv_len: int = 150
    head_dim: int = 16
    prefix_len: int = 5
    num_prefixes: int = 3
    mask: str = "none"  # none, bool, float: of all heads together; bool-heads: one per head
    is_causal: bool = False
    window: int = 0
    softcap: float = 0.0

    def __str__(self):
        flags = [self.mask] * (self.mask != "none") + ["causal"] * self.is_causal
        flags += [f"w{self.window}"] * (self.window > 0) + [f"cap{self.softcap}"] * (self.softcap > 0)
        return "-".join(
            [f"b{self.batch}-h{self.num_heads}-kv{self.num_kv_heads}-t{self.q_len}-s{self.kv_len}"]
            + [f"d{self.head_dim}-p{self.prefix_len}-n{self.num_prefixes}", *flags]
        )


class Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    gate: torch.Tensor
    attn_mask: torch.Tensor | None
    row_ids: torch.Tensor | None


SHAPES = [
    Shape(num_heads=3, num_kv_heads=3, head_dim=40, num_prefixes=1),
    Shape(num_heads=6, num_kv_heads=2, head_dim=64, prefix_len=10, mask="bool"),
    Shape(batch=1, num_heads=8, num_kv_heads=1, q_len=3, kv_len=65, head_dim=80, prefix_len=40, mask="float"),
    Shape(batch=1, num_heads=2, num_kv_heads=2, kv_len=129, head_dim=128, prefix_len=100, mask="bool-heads"),
    Shape(batch=1, q_len=3, kv_len=40, head_dim=200, prefix_len=17),
    Shape(batch=1, num_heads=3, q_len=7, kv_len=70, softcap=2.0),
    Shape(batch=1, q_len=16, kv_len=90, is_causal=True, num_prefixes=1),
    Shape(batch=1, q_len=9, kv_len=9, is_causal=True, window=3, softcap=5.0),
    Shape(q_len=2, kv_len=1, head_dim=1, prefix_len=1),
    Shape(q_len=2, kv_len=0),
]


def make_inputs(shape, dtype, *, prefix_dtype=None, gate="random", seed=0):
    """Drawn in ``dtype``, so that every party sees the same rounded values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, of=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    b, h, kv, t, s, d = shape[:6]
    bank = (shape.num_prefixes, kv, shape.prefix_len, d)
    gates = draw(shape.num_prefixes, h, of=torch.float32)
    mask = None
    if shape.mask != "none":
        of_heads = h if shape.mask == "bool-heads" else 1
        scores = draw(b, of_heads, t, s, of=torch.float32)
        mask = (scores if shape.mask == "float" else scores > 0).expand(b, h, t, s)
    row_ids = None
    if shape.num_prefixes > 1:
        row_ids = torch.arange(shape.num_prefixes - 1, -2, -1).repeat(b)[:b].to(torch.int32)
    return Inputs(
        draw(b, h, t, d),
        draw(b, kv, s, d),
        draw(b, kv, s, d),
        draw(*bank, of=prefix_dtype or dtype),
        draw(*bank, of=prefix_dtype or dtype),
        gates if gate == "random" else torch.full_like(gates, gate),
        mask,
        row_ids,
    )


def launch(op, inputs, shape, *, gate_fn="tanh", softmax_scale=None):
    scale = softmax_scale or inputs.query.shape[-1] ** -0.5
    options = (shape.is_causal, shape.window, shape.softcap)
    *tensors, gate, mask, row_ids = (on_device(x, DEVICE) for x in inputs)
    if op == "gated_prefix_attention":
        out = kernels.gated_prefix_attention_decode(*tensors, gate, mask, row_ids, scale, gate_fn, *options)
    else:
        out = kernels.prefix_attention_decode(*tensors, mask, row_ids, scale, *options)
    return out.cpu()


def eager(op, inputs, shape, compute_dtype, *, gate_fn="tanh", softmax_scale=None):
    """The reference formulas with every intermediate in ``compute_dtype``."""
    options = {
        "softmax_scale": softmax_scale or inputs.query.shape[-1] ** -0.5,
        "row_ids": inputs.row_ids,
        "attn_mask": inputs.attn_mask,
        "is_causal": shape.is_causal,
        "window": shape.window or None,
        "softcap": shape.softcap or None,
        "compute_dtype": compute_dtype,
    }
    operands = inputs[:5]
    if op == "gated_prefix_attention":
        operands, options["gate_fn"] = inputs[:6], gate_fn
    if compute_dtype == torch.float64:
        operands = [x.double() for x in operands]
    return getattr(reference, op)(*operands, **options)[0]


def check(op, inputs, shape, actual, **options):
    dtype = inputs.prefix_key.dtype
    plain = eager(op, inputs, shape, dtype, **options)
    exact = eager(op, inputs, shape, torch.float64, **options)
    assert actual.dtype == inputs.query.dtype
    assert_within_budget(actual, plain, exact, op)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_are_within_budget(op, dtype, shape):
    inputs = make_inputs(shape, dtype)
    check(op, inputs, shape, launch(op, inputs, shape))


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
@pytest.mark.parametrize("op", OPS)
def test_splits_of_the_shipped_table(op, arch):
    """As long as the table makes them; the bits of a run do not change from one to the next."""
    shape = Shape(batch=1, head_dim=128, kv_len=300)
    inputs = make_inputs(shape, torch.float32)
    with target.assume(arch):
        actual = launch(op, inputs, shape)
        assert same_bits(launch(op, inputs, shape), actual)
    check(op, inputs, shape, actual)


@pytest.mark.parametrize("op", OPS)
def test_fp32_prefix_beside_half_activations(op):
    shape = Shape()
    inputs = make_inputs(shape, torch.float16, prefix_dtype=torch.float32)
    check(op, inputs, shape, launch(op, inputs, shape))


def test_identity_gate_and_scale():
    shape, options = Shape(kv_len=20), {"gate_fn": "identity", "softmax_scale": 0.7}
    inputs = make_inputs(shape, torch.float32)
    check(OPS[0], inputs, shape, launch(OPS[0], inputs, shape, **options), **options)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("op", OPS)
def test_static_cache(op):
    """Keys are a slice of a cache with other strides, and what the mask hides is never read."""
    shape = Shape(num_heads=4, num_kv_heads=2, kv_len=140, mask="bool")
    inputs = make_inputs(shape, torch.float32)
    hidden = torch.arange(shape.kv_len) >= 90
    inputs = inputs._replace(attn_mask=~hidden.expand(shape.batch, shape.num_heads, 1, -1))
    expected = launch(op, inputs, shape)
    check(op, inputs, shape, expected)

    def cache(x):  # (batch, seq, heads, head_dim) in memory, every second element, longer than it is used
        wide = torch.full((3, 200, 2, 32), float("nan"))
        view = wide.transpose(1, 2)[1:, :, 10:150, ::2]
        return view.copy_(x).masked_fill_(hidden[:, None], float("nan"))

    views = inputs._replace(key=cache(inputs.key), value=cache(inputs.value))
    assert same_bits(launch(op, views, shape), expected)
    floats = torch.zeros(views.attn_mask.shape).masked_fill_(~views.attn_mask, float("-inf"))
    assert same_bits(launch(op, views._replace(attn_mask=floats), shape), expected)


@pytest.mark.parametrize("op", OPS)
def test_strided_operands(op):
    shape = Shape(q_len=2, kv_len=20, mask="float")
    inputs = make_inputs(shape, torch.float32)

    def swapped(x):
        return x if x is None or x.dim() != 4 else x.transpose(1, 2).contiguous().transpose(1, 2)

    views = Inputs(*(swapped(x) for x in inputs))._replace(gate=inputs.gate.t().contiguous().t())
    actual = launch(op, views, shape)
    assert same_bits(actual, launch(op, inputs, shape))
    assert actual.stride() == views.query.stride()


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("op", OPS)
def test_rows_are_isolated(op):
    """A row has the bits it has alone, whatever its neighbours and their bank entries hold; another id shows."""
    shape = Shape(batch=3, mask="bool")
    inputs = make_inputs(shape, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([2, 0, 1], dtype=torch.int32))
    alone = Inputs(*(x[1:2] for x in inputs[:3]), *inputs[3:6], inputs.attn_mask[1:2], inputs.row_ids[1:2])
    expected = launch(op, alone, shape._replace(batch=1))
    for name in ("query", "key", "value"):
        getattr(inputs, name)[[0, 2]] = float("nan")
    for name in ("prefix_key", "prefix_value", "gate"):
        getattr(inputs, name)[[1, 2]] = float("nan")
    actual = launch(op, inputs, shape)
    assert same_bits(actual[1:2], expected)
    assert actual[[0, 2]].isnan().all()
    other = alone._replace(row_ids=torch.tensor([1], dtype=torch.int32), gate=torch.ones_like(alone.gate))
    other.prefix_value[1] = 3.0
    assert not same_bits(launch(op, other, shape._replace(batch=1)), expected)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rows_without_an_adapter(op, dtype):
    """-1, and a gate of zero, are the same kernel without a prefix bit for bit, though the bank holds Inf."""
    shape = Shape(num_heads=4)
    inputs = make_inputs(shape, dtype)._replace(row_ids=torch.tensor([-1, 1], dtype=torch.int32))
    actual = launch(op, inputs, shape)
    none = inputs._replace(row_ids=torch.full_like(inputs.row_ids, -1))
    base = launch(op, none, shape)
    check(op, none, shape, base)
    assert same_bits(actual[0], base[0]) and not same_bits(actual[1], base[1])
    for name in ("prefix_key", "prefix_value"):
        getattr(inputs, name).fill_(float("inf"))
    assert same_bits(launch(op, none, shape), base)
    if op == "gated_prefix_attention":
        zero = inputs._replace(gate=torch.zeros_like(inputs.gate))
        assert same_bits(launch(op, zero, shape), base)


@pytest.mark.parametrize("op", OPS)
def test_ids_outside_the_bank_show_as_nan(op):
    shape = Shape(batch=4, kv_len=10)
    inputs = make_inputs(shape, torch.float32)
    inputs = inputs._replace(row_ids=torch.tensor([0, 3, -2, 2**31 - 1], dtype=torch.int32))
    actual = launch(op, inputs, shape)
    assert actual[0].isfinite().all() and actual[1:].isnan().all()


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("op", OPS)
def test_queries_that_see_no_key(op):
    """The base term is zero there, also where every split is hidden; a row without a prefix too is zero."""
    shape = Shape(q_len=2, kv_len=100, mask="bool")
    inputs = make_inputs(shape, torch.float32)._replace(row_ids=torch.tensor([0, -1], dtype=torch.int32))
    mask = inputs.attn_mask.clone()
    mask[:, :, 1] = False
    mask[:, :, 0, 64:] = False
    inputs = inputs._replace(attn_mask=mask)
    actual = launch(op, inputs, shape)
    check(op, inputs, shape, actual)
    assert not actual[1, :, 1].any() and actual[0, :, 1].abs().min() > 0


@pytest.mark.parametrize("op", OPS)
def test_extreme_scores_and_masks(op):
    """Scores of 1e4; and a row whose mask is the lowest finite value everywhere, which hides nothing from itself."""
    shape = Shape(mask="float", kv_len=70, num_prefixes=1)
    inputs = make_inputs(shape, torch.float32)
    inputs = inputs._replace(query=inputs.query * 1e4, key=inputs.key * 4)
    check(op, inputs, shape, launch(op, inputs, shape))
    inputs = inputs._replace(query=inputs.query * 1e-4)
    lowest = torch.full_like(inputs.attn_mask, torch.finfo(torch.float32).min)
    inputs = inputs._replace(attn_mask=lowest)
    check(op, inputs, shape, launch(op, inputs, shape))


@pytest.mark.parametrize("axis", [0, 2])
def test_strides_beyond_32_bits(axis):
    """Rows and keys whose offsets need 64 bits."""
    shape = Shape(batch=3, kv_len=3)
    inputs = make_inputs(shape, torch.float16)
    far = {name: far_apart(getattr(inputs, name), axis) for name in ("key", "value")}
    assert same_bits(launch(OPS[0], inputs._replace(**far), shape), launch(OPS[0], inputs, shape))


@pytest.mark.parametrize("shape", [Shape(batch=0), Shape(q_len=0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_batches(op, shape):
    inputs = make_inputs(shape, torch.float32)
    assert launch(op, inputs, shape).shape == inputs.query.shape


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("op", OPS)
def test_the_op_takes_this_route_without_backward(op):
    """Few queries, keys worth two splits, nothing to save; with something to save, the single pass."""
    shape = Shape(batch=1, mask="bool", softcap=3.0)
    inputs = make_inputs(shape, torch.float32)
    *tensors, gate, mask, row_ids = (on_device(x, DEVICE) for x in inputs)
    module, gates, names = prefix_attention, (), ()
    if op == "gated_prefix_attention":
        module, gates, names = gated_prefix_attention, (gate,), ("tanh",)
    run = getattr(module, f"{op}_forward")
    arguments = (*tensors, *gates, mask, None, row_ids, 0.3, *names, False, 0, shape.softcap)
    results, saved = run(*arguments, False), run(*arguments, True)
    assert same_bits(results[0].cpu(), launch(op, inputs, shape, softmax_scale=0.3))
    assert [x.shape for x in results[1:]] == [(0,)] * len(results[1:])
    assert [x.dtype for x in results] == [x.dtype for x in saved]
    check(op, inputs, shape, saved[0].cpu(), softmax_scale=0.3)
    assert kernels.takes(inputs.query, inputs.key, None, False)
    assert not kernels.takes(inputs.query, inputs.key, row_ids, False)
    assert not kernels.takes(inputs.query, inputs.key, None, True)


def test_the_table_knows_when_to_split():
    """Few queries over keys worth two splits; the batch is no argument, since a row's bits must not depend on it."""
    assert kernels.wants_decode("sm_90", 8, 1, 2048, 128)
    assert kernels.wants_decode("sm_90", 8, 16, 2048, 128)
    assert not kernels.wants_decode("sm_90", 8, 17, 2048, 128)
    assert not kernels.wants_decode("sm_90", 8, 1, 128, 128)
    assert not kernels.wants_decode("sm_90", 8, 1, 0, 128)
    for arch in (*kernels.PROCESSORS, "gfx1100"):
        for heads in (1, 3, 8, 32, 128):
            for kv_len in (1, 65, 2048, 131072):
                split_len, num_splits = kernels._splits(arch, heads, kv_len, 128)
                assert split_len % 64 == 0 and 1 <= num_splits <= kernels.MAX_SPLITS
                assert (num_splits - 1) * split_len < kv_len <= num_splits * split_len


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "fp32, bf16 or fp16, got torch.float64"),
        ({"head_dim": 257}, ValueError, "head_dim must be at most 256, got 257"),
        ({"gate_fn": "relu"}, ValueError, "gate_fn must be 'tanh' or 'identity', got 'relu'"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error(change, error, message):
    shape = Shape(kv_len=2, head_dim=change.get("head_dim", 8))
    inputs = make_inputs(shape, change.get("dtype", torch.float32))
    with pytest.raises(error, match=message):
        launch(OPS[0], inputs, shape, gate_fn=change.get("gate_fn", "tanh"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
def test_bf16_in_the_interpreter_is_refused():
    with pytest.raises(TypeError, match="under TRITON_INTERPRET=1"):
        launch(OPS[1], make_inputs(Shape(), torch.bfloat16), Shape())
