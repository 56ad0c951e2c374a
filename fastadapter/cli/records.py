"""Records written as they are made: JSON lines, in a file that a later call can go on with, or on stdout."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapter.checkpoints.files import write_atomically
from fastadapter.training import UserError
from fastadapter.training.report import require_writable


def add_output_arguments(parser: Any) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="write a JSON record per line to this file as they come, and nothing else; stdout if not given",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output after an interruption, if its prompts and settings are these",
    )
    group.add_argument("--json", action="store_true", help="print JSON, a record per line, as they come")


def require_output(args: Any) -> None:
    """Raise UserError where the options of :func:`add_output_arguments` contradict each other."""
    if args.resume and args.output is None:
        raise UserError("--resume needs --output, the file to go on with")
    if args.json and args.output is not None:
        raise UserError("--json prints what --output writes to a file; give one of them")


class RecordFile:
    """A file of JSON lines, and beside it ``FILE.settings.json`` with what its records were made with.

    Every :meth:`write` is one system call, so that after a kill all lines but perhaps the last are whole; a last line
    that is not is cut off by the next call. Nothing is written before :meth:`start`.

    Args:
        path: the file.
        settings: everything but the inputs that decides what the records hold.
        resume: go on with the records that are there; otherwise there must be none.
    Attributes:
        found: the records that were there.
    Raises: UserError: there are records without ``resume``; they were made with other settings, each of which is
        named; their lines are malformed.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, resume: bool = False):
        self.path = Path(path)
        self.settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self.settings = json.loads(json.dumps(settings))
        if self.path.exists() and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "a device"
            raise UserError(f"--output {path}: expected a file, got {what}")
        size = self.path.stat().st_size if self.path.exists() else 0
        if size and not resume:
            raise UserError(
                f"--output {path}: holds records; --resume goes on with them, or name another file"
            )
        self.found: list[dict[str, Any]] = []
        self.whole_bytes = 0
        if size:
            self._require_settings()
            self._read()
        self.file: Any = None

    def start(self) -> None:
        """Make ready to write behind what is there.

        Raises: UserError: the file cannot be written.
        """
        require_writable(self.path.parent)
        write_atomically(self.settings_path, (json.dumps(self.settings, indent=1) + "\n").encode())
        try:
            self.file = self.path.open("ab", buffering=0)
            self.file.truncate(self.whole_bytes)
        except OSError as error:
            raise UserError(f"--output {self.path}: {error.strerror or error}") from error

    def _require_settings(self) -> None:
        settings = self.settings
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"--resume: {self.settings_path} is gone, so nobody knows what {self.path} was made with; "
                "name another file"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.settings_path}: malformed JSON: {error}") from None
        if not isinstance(before, dict):
            raise UserError(f"{self.settings_path}: expected a JSON object")
        changed = [
            f"{key} was {before.get(key)!r}, now {settings.get(key)!r}"
            for key in sorted(before.keys() | settings.keys())
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise UserError(f"--resume: {self.path} was made with other settings: {'; '.join(changed)}")

    def _read(self) -> None:
        data = self.path.read_bytes()
        self.whole_bytes = data.rfind(b"\n") + 1
        for number, raw in enumerate(data[: self.whole_bytes].splitlines(), 1):
            try:
                record = json.loads(raw)
            except ValueError as error:
                raise UserError(f"{self.path} line {number}: malformed JSON: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f"{self.path} line {number}: expected a JSON object")
            self.found.append(record)

    def require_same(self, inputs: Sequence[dict[str, Any]], start: int = 0) -> None:
        """Raise UserError where a record that was there, from number ``start`` on, has other inputs than these."""
        for number, (record, given) in enumerate(zip(self.found[start:], inputs, strict=False), start + 1):
            for key, value in given.items():
                if record.get(key) != value:
                    raise UserError(
                        f"--resume: {self.path} line {number}: {key} was {record.get(key)!r}, now {value!r}"
                    )

    def require_at_most(self, count: int) -> None:
        """Raise UserError where more records were there than are asked for."""
        if len(self.found) > count:
            raise UserError(
                f"--resume: {self.path} holds {len(self.found)} records, more than the {count} asked for"
            )

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records, all at once.

        Raises: UserError: they cannot be written; those before are there.
        """
        data = "".join(line(record) for record in records).encode()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise UserError(
                f"--output {self.path}: {error.strerror or error}; --resume goes on behind what was written"
            ) from error

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()


def line(record: dict[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def show(text: str) -> None:
    """Print now, not when a buffer is full: somebody, or a program, waits for it."""
    sys.stdout.write(text)
    sys.stdout.flush()
