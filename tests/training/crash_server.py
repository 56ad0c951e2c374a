"""Runs the toy training in forked children, so that a test can kill many without importing torch for each.

One JSON command per line on stdin: ``folder``, ``resume`` and ``exit_at``, the number of a file operation before which
the child ends at once as if killed (null: none). Two lines on stdout per command: the child's process id, and its wait
status when it has ended.
"""

import functools
import json
import os
import sys
from pathlib import Path

import sklearn.metrics  # noqa: F401  so that no child has to import it
import torch

from tests.training.toy import history, run

OPERATIONS = ("open", "fsync", "replace", "close")


def count_operations(exit_at: int | None) -> list[str]:
    """Record every file operation of the process; end it before the one numbered ``exit_at``."""
    seen: list[str] = []

    def counted(name, plain, *args, **kwargs):
        if len(seen) == exit_at:
            os._exit(9)
        seen.append(name)
        return plain(*args, **kwargs)

    for name in OPERATIONS:
        setattr(os, name, functools.partial(counted, name, getattr(os, name)))
    return seen


def child(folder: Path, resume: bool, exit_at: int | None) -> None:
    seen = count_operations(exit_at)
    result = run(folder, resume=resume, dropout=0.2)
    operations = len(seen)
    (folder / "result.json").write_text(json.dumps({"history": history(result), "operations": operations}))


def main() -> None:
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(Path(command["folder"]), command["resume"], command["exit_at"])
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
