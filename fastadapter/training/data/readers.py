"""Records of files: JSONL, JSON, CSV, TSV, parquet, and data sets of Hugging Face.

A reader gives the place and the fields of one record after the other, and holds no more than one of them, and of that
no more than ``max_record_bytes``, in memory. Every complaint names the file and the line, or the number of the record
where a format has no lines.
"""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from fastadapter.training.config import UserError
from fastadapter.training.data import arrow

MAX_RECORD_BYTES = 16 * 2**20
_CHUNK = 1 << 16

Record = tuple[str, dict[str, Any]]


def read_records(path: str | Path, *, max_record_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """Place and fields of every record of a file or data set.

    Args:
        path: a file whose name ends in ``.jsonl`` or ``.ndjson`` (one object per line), ``.json`` (a list of objects,
            or one per line), ``.csv`` or ``.tsv`` (with a header), each of them possibly with ``.gz`` behind it, or
            ``.parquet``; a folder that ``datasets.Dataset.save_to_disk`` wrote; or the name of a data set of the hub.
            ``:SPLIT`` behind folder and name takes that split; of several it is otherwise ``train``.
        max_record_bytes: a larger record is refused, without being read to its end where the format allows.
    Raises: UserError: naming file and line, if it is malformed; or a package that reading it needs.
    """
    if not isinstance(max_record_bytes, int) or isinstance(max_record_bytes, bool) or max_record_bytes < 1:
        raise UserError(f"max_record_bytes must be an int, at least 1, got {max_record_bytes!r}")
    path, name = Path(path), str(path)
    reader = _FORMATS.get(_kind(path))
    if reader is not None:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a regular file")
        if not path.is_file():
            raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        try:
            yield from reader(path, max_record_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip data: {error}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path}: expected a name that ends in {', '.join(_FORMATS)}")
    else:
        yield from arrow.read_data_set(name, max_record_bytes)


def _kind(path: Path) -> str:
    """What the name of a file says of its format."""
    suffix = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower() if suffix == ".gz" else suffix
    return suffix if inner == ".parquet" and suffix == ".gz" else inner


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, limit: int) -> Iterator[tuple[int, int, str]]:
    """Number, bytes and text of every line."""
    with _open(path) as file:
        number = 0
        while raw := file.readline(limit + 2):  # so much and no more, however long the line is
            number += 1
            if len(raw.rstrip(b"\r\n")) > limit:
                _too_large(f"{path} line {number}", limit)
            if number == 1:
                _require_plain(path, raw)
            try:
                yield number, len(raw), raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not UTF-8: {error.reason}") from None


def _require_plain(path: Path, start: bytes) -> None:
    if start.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} line 1: not UTF-8 but gzip data; give the file a name that ends in .gz")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} line 1: not UTF-8 but UTF-16")


def _too_large(source: str, limit: int, hint: str = "") -> NoReturn:
    raise UserError(f"{source}: the record has more than {limit:,} bytes (max_record_bytes){hint}")


# JSON ---------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"field {name!r} occurs twice")
        record[name] = value
    return record


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)


def _malformed(source: str, error: Exception) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"{source}: JSON is nested too deeply")
    where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
    return UserError(f"{source}: malformed JSON: {where}")


def _object(value: Any, text: str, source: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(value).__name__}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise UserError(
                f"{source}: holds half a surrogate pair ({half}), which is no character"
            ) from None
    return source, value


def _read_jsonl(path: Path, limit: int) -> Iterator[Record]:
    for number, _, line in _lines(path, limit):
        if not line.strip():
            continue
        source = f"{path} line {number}"
        try:
            value = _DECODER.decode(line)
        except (RecursionError, ValueError) as error:
            raise _malformed(source, error) from None
        yield _object(value, line, source)


