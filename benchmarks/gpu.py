"""Correctness and timings on a GPU: ``python -m benchmarks.gpu [--part 1|2] [--dry-run]``; exit status 2 without one.

First the Triton kernels' tests against fp64: no timing follows red tests. Then the goals G1 to G15 of docs/gpu.md,
each against its peers at their best settings, with the share of the floor that the card itself reached in this run.
Part 1 is attention and decode, part 2 bottlenecks and whole training steps; each fits into ten minutes. Rows go to
``benchmarks/results/gpu.jsonl``, a table is printed last. ``--dry-run`` walks through all of it on a CPU with tiny
sizes and stores nothing.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PARTS = (1, 2)
TESTS = {
    1: ("tests/test_gated_prefix_triton.py", "tests/test_attention_triton.py", "tests/test_decode_triton.py"),
    2: ("tests/test_bottleneck_triton.py",),
}
LLAMA_8B = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 32000,
}  # fmt: skip


def run_tests(part: int, dry_run: bool, seconds: float) -> str:
    """ "" when they pass, else what happened. Without the tests' folder (an installed package) the ops' self-check has
    to do, which runs before their first launch."""
    root = Path(__file__).resolve().parents[1]
    present = [name for name in TESTS[part] if (root / name).is_file()]
    if not present:
        print("benchmarks.gpu: no tests here: relying on the self-check of each op", file=sys.stderr)
        return ""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(["--collect-only"] if dry_run else []), *present]
    print(" ".join(["python", *command[1:]]), file=sys.stderr, flush=True)
    try:
        status = subprocess.run(command, cwd=root, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"benchmarks.gpu: tests stopped after {seconds:.0f} s, none red until then", file=sys.stderr)
        return ""
    return "" if status == 0 else f"tests are red (pytest {status})"


def goals(part: int, bench) -> Iterator:
    """Pairs (case, floor in seconds) of the goals on single ops."""
    from . import gpu_attention, gpu_bottleneck

    if part == 1:
        groups = [
            gpu_attention.epilogue,
            gpu_attention.one_pass,
            gpu_attention.decode,
            gpu_attention.shared_softmax,
        ]
    else:
        groups = [gpu_bottleneck.forward, gpu_bottleneck.training, gpu_bottleneck.mixed]
    for group in groups:
        yield from group(bench)


def steps(settings) -> Iterator:
    """Cases of whole training steps, bf16: G5 one layer that is nearly all attention, G6 four layers, G7 SmolLM2."""
    import torch

    from . import bench_llama_adapter

    dtype = torch.float32 if settings.quick else torch.bfloat16
    batch, length = (2, 16) if settings.quick else (4, 2048)
    shape = (
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        if settings.quick
        else LLAMA_8B
    )
    attention = {**shape, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 512}
    sliced = {**shape, "num_hidden_layers": 2 if settings.quick else 4}
    cases = bench_llama_adapter.training_cases
    yield from cases(settings, batch, length, dtype, "G5 attention block step", attention)
    yield from cases(settings, batch, length, dtype, "G6 training step, 8B shape", sliced)
    yield from cases(
        settings, 2 if settings.quick else 8, 16 if settings.quick else 512, dtype, "G7 training step"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastadapter bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=PARTS, help="attention and decode, or the rest (both)")
    parser.add_argument(
        "--dry-run", action="store_true", help="walk through it on a CPU, tiny, nothing stored"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="samples of every variant (ops: ten times as many)"
    )
    parser.add_argument(
        "--seconds", type=float, default=560, help="time for a part; goals past it are left out"
    )
    parser.add_argument("--test-seconds", type=float, default=150, help="of which for the tests at most")
    parser.add_argument("--out", type=Path, help="file to append rows to (benchmarks/results/gpu.jsonl)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")

    import torch

    from fastadapter.ops.backends import triton_error

    from . import rows, table

    if not args.dry_run:
        if not torch.cuda.is_available():
            print(f"benchmarks.gpu: no GPU (torch {torch.__version__}); nothing was run", file=sys.stderr)
            return 2
        if error := triton_error("cuda"):
            print(f"benchmarks.gpu: {error}; nothing was run", file=sys.stderr)
            return 2
    device = "cpu" if args.dry_run else "cuda"
    out = args.out or (None if args.dry_run else rows.destination("gpu.jsonl"))
    measured: list = []
    for part in [args.part] if args.part else PARTS:
        start = time.monotonic()
        if problem := run_tests(part, args.dry_run, args.test_seconds):
            print(f"benchmarks.gpu: {problem}, so nothing is timed", file=sys.stderr)
            return 1
        for found in measure_part(part, device, args, start + args.seconds):
            measured += found
            if out is not None:
                rows.append(out, found)
    if not measured:
        print("benchmarks.gpu: there was no time for any goal", file=sys.stderr)
        return 1
    print(table.table(measured))
    print(f"\n{table.caption(measured[0])}")
    if measured[0].clocks:
        print(f"clocks: {measured[0].clocks}")
    print("dry run: nothing here is a measurement" if args.dry_run else f"stored in {out}")
    return 0


def measure_part(part: int, device: str, args: argparse.Namespace, deadline: float) -> Iterator:
    """Rows of every case, until the time is over."""
    from . import gpu_tools, rows, runner

    dry = args.dry_run
    bench = gpu_tools.ceilings(device, dry)
    reached = f"copy {bench.copy_bytes_per_s / 1e12:.3g} TB/s, product {bench.flops_per_s / 1e12:.3g} TFLOP/s"
    print(f"part {part}: {reached}", file=sys.stderr, flush=True)
    settings = runner.Settings(
        rounds=1 if dry else args.rounds, quick=dry, device=device, environment=rows.environment(device)
    )
    # a sample is one call, so there are many
    many = dataclasses.replace(settings, rounds=settings.rounds if dry else 10 * settings.rounds)
    events, wall = bench.event_meter(), bench.wall_meter()
    for case, floor in goals(part, bench):
        if time.monotonic() > deadline:
            print(f"{case.entry}, {case.shape}: no time left, and for what follows", file=sys.stderr)
            return
        found = runner.measure(case, many, events)
        for row in found:
            if floor:
                row.extra["percent_of_floor"] = 100 * floor / (row.median * 1e-6)
        yield found
    if part == 2:
        for case in step_cases(settings):
            if time.monotonic() > deadline:
                print(f"{case.entry}, {case.shape}: no time left, and for what follows", file=sys.stderr)
                return
            yield runner.measure(case, settings, wall)


def step_cases(settings) -> Iterator:
    """The training steps, where transformers and PEFT are installed."""
    try:
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        print(f"benchmarks.gpu: training steps are left out: {error}", file=sys.stderr)
        return
    transformers.logging.set_verbosity_error()
    yield from steps(settings)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.exit(main())
