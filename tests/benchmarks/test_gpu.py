"""The GPU benchmarks, walked through on a CPU: every case runs, and what goes wrong costs one case and is said."""

import dataclasses
import json

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_attention,
    gpu_bottleneck,
    gpu_process,
    gpu_summary,
    gpu_tests,
    gpu_tools,
    rows,
    table,
)
from tests.search.__main__ import OPS as SEARCHED

CASES = {**gpu_attention.CASES, **gpu_bottleneck.CASES}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="walks through on a CPU")


def bench(**changes):
    return gpu_tools.Bench("cpu", True, environment=rows.environment(), **changes)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_walked_through(name, capsys):
    """Ours and a peer in each, right, with its error; nothing is timed while others compile."""
    warming = bench(warm=True)
    assert not list(CASES[name](warming)) and not warming.problems
    dry = bench()
    found = list(CASES[name](dry))
    variants = {row.variant: row for row in found}
    assert not dry.problems and "left out" not in capsys.readouterr().err
    assert "fastadapter" in variants and len(variants) >= 3
    assert variants["fastadapter"].extra["error"] < 1e-5 and variants["fastadapter"].floor in variants
    assert len({(row.entry, row.shape, row.dtype) for row in found}) == 1
    assert found[0].entry.split(" ")[0] in gpu_tools.OPS


def test_cases_have_names_and_rows_of_their_own():
    assert len(CASES) == len(gpu_attention.CASES) + len(gpu_bottleneck.CASES)
    assert {"gp_fwd", "gp_bwd", "pm_bwd", "ga_fb", "pa_fb", "bn_fwd", "bn_fb", "dec64", "dec256"} <= set(
        CASES
    )


@without_gpu
def test_what_goes_wrong_costs_one_case(tmp_path, monkeypatch, capsys):
    """A wrong result and a hang are said first; the rows before the hang are kept, and the next case is timed."""
    monkeypatch.setitem(gpu.PARTS, 1, gpu.Part(("tests.benchmarks.gpu_fake_cases",), 60, 60))
    arguments = ["--part", "1", "--dry-run", "--out", str(tmp_path), "--case-seconds", "6"]
    assert gpu.main([*arguments, "--only", "hangs_after_a_row,wrong"]) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert sum("RED" in line for line in lines[:5]) == 2
    assert "RED gated_prefix wrong, 3 numbers: fastadapter is left out: RuntimeError: off by 1" in printed
    hang = next(line for line in lines if line.startswith("RED hangs_after_a_row hangs (killed after 6 s)"))
    assert "wait_for_ever < benchmarks/gpu_fake_cases.py" in hang
    stored = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(row["entry"], row["variant"]) for row in stored if row["variant"] != "copy"] == [
        ("gated_prefix hangs_after_a_row", "fastadapter"),
        ("gated_prefix hangs_after_a_row", "eager"),
        ("gated_prefix wrong", "eager"),
    ]
    assert "gated_prefix wrong | 3 numbers, float32 | OURS IS MISSING" in printed
    assert (tmp_path / "summary.txt").read_text().strip() == printed.strip()
    assert len(list(tmp_path.iterdir())) <= 6 and len(printed) <= gpu_summary.LIMIT
    assert not (rows.RESULTS / "gpu.jsonl").exists() or "fake" not in (rows.RESULTS / "gpu.jsonl").read_text()


def test_a_process_that_dies_or_does_not_end_in_time(tmp_path):
    for name, limit, until in (("dies", 60, float("inf")), ("hangs_at_once", 60, 0.0)):
        process = gpu_process.Process(name, ("tests.benchmarks.gpu_fake_cases",), tmp_path / name)
        bench = {"device": "cpu", "dry": True}
        process.begin({"bench": bench, "rows": []}, limit, until)
        process.wait()
        assert process.late == (name == "hangs_at_once") and not process.hung
        if name == "dies":
            assert process.status == 3 and process.complaints() == ["dies failed (exit status 3): "]


