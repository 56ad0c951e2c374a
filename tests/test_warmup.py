"""fastadapter.warmup: what it asks for and refuses; the calls it makes, on the reference instead of a GPU."""

import importlib

import pytest
import torch

import fastadapter as fa
from fastadapter.ops import self_check
from tests.support.cuda_standin import cuda_standin, first_call, within

warmup = importlib.import_module("fastadapter.warmup")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="warmup: there is no GPU"):
        fa.warmup()


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"ops": ["nothing"]}, ValueError, "ops must be among gated_prefix, .*, got nothing"),
        ({"dtypes": [torch.float64]}, TypeError, "dtypes must be fp32, bf16 or fp16, got torch.float64"),
        ({"device": "cpu"}, ValueError, "device must be a GPU, got cpu"),
    ],
)
def test_wrong_calls_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        fa.warmup(**options)


def test_every_op_is_checked_once_and_run_at_every_size(monkeypatch):
    calls = []
    monkeypatch.setattr(warmup, "_gpu", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(self_check, "check", lambda op, device, dtype: not calls.append((op, dtype)))
    monkeypatch.setattr(warmup, "_exercise", lambda op, *rest: calls.append((op, rest[2])))
    done = fa.warmup(["gated_prefix", "bottleneck"], head_dims=[64, 128])
    half = torch.bfloat16
    assert calls == [
        ("gated_prefix", half),
        ("gated_prefix", 64),
        ("gated_prefix", 128),
        ("bottleneck", half),
    ]
    assert [(row.op, row.size, row.checked) for row in done] == [
        ("gated_prefix", 64, True),
        ("gated_prefix", 128, False),
        ("bottleneck", None, True),
    ]
    assert all(row.seconds >= 0 for row in done)


@pytest.mark.parametrize("op", list(self_check.PROBES))
def test_the_calls_are_valid(op, monkeypatch):
    """Forward and backward of each op, on short inputs."""
    monkeypatch.setattr(warmup, "_LENGTHS", (1, 5))
    size = (32, 8) if op == "bottleneck" else 16
    warmup._exercise(op, torch.device("cpu"), torch.bfloat16, size, 3, "reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
class TestOnAStandIn:
    """The whole of it, kernels in the interpreter, backward on the device's own thread."""

    @pytest.fixture
    def gpu(self, monkeypatch, tmp_path):
        pytest.importorskip("triton")
        monkeypatch.setattr(warmup, "_LENGTHS", (1, 5))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with cuda_standin(monkeypatch, tmp_path / "cache") as state:
            yield state

    def test_it_checks_and_runs_every_op_and_a_capture_follows(self, gpu):
        options = {"head_dims": [16], "dtypes": [torch.float32], "device": "cpu", "prefix_len": 3}
        done = within(240, lambda: fa.warmup(bottlenecks=[(32, 8)], **options))
        assert [row.op for row in done] == list(self_check.PROBES)
        assert {key[0] for key in self_check._passed} == {"gated_prefix", "prefix_merge", "bottleneck"}
        assert gpu.launches and not gpu.unguarded and gpu.synchronised == len(done)
        gpu.capturing = True
        launched = len(gpu.launches)
        for op in self_check.PROBES:
            first_call(op)
        assert len(gpu.launches) > launched
        assert not any(row.checked for row in fa.warmup(["gated_prefix"], **options))

    def test_wrong_kernels_end_it(self, gpu, monkeypatch):
        kernels = importlib.import_module("fastadapter.kernels.gated_prefix")
        right = kernels.gated_prefix_forward
        monkeypatch.setattr(kernels, "gated_prefix_forward", lambda *args: right(*args) + 1)
        with pytest.raises(RuntimeError, match="gated_prefix: the Triton kernels give wrong results"):
            fa.warmup(["gated_prefix"], [torch.float32], [16], "cpu")

    def test_a_capture_in_progress_is_no_moment_for_it(self, gpu):
        gpu.capturing = True
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            fa.warmup(["gated_prefix"], [torch.float32], [16], "cpu")
