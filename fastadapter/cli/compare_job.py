"""One run of ``fastadapter compare`` in a process of its own: ``python -m fastadapter.cli.compare_job FOLDER``."""

import sys
from pathlib import Path


def main(folder: Path) -> int:
    from transformers.utils import logging

    from fastadapter.cli import faults
    from fastadapter.cli.loading import load_classifier, load_model
    from fastadapter.compare.worker import execute, read_job
    from fastadapter.training import TrainingInterrupted

    logging.disable_progress_bar()  # the comparison has a line for every run
    try:
        execute(read_job(folder / "job.json"), folder, load_classifier, load_model)
    except TrainingInterrupted as stop:
        return stop.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return faults.tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
