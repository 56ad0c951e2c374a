"""What the kernels compile to, without a GPU: no spills, matrix instructions, 64-bit offsets, as in the stored table.

The audit starts itself in a process of its own where the tests run kernels in the interpreter. A stored row is only
compared with a compile by the Triton it came from.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def audit(*options, **environment):
    """The rows of one run of the audit, as they would be stored."""
    from fastadapter.benchmarks.audit import report

    command = [sys.executable, "-m", "fastadapter.cli", "bench", "audit", "--json", *options]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr  # 1: there are faults, judged below
    return [report.Row(**row) for row in json.loads(result.stdout)]


def assert_sound(rows):
    """No fault, and nothing but compile times differs from the stored table."""
    from fastadapter.benchmarks.audit import report

    assert rows
    stored = {row.key: row for row in report.load()}
    for row in rows:
        assert not report.faults(row), row
        if row.op in ("gated_prefix", "prefix_merge") and row.arch == "sm_90":
            # ptxas before 13.3 may corrupt wgmma operands; the tiles are small to stay clear of it
            assert row.matrix != "wgmma", row
        if (old := stored.get(row.key)) and old.triton == row.triton:
            assert not report.differences(old, row), f"{row.key}: store the table anew (CONTRIBUTING.md)"


def test_a_sample_of_every_op_and_pass_is_sound():
    assert_sound(audit("--sample", "--jobs", "2", TRITON_INTERPRET="1"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_is_sound(arch):
    assert_sound(audit("--arch", arch))


def test_the_stored_table_is_sound():
    """It has rows of every case on every architecture and no others, none of them faulty."""
    from fastadapter.benchmarks.audit import cases, command, report

    stored = report.load()
    assert not [row for row in stored if report.faults(row)]
    present = {row.key[:-1] for row in stored}
    wanted = {
        (case.op, case.direction, case.dtype, str(case), arch)
        for case in cases.all_cases()
        for arch in command.ARCHITECTURES
    }
    assert present == wanted, "store the missing cases (CONTRIBUTING.md)"
    assert len({row.key for row in stored}) == len(stored)


def test_the_document_is_that_of_the_stored_tables():
    from fastadapter.benchmarks.audit import calibrate, draw, report, traffic

    document = Path(__file__).parents[1] / "docs" / "audit.md"
    tables = (report.load(), traffic.load(), calibrate.measured(), calibrate.load())
    assert document.read_text() == draw.document(*tables), "fastadapter bench audit --draw docs/audit.md"


def test_a_table_survives_being_stored(tmp_path):
    from fastadapter.benchmarks.audit import report

    rows = report.load()
    report.store(tmp_path / "again.csv", reversed(rows))
    assert report.load(tmp_path / "again.csv") == rows
    text = (tmp_path / "again.csv").read_text()
    (tmp_path / "bad.csv").write_text(text.replace("False", "maybe", 1))
    with pytest.raises(ValueError, match=r"bad.csv:2: expected True or False"):
        report.load(tmp_path / "bad.csv")
    (tmp_path / "worse.csv").write_text(text.replace("spills", "spilled", 1))
    with pytest.raises(ValueError, match=r"columns \['spilled', 'spills'\]"):
        report.load(tmp_path / "worse.csv")


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"spills": 4}, "4 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"matrix": ""}, "no matrix instructions"),
        ({"narrow_offsets": 1}, "1 products of strides in 32 bits"),
        ({"blocks_per_multiprocessor": 0}, "does not fit"),
    ],
)
def test_faults_are_seen(change, fault):
    from fastadapter.benchmarks.audit import report

    sound = next(row for row in report.load() if row.dtype == "bf16" and row.arch == "sm_90" and row.matrix)
    assert not report.faults(sound)
    assert fault in "".join(report.faults(dataclasses.replace(sound, **change)))
    assert report.differences(sound, dataclasses.replace(sound, **change))
    assert not report.differences(sound, dataclasses.replace(sound, compile_seconds=99.0))


def test_fp32_may_spill_a_little():
    """Its operands are three parts each; half-precision kernels and more than 128 bytes are faults."""
    from fastadapter.benchmarks.audit import report

    row = next(row for row in report.load() if row.dtype == "fp32" and row.arch == "sm_90" and row.matrix)
    assert not report.faults(dataclasses.replace(row, spills=32, stack=128))
    assert report.faults(dataclasses.replace(row, spills=33, stack=132)) == ["33 spills, 132 bytes of stack"]
    assert report.faults(dataclasses.replace(row, dtype="bf16", spills=1, stack=8))


# (BLOCK_M, BLOCK_D) pointers: row * stride + (tile * 32 + position) * stride
WIDE = """
module {
  tt.func public @kernel(%ptr: !tt.ptr<f32>, %stride: i32, %length: i32) attributes {noinline = false} {
    %tile = arith.constant 32 : i32
    %zero = arith.constant 0 : i32
    %one = arith.constant 1 : i32
    %row = tt.get_program_id x : i32
    %wide = arith.extsi %row : i32 to i64
    %stride_0 = arith.extsi %stride : i32 to i64
    %offset = arith.muli %wide, %stride_0 : i64
    %base = tt.addptr %ptr, %offset : !tt.ptr<f32>, i64 loc(#loc3)
    %first = arith.muli %row, %tile : i32
    %range = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32>
    %splat = tt.splat %first : i32 -> tensor<32xi32>
    %position = arith.addi %splat, %range : tensor<32xi32>
    %end = scf.for %i = %zero to %length step %one iter_args(%carried = %position) -> (tensor<32xi32>)  : i32 {
      %next = arith.addi %carried, %range : tensor<32xi32>
      scf.yield %next : tensor<32xi32>
    } loc(#loc4)
    %pointers = tt.splat %base : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>>
    %at = tt.addptr %pointers, %end : tensor<32x!tt.ptr<f32>>, tensor<32xi32>
    tt.return
  }
}
"""


def test_offsets_in_32_bits_are_found():
    """Products that wrap are found through casts, splats and loops; tiles and widened products are let through."""
    from fastadapter.benchmarks.audit.offsets import narrow_products

    assert narrow_products(WIDE, {32}) == []
    # the tile size is no tile size: a row length, say, that the compiler knows
    assert [line.split()[0] for line in narrow_products(WIDE, {64})] == ["%first"]
    widened_late = WIDE.replace(
        "%offset = arith.muli %wide, %stride_0 : i64",
        "%product = arith.muli %row, %stride : i32\n    %offset = arith.extsi %product : i32 to i64",
    )
    assert [line.split()[0] for line in narrow_products(widened_late, {32})] == ["%product"]
    in_the_loop = WIDE.replace(
        "      %next = arith.addi %carried, %range",
        "      %strides = tt.splat %stride : i32 -> tensor<32xi32>\n      %next = arith.muli %carried, %strides",
    )
    assert [line.split()[0] for line in narrow_products(in_the_loop, {32})] == ["%next"]
    bounded = WIDE.replace("%first = arith.muli %row, %tile", "%first = arith.remsi %stride, %length")
    assert narrow_products(bounded, {64}) == []


def test_occupancy_by_the_makers_tables():
    """Worked examples: registers, threads and shared memory each in turn are what is short."""
    from fastadapter.benchmarks.audit.chips import CHIPS

    hopper, instinct = CHIPS["sm_90"], CHIPS["gfx942"]
    assert hopper.blocks(32, 128, 0) == 16 and hopper.occupancy(32, 128, 0) == 1.0
    assert hopper.blocks(255, 128, 0) == 2
    assert hopper.blocks(32, 32, 0) == 32
    assert hopper.blocks(32, 128, 100 * 1024) == 2
    assert hopper.blocks(32, 128, 228 * 1024) == 0
    assert instinct.blocks(128, 256, 0) == 4 and instinct.occupancy(128, 256, 0) == 0.5
    assert instinct.blocks(32, 256, 40 * 1024) == 1


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    """G1 of the goals: base, query and out of 8192 tokens of 32 heads of 128, in bf16, at 3.0 TB/s."""
    from fastadapter.benchmarks.audit import cases
    from fastadapter.benchmarks.audit.case import Case
    from fastadapter.benchmarks.audit.chips import CHIPS

    sizes = {"b": 4, "h": 32, "kv": 8, "q": 2048, "d": 128, "p": 10, "n": 0}
    case = Case("gated_prefix", "forward", "bf16", sizes)
    work = (cases.bytes_of(case), cases.flops_of(case), case.matrix)
    chip = CHIPS["sm_90"]
    assert chip.floor_us(*work, reached=True) == pytest.approx(67.5, rel=0.01)
    assert chip.floor_us(0, 989 * 10**6, True) == pytest.approx(1.0)


def small_cases():
    if importlib.util.find_spec("triton") is None:
        return []
    from fastadapter.benchmarks.audit import cases, command

    turns = itertools.cycle(command.ARCHITECTURES)
    return [
        pytest.param(case, arch, id=f"{case.op}-{case.direction}-{case}-{arch}")
        for case, arch in zip(cases.small_cases(), turns)
    ]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")
@pytest.mark.parametrize("case, arch", small_cases())
def test_kernels_touch_the_bytes_of_the_formula(case, arch):
    """Counted address by address, within a tenth; and what is stored is what is counted."""
    from fastadapter.benchmarks.audit import traffic

    count = traffic.count(case, arch)
    assert abs(count.ratio - 1) <= 0.1, count
    assert count.requested >= count.touched and count.moved >= count.touched
    assert count in traffic.load(), "store the table anew (CONTRIBUTING.md)"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")
def test_the_counter_sees_every_kind_of_access():
    """Against a kernel whose accesses are known: masked, repeated, and through memory of its own."""
    import triton
    import triton.language as tl
    from fastadapter.benchmarks.audit import traffic

    @triton.jit
    def copy_kernel(out_ptr, in_ptr, length, BLOCK_M: tl.constexpr):
        offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        first = tl.load(in_ptr)
        tl.store(out_ptr + offs, tl.load(in_ptr + offs, mask=offs < length) + first, mask=offs < length)

    source, out = torch.ones(10), torch.empty(10)
    with traffic.logging() as log:
        for _ in range(2):
            copy_kernel[(3,)](out_ptr=out, in_ptr=source, length=10, BLOCK_M=4)
    assert log.touched([source, out]) == 4 * (10 + 10)
    assert log.touched([out]) == 4 * 10
    assert log.moved() == 2 * 4 * (10 + 10)
    assert log.requested == 2 * 4 * (10 + 10 + 3)


def test_unknown_names_are_refused():
    command = [sys.executable, "-m", "fastadapter.cli", "bench", "audit", "--op", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--op: unknown nothing; there is bottleneck" in result.stderr
