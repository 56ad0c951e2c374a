"""Norms, gated feed-forwards and rotary embeddings of a frozen model: PyTorch's bits, gradients within the budget."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastadapter.ops.frozen import glu, rms_norm, rotary
from fastadapter.reference import frozen as reference
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import CPP, needs_extension

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# no whole vector, several, more than one level of PyTorch's sums, and real ones
SIZES = [1, 3, 8, 31, 64, 100, 128, 576, 1000, 2048, 4096, 8192, 16384]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.parametrize("backend", ["reference", CPP])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_extension
@every_dtype
@pytest.mark.parametrize("hidden", SIZES)
def test_a_norm_has_the_bits_of_pytorch(hidden, dtype):
    weight = random(hidden, seed=1, dtype=dtype)
    for shape in ((1, 1), (3, 5), (70,)):
        x = 3 * random(*shape, hidden, dtype=dtype)
        for eps in (1e-6, 1e-5):
            assert same_bits(rms_norm(x, weight, eps, "cpp"), reference.rms_norm(x, weight, eps))


@needs_extension
@every_dtype
def test_special_values_and_strides(dtype):
    x = random(6, 40, dtype=dtype)
    x[0, 3], x[1, 3], x[2], x[3] = float("inf"), float("nan"), 0.0, -0.0
    x[4] = torch.finfo(dtype).tiny
    weight = random(40, dtype=dtype)
    for each in (x, x.t().contiguous().t(), x[::2], x.expand(2, 6, 40), x[:0]):
        found, expected = rms_norm(each, weight, 1e-6), reference.rms_norm(each, weight, 1e-6)
        assert torch.equal(found.isnan(), expected.isnan())
        assert same_bits(found.nan_to_num(), expected.nan_to_num())


@every_backend
@every_dtype
@pytest.mark.parametrize("hidden", [1, 31, 576])
def test_the_gradient_of_a_norm_is_within_budget(hidden, dtype, backend):
    x, weight, grad = (
        random(*s, seed=i, dtype=dtype) for i, s in enumerate(((9, hidden), (hidden,), (9, hidden)))
    )

    def gradient(of, kind):
        given = (3 * x).to(kind).requires_grad_()
        of(given, weight.to(kind), 1e-5).backward(grad.to(kind))
        return given.grad

    ours = gradient(lambda *a: rms_norm(*a, backend), dtype)
    plain, exact = gradient(reference.rms_norm, dtype), gradient(reference.rms_norm, torch.float64)
    assert_within_budget(ours, plain, exact)


@every_backend
@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_unit_is_pytorchs_with_gradients_within_budget(activation, dtype, backend):
    act = ACTIVATIONS[activation]
    gate, up, grad = (3 * random(5, 103, seed=seed, dtype=dtype) for seed in range(3))

    def run(of, kind):
        given = [each.to(kind).clone().requires_grad_() for each in (gate, up)]
        out = of(*given)
        out.backward(grad.to(kind))
        return out, *(each.grad for each in given)

    ours = run(lambda a, b: glu(a, b, act, activation, backend), dtype)
    plain, exact = (run(lambda a, b: act(a) * b, kind) for kind in (dtype, torch.float64))
    assert same_bits(ours[0], plain[0])
    for name, found, eager, right in zip(("gate", "up"), ours[1:], plain[1:], exact[1:], strict=True):
        assert_within_budget(found, eager, right, name)


@every_backend
@every_dtype
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 1, 5), (3, 1, 2, 2, 1), (1, 1, 4, 2, 17)], ids=str)
def test_rotary_has_the_bits_of_pytorch_and_so_has_its_gradient(sizes, head_dim, dtype, backend):
    batch, angles, heads, kv_heads, length = sizes
    given = [random(batch, length, each, head_dim, seed=each, dtype=dtype) for each in (heads, kv_heads)]
    angle = random(angles, length, head_dim, seed=3)
    turn = angle.cos().to(dtype), angle.sin().to(dtype)

    def run(of, *options):
        leaves = [each.clone().requires_grad_() for each in given]
        found = of(*(each.transpose(1, 2) for each in leaves), *turn, *options)
        return *found, *torch.autograd.grad(found, leaves, [each.detach() * 3 for each in found])

    ours = run(rotary, backend)
    assert all(map(same_bits, ours, run(reference.rotary)))
    with torch.no_grad():
        plain = rotary(*(each.transpose(1, 2) for each in given), *turn, backend)
    assert all(map(same_bits, plain, ours))
    assert plain[0].stride() == given[0].transpose(1, 2).stride() or length == 1


@needs_extension
@every_dtype
def test_rotary_of_special_values_and_strides(dtype):
    x = random(2, 3, 4, 8, dtype=dtype)
    x[0, 0, 0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, torch.finfo(dtype).tiny])
    angles = [random(2, 4, 8, seed=seed, dtype=dtype) for seed in (1, 2)]
    wide = random(2, 3, 4, 24, seed=3, dtype=dtype)
    for query in (x, wide[..., 8:16], wide[..., ::3], x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        found, expected = rotary(query, x, *angles), reference.rotary(query, x, *angles)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert same_bits(ours.nan_to_num(), theirs.nan_to_num())


@needs_extension
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4, 8), (1, 1, 4, 8), (2, 4, 8), (2, 4, 8)), "key must have size 2 in dim 0"),
        (((2, 3, 4, 8), (2, 1, 4, 8), (3, 4, 8), (2, 4, 8)), "cosine must have shape .2 or 1, 4, 8"),
        (((2, 3, 4, 8), (2, 1, 4, 8), (2, 4, 8), (2, 4, 4)), "sine must have shape"),
        (((2, 3, 4, 8), (2, 1, 4, 8), (4, 8), (2, 4, 8)), "cosine must have 3 dims"),
        (((2, 3, 4, 7), (2, 1, 4, 7), (2, 4, 7), (2, 4, 7)), "even head_dim"),
    ],
)
def test_what_cannot_be_rotated_is_refused(shapes, message):
    with pytest.raises(RuntimeError, match=message):
        rotary(*(torch.ones(shape) for shape in shapes))
    halves = [torch.ones(shape).half() for shape in ((1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2))]
    with pytest.raises(RuntimeError, match="one dtype"):
        rotary(*halves, torch.ones(1, 1, 2))


@needs_extension
def test_threads_do_not_change_a_bit(default_threads):
    x, weight, grad = random(700, 576), random(576, seed=1), random(700, 576, seed=2)

    def run():
        given = x.clone().requires_grad_()
        out = glu(rms_norm(given, weight, 1e-5), grad, F.silu, "silu")
        out.backward(grad)
        return out.detach(), given.grad

    torch.set_num_threads(1)
    expected = run()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(same_bits, run(), expected))


@needs_extension
def test_what_is_kept_for_backward_is_the_input():
    kept = []
    x = random(4, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()), lambda each: each):
        rms_norm(x, torch.ones(64), 1e-5)
    assert sorted(kept) == [64, 256]


@needs_extension
def test_registered_ops_are_sound():
    x, weight = random(3, 16), random(16, seed=1)
    ops = torch.ops.fastadapter
    for op, arguments in (
        (ops.rms_norm, (x, weight, 1e-5)),
        (ops.rms_norm_backward, (x, x, weight, 1e-5)),
        (ops.glu_backward, (x, x, x, "silu")),
        (ops.rotary, (x[None, None], x[None, None], x[None], x[None], False)),
    ):
        torch.library.opcheck(op.default, arguments)


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4), 1e-5), "weight must have the size of the last dimension of x"),
        ((torch.ones(2, 3), torch.ones(3).half(), 1e-5), "weight must have the dtype"),
        ((torch.ones(2, 3).double(), torch.ones(3).double(), 1e-5), "not float64"),
        ((torch.ones(3, 2).t(), torch.ones(3), 1e-5), "x must be contiguous"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_read(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastadapter.rms_norm(*arguments)
    with pytest.raises(RuntimeError, match="activation must be one of"):
        torch.ops.fastadapter.glu_backward(*[torch.ones(2)] * 3, "swish")


PROGRAM = """
import torch
from fastadapter.ops.frozen import rms_norm
from fastadapter.reference import frozen as reference
for hidden in (31, 576, 1000, 4096):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(3, 5, hidden).to(dtype), torch.randn(hidden).to(dtype)
        assert torch.equal(rms_norm(x, weight, 1e-5, "cpp"), reference.rms_norm(x, weight, 1e-5)), (hidden, dtype)
print(torch.ops.fastadapter.cpu_capability())
"""


@needs_extension
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_has_the_bits_of_pytorch(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().lower() in (capability, "default")