def test_the_stack_of_a_hang_names_our_frames():
    """Of every thread: a backward on a GPU runs on one of autograd's."""
    text = """warm
Timeout (0:00:20)!
Thread 0x01 (most recent call first):
  File "/x/fastadapter/ops/self_check.py", line 90 in ensure
  File "/x/fastadapter/ops/gated_prefix.py", line 12 in backward
  File "/x/torch/autograd/function.py", line 311 in apply

Thread 0x02 (most recent call first):
  File "/x/torch/autograd/graph.py", line 869 in _engine_run_backward
  File "/x/benchmarks/gpu_tools.py", line 300 in run
"""
    assert gpu_process.first_stack(text) == (
        "ops/self_check.py:90 ensure < ops/gated_prefix.py:12 backward | "
        "autograd/graph.py:869 _engine_run_backward < benchmarks/gpu_tools.py:300 run"
    )
    assert gpu_process.first_stack("nothing") == "no stack was printed"


XDIST = """2 workers [5 items]
[gw0] [ 20%] PASSED tests/test_gated_prefix_triton.py::test_a[b c]
[gw1] [ 40%] FAILED tests/test_bottleneck_triton.py::test_b[x-y]
-- tests/test_bottleneck_triton.py::test_b[x-y]
tests/test_bottleneck_triton.py:7: in test_b
E   AssertionError: out: off
E   assert 1
--
[gw0] [ 60%] SKIPPED tests/test_gated_prefix_triton.py::test_d
[gw0] [ 80%] PASSED tests/test_gated_prefix_triton.py::test_e
"""
PLAIN = """collected 9 items / 4 deselected / 5 selected

tests/test_gated_prefix_triton.py::test_a[b c] PASSED            [ 20%]
tests/test_bottleneck_triton.py::test_b[x-y] FAILED              [ 40%]
-- tests/test_bottleneck_triton.py::test_b[x-y]
E   AssertionError: out: off
--
tests/test_gated_prefix_triton.py::test_d SKIPPED (no fp64)      [ 60%]
tests/test_gated_prefix_triton.py::test_e PASSED                 [ 80%]
"""


@pytest.mark.parametrize("text", [XDIST, PLAIN], ids=["xdist", "plain"])
def test_interrupted_tests_are_counted(text):
    """From what pytest printed until then: what failed, and how many were not reached."""
    outcome = gpu_tests.Outcome()
    gpu_tests.read_tests(text, outcome)
    assert outcome.failed == ["tests/test_bottleneck_triton.py::test_b[x-y]"]
    assert outcome.words() == "tests: 2 passed, 1 failed, 1 skipped, 1 NOT REACHED in time"
    assert outcome.red_by_op() == {"bottleneck": 1}
    assert outcome.red == ["tests/test_bottleneck_triton.py::test_b[x-y]: AssertionError: out: off"]


def test_pytest_that_does_not_begin():
    """In time is one thing, at all is another: that is red, and so is a file that cannot be collected."""
    slow, broken = gpu_tests.Outcome(), gpu_tests.Outcome()
    gpu_tests.read_tests("created: 2/2 workers\n", slow, interrupted=True)
    assert slow.words() == "tests: NONE REACHED in time" and not slow.red
    gpu_tests.read_tests("ERROR tests/test_bottleneck.py - ImportError: x\nno tests ran\n", broken)
    assert broken.failed == ["tests/test_bottleneck.py", "pytest itself: no tests ran"]


def test_a_search_says_what_it_found():
    outcome = gpu_tests.Outcome()
    found = {
        "op": "prefix_attention",
        "backends": ["triton"],
        "failures": 1,
        "examples": 7,
        "what": "Case(...)",
    }
    gpu_tests.read_search("prefix_attention", json.dumps(found) + "\n", 0, outcome)
    gpu_tests.read_search("gated_prefix", "ImportError: nothing here\n", 1, outcome)
    assert outcome.red == ["search of prefix_attention: Case(...)"]
    assert outcome.notes == ["search of gated_prefix ended with 1: ImportError: nothing here"]
    assert set(outcome.red_by_op()) == {"prefix_attention", "prefix_merge"}
    assert set(gpu_tests.SEARCHED) == set(SEARCHED) and set(gpu_tests.OPS) == set(gpu_tools.OPS)


