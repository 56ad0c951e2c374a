"""Records of parquet files and of data sets of Hugging Face, by pyarrow and datasets where they are installed."""

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastadapter.training.config import UserError

_ROWS = 64  # looked at together
_OVERHEAD = 1 << 14  # bytes of a column in a row group that belong to no record
_SPLIT = re.compile(r"(?P<name>.+?)(?::(?P<split>[\w.-]+))?")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_parquet(path: Path, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet = _require("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, str(path))
            groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
            # A group is read whole, so one whose mean is beyond the limit is not read at all.
            for number, group in enumerate(groups, 1):
                if group.total_byte_size > limit * group.num_rows + _OVERHEAD * group.num_columns:
                    raise UserError(
                        f"{path}: row group {number} has {group.total_byte_size:,} bytes in {group.num_rows} "
                        f"records, and so a record of more than {limit:,} bytes (max_record_bytes)"
                    )
            yield from _records(file.iter_batches(_ROWS, columns=columns), str(path), limit, {})
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # what pyarrow raises are kinds of these
        raise UserError(f"{path}: not a readable parquet file: {_first_line(error)}") from error


def read_data_set(name: str, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a folder that ``save_to_disk`` wrote, or of a data set of the hub."""
    found = _SPLIT.fullmatch(name)
    whole = Path(name).is_dir() or found is None
    folder, split = (name, None) if whole or found is None else (found["name"], found["split"])
    if not Path(folder).is_dir() and not _HUB_NAME.fullmatch(folder):
        raise UserError(f"{name}: no such file or folder")
    datasets = _require("datasets", name)
    try:
        if Path(folder).is_dir():
            loaded = datasets.load_from_disk(folder)
        else:
            loaded = datasets.load_dataset(folder)
    except Exception as error:  # of the libraries below datasets, which have no base in common
        what = (
            "a folder, but not one that save_to_disk wrote"
            if Path(folder).is_dir()
            else "no file, no folder, and no data set that can be loaded"
        )
        raise UserError(f"{name}: {what}: {_first_line(error)}") from error
    loaded = _split(loaded, split, name)
    classes = {
        field: feature.names
        for field, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    columns = _columns(loaded.features.arrow_schema, name)
    tables = loaded.select_columns(columns).with_format("arrow").iter(_ROWS)
    try:
        yield from _records(tables, name, limit, classes)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: the data set cannot be read: {_first_line(error)}") from error


def _split(loaded: Any, split: str | None, name: str) -> Any:
    if not isinstance(loaded, dict):
        if split is not None:
            raise UserError(f"{name}: the data set has no splits")
        return loaded
    wanted = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if wanted not in loaded:
        splits = ", ".join(map(str, loaded)) or "none"
        raise UserError(
            f"{name}: has no split {wanted!r}; its splits are {splits} (NAME:SPLIT takes one of them)"
        )
    return loaded[wanted]


def _columns(schema: Any, name: str) -> list[str]:
    """The columns that a record can be made of: times are of no use here, and some of them no Python value."""
    import pyarrow

    if len(set(schema.names)) < len(schema.names):
        twice = next(column for column in schema.names if schema.names.count(column) > 1)
        raise UserError(f"{name}: a column name occurs twice: {twice!r}")
    return [field.name for field in schema if not pyarrow.types.is_temporal(field.type)]


def _records(
    tables: Iterator[Any], name: str, limit: int, classes: Mapping[str, list[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for table in tables:
        # One by one where they are large, so that no second one is in memory.
        step = max(1, table.num_rows) if table.nbytes <= limit else 1
        for start in range(0, table.num_rows, step):
            part = table.slice(start, step)
            if part.num_rows == 1 and part.nbytes > limit:
                raise UserError(
                    f"{name} record {number + 1}: the record has more than {limit:,} bytes (max_record_bytes)"
                )
            for record in _values(part, name, number):
                number += 1
                source = f"{name} record {number}"
                for field, names in classes.items():
                    record[field] = _class(record[field], names, field, source)
                yield source, record


def _values(table: Any, name: str, before: int) -> list[dict[str, Any]]:
    try:
        return table.to_pylist()
    except (ValueError, OverflowError) as error:
        for row in range(table.num_rows):
            try:
                table.slice(row, 1).to_pylist()
            except (ValueError, OverflowError) as first:
                raise UserError(
                    f"{name} record {before + row + 1}: cannot be read: {_first_line(first)}"
                ) from None
        raise UserError(f"{name} record {before + 1}: cannot be read: {_first_line(error)}") from None


def _class(value: Any, names: list[str], field: str, source: str) -> str | None:
    if value is None:
        return None
    if not 0 <= value < len(names):
        raise UserError(f"{source}: field {field!r} is {value}, none of its {len(names)} classes")
    return names[value]


def _require(module: str, what: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = "" if Path(what).exists() else "no such file or folder; a data set of the hub? "
        raise UserError(
            f'{what}: {missing}reading it needs {package}: pip install "fastadapter[data]" ({error})'
        ) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
