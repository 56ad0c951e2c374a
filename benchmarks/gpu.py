"""Correctness and timings on a CUDA GPU: ``python -m benchmarks.gpu [--dry-run]``; exit status 2 without one.

First the Triton kernels' tests against fp64: no timing follows red tests. Then the op at the 8B shape, forward and
backward apart, and training step and decode of the recipe. Rows go to ``benchmarks/results/gpu.jsonl``.
``--dry-run`` walks through the same code on a CPU with small sizes and stores nothing.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = ("tests/test_gated_prefix.py", "tests/test_gated_prefix_triton.py")
# Cycles the GPU idles for while the host enqueues a sample, so that no launch gap falls into the window.
HEAD_START = 2_000_000
# More than the L2 cache of any current card.
FLUSH_BYTES = 256 * 2**20


def run_tests(dry_run: bool) -> int:
    command = [sys.executable, "-m", "pytest", "-q", *(["--collect-only"] if dry_run else []), *TESTS]
    print(" ".join(["python", *command[1:]]), file=sys.stderr, flush=True)
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=root).returncode


def event_meter():
    """Seconds of GPU time per call, caches cold: events around each call, the L2 cache overwritten before it."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def meter(run, state, calls):
        pairs = []
        for _ in range(calls):
            flush.zero_()
            torch.cuda._sleep(HEAD_START)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(state)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3

    return meter


def synchronized_clock() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def op_cases(settings) -> Iterator:
    """G1 and G2: forward, and backward alone, of bf16 activations at Llama-3-8B's shape, 8192 tokens."""
    import torch

    from . import bench_gated_prefix as bench
    from .runner import Case, Variant

    sizes = (2, 4, 2, 16, 16, 10) if settings.quick else (4, 32, 8, 2048, 128, 10)
    shape, dtype = bench.Shape(*sizes, "bthd"), torch.bfloat16
    moved = bench.bytes_moved(
        shape, dtype, "forward"
    )  # backward: reads grad_out and query, writes grad_query
    options = {
        "entry": "gated_prefix",
        "dtype": "bfloat16",
        "floor": "copy",
        "unit": "us",
        "bytes_moved": moved,
        "warmup": 5,
    }
    inputs = bench.make_inputs(shape, dtype, settings.device, grad=False)
    usable = bench.usable_forms(shape, dtype, settings.device, "forward", inputs)
    copy = bench.copy_variant(moved, settings.device)
    own = [Variant(name, lambda _, fn=fn: bench.forward(fn, inputs)) for name, fn in usable.items()]
    yield Case(shape=f"forward {shape}", variants=[copy, *own], **options)

    inputs = bench.make_inputs(shape, dtype, settings.device, grad=True)
    usable = bench.usable_forms(shape, dtype, settings.device, "forward+backward", inputs)

    def backward(out):
        torch.autograd.grad(out, inputs.operands, inputs.grad_out)

    # a forward for every sample, untimed: compiled graphs cannot go through their backward twice
    own = [Variant(name, backward, lambda fn=fn: bench.forward(fn, inputs)) for name, fn in usable.items()]
    yield Case(shape=f"backward {shape}", variants=[copy, *own], **options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run", action="store_true", help="walk through it on a CPU, small, nothing stored"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples of every variant")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")

    import torch
    import transformers

    from fastadapter.ops.backends import triton_error

    from . import bench_llama_adapter, rows, runner, table

    if not args.dry_run:
        if not torch.cuda.is_available():
            print(
                f"benchmarks.gpu: no CUDA GPU (torch {torch.__version__}); nothing was run", file=sys.stderr
            )
            return 2
        if error := triton_error("cuda"):
            print(f"benchmarks.gpu: {error}; nothing was run", file=sys.stderr)
            return 2
    if run_tests(args.dry_run):
        print("benchmarks.gpu: tests are red, so nothing is timed", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    device = "cpu" if args.dry_run else "cuda"
    settings = runner.Settings(
        rounds=2 if args.dry_run else args.rounds,
        quick=args.dry_run,
        device=device,
        environment=rows.environment(device),
    )
    events = runner.wall_meter() if args.dry_run else event_meter()
    wall = runner.wall_meter() if args.dry_run else runner.wall_meter(synchronized_clock)

    def parts():
        # a sample is one call, so there are many
        many = dataclasses.replace(settings, rounds=settings.rounds if args.dry_run else 10 * settings.rounds)
        for case in op_cases(settings):
            yield runner.measure(case, many, events)
        yield from bench_llama_adapter.training_step(settings, wall)
        yield from bench_llama_adapter.decode(settings, wall)

    measured = []
    for part in parts():
        measured += part
        if not args.dry_run:
            rows.append(rows.destination("gpu.jsonl"), part)
    print(table.table(measured))
    print(f"\n{table.caption(measured[0])}")
    if measured[0].clocks:
        print(f"clocks: {measured[0].clocks}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
