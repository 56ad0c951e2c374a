"""The GPU benchmarks, walked through on a CPU: every goal has its case, and what must stop them does."""

import pytest
import torch
from fastadapter.benchmarks import gpu, gpu_tools

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="walks through on a CPU")


def walk(part, capsys, *options):
    status = gpu.main(["--dry-run", "--part", str(part), *options])
    return status, capsys.readouterr()


@pytest.fixture
def without_tests(monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda *args: "")


@pytest.mark.parametrize(
    "part, goals", [(1, ["G1", "G2", "G3", "G4", "G8", "G9", "G10"]), (2, ["G11", "G13", "G15"])]
)
def test_every_goal_on_ops_is_walked_through(part, goals, capsys, monkeypatch, without_tests):
    """With our op in each, floors, and nothing stored."""
    monkeypatch.setattr(gpu, "step_cases", lambda settings: iter(()))
    status, printed = walk(part, capsys)
    assert status == 0, printed.err
    for goal in goals:
        assert f"{goal} " in printed.out
    assert "% of floor" in printed.out and "nothing here is a measurement" in printed.out
    assert "fastadapter" in printed.out and "left out" not in printed.err, printed.err


@pytest.mark.slow
def test_training_steps_are_walked_through(capsys, monkeypatch, without_tests):
    pytest.importorskip("peft")
    monkeypatch.setattr(gpu, "goals", lambda part, bench: iter(()))
    status, printed = walk(2, capsys)
    assert status == 0, printed.err
    assert all(goal in printed.out for goal in ("G5 ", "G6 ", "G7 ")) and "PEFT" in printed.out


def test_no_timing_follows_red_tests(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda *args: "tests are red (pytest 1)")
    status, printed = walk(1, capsys)
    assert status == 1 and "tests are red (pytest 1), so nothing is timed" in printed.err


def test_goals_past_the_time_are_named(capsys, without_tests):
    status, printed = walk(1, capsys, "--seconds", "0")
    assert status == 1 and "G1 gated_prefix forward" in printed.err and "no time left" in printed.err


def test_without_a_gpu_nothing_is_run(capsys):
    assert gpu.main([]) == 2 and "no GPU" in capsys.readouterr().err


def test_a_wrong_peer_is_left_out_and_a_wrong_kernel_is_an_error(capsys):
    bench = gpu_tools.Bench("cpu", True, 1e9, 1e9)
    x = torch.ones(3)
    forms = {"(part)": lambda: x * 5, "right": lambda: x, "wrong": lambda: x * 2, "absent": lambda: x.nothing}
    case, floor = gpu_tools.comparison(
        bench, "G0", "three", forms, floor="copy", bytes_moved=24, exact=x.double
    )
    assert [variant.name for variant in case.variants] == ["copy", "(part)", "right"]
    assert floor == pytest.approx(24e-9)
    printed = capsys.readouterr().err
    assert "wrong is left out: off by 1" in printed and "absent is left out" in printed
    with pytest.raises(RuntimeError, match="off by 1"):
        gpu_tools.comparison(
            bench, "G0", "three", {"fastadapter": lambda: x * 2}, floor="copy", exact=x.double
        )