def test_failures_concern_the_ops_in_their_names():
    assert gpu_tests.ops_of("tests/test_gated_prefix_triton.py::t") == (
        "gated_prefix",
        "gated_prefix_attention",
    )
    assert gpu_tests.ops_of("tests/test_decode_triton.py::t[gated_prefix_attention]") == (
        "gated_prefix_attention",
    )
    assert len(gpu_tests.ops_of("tests/test_decode_triton.py::t")) == 3
    assert gpu_tests.ops_of("pytest itself: no module") == gpu_tests.OPS


def test_no_speedup_is_drawn_while_tests_are_red():
    """Neither in the summary nor in a table; rows of whole models need all ops."""
    found = list(gpu_bottleneck.CASES["bn_fwd"](bench(red={"bottleneck": 2})))
    text = gpu_summary.line([dataclasses.asdict(row) for row in found])
    assert ", float32 | 2 RED TESTS, nothing is claimed | us: copy" in text
    assert table.table(found).count("tests are red") == len(found)
    clean = list(gpu_bottleneck.CASES["bn_fwd"](bench(red={"gated_prefix": 2})))
    assert "red_tests" not in clean[0].extra
    step = dataclasses.replace(clean[0], entry="step of a model", extra={})
    assert bench(red={"gated_prefix": 2}).marked([step])[0].extra == {"red_tests": 2}


def test_a_summary_is_short_whatever_happened(tmp_path):
    """And says what is red before anything else."""
    environment = rows.environment()
    outcome = gpu_tests.Outcome(failed=[f"tests/test_{n}.py::test_with_a_long_name" for n in range(500)])
    run = gpu.Run(
        1, 0.0, tmp_path, False, [], tests=outcome, problems=["p" * 900] * 50, notes=["n" * 300] * 50,
        bench={"environment": environment, "copy_bytes_per_s": 4e12, "flops_per_s": 8e14},
    )  # fmt: skip
    row = dataclasses.asdict(list(gpu_bottleneck.CASES["bn_fwd"](bench()))[1])
    with (tmp_path / "gpu.jsonl").open("w") as file:
        for number in range(200):
            file.write(json.dumps({**row, "shape": f"shape {number}", "date": environment["date"]}) + "\n")
    text = gpu_summary.summary(run)
    assert len(text) <= gpu_summary.LIMIT
    assert text.splitlines()[2].startswith("RED tests/test_0.py") and "more, in the files" in text
    assert "bottleneck forward | shape 0" in text


def test_without_a_gpu_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--part", "1", "--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_wrong_peer_is_left_out_and_a_wrong_kernel_is_a_problem(capsys):
    x = torch.ones(3)
    forms = {
        "fastadapter": lambda: x * 2,
        "(part)": lambda: x * 5,
        "right": lambda: x,
        "wrong": lambda: x * 2,
        "absent": lambda: x.nothing,
    }
    dry = bench()
    found = list(gpu_tools.compare(dry, "bottleneck", "three", forms, bytes_moved=24, exact=x.double))
    assert [row.variant for row in found] == ["copy", "(part)", "right"]
    printed = capsys.readouterr().err
    assert "wrong is left out: RuntimeError: off by 1" in printed and "absent is left out: Attr" in printed
    assert len(dry.problems) == 1 and "fastadapter is left out" in dry.problems[0]


def test_errors_are_of_the_first_rows_and_never_nan():
    found, exact = torch.tensor([1.0, 2.0, 99.0]), torch.tensor([1.0, 4.0]).double()
    assert gpu_tools.error_of([found], [exact]) == 0.5
    assert gpu_tools.error_of([found * float("nan")], [exact]) == float("inf")
