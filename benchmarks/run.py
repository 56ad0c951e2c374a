"""Run the CPU benchmarks, store their rows and print them: ``python -m benchmarks.run [--only NAME ...] [--quick]``.

Rows are appended to ``benchmarks/results/cpu.jsonl`` as each entry ends. ``--quick`` is a smoke test on small models
and stores nothing. Nothing else should run on the machine.
"""

import argparse
import os
import sys
from pathlib import Path

from . import runner


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries to run")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds, nothing stored")
    parser.add_argument("--rounds", type=int, help="samples of every variant (15, or 2 with --quick)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--out", type=Path, help="file to append to (benchmarks/results/cpu.jsonl)")
    args = parser.parse_args(argv)
    rounds = args.rounds if args.rounds is not None else (2 if args.quick else 15)
    if rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    runner.keep_memory()

    import torch
    import transformers

    from . import (
        bench_bottleneck,
        bench_gated_prefix,
        bench_gated_prefix_attention,
        bench_llama_adapter,
        bench_methods,
        bench_prefix_attention,
        rows,
        table,
    )

    entries = {
        "gated_prefix": bench_gated_prefix.entry,
        "gated_prefix_attention": bench_gated_prefix_attention.entry,
        "prefix_attention": bench_prefix_attention.entry,
        "bottleneck": bench_bottleneck.entry,
        "training-step": bench_llama_adapter.training_step,
        "decode": bench_llama_adapter.decode,
        "method-step": bench_methods.method_step,
        "mixed-decode": bench_methods.mixed_decode,
        "generate": bench_methods.generate,
        "peak-memory": bench_llama_adapter.peak_memory,
    }
    chosen = args.only or list(entries)
    if unknown := sorted(set(chosen) - set(entries)):
        parser.error(f"--only: unknown {', '.join(unknown)}; there is {', '.join(entries)}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    runner.touch_memory(256 if args.quick else 2048)
    settings = runner.Settings(rounds=rounds, quick=args.quick, environment=rows.environment())
    out = args.out or (None if args.quick else rows.destination("cpu.jsonl"))
    measured = []
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for part in entries[name](settings):
            measured += part
            if out is not None:
                rows.append(out, part)
    print(table.table(measured))
    print(f"\n{table.caption(measured[0])}")
    print("quick run: not to be quoted" if args.quick else f"stored in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