def _read_json(path: Path, limit: int) -> Iterator[Record]:
    with _open(path) as file:
        text = _Text(file, path)
        if text.next() == "[":
            yield from _list(text, limit)
            return
    try:
        yield from _read_jsonl(path, limit)
    except UserError as error:
        if "malformed JSON" not in str(error):
            raise
        raise UserError(f"{error} (a .json file holds a list of records, or one record per line)") from None


def _list(text: "_Text", limit: int) -> Iterator[Record]:
    text.at += 1
    number = 0
    if text.next() != "]":
        while True:
            text.next()
            number += 1
            source = f"{text.source()} (record {number})"
            value, written = text.value(source, limit)
            yield _object(value, written, source)
            found = text.next()
            if found == "]":
                break
            if found != ",":
                raise UserError(
                    f"{text.source()}: malformed JSON: expected a comma or the end of the list behind record {number}"
                )
            text.at += 1
    text.at += 1
    if text.next():
        raise UserError(f"{text.source()}: malformed JSON: more text behind the list")


class _Text:
    """Text of a file, of which only the part around ``at`` is in memory."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at = "", 0
        self.lines = 1  # the line on which the buffer begins
        self.started = self.ended = False

    def source(self) -> str:
        return f"{self.path} line {self.lines + self.buffer.count(chr(10), 0, self.at)}"

    def more(self, size: int = _CHUNK) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        raw = self.file.read(size)
        if not self.started:
            _require_plain(self.path, raw)
            self.started = True
        self.ended = not raw
        try:
            self.buffer += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.lines + self.buffer.count("\n") + raw.count(b"\n", 0, error.start)
            raise UserError(f"{self.path} line {line}: not UTF-8: {error.reason}") from None
        return not self.ended

    def next(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in " \t\r\n":
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self, source: str, limit: int) -> tuple[Any, str]:
        """The JSON value at ``at`` and the text of it; ``at`` is then behind it."""
        if self.at > max(_CHUNK, len(self.buffer) // 2):
            self.lines += self.buffer.count("\n", 0, self.at)
            self.buffer, self.at = self.buffer[self.at :], 0
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
                break
            except json.JSONDecodeError as error:
                # Half a value fails at its end, or at the start of its last string.
                cut = error.pos >= len(self.buffer) - 16 or error.msg.startswith("Unterminated string")
                if not cut or self.ended:
                    raise _malformed(self._place(error, source), error) from None
            except (RecursionError, ValueError) as error:
                raise _malformed(source, error) from None
            if len(self.buffer) - self.at > limit:
                _too_large(source, limit)
            # Doubling what there is keeps the tries few.
            have = len(self.buffer) - self.at
            self.more(min(max(_CHUNK, have), limit + 1 - have))
        written = self.buffer[self.at : end]
        if len(written) > limit or len(written.encode(errors="replace")) > limit:
            _too_large(source, limit)
        self.at = end
        return value, written

    def _place(self, error: json.JSONDecodeError, source: str) -> str:
        line = self.lines + error.lineno - 1
        return source if source.startswith(f"{self.path} line {line} ") else f"{source}, line {line}"


# CSV ----------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, limit: int, delimiter: str = ",") -> Iterator[Record]:
    if csv.field_size_limit() < limit:
        csv.field_size_limit(limit)  # the module's own limit of 131,072 stands in for the one we have
    first = 1  # line on which the record starts; a quoted field may span several
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for _, length, line in _lines(path, limit):
            size += length
            if size > limit + 2:
                _too_large(f"{path} line {first}", limit, "; is a quote left open?")
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        source = f"{path} line {first}"
        size = 0
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{source}: malformed CSV: {error}") from None
        if row is None:
            return
        first = reader.line_num + 1
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{source}: a column name occurs twice: {twice!r}")
            continue
        if len(row) != len(header):
            raise UserError(f"{source}: has {len(row)} fields, the header {len(header)}")
        yield source, dict(zip(header, row, strict=True))


def _read_tsv(path: Path, limit: int) -> Iterator[Record]:
    return _read_csv(path, limit, "\t")


_FORMATS: dict[str, Callable[[Path, int], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": arrow.read_parquet,
}
