"""The norms and gated feed-forwards of a frozen model: PyTorch's bits forward, gradients within the budget."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastadapter.ops.frozen import glu, rms_norm
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
