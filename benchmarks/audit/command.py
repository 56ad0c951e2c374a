"""The command line of the audit. It starts itself again where the environment asks for Triton's interpreter."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from ..runner import Progress

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
        "--sample", action="store_true", help="one case of every op and pass, architectures in rotation"
    )
    parser.add_argument(
        "--traffic", action="store_true", help="count the bytes that small calls touch, in the interpreter"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="estimate times on H200 and H100 (bf16, unless --dtype says more)",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compile in parallel")
    parser.add_argument(
        "--out", type=Path, help="store the rows in this file: they replace those of the same cases"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--draw", type=Path, metavar="DOCUMENT", help="write the short document from stored tables"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and compile nothing")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.draw:
        from . import calibrate, draw, report, traffic

        tables = (report.load(), traffic.load(), calibrate.measured(), calibrate.load())
        args.draw.write_text(draw.document(*tables), encoding="utf-8")
        return 0
    if args.traffic != (os.environ.get("TRITON_INTERPRET") == "1"):
        # settled when a kernel is decorated: one made for the interpreter cannot be compiled, nor the reverse
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_INTERPRET": "1"} if args.traffic else {}
        return subprocess.run([sys.executable, "-m", __package__, *arguments], env=environment).returncode
    if args.traffic:
        return traffic_main(args)

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
    if args.estimate:
        return estimate_main(args, [case for case in chosen if args.dtype or case.dtype == "bf16"])
    work = [(case, arch) for case in chosen for arch in args.arch]
    if args.sample:
        sample = cases.sample(ARCHITECTURES)
        work = [item for item in work if item in sample]
    rows = collect(work, args.jobs)
    if args.out:
        report.update(args.out, rows)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(draw.table(rows))
    unsound = [(row, fault) for row in rows for fault in report.faults(row)]
    for row, fault in unsound:
        name = f"{row.kernel} ({row.op} {row.direction}, {row.dtype}, {row.case}) on {row.arch}"
        print(f"{name}: {fault}", file=sys.stderr)
    return int(bool(unsound))


def traffic_main(args: argparse.Namespace) -> int:
    """1 where the count of a call is more than a tenth off its formula."""
    from . import draw, traffic

    counts = traffic.count_all(args.arch, args.op)
    if args.out:
        traffic.update(args.out, counts)
    if args.json:
        print(json.dumps([asdict(count) for count in counts], indent=1))
    else:
        print(draw.traffic_table(counts))
    return int(any(abs(count.ratio - 1) > 0.1 for count in counts))


def estimate_main(args: argparse.Namespace, chosen: list) -> int:
    from . import calibrate, draw

    rows = in_parallel(calibrate.predict, [(case,) for case in chosen], args.jobs, "estimate")
    if args.out:
        calibrate.update(args.out, rows)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(draw.aligned(calibrate.predictions_table(rows)))
    return 0


def in_parallel(function, arguments: list[tuple], jobs: int, what: str) -> list:
    """Results in the order of ``arguments``, each computed in one of ``jobs`` processes."""
    progress = Progress(what, len(arguments))
    found = {}
    if jobs == 1 or len(arguments) == 1:
        for place, given in enumerate(arguments):
            found[place] = function(*given)
            progress(len(found))
    else:
        # spawned: a forked compiler inherits locks that another thread may hold
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(function, *given): place for place, given in enumerate(arguments)}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress(len(found))
    return [found[place] for place in range(len(arguments))]


def collect(work, jobs: int) -> list:
    """Rows of all (case, architecture) pairs, in their order. What compiles to the same kernel is compiled once."""
    from . import capture, report

    launches = [
        (case, arch, index, launch)
        for case, arch in work
        for index, launch in enumerate(report.launches_of(case, arch))
    ]
    keys = [capture.identity(launch, arch) for _, arch, _, launch in launches]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    inspected = in_parallel(report.inspect, [launches[place][:3] for place in first.values()], jobs, "audit")
    found = dict(zip(first, inspected, strict=True))
    return [
        report.make_row(case, arch, index, launch, found[key])
        for (case, arch, index, launch), key in zip(launches, keys, strict=True)
    ]
