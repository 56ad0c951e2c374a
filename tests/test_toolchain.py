"""Known faults of the compilers, and the check on the device before a kernel is trusted.

No GPU: the device is made up, the comparison with fp64 is run with the C++ backend, and with backends that are wrong.
"""

import importlib
import importlib.util
import json
import types

import pytest
import torch

from fastadapter.cli import doctor
from fastadapter.ops import self_check
from tests.support.gated_prefix import needs_extension

toolchain = importlib.import_module("fastadapter.kernels.toolchain")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(
    "triton, ptxas, arch, names",
    [
        ("3.6.0", "12.8", "sm_90", ["wgmma-register-reuse", "transposed-dot"]),
        ("3.6.0", "13.4", "sm_90", ["transposed-dot"]),
        ("3.7.0", "13.3", "sm_90", ["transposed-dot"]),
        ("3.7.1", "13.3", "sm_90", ["wgmma-32-wide"]),
        ("3.7.1+git1234", "13.0", "sm_90", ["wgmma-register-reuse", "wgmma-32-wide"]),
        ("3.10.0", "13.4", "sm_90", []),
        ("3.9.0", "13.4", "sm_90", []),
        ("3.6.0", "12.8", "sm_80", []),
        ("3.6.0", "12.9", "sm_100", []),
        ("3.6.0", "", "gfx942", []),
    ],
)
def test_hazards_of_a_combination(triton, ptxas, arch, names):
    """Each says what it is, where it was reported and what is done."""
    found = toolchain.hazards(triton, ptxas, arch)
    assert [hazard.name for hazard in found] == names
    assert all(hazard.what and hazard.source and hazard.action for hazard in found)


def test_a_version_that_is_none_is_refused():
    with pytest.raises(ValueError, match="ptxas version must start with a number, got 'unknown'"):
        toolchain.hazards("3.6.0", "unknown", "sm_90")


@needs_triton
def test_the_installed_versions_are_found():
    import triton

    found = toolchain.installed("sm_90")
    assert found.triton == triton.__version__ and toolchain.hazards(*found, "sm_90") is not None
    assert toolchain.installed("gfx942").ptxas == ""


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A CPU that passes for a GPU nobody has checked yet; what was compared is in ``device.compared``."""
    monkeypatch.setenv("FASTADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "_failed", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing)
    versions = {"device": "card", "driver": "580", "triton": "3.6.0", "ptxas": "12.8"}

    device = types.SimpleNamespace(
        versions=versions, compared=[], wrong=[], capturing=False, tensor=torch.empty(1)
    )

    def compare(op, *rest):
        device.compared.append(op)
        return device.wrong

    monkeypatch.setattr(self_check, "describe", lambda _: dict(device.versions))
    monkeypatch.setattr(self_check, "compare", compare)
    return device


def test_an_op_is_checked_once_per_device_dtype_and_versions(device, monkeypatch):
    self_check.ensure("bottleneck", device.tensor)
    self_check.ensure("bottleneck", device.tensor)
    assert device.compared == ["bottleneck"]
    self_check.ensure("bottleneck", device.tensor.half())
    self_check.ensure("gated_prefix", device.tensor)
    assert device.compared == ["bottleneck", "bottleneck", "gated_prefix"]
    # another process finds the note, unless a version changed in between
    monkeypatch.setattr(self_check, "_passed", set())
    self_check.ensure("bottleneck", device.tensor)
    assert len(device.compared) == 3
    monkeypatch.setattr(self_check, "_passed", set())
    device.versions["driver"] = "590"
    self_check.ensure("bottleneck", device.tensor)
    assert len(device.compared) == 4


def test_wrong_kernels_are_refused_every_time(device, monkeypatch):
    """By name, with the versions, without another check; a new process tries again: a compiler may be fixed."""
    device.wrong = ["causal, output: off by 1"]
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"bottleneck: .*float32; device card; driver 580; triton 3\.6\.0; ptxas"
        ):
            self_check.ensure("bottleneck", device.tensor)
    assert len(device.compared) == 1 and not self_check.verdicts().exists()
    device.wrong = []
    monkeypatch.setattr(self_check, "_failed", {})
    self_check.ensure("bottleneck", device.tensor)
    assert len(device.compared) == 2


def test_a_capture_before_the_check_says_what_to_do(device):
    device.capturing = True
    with pytest.raises(RuntimeError, match=r"call fastadapter\.warmup\(\)"):
        self_check.ensure("bottleneck", device.tensor)
    device.capturing = False
    self_check.ensure("bottleneck", device.tensor)
    device.capturing = True
    self_check.ensure("bottleneck", device.tensor)
    assert device.compared == ["bottleneck"]


def test_a_check_inside_a_check(device, monkeypatch):
    """The backward of one op can be the first use of another."""
    calls = []

    def compare(op, *rest):
        calls.append(op)
        if op == "bottleneck":
            self_check.ensure("prefix_attention", device.tensor)
        return []

    monkeypatch.setattr(self_check, "compare", compare)
    self_check.ensure("bottleneck", device.tensor)
    assert calls == ["bottleneck", "prefix_attention"]
    assert self_check.check("bottleneck", device.tensor.device, torch.float32) is False


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "\x00"])
def test_a_damaged_note_costs_a_check(device, content):
    self_check.verdicts().parent.mkdir(parents=True)
    self_check.verdicts().write_text(content)
    self_check.ensure("bottleneck", device.tensor)
    assert device.compared == ["bottleneck"] and len(json.loads(self_check.verdicts().read_text())) == 1


def test_a_folder_that_cannot_be_written_is_said(device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTADAPTER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="will run again"):
        self_check.ensure("bottleneck", device.tensor)


def test_every_op_has_a_probe():
    from fastadapter.ops import backends

    assert set(self_check.PROBES) == {row["op"] for row in backends()}


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_results_pass(dtype):
    """The C++ backend stands in for the GPU: it answers to the same budget."""
    assert self_check.compare("gated_prefix", torch.device("cpu"), dtype, "cpp") == []


@pytest.mark.parametrize("op", ["gated_prefix", "gated_prefix_attention", "prefix_attention", "bottleneck"])
def test_wrong_results_do_not_pass(op, monkeypatch):
    """A result one part in a hundred off, as a lost tile would leave it, and a gradient alone."""
    from fastadapter import ops

    right = getattr(ops, op)

    class Slip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    monkeypatch.setattr(ops, op, lambda *args, **options: Slip.apply(right(*args, **options)))
    found = self_check.compare(op, torch.device("cpu"), torch.float32, "reference")
    assert found and all("gradient of" in line and "off by" in line for line in found)
    monkeypatch.setattr(ops, op, lambda *args, **options: right(*args, **options) * 1.01)
    assert any(
        "output" in line for line in self_check.compare(op, torch.device("cpu"), torch.float32, "reference")
    )


def test_doctor_shows_the_hazards_of_a_gpu(monkeypatch):
    target = importlib.import_module("fastadapter.kernels.target")
    monkeypatch.setattr(target, "arch", lambda tensor: "sm_90")
    monkeypatch.setattr(toolchain, "installed", lambda arch: toolchain.Toolchain("3.6.0", "12.8"))
    rows = doctor._hazards(0)
    if importlib.util.find_spec("triton"):
        assert [status for _, status, _ in rows] == ["note", "note"]
        assert "mma.sync" in rows[0][2] and rows[0][0] == "GPU 0 compilers"
