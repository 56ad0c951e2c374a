"""One process of a GPU run: ``benchmarks/gpu.py`` starts it, sends it a job and kills it when its time is over.

It imports what it needs, then waits for the job on stdin, so that the next process can start while one is timed.
``probe`` instead of a case describes the card and lists the cases that can be imported here.
"""

import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def cases(module: str) -> dict[str, Callable]:
    return importlib.import_module(module if "." in module else f".{module}", __package__).CASES


def probe(modules: Sequence[str], dry: bool) -> dict[str, Any]:
    """What the run needs to know of card and packages; ``error`` where nothing can be timed."""
    import torch

    from fastadapter.ops.backends import triton_error

    from . import gpu_tools, rows

    device = "cpu" if dry else "cuda"
    if dry:
        torch.set_num_threads(1)  # others run beside it, and what it does is tiny
    if not dry:
        if not torch.cuda.is_available():
            return {"error": f"no GPU (torch {torch.__version__})"}
        if error := triton_error("cuda"):
            return {"error": error}
    found: dict[str, list[str]] = {}
    absent: list[str] = []
    for module in modules:
        try:
            found[module] = list(cases(module))
        except ImportError as error:
            absent.append(f"the cases of {module} are left out: {error}")
    return {
        "error": "",
        "cases": found,
        "absent": absent,
        "bench": {
            "device": device,
            "environment": rows.environment(device),
            **gpu_tools.ceilings(device, dry),
        },
    }


def run(case: Callable, job: dict[str, Any]) -> int:
    """Rows are written as the case yields them. Exit status 1 where something of ours was wrong or failed."""
    import torch

    from . import gpu_tools, rows

    torch.manual_seed(0)
    bench = gpu_tools.Bench(**job["bench"])
    if bench.dry:
        torch.set_num_threads(1)
    for row in case(bench):
        found = row if isinstance(row, list) else [row]
        for path in job["rows"]:
            rows.append(Path(path), found)
    for problem in bench.problems:
        print(f"PROBLEM {problem}", file=sys.stderr, flush=True)
    return 1 if bench.problems else 0


def main() -> int:
    what, *modules = sys.argv[1:]
    if what == "probe":
        os.dup2(2, 1)
        job = json.loads(sys.stdin.readline())
        answer = probe(modules, job["dry"])
        Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
        return 0
    case = cases(modules[0])[what]
    os.write(1, b".")  # ready
    os.dup2(2, 1)
    line = sys.stdin.readline()
    if not line:  # the run ended before this case's turn
        return 0
    job = json.loads(line)
    # Says where it hangs, before the end of its time.
    faulthandler.dump_traceback_later(job["stack_after"])
    return run(case, job)


if __name__ == "__main__":
    sys.exit(main())
