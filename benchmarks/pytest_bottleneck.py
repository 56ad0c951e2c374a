"""bottleneck under pytest-benchmark, one variant at a time: ``pytest benchmarks/pytest_bottleneck.py``."""

import pytest
import torch

from . import bench_bottleneck as bench


@pytest.mark.parametrize("direction", bench.PASSES)
@pytest.mark.parametrize("shape", [bench.WIDE, bench.NARROW], ids=str)
@pytest.mark.parametrize("name", ["fastadapter-cpp", "eager", "gemm-pair", "modules", "eager-compiled"])
def test_bottleneck(benchmark, name, shape, direction):
    inputs = bench.make_inputs(shape, torch.float32, "cpu", grad=direction != "forward")
    fn = bench.forms(shape, inputs)[name]
    run = bench.PASSES[direction]
    run(fn, inputs)  # compiles where it has to
    benchmark.extra_info["bytes_moved"] = bench.bytes_moved(shape, torch.float32, direction)
    benchmark(run, fn, inputs)
