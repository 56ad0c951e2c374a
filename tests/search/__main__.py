"""The long search: ``python -m tests.search [--examples 2000] [--triton 300] [--output FILE]``, a summary as JSON.

With ``--seconds`` it draws in small batches until the time is over, and a failure is part of the summary, not its end:
so ``benchmarks/gpu.py`` searches on a device, where kernels are compiled, not interpreted.
"""

import argparse
import datetime
import json
import os
import platform
import time
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

with suppress(ImportError):  # quick_interpreter() changes what is there
    import triton.runtime.interpreter  # noqa: F401

from fastadapter import __version__
from tests.search.attention import OPERANDS
from tests.search.search import CPU, TRITON, search, search_until
from tests.support.attention import runs_here
from tests.support.interpreter import quick_interpreter

OPS = (*OPERANDS, "bottleneck")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--examples", type=int, default=2000, help="cases per op for the CPU backends")
    parser.add_argument("--triton", type=int, default=300, help="cases per op for the Triton kernels")
    parser.add_argument("--output", type=Path, help="store the summary; entries of other ops in it are kept")
    parser.add_argument("--seconds", type=float, help="draw small batches until so many are over")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN then: an output left unwritten shows
    deadline = time.monotonic() + (options.seconds or 0)
    rows = []
    if options.output and options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    for op in options.ops:
        for wanted, examples in ((CPU, options.examples), (TRITON, options.triton)):
            backends = [backend for backend in wanted if runs_here(op, backend)]
            if not backends or not examples:
                continue
            start = time.process_time()
            failure = None
            with quick_interpreter():
                if options.seconds is None:
                    drawn = search(op, backends, examples)
                else:
                    drawn, failure = search_until(deadline, op, backends, examples)
            row = {"op": op, "backends": backends, "failures": 0, **dict(sorted(drawn.items()))}
            if failure is not None:
                notes = getattr(failure, "__notes__", [])  # hypothesis puts the case there
                traceback.print_exception(failure)
                row |= {"failures": 1, "what": " ".join(f"{failure} {' '.join(notes)}".split())[:600]}
            row["cpu_seconds"] = round(time.process_time() - start)
            rows = [old for old in rows if (old["op"], old["backends"]) != (op, backends)] + [row]
            print(json.dumps(row), flush=True)
            if options.output:
                summary = {
                    "date": datetime.date.today().isoformat(),
                    "versions": {
                        "python": platform.python_version(),
                        "fastadapter": __version__,
                        "torch": torch.__version__,
                        "triton": version("triton"),
                    },
                    "rows": rows,
                }
                options.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
