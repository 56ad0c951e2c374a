"""The whole-model cases for a GPU, walked through on a CPU: their rows come out, and failures are told."""

import json

import pytest
import torch

pytest.importorskip("peft")

from fastadapter.benchmarks import gpu_models

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="walks through on a CPU")


QUICK = ("step-8b", "step-methods", "decode-8b", "decode-compiled-64", "resume-cli")


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in gpu_models.CASES],
)
def test_every_case_is_walked_through(case, capfd):
    """With our variant among the rows and nothing left out."""
    assert gpu_models.main([case, "--dry-run"]) == 0
    printed = capfd.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert found and "left out" not in printed.err
    if not case.endswith("-cli"):
        assert {"fastadapter"} <= {row["variant"] for row in found}
        assert all(any(row["variant"] == row["floor"] for row in found) for row in found)


def test_without_a_gpu_nothing_is_run(capsys):
    assert gpu_models.main(["step-8b"]) == 2 and "no GPU" in capsys.readouterr().err


def test_a_failing_variant_of_ours_ends_the_case(capsys):
    def broken():
        raise ValueError("no such kernel")

    usable, failed = gpu_models.first_calls({"PEFT": broken, "base": int, "fastadapter": broken})
    assert list(usable) == ["base"]
    assert "PEFT is left out: ValueError: no such kernel" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="fastadapter cannot run"):
        gpu_models.raise_if_ours(failed)
    gpu_models.raise_if_ours({"PEFT": failed["PEFT"]})
