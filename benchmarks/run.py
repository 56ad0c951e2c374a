"""Run the CPU benchmarks, store their rows and print them: ``python -m benchmarks.run [--only NAME ...] [--quick]``.

Rows are appended to ``benchmarks/results/cpu.jsonl`` as each case ends. ``--quick`` is a smoke test on small models
and stores nothing. Nothing else should run on the machine: rows measured beside other work are marked and stored, but
no table and no picture shows them (``benchmarks/quiet.py``).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import runner

SIZES = ("records", "held_out", "epochs")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries to run")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="entries not to run")
    parser.add_argument("--list", action="store_true", help="name the entries and run nothing")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds, nothing stored")
    parser.add_argument(
        "--rounds",
        type=int,
        help="samples of every variant (15, or 2 with --quick); of recipes and memory the number is fixed",
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--out", type=Path, help="file to append to (benchmarks/results/cpu.jsonl)")
    parser.add_argument("--report", action="store_true", help="then draw the documents' tables and pictures")
    parser.add_argument("--records", type=int, help="reviews that the recipes train on")
    parser.add_argument("--held-out", type=int, help="reviews that time-to-accuracy is judged by")
    parser.add_argument("--epochs", type=int, help="of the recipes")
    args = parser.parse_args(argv)
    rounds = args.rounds if args.rounds is not None else (2 if args.quick else 15)
    if rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    runner.keep_memory()

    import torch
    import transformers

    from . import quiet, report, rows, table

    known = entries()
    if args.list:
        print("\n".join(known))
        return 0
    if unknown := sorted({*(args.only or []), *args.skip} - set(known)):
        parser.error(f"--only, --skip: unknown {', '.join(unknown)}; there is {', '.join(known)}")
    chosen = [name for name in args.only or known if name not in args.skip]
    if not chosen:
        parser.error("--skip leaves nothing to run")
    options = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    if options and not any(name.startswith(("recipe-", "time-to-accuracy-")) for name in chosen):
        parser.error(f"--{next(iter(options)).replace('_', '-')} is for the recipes, none of which is run")
    if "held_out" in options and not any(name.startswith("time-to-accuracy-") for name in chosen):
        parser.error("--held-out is for time-to-accuracy, which is not run")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    runner.touch_memory(256 if args.quick else 2048)
    settings = runner.Settings(
        rounds=rounds, quick=args.quick, environment=rows.environment(), options=options
    )
    out = args.out or (None if args.quick else rows.destination("cpu.jsonl"))
    measured, busy = [], {}
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for part in watched(known[name](settings), quiet.Watch):
            measured += part
            if part and part[0].extra.get(quiet.MARK):
                busy[name] = quiet.why(part[0].extra)
            if out is not None:
                rows.append(out, part)
    if not measured:
        print("nothing could be measured here", file=sys.stderr)
        return 1
    print(table.table(measured))
    print(f"\n{table.caption(measured[0])}")
    print("quick run: not to be quoted" if args.quick else f"stored in {out}")
    if args.report and out == rows.destination("cpu.jsonl"):
        report.main([])
    elif args.report:
        print("--report: drawn is what is stored with the project, and nothing of this run is")
    for name, why in busy.items():
        print(f"NOT PUBLISHED: the machine was busy during {name} ({why})", file=sys.stderr)
    return 0


def entries() -> dict[str, Callable[[runner.Settings], Any]]:
    """Every entry by its name, in the order in which they run: ops, steps, decoding, recipes, memory."""
    from . import (
        bench_bottleneck,
        bench_gated_prefix,
        bench_gated_prefix_attention,
        bench_llama_adapter,
        bench_methods,
        bench_prefix_attention,
        bench_scaling,
        recipe,
        roofline,
        stack,
    )

    return {
        "gated_prefix": bench_gated_prefix.entry,
        "gated_prefix_attention": bench_gated_prefix_attention.entry,
        "prefix_attention": bench_prefix_attention.entry,
        "bottleneck": bench_bottleneck.entry,
        "roofline": roofline.entry,
        "training-step": bench_llama_adapter.training_step,
        "training-step-bf16": bench_llama_adapter.training_step_bf16,
        "method-step": bench_methods.method_step,
        "step-stack": stack.entry,
        "prefix-length": bench_scaling.prefix_length,
        "batch": bench_scaling.batch,
        "decode": bench_llama_adapter.decode,
        "mixed-decode": bench_methods.mixed_decode,
        "generate": bench_methods.generate,
        "generate-1b": bench_methods.generate_1b,
        **recipe.ENTRIES,
        "peak-memory": bench_llama_adapter.peak_memory,
    }


def watched(parts: Any, watch: Callable[[], Any]) -> Any:
    """``parts``, the rows of each with the marks of what else the machine did while they were measured."""
    from . import quiet

    parts = iter(parts)
    while True:
        looking = watch()
        part = next(parts, None)
        if part is None:
            return
        marks = looking.marks()
        for row in part:
            row.extra.update(marks)
            if row.unit == "MiB":  # memory is no matter of who else is at work
                row.extra.pop(quiet.MARK, None)
        yield part


if __name__ == "__main__":
    sys.exit(main())
