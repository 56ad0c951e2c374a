"""``run.json``: what a run was asked, with what, and what came of it, for people and for the commands that use it."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints.about import base_dtype, versions
from fastadapter.checkpoints.fingerprint import fingerprint
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.training.report import write_json

RUN_FILE = "run.json"
_FORMAT = 1
_MAX_BYTES = 64 * 2**20
_TEXT: tuple[type, ...] = (str, type(None))
_OBJECT: tuple[type, ...] = (dict, type(None))
# The fields and the types they may have. Those that may be null may be missing as well.
_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "command": (list, type(None)),
    "versions": _OBJECT,
    "base": (dict,),
    "method": (str,),
    "adapter_config": _OBJECT,
    "task": (str,),
    "labels": (list, type(None)),
    "template": _TEXT,
    "completion_template": _TEXT,
    "chat": (bool, type(None)),
    "columns": _OBJECT,
    "system_prompt": _TEXT,
    "dtype": _TEXT,
    "data": _OBJECT,
    "training": _OBJECT,
    "epochs": (list, type(None)),
    "eval": _OBJECT,
    "finished": (bool,),
}
# What only the caller of a run knows; the rest is found out.
DETAILS = (
    "command",
    "base",
    "labels",
    "template",
    "completion_template",
    "chat",
    "columns",
    "system_prompt",
    "data",
)


def describe_run(model: nn.Module, identity: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that is about to begin.

    Args:
        model: the frozen model, with what is trained in place.
        identity: what tells the run from others: ``training``, ``adapter``, ``data``, ``num_processes``, ``task``.
        details: some of :data:`DETAILS`: ``base`` holds ``name``, ``revision`` and ``gguf_file``, as they were given;
            ``data`` holds ``files``, ``digest``, ``train_records`` and ``eval_records``.
    """
    inner = unwrap(model)
    print_of_base = fingerprint(inner)
    given = details.get("base") or {}
    adapter = dict(identity["adapter"])
    return {
        "format": _FORMAT,
        "command": list(details.get("command") or []),
        "versions": versions(),
        "base": {
            "name": given.get("name") or print_of_base["name"],
            "revision": given.get("revision") or print_of_base["revision"],
            "gguf_file": given.get("gguf_file"),
            "model_type": getattr(getattr(inner, "config", None), "model_type", None),
            "fingerprint": print_of_base["fingerprint"],
            "weights_digest": print_of_base["weights_digest"],
        },
        "method": adapter.pop("method"),
        "adapter_config": adapter,
        "task": identity.get("task", {}).get("kind", "generation"),
        "labels": details.get("labels") or identity.get("task", {}).get("labels"),
        "template": details.get("template"),
        "completion_template": details.get("completion_template"),
        "chat": bool(details.get("chat")),
        "columns": dict(details.get("columns") or {}),
        "system_prompt": details.get("system_prompt"),
        "dtype": base_dtype(inner),
        "data": dict(details.get("data") or _data(identity["data"])),
        "training": {**identity["training"], "num_processes": identity["num_processes"]},
        "epochs": [],
        "eval": {},
        "finished": False,
    }


def _data(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of records that came from no file: the digest is of their tokens."""
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    counts = {"train_records": found["train_rows"], "eval_records": found["eval_rows"]}
    return {"files": [], "digest": digest, **counts}


def write_run(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json`` into ``folder``, whole or not at all; numbers that are not finite become null.

    One that says the same already stays. Raises: CheckpointError: it cannot be written; an older one is intact.
    """
    path, value = Path(folder) / RUN_FILE, finite(dict(record))
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= _MAX_BYTES and json.loads(path.read_bytes()) == value:
            return
    write_json(path, value)


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """The record of the run in ``folder``, with null for what an older one lacks; ``None``: there is no ``run.json``.

    Raises: CheckpointError: it is malformed, or of a later release.
    """
    path = Path(folder) / RUN_FILE
    try:
        if not path.is_file():
            if path.exists():
                raise CheckpointError(f"{path}: it is not a regular file")
            return None
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: it has more than {_MAX_BYTES >> 20} MiB")
        record = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON: {error}"
        raise CheckpointError(f"{path}: damaged, it {why}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: damaged, it is not a JSON object")
    found = record.get("format")
    if found != _FORMAT or isinstance(found, bool):
        raise CheckpointError(
            f"{path}: it has format {str(found)[:40]}; this release reads {_FORMAT}, a later one may read it"
        )
    record = {**{key: None for key, types in _FIELDS.items() if type(None) in types}, **record}
    for key, types in _FIELDS.items():
        if key not in record:
            raise CheckpointError(f"{path}: damaged, it has no field {key!r}")
        if not isinstance(record[key], types):
            expected = " or ".join("null" if each is type(None) else each.__name__ for each in types)
            raise CheckpointError(
                f"{path}: damaged, {key!r} must be {expected}, got {type(record[key]).__name__}"
            )
    for key in ("command", "labels"):
        if not all(isinstance(each, str) for each in record[key] or []):
            raise CheckpointError(f"{path}: damaged, {key!r} must hold strings")
    files = (record["data"] or {}).get("files")
    if not isinstance(files, list | None) or not all(isinstance(each, str) for each in files or []):
        raise CheckpointError(f"{path}: damaged, 'data.files' must hold strings")
    for key in ("name", "revision", "gguf_file"):
        if not isinstance(record["base"].get(key), _TEXT):
            raise CheckpointError(f"{path}: damaged, 'base.{key}' must be str or null")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
