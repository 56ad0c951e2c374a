"""The self-check as a GPU runs it: from any thread, nested, while others call; it says what is wrong and never hangs.

Correct means: the call comes back, with the same bits as without a check, or with an error that names the op.
"""

import importlib

import pytest
import torch

import fastadapter as fa
from fastadapter.ops import self_check
from tests.support.cuda_standin import cuda_standin, first_call, within

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="stands in for a GPU"
)
SECONDS = 120  # a machine shared with other tests is slow; a hang is for ever


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    with cuda_standin(monkeypatch, tmp_path / "cache") as state:
        yield state


@pytest.mark.parametrize("op", list(self_check.PROBES))
def test_a_first_call_with_a_gradient_comes_back(op, gpu):
    """It hung: the check held a lock over its backward, whose thread asked for the same lock."""
    found = within(SECONDS, lambda: first_call(op))
    assert gpu.thread.ran >= 2  # the check's backwards and the call's own
    # the attentions are torch's and our term: what is checked is the term
    kernel = {"gated_prefix_attention": "gated_prefix", "prefix_attention": "prefix_merge"}.get(op, op)
    assert {key[0] for key in self_check._passed} == {kernel}
    assert gpu.launches and not gpu.unguarded
    again = within(SECONDS, lambda: first_call(op))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_pass_is_noted_for_the_next_process(gpu):
    first_call("gated_prefix")
    assert "gated_prefix; float32; device stand-in; driver" in self_check.verdicts().read_text()
    self_check._passed.clear()
    gpu.thread.ran = 0
    first_call("gated_prefix")
    assert gpu.thread.ran == 1  # the call's own


def test_the_check_may_be_the_first_in_a_backward(gpu):
    """Forward on another backend: the check then starts on autograd's thread, and its own backwards nest there."""

    def call():
        probe = self_check.PROBES["gated_prefix"][0]
        leaves = {
            name: x.requires_grad_()
            for name, x in probe.inputs(torch.device("cpu"), torch.float32, torch.float32).items()
        }
        key = ("gated_prefix", torch.device("cpu"), torch.float32)
        self_check._passed.add(key)
        out = fa.ops.gated_prefix(**leaves)
        self_check._passed.discard(key)
        out.sum().backward()
        return key in self_check._passed

    assert within(SECONDS, call)


def test_threads_that_call_at_once_all_come_back(gpu):
    """Both check; a check waiting for the other's would hold up the thread of the device in its backward."""
    import threading

    together, found = threading.Barrier(3), []

    def work():
        together.wait()
        found.append(first_call("gated_prefix"))

    def call():
        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    within(SECONDS, call)
    assert len(found) == 3
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in other)


def test_a_call_from_elsewhere_does_not_slip_through_a_check(gpu, monkeypatch):
    """While a wrong kernel is being found out, nobody else gets its results."""
    compare, refused = self_check.compare, []

    def meanwhile(op, *rest):
        if not refused:
            refused.append(None)
            with pytest.raises(RuntimeError, match="are not used"):
                first_call(op)
        compare(op, *rest)
        return ["output: off by 1"]

    monkeypatch.setattr(self_check, "compare", meanwhile)
    with pytest.raises(
        RuntimeError, match=r"gated_prefix: the Triton kernels give wrong results .* off by 1"
    ):
        within(SECONDS, lambda: first_call("gated_prefix"))
    assert refused


def test_wrong_kernels_are_refused_and_the_process_lives(gpu, monkeypatch):
    """Every call raises the same, without another check; other ops and other backends run on."""
    kernels = importlib.import_module("fastadapter.kernels.gated_prefix")
    right = kernels.gated_prefix_forward
    ran = []

    def wrong(*args):
        ran.append(args)
        return right(*args) * 1.01

    monkeypatch.setattr(kernels, "gated_prefix_forward", wrong)
    with pytest.raises(
        RuntimeError, match=r"gated_prefix: .* prefix 10, output .*: off by .* is allowed"
    ) as first:
        within(SECONDS, lambda: first_call("gated_prefix"))
    checked = len(ran)
    with pytest.raises(RuntimeError) as second:
        within(SECONDS, lambda: first_call("gated_prefix"))
    assert str(second.value) == str(first.value) and len(ran) == checked
    within(SECONDS, lambda: first_call("bottleneck"))
    within(SECONDS, lambda: first_call("gated_prefix", backend="reference"))


def test_a_device_that_disappears_in_mid_check_is_no_verdict(gpu, monkeypatch):
    """The error names op and device; nothing is noted, and the next call tries again."""
    kernels = importlib.import_module("fastadapter.kernels.gated_prefix")
    with monkeypatch.context() as patch:

        def lost(*args):
            raise RuntimeError("CUDA error: device-side assert triggered")

        patch.setattr(kernels, "gated_prefix_backward", lost)
        with pytest.raises(
            RuntimeError, match=r"gated_prefix: .* could not be finished .*: CUDA error: device-side"
        ):
            within(SECONDS, lambda: first_call("gated_prefix"))
        assert not self_check._passed and not self_check._failed and not self_check.verdicts().exists()
    within(SECONDS, lambda: first_call("gated_prefix"))


def test_out_of_memory_in_a_check_stays_out_of_memory(gpu, monkeypatch):
    """Loops that halve their batch look for the type."""
    kernels = importlib.import_module("fastadapter.kernels.gated_prefix")

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "gated_prefix_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        first_call("gated_prefix")
    assert not self_check._failed


def test_a_capture_before_the_check_raises_and_one_after_does_not(gpu):
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"call fastadapter\.warmup\(\)"):
        first_call("gated_prefix")
    gpu.capturing = False
    first_call("gated_prefix")
    gpu.capturing = True
    first_call("gated_prefix")


def test_the_check_is_not_disturbed_by_what_the_caller_runs_in(gpu):
    """Autocast would round the references and so allow more; checkpointing would count the probes' saved tensors."""
    allowed = []
    over_budget = self_check._over_budget

    def note(value, plain, exact):
        allowed.append((plain.double() - exact).abs().max().item())
        return over_budget(value, plain, exact)

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "_over_budget", note)
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x),
            torch.device("meta"),
        ):
            self_check.check("gated_prefix", torch.device("cpu"), torch.float32)
    assert allowed and max(allowed) < 1e-4 and not seen


def test_a_forked_child_checks_for_itself(gpu):
    """Nothing is held across a fork: no lock, no thread."""
    import os

    first_call("gated_prefix")
    child = os.fork()
    if child == 0:
        key = ("bottleneck", torch.device("cpu"), torch.float32)
        torch.set_num_threads(1)
        self_check.compare = lambda *_: []
        self_check.ensure("bottleneck", torch.empty(1))
        os._exit(0 if key in self_check._passed else 1)
    assert os.waitpid(child, 0)[1] == 0
