"""What the tests launch in the interpreter, the compiler takes as well: for sm_80 and sm_90, fp16 also as bf16.

A sample of this run's launches by default, another with every commit; all of the default tests' launches in the
long grid. Runs last (tests/conftest.py), when the others have launched what they launch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import launches

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU, launches compile by themselves"
    ),
]


def compiled(calls, *options):
    """How many kernels compiled, and what did not."""
    assert not [call for call in calls if "unclear" in call], (
        "tests/support/launches.py cannot write these down"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = "".join(json.dumps(call) + "\n" for call in calls)
    command = [sys.executable, "-m", "tests.support.compile_launches", *options]
    result = subprocess.run(command, input=lines, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout, result.stderr
    *failures, total = map(json.loads, result.stdout.splitlines())
    return total, failures


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def gated_prefix_call(head_dim, prefix_len, dtype, direction="forward"):
    def tensor(*shape, dtype=dtype):
        return launches.describe(torch.empty(shape, dtype=dtype))

    prefix = tensor(1, 2, prefix_len, head_dim)
    heads = tensor(2, 4, 33, head_dim)
    arguments = {
        "query": heads, "prefix_key": prefix, "prefix_value": prefix, "gate": tensor(1, 4, dtype=torch.float32),
        "row_ids": None, "softmax_scale": 0.1, "gate_fn": "tanh",
    }  # fmt: skip
    arguments |= {"base": heads} if direction == "forward" else {"grad_out": heads, "base_grad": heads}
    function = {"forward": "gated_prefix_forward", "backward": "gated_prefix_backward_onto"}[direction]
    rest = [] if direction == "forward" else [True, True, True]
    module = "fastadapter.kernels.gated_prefix"
    return {"module": module, "function": function, "arguments": arguments, "rest": rest}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fp32_products_of_long_rows_have_blocks_that_the_compiler_takes(direction):
    """tl.dot wants at least 16 positions in fp32: blocks of 8 ran in the interpreter and nowhere else."""
    total, failures = compiled([gated_prefix_call(200, 9, torch.float32, direction)], "--front-end")
    assert not failures, failures[0]["error"]
    assert total["compiled"]


def test_a_call_is_noted_once_and_as_it_was():
    from fastadapter.kernels.gated_prefix import gated_prefix_forward

    recorder = launches.Recorder()
    base, query = torch.randn(2, 1, 4, 2, 16).transpose(2, 3)
    prefix = torch.randn(1, 2, 3, 16)
    with launches.recorded(recorder):
        for _ in range(2):
            gated_prefix_forward(base, query, prefix, prefix, torch.ones(1, 2), None, 0.25, "tanh")
    (line,) = recorder.seen
    noted = json.loads(line)
    assert (
        noted["function"] == "gated_prefix_forward" and noted["module"] == "fastadapter.kernels.gated_prefix"
    )
    assert noted["arguments"]["query"] == {
        "shape": [1, 2, 4, 16], "strides": [128, 16, 32, 1], "dtype": "float32", "aligned": True,
    }  # fmt: skip
    assert noted["arguments"]["gate_fn"] == "tanh" and noted["arguments"]["row_ids"] is None


@pytest.mark.last
def test_a_sample_of_what_was_launched_compiles():
    """With nothing launched before, as when this file runs alone, it is what the test above launched."""
    calls = launches.calls() or [gated_prefix_call(64, 10, torch.float16)]
    total, failures = compiled(calls, "--sample", "6", commit())
    assert not failures, json.dumps(failures[0], indent=1)
    assert total["compiled"]


@pytest.mark.slow
def test_everything_that_the_default_tests_launch_compiles(tmp_path):
    environment = os.environ | {"FASTADAPTER_TEST_LAUNCHES": str(tmp_path)}
    files = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "triton" in path.read_text(encoding="utf-8")
    ]
    files = [str(path) for path in files if path != Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )  # red ones show elsewhere
    lines = {
        line for path in tmp_path.glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()
    }
    assert lines
    _, failures = compiled([json.loads(line) for line in sorted(lines)])
    assert not failures, f"{len(failures)} kernels, the first: {json.dumps(failures[0], indent=1)}"
