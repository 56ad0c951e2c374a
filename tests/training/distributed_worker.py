"""One process of the toy training under torchrun; the argument is the output folder."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from tests.training.toy import history, run

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    results = {}
    for labelled in (True, False):
        result = run(folder / str(labelled), labelled=labelled, batch_size=5, accelerator=accelerator)
        results[str(labelled)] = history(result)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()
