"""The command line of the audit. It starts itself again where the environment asks for Triton's interpreter."""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def main(argv: list[str] | None = None) -> int:
    """0 when every row is sound, 1 when one is not."""
    parser = argparse.ArgumentParser(
        prog="fastadapter bench audit",
        description="Compile the Triton kernels ahead of time, without a GPU, and show what they need.",
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="ops to audit (all)")
    parser.add_argument("--direction", nargs="+", choices=("forward", "backward"), help="passes (all)")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="bf16, fp16, fp32, bf16+fp32, ... (all)")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="D", help="head sizes (all)")
    parser.add_argument(
        "--case", nargs="+", metavar="TEXT", help="only cases whose name contains one of these"
    )
    parser.add_argument(
        "--sample", action="store_true", help="one case of every op and pass, two architectures"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compile in parallel")
    parser.add_argument("--out", type=Path, help="store the rows in this file, replacing what it holds")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--list", action="store_true", help="name the cases and compile nothing")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        # a kernel that was decorated for the interpreter cannot be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", __package__, *arguments], env=environment).returncode

    from . import cases, draw, report

    chosen = cases.all_cases()
    filters = (
        ("--op", args.op, lambda case: case.op),
        ("--direction", args.direction, lambda case: case.direction),
        ("--dtype", args.dtype, lambda case: case.dtype),
        ("--head-dim", args.head_dim, lambda case: case.sizes.get("d")),
    )
    for option, wanted, value in filters:
        if wanted is None:
            continue
        if unknown := [name for name in wanted if name not in {value(case) for case in cases.all_cases()}]:
            known = ", ".join(map(str, sorted({value(case) for case in cases.all_cases()} - {None})))
            parser.error(f"{option}: unknown {', '.join(map(str, unknown))}; there is {known}")
        chosen = [case for case in chosen if value(case) in wanted]
    if args.case:
        chosen = [case for case in chosen if any(text in str(case) for text in args.case)]
    if not chosen:
        parser.error("no case is left")
    if args.list:
        for case in chosen:
            print(case.op, case.direction, case.dtype, case)
        return 0
    work = [(case, arch) for case in chosen for arch in args.arch]
    if args.sample:
        sample = cases.sample(ARCHITECTURES)
        work = [item for item in work if item in sample]
    rows = collect(work, args.jobs)
    if args.out:
        report.store(args.out, rows)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(draw.table(rows))
    unsound = [(row, fault) for row in rows for fault in report.faults(row)]
    for row, fault in unsound:
        name = f"{row.kernel} ({row.op} {row.direction}, {row.dtype}, {row.case}) on {row.arch}"
        print(f"{name}: {fault}", file=sys.stderr)
    return int(bool(unsound))


def collect(work, jobs: int) -> list:
    """Rows of all (case, architecture) pairs, in their order."""
    from . import report

    start = last = time.monotonic()
    if jobs == 1 or len(work) == 1:
        return [row for case, arch in work for row in report.rows_of(case, arch)]
    found = {}
    # spawned: a forked compiler inherits locks that another thread may hold
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        places = {pool.submit(report.rows_of, *item): place for place, item in enumerate(work)}
        for future in as_completed(places):
            found[places[future]] = future.result()
            now = time.monotonic()
            if now - last > 1:
                last = now
                print(f"audit: {len(found)}/{len(work)}, {now - start:.0f} s", file=sys.stderr, flush=True)
    return [row for place in sorted(found) for row in found[place]]
