"""Texts and prompts that a command is given: on its command line, in a file, or on stdin."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastadapter.training import UserError
from fastadapter.training.data import read_records

# Files of records, which have fields; everything else holds a text per line.
_RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Beyond this a line is a mistake, such as a file of another kind.
_MAX_LINE_BYTES = 16 * 2**20


def is_records(path: str) -> bool:
    """Whether a file holds records with fields, by its name (or because it is a folder, as a data set may be)."""
    suffixes = [each.lower() for each in Path(path).suffixes]
    return Path(path).is_dir() or bool(set(suffixes[-2:]) & set(_RECORDS))


def read_file(path: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Where each entry of a file stands, and what it is: a record or, in a plain text file, a line.

    Raises: UserError: naming file and line, if it is malformed.
    """
    if is_records(path):
        yield from read_records(path)
        return
    if not Path(path).is_file():
        raise UserError(f"--file {path}: {'not a regular file' if Path(path).exists() else 'no such file'}")
    with Path(path).open("rb") as file:
        yield from _lines(path, file)


def read_stdin() -> Iterator[tuple[str, str]]:
    """The lines of stdin, as they come.

    Raises: UserError: it is a terminal, at which nobody would know that something is waited for.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("there is no text: give it by an option or --file, or pipe it into stdin")
    yield from _lines("stdin", sys.stdin.buffer)


def _lines(name: str, file: Any) -> Iterator[tuple[str, str]]:
    number = 0
    while raw := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        source = f"{name} line {number}"
        if len(raw) > _MAX_LINE_BYTES:
            raise UserError(f"{source}: longer than {_MAX_LINE_BYTES >> 20} MiB; is this a text file?")
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8: {error.reason}") from None
        if text.strip():
            yield source, require_text(source, text)


def require_text(source: str, text: Any) -> str:
    """Raise UserError unless ``text`` is a string that a tokenizer can be given; return it."""
    if not isinstance(text, str):
        raise UserError(f"{source} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: not valid Unicode: {error.reason} at character {error.start + 1}"
        ) from None
    return text


def field(source: str, record: dict[str, Any], names: Sequence[str]) -> str:
    """The first of several fields that a record has.

    Raises: UserError: it has none of them, or no string in it.
    """
    name = next((each for each in names if each in record), None)
    if name is None:
        fields = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"{source}: field {' or '.join(map(repr, names))} is missing; its fields are {fields}"
        )
    if not isinstance(record[name], str):
        raise UserError(f"{source}: field {name!r} must be a string, got {type(record[name]).__name__}")
    return require_text(f"{source}: field {name!r}", record[name])
