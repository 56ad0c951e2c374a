"""Calls of ops on a GPU, good and bad, with CPU tensors that pass for a GPU's (tests/support/cuda_standin.py).

Correct means: a good call runs our kernels on the device of its tensors and agrees with the reference; a bad one raises
before anything is launched, or takes the reference and says why.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastadapter as fa
from fastadapter import reference
from fastadapter.ops import checks, registration
from fastadapter.ops.backends import MAX_FP32_HEAD_DIM, MAX_HEAD_DIM, automatic_backend, choose_backend
from tests.support.cuda_standin import cuda_standin, first_call, within

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
SECONDS = 120


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    with cuda_standin(monkeypatch, tmp_path / "cache") as state:
        yield state


def operands(prefix_len=3, head_dim=16, dtype=torch.float32, q_len=5):
    """base, query, prefix_key, prefix_value, gate."""
    query = torch.randn(2, 4, q_len, head_dim, dtype=dtype)
    bank = [torch.randn(1, 2, prefix_len, head_dim, dtype=dtype) for _ in range(2)]
    gate = torch.rand(1, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.3
    return [torch.randn_like(query), query, *bank, gate]


def expected(tensors):
    doubles = [x.double() for x in tensors]
    return reference.gated_prefix(
        *doubles, softmax_scale=tensors[1].shape[-1] ** -0.5, gate_fn="tanh", row_ids=None
    )


@pytest.mark.parametrize("prefix_len, head_dim", [(1025, 8), (3, 8), (1, 128)])
def test_sizes_at_the_edge(gpu, prefix_len, head_dim):
    tensors = operands(prefix_len, head_dim)
    out = within(SECONDS, lambda: fa.ops.gated_prefix(*tensors))
    assert (out.double() - expected(tensors)).abs().max() < 1e-5
    assert gpu.launches and not gpu.unguarded


def test_no_prefix_is_refused_before_anything_runs(gpu):
    with pytest.raises(ValueError, match=r"gated_prefix: .*prefix_len.* must be at least 1"):
        fa.ops.gated_prefix(*operands(prefix_len=0))
    assert not gpu.launches


def test_fp64_takes_the_reference_and_says_so(gpu):
    tensors = operands(dtype=torch.float64)
    assert torch.equal(fa.ops.gated_prefix(*tensors), expected(tensors)) and not gpu.launches
    name, reason = automatic_backend("cpu", torch.float64, "gated_prefix")
    assert name == "reference" and "no fp64" in reason
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .* no fp64"):
        fa.ops.gated_prefix(*tensors, backend="triton")


def test_head_dim_beyond_the_kernels_takes_the_reference_and_says_so(gpu):
    assert automatic_backend("cpu", torch.bfloat16, "gated_prefix", MAX_HEAD_DIM)[0] == "triton"
    name, reason = automatic_backend("cpu", torch.float32, "gated_prefix", 512)
    assert name == "reference" and "no head_dim above 256, got 512" in reason
    assert automatic_backend("cpu", torch.float32, "bottleneck", 4096)[0] == "triton"
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot run here: .* no head_dim above 256, got 512"
    ):
        choose_backend("triton", "cpu", torch.float32, "gated_prefix", 512)
    tensors = operands(head_dim=512)
    args = (*tensors, None, 512**-0.5, "tanh")
    out = torch.ops.fastadapter.gated_prefix(*args)  # as a compiled graph calls it
    assert (out.double() - expected(tensors)).abs().max() < 1e-5 and not gpu.launches


@pytest.mark.parametrize("op", ["gated_prefix", "prefix_merge", "prefix_attention", "gated_prefix_attention"])
def test_fp32_with_a_large_head_dim_takes_the_reference_and_says_so(gpu, op):
    """Operands of three parts each would spill."""
    for head_dim, backend in ((MAX_FP32_HEAD_DIM, "triton"), (MAX_FP32_HEAD_DIM + 1, "reference")):
        name, reason = automatic_backend("cpu", torch.float32, op, head_dim)
        assert name == backend
    assert reason == "the Triton kernels have no head_dim above 128 in fp32, got 129"
    with pytest.raises(ValueError, match=r"cannot run here: .* no head_dim above 128 in fp32, got 129"):
        choose_backend("triton", "cpu", torch.float32, op, 129)


def test_a_call_in_fp32_with_a_large_head_dim_launches_nothing(gpu):
    tensors = operands(head_dim=129)
    assert torch.equal(fa.ops.gated_prefix(*tensors), fa.ops.gated_prefix(*tensors, backend="reference"))
    assert not gpu.launches
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .* in fp32, got 129"):
        fa.ops.gated_prefix(*tensors, backend="triton")


@pytest.mark.parametrize("op", ["gated_prefix", "prefix_merge", "prefix_attention", "gated_prefix_attention"])
def test_every_attention_op_takes_the_reference_for_a_large_head_dim(gpu, op):
    base, query, *bank, gate = operands(head_dim=512)
    calls = {
        "gated_prefix": [base, query, *bank, gate],
        "prefix_merge": [base, torch.randn(query.shape[:3]), query, *bank],
        "prefix_attention": [query, query[:, :2], base[:, :2], *bank],
        "gated_prefix_attention": [query, query[:, :2], base[:, :2], *bank, gate],
    }
    getattr(fa.ops, op)(*calls[op])
    assert not gpu.launches


@pytest.mark.parametrize("name", ["base", "prefix_key", "prefix_value", "gate", "row_ids"])
def test_a_tensor_on_another_device_is_named(gpu, name):
    base, query, key, value, gate = operands()
    named = {"base": base, "prefix_key": key, "prefix_value": value, "gate": gate}
    named["row_ids"] = torch.zeros(2, dtype=torch.int32)
    fa.ops.gated_prefix(query=query, **named)
    launched = len(gpu.launches)
    named[name] = named[name].to("meta")
    with pytest.raises(ValueError, match=f"gated_prefix: {name} must be on cpu like query, got meta"):
        fa.ops.gated_prefix(query=query, **named)
    assert len(gpu.launches) == launched


@pytest.mark.parametrize("op", ["prefix_attention", "gated_prefix_attention"])
def test_a_mask_on_another_device_is_named(gpu, op):
    base, query, *bank, gate = operands()
    bank += [gate] if op.startswith("gated") else []
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=f"{op}: attn_mask must be on cpu like query, got meta"):
        getattr(fa.ops, op)(query, query[:, :2], base[:, :2], *bank, attn_mask=mask)
    assert not gpu.launches


def test_a_compiled_graph_takes_the_registered_op(gpu):
    """No graph break, the self-check on the way, the same bits as an eager call, backward on the device's thread."""
    leaves = [x.requires_grad_() for x in operands()]

    def call(*tensors):
        return fa.ops.gated_prefix(*tensors)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    def both(run):
        out = run(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    eager = within(SECONDS, lambda: both(call))
    ran, launched = gpu.thread.ran, len(gpu.launches)
    found = within(SECONDS, lambda: both(compiled))
    assert all(torch.equal(x, y) for x, y in zip(eager, found))
    assert gpu.thread.ran == ran + 1 and len(gpu.launches) > launched


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_whoever_looks_at_calls_sees_the_registered_op(gpu):
    """Eager calls go around the dispatcher, but not where a mode or a transform would miss them."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    first_call("gated_prefix")
    tensors = operands()
    with torch.no_grad(), Log():
        fa.ops.gated_prefix(*tensors)
    assert "fastadapter.gated_prefix.default" in seen

    launched = len(gpu.launches)
    with torch.no_grad(), torch._subclasses.FakeTensorMode() as mode:
        out = fa.ops.gated_prefix(*(mode.from_tensor(x) for x in tensors))
    assert isinstance(out, torch._subclasses.FakeTensor) and len(gpu.launches) == launched

    assert registration.is_plain((*tensors, None, 1.0, "tanh"))
    plain = []
    torch.vmap(lambda x: plain.append(registration.is_plain((x,))) or x)(tensors[0])
    with torch.device("cpu"):
        plain.append(registration.is_plain((tensors[0],)))
    torch.jit.trace(
        lambda x: plain.append(registration.is_plain((x,))) or x * 1, tensors[0], check_trace=False
    )
    with torch.autograd.forward_ad.dual_level():
        plain.append(registration.is_plain((tensors[0],)))
    assert plain == [False] * 4


class TestOnce:
    """checks.once: what was right stays right for its layout; what was wrong is said every time."""

    @pytest.fixture
    def check(self):
        ran = []

        @checks.once(tensors=2)
        def check(x, y, word):
            ran.append(word)
            checks.require_tensor("op", x=x)
            if x.shape[0] == 0:
                raise ValueError("op: x must not be empty")

        check.ran = ran
        return check

    def test_a_layout_is_checked_once(self, check):
        x = torch.ones(2, 3)
        for _ in range(3):
            check(x, None, "tanh")
        check(x.T.contiguous().T, None, "tanh")  # strides are nobody's business
        assert len(check.ran) == 1
        for call in [
            (x.double(), None, "tanh"),
            (x[:1], None, "tanh"),
            (x, x, "tanh"),
            (x, None, "identity"),
        ]:
            check(*call)
        check(x.to("meta"), None, "tanh")
        assert len(check.ran) == 6

    def test_an_error_is_raised_every_time(self, check):
        for _ in range(2):
            with pytest.raises(ValueError, match="must not be empty"):
                check(torch.ones(0, 3), None, "tanh")
            with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
                check([1.0], None, "tanh")
        assert len(check.ran) == 4

    def test_layouts_do_not_pile_up(self, check, monkeypatch):
        monkeypatch.setattr(checks, "_LIMIT", 3)
        for size in range(1, 10):
            check(torch.ones(size), None, "tanh")
        check(torch.ones(9), None, "tanh")
        assert len(check.ran) == 9
