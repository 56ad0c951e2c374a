"""One process of the toy training under torchrun; the argument is the output folder.

Writes its histories to ``rank0.json`` or ``rank1.json``: of runs with labels and with free completions, and of a run
with dropout that is left alone and of one that a signal to the second process stops and that is then resumed.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from fastadapter.training import TrainingInterrupted, loop
from tests.training.toy import history, run


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    options = {"batch_size": 5, "accelerator": accelerator}
    results = {
        "labels": history(run(folder / "labels", **options)),
        "completions": history(run(folder / "completions", labelled=False, **options)),
        "whole": history(run(folder / "whole", dropout=0.2, **options)),
    }
    plain, calls = loop.supervised_loss, []

    def stopping(model, batch):
        calls.append(1)
        if accelerator.process_index == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    loop.supervised_loss = stopping
    try:
        run(folder / "stopped", dropout=0.2, **options)
    except TrainingInterrupted as stop:
        results["exit_code"] = stop.exit_code
    loop.supervised_loss = plain
    results["resumed"] = history(run(folder / "stopped", dropout=0.2, resume=True, **options))
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main()
