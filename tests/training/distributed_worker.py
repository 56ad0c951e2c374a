"""One process of the toy training under torchrun; the argument is the output folder.

Writes its histories to ``rank0.json`` or ``rank1.json``: of runs with labels and with free completions, padded and
packed; of a run with dropout that is left alone and of one that a signal to the second process stops and that is then
resumed; of one that begins its passes from states that both computed; what is said when the processes do not share a
folder, and where another run is at work.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from fastadapter.training import TrainingInterrupted, UserError, state, tasks
from fastadapter.training.lock import FolderLock
from fastadapter.training.trunk import store
from tests.training import trunk_runs
from tests.training.toy import history, run


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    options = {"batch_size": 5, "accelerator": accelerator}
    results = {
        "labels": history(run(folder / "labels", **options)),
        "completions": history(run(folder / "completions", labelled=False, **options)),
        "packed": history(run(folder / "packed", labelled=False, packing=True, pack_length=40, **options)),
        "whole": history(run(folder / "whole", dropout=0.2, **options)),
    }
    plain, calls = tasks.supervised_loss, []

    def stopping(model, batch):
        calls.append(1)
        if accelerator.process_index == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    tasks.supervised_loss = stopping
    write = state.write_tensors

    def slow(path, tensors, metadata):
        # The last save takes so long that a process that did not wait for it would resume from the one before.
        time.sleep(2 if len(tensors["losses"]) == 3 else 0)
        write(path, tensors, metadata)

    state.write_tensors = slow
    try:
        run(folder / "stopped", dropout=0.2, **options)
    except TrainingInterrupted as stop:
        results["exit_code"] = stop.exit_code
    tasks.supervised_loss, state.write_tensors = plain, write
    results["resumed"] = history(run(folder / "stopped", dropout=0.2, resume=True, **options))
    if accelerator.is_main_process:
        shutil.copytree(folder / "whole" / "last", folder / "private0" / "last")
    try:
        private = folder / f"private{accelerator.process_index}"
        run(private, dropout=0.2, resume=True, **options)
    except UserError as error:
        results["private"] = str(error)
    store.SHARD_SEQUENCES = 8
    trunk = trunk_runs.run(folder / "trunk", folder / "cache", batch_size=5, accelerator=accelerator)
    results["trunk"] = history(trunk)
    results["computed"] = trunk.trunk_cache["computed_tokens"] - trunk.trunk_cache["tokens"]
    lock = FolderLock(folder / "labels")
    if accelerator.is_main_process:
        lock.acquire()
    try:
        run(folder / "labels", resume=True, **options)
    except UserError as error:
        results["locked"] = str(error).partition(" (")[0] if accelerator.is_main_process else "refused"
    lock.release()
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main()
