"""Peak memory of one training step of one variant, in this process: ``python -m benchmarks.memory VARIANT``.

Measured is the resident set: what the kernel counts, not what a framework admits to. Two things make it repeatable.
glibc is told to map every larger block and so to return it when it is freed (:data:`ALLOCATOR`, the opposite of what
timing needs): then the resident set is what is alive, not what once was. And Linux can reset the peak
(``/proc/self/clear_refs``), which is done after a warm-up step, when buffers that live as long as the process are
there: what loading the model took does not count. Prints JSON: resident and peak, MiB.
"""

import argparse
import ctypes
import gc
import json
import os
from pathlib import Path

from .peers.protocol import status_mib

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
RESET_PEAK = "5"


def measure(name: str, quick: bool) -> dict[str, float]:
    from . import models, variants

    model = models.build(small=quick)
    model = variants.MAKERS[name](model, len(model.model.layers)).train()
    ids = models.tokens(model, *((2, 32) if quick else (4, 128)))
    step = variants.runs_of(name, models.training_step)
    step(model, ids)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    resident = status_mib("VmRSS")
    step(model, ids)
    return {"resident_mib": resident, "peak_mib": status_mib("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant")
    parser.add_argument("--quick", action="store_true", help="a small model")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        raise SystemExit(f"memory.py needs the environment {ALLOCATOR}")
    print(json.dumps(measure(args.variant, args.quick)))


if __name__ == "__main__":
    main()
