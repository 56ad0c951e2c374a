"""One version's side of ``benchmarks/versions.py``: cases of an entry, a round whenever it is asked for one.

    python -m benchmarks.serve ENTRY [--quick]

A line of JSON says which library this is, then one for every case, followed by one with the seconds of every variant
for each line on stdin, as many as rounds. Only ours and the floor are timed: the other version is the rival.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from . import lost, runner


def serve(entry: Any, settings: runner.Settings, out: Any, questions: Any) -> None:
    """Answer ``questions``, a line for each round of each case."""

    def say(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=out, flush=True)

    def rounds(case: runner.Case, wanted: int, meter: runner.Meter) -> dict[str, list[float]]:
        kept = [each for each in case.variants if each.name == case.floor or lost.is_ours(each.name)]
        turns = runner.rounds_of(dataclasses.replace(case, variants=kept), meter)
        samples: dict[str, list[float]] = {variant.name: [] for variant in case.variants}
        first = next(turns)  # takes the warm-up, and is not counted
        say({"entry": case.entry, "shape": case.shape})
        for _ in range(wanted):
            if not questions.readline():
                raise SystemExit("the comparison has ended")
            for name, seconds in (answer := next(turns)).items():
                samples[name].append(seconds)
            say({"seconds": answer})
        # rows are made and thrown away: those that were not timed get what the first round had
        return {name: found or [first[case.floor]] * wanted for name, found in samples.items()}

    for _ in entry(dataclasses.replace(settings, interleave=rounds)):
        pass
    say({"end": True})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entry")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch
    import transformers

    from . import rows, run

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    import fastadapter
    from fastadapter.ops.backends import extension_error

    # so that nobody compares a version with itself, or compiled code with none
    said = {"library": str(Path(fastadapter.__file__).parent), "extension": extension_error() or "works"}
    print(json.dumps(said), file=out, flush=True)
    settings = runner.Settings(rounds=args.rounds, quick=args.quick, environment=rows.environment())
    serve(run.entries()[args.entry], settings, out, sys.stdin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
