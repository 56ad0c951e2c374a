"""``run.json``: what a run was asked, on what, and how far it came."""

import json
from pathlib import Path
from typing import Any

from fastadapter.checkpoints.files import CheckpointError, write_atomically

RUN_FILE = "run.json"
_FORMAT = 1


def write_run(folder: str | Path, record: dict[str, Any]) -> None:
    """Write the record of a run, whole or not at all."""
    write_atomically(Path(folder) / RUN_FILE, (json.dumps(record, indent=1) + "\n").encode())


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """The record of the run in a folder; ``None``: there is none.

    Raises: CheckpointError: it is malformed.
    """
    path = Path(folder) / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise ValueError(f"expected a JSON object with format {_FORMAT}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the record of a run: {error}") from error
    return record
