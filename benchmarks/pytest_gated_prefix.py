"""gated_prefix under pytest-benchmark, one variant at a time: ``pytest benchmarks/pytest_gated_prefix.py``."""

import pytest
import torch

from . import bench_gated_prefix as bench

NAMES = [
    "fastadapter-cpp",
    "fastadapter-reference",
    *bench.PEERS,
    *(f"{name}-compiled" for name in bench.PEERS),
]


@pytest.mark.parametrize("direction", bench.PASSES)
@pytest.mark.parametrize("shape", bench.SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gated_prefix(benchmark, name, shape, direction):
    inputs = bench.make_inputs(shape, torch.float32, "cpu", grad=direction != "forward")
    fn = bench.forms("cpu")[name]
    run = bench.PASSES[direction]
    run(fn, inputs)  # compiles where it has to
    benchmark.extra_info["bytes_moved"] = bench.bytes_moved(shape, torch.float32, direction)
    benchmark(run, fn, inputs)
