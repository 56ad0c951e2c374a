"""What benchmarks/audit.py reads from the compiled kernels: no spills, matrix instructions, no wgmma.

No GPU is needed. The audit runs in a process of its own, because a kernel decorated for the interpreter cannot be
compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
AUDIT = Path(__file__).parents[1] / "benchmarks" / "audit.py"


def audit(*options):
    """The rows of one run of the audit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(AUDIT), *(str(option) for option in options)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_sound(rows):
    assert rows
    for row in rows:
        assert row["spills"] == 0 and row["stack"] == 0, f"registers spill: {row}"
        # ptxas before 13.3 may corrupt wgmma operands; the tiles are small to stay clear of it
        assert not row["wgmma"], row
        if row["kernel"] != "reduce":
            assert row["matrix_instructions"] or row["dtype"] not in ("fp16", "bf16"), row
            assert row["widest_load"] == 128, row


@pytest.mark.parametrize(
    "options",
    [
        ("--kernel", "forward", "backward", "--arch", 90, "--dtype", "bf16", "--head-dim", 128),
        ("--kernel", "forward", "backward", "--arch", 80, "--dtype", "fp16", "--head-dim", 64),
        ("--kernel", "backward", "--arch", "gfx942", "--dtype", "bf16", "--head-dim", 64),
        ("--kernel", "reduce", "--arch", 100, "--dtype", "fp32", "--head-dim", 64),
    ],
    ids=lambda options: "-".join(str(x) for x in options if not str(x).startswith("--")),
)
def test_common_kernels_compile_without_spills(options):
    assert_sound(audit(*options))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, "gfx942"])
def test_every_kernel_of_short_prefixes_compiles_without_spills(arch):
    kernels = ("forward", "backward", "reduce")
    assert_sound(audit("--arch", arch, "--kernel", *kernels, "--prefix-len", 10, "--head-dim", 64, 128))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, "gfx942"])
def test_every_kernel_of_long_prefixes_compiles_without_spills(arch):
    kernels = ("forward", "backward-query", "backward-prefix")
    assert_sound(audit("--arch", arch, "--kernel", *kernels, "--prefix-len", 100, "--head-dim", 64, 128))


def test_the_interpreter_cannot_be_audited():
    """Said in one line, instead of a traceback from inside the compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, str(AUDIT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "audit.py compiles kernels: unset TRITON_INTERPRET"
