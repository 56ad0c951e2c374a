"""Estimated times: the walk through machine code against kernels whose work is known, the model against measurements.

Kernels are compiled in processes of their own, since here they are made for the interpreter.
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

KERNELS = '''
import json
import torch, triton
import triton.language as tl
from fastadapter.benchmarks.audit import estimate

@triton.jit(do_not_specialize=["length"])
def copy_kernel(out_ptr, in_ptr, length, BLOCK: tl.constexpr):
    """Each program copies its own ``length`` numbers, BLOCK at a time."""
    first = tl.program_id(0).to(tl.int64) * length
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(in_ptr + first + offs, mask=offs < length)
        tl.store(out_ptr + first + offs, x * 2, mask=offs < length)

@triton.jit(do_not_specialize=["rows"])
def product_kernel(out_ptr, a_ptr, rows, SIZE: tl.constexpr):
    """(16, SIZE) times (SIZE, SIZE), ``rows`` / 16 times."""
    offs = tl.arange(0, SIZE)
    b = tl.load(a_ptr + offs[:, None] * SIZE + offs[None, :])
    acc = tl.zeros((16, SIZE), tl.float32)
    for start in range(0, rows, 16):
        a = tl.load(a_ptr + (start + tl.arange(0, 16))[:, None] * SIZE + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * SIZE + offs[None, :], acc)

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def copied(length, programs=7):
    x = meta(programs, length)
    call = lambda: copy_kernel[(programs,)](meta(programs, length), x, length, BLOCK=256, num_warps=2)
    return estimate.features(call)[0]

def multiplied(rows):
    half = meta(4096, 64, dtype=torch.bfloat16)
    call = lambda: product_kernel[(1,)](meta(16, 64), half, rows, SIZE=64, num_warps=2)
    return estimate.features(call)[0]
'''


SCRIPT = """
def chain(rows):
    x, w = (meta(size, 1024, dtype=torch.bfloat16) for size in (rows, 1024))
    return estimate.estimate(lambda: torch.mm(torch.mm(x, w), w), "H100")

launches = [copied(1024), copied(8192), copied(16384), multiplied(160), multiplied(320)]
print(json.dumps({
    "launches": [vars(features) for features in launches],
    "chains": [[{**vars(s), "us": p.us} for s, p in zip(e.steps, e.parts)] for e in (chain(1024), chain(1 << 20))],
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script prints; in a file, because Triton reads a kernel's source from its file."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path_factory.mktemp("estimates") / "kernels.py"
    path.write_text(KERNELS + SCRIPT, encoding="utf-8")
    result = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_loops_turn_as_often_as_their_arguments_say(found):
    """Bytes exactly; instructions and time in proportion; products by matrix units counted one by one."""
    short, long, longer, few, many = found["launches"]
    assert not any(features["unknown"] for features in found["launches"])
    for features, length in ((short, 1024), (long, 8192), (longer, 16384)):
        assert features["programs"] == 7 and features["warps"] == 2
        assert features["requested"] == features["touched"] == 2 * 4 * 7 * length
        assert features["matrix_fma"] == 0
    turns = (long["arithmetic"] - short["arithmetic"]) / 7
    assert longer["arithmetic"] - long["arithmetic"] == pytest.approx(8 * turns, rel=0.05)
    assert longer["cycles"] > 1.8 * long["cycles"]
    # two warps share the products of 16 x 64 by 64 x 64
    assert few["matrix_fma"] == 10 * 16 * 64 * 64 / 2 and many["matrix_fma"] == 2 * few["matrix_fma"]


def test_what_a_launch_hands_on_stays_in_the_cache_and_products_of_libraries_count(found):
    (first, second), large = found["chains"]
    size = 2 * 1024 * 1024
    assert [step["touched"] for step in (first, second)] == [3 * size, 3 * size]
    assert [step["handed_on"] for step in (first, second)] == [0, size]
    assert [step["flops"] for step in (first, second)] == [2 * 1024**3] * 2
    assert large[1]["us"] == pytest.approx(large[0]["us"]), "2 GB do not fit"


def test_estimates_hold_against_what_was_measured():
    """The promise: a median error of at most a quarter, also of rows that the constants were not fitted to."""
    from fastadapter.benchmarks.audit import calibrate
    from fastadapter.benchmarks.audit.estimate import Constants

    rows = calibrate.measured()
    assert calibrate.fit(rows) == Constants()
    assert statistics.median(abs(row.error(Constants())) for row in rows) <= 0.25
    assert statistics.median(map(abs, calibrate.left_out(rows))) <= 0.25
    assert not any(launch.unknown for row in rows for launch in row.launches)


def test_more_of_anything_takes_no_less_time():
    from fastadapter.benchmarks.audit import calibrate
    from fastadapter.benchmarks.audit.estimate import CARDS, Constants, time_of

    for row in calibrate.measured():
        for launch in row.launches:
            before = time_of(launch, CARDS["H200"], Constants()).us
            assert time_of(launch, CARDS["H100"], Constants()).us >= before
            for name in (
                "cycles",
                "arithmetic",
                "special",
                "matrix_fma",
                "shared_bytes",
                "requested",
                "touched",
            ):
                more = {name: 2 * getattr(launch, name)}
                if name == "cycles":
                    more["longest"] = 2 * launch.longest
                after = time_of(dataclasses.replace(launch, **more), CARDS["H200"], Constants()).us
                assert after >= before * (1 - 1e-9), (row.case, launch.kernel, name)


def test_the_stored_predictions_are_those_of_the_cases():
    from fastadapter.benchmarks.audit import calibrate

    wanted = [(case.op, case.direction, case.dtype, str(case)) for case in calibrate.chosen()]
    assert [row.key for row in calibrate.load()] == wanted, "store the missing predictions (CONTRIBUTING.md)"


def test_a_stored_prediction_can_be_made_again():
    import triton
    from fastadapter.benchmarks.audit import calibrate

    stored = calibrate.load()[0]
    command = [
        sys.executable,
        "-m",
        "fastadapter.cli",
        "bench",
        "audit",
        "--estimate",
        "--json",
        "--jobs",
        "1",
    ]
    command += ["--op", stored.op, "--direction", stored.direction, "--case", stored.case]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [row for row in json.loads(result.stdout) if row["case"] == stored.case]
    if stored.triton == triton.__version__:
        assert found == [dataclasses.asdict(stored)], "store the predictions anew (CONTRIBUTING.md)"


def test_scheduling_is_read_from_the_encoding():
    from fastadapter.benchmarks.audit import sass

    code = """
.L_x_1:
        /*0190*/              @!P0 ISETP.NE.AND P4, PT, R0, -0x1, PT ;                /* 0x000000ff0000720c */
                                                                                      /* 0x010fe40003f85270 */
        /*01a0*/                   LDG.E.128 R4, desc[UR10][R2.64+0x40] ;             /* 0x0000000a02047981 */
                                                                                      /* 0x000ea2000c1e1d00 */
"""
    (compare, load), labels = sass.parse(code)
    assert labels == {".L_x_1": 0}
    assert compare.guard == sass.Predicate(False, 0, True) and compare.modifiers == ("NE", "AND")
    assert compare.operands[2:4] == (sass.Register(False, 0), sass.Immediate(0xFFFFFFFF))
    assert (compare.stall, compare.waits, compare.sets_result) == (2, 1 << 4, sass.NO_BARRIER)
    assert load.sets_result == 2 and load.operands[1] == sass.Address((sass.Register(False, 2),), 0x40, True)
