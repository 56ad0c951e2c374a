"""``fastadapter inspect``: what is in an adapter's file or in a run's folder, without its model."""

import argparse
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastadapter.checkpoints.describe import describe_file, describe_folder
from fastadapter.training import UserError
from fastadapter.training.run_record import finite, read_run

_DIGITS = 12  # of a digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="a .safetensors file, or the folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        found, folder = describe_folder(path), path
    else:
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: expected a folder or a .safetensors file; other files may run code when they are opened, so "
                "none is"
            )
        found, folder = {"files": [describe_file(path)]}, path.parent
    record = read_run(folder)
    if record is None and folder.resolve().name in ("best", "last"):
        record = read_run(folder.resolve().parent)
    found["run"] = record
    if args.json:
        for each in found["files"]:
            del each["metadata"]
        print(json.dumps(finite(found), indent=2, allow_nan=False))
    else:
        print("\n".join(_clean(line) for line in _lines(found)))
    return 0


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    foreign = found.get("foreign")
    if foreign:
        yield f"{found['folder']}: {foreign['method'] or 'an adapter'} of {foreign['library']}"
        if foreign["base"]:
            yield _row("base", foreign["base"])
        for name in foreign["pickled"]:
            yield _row("weights", f"{name}, a Python pickle: not opened")
    for number, each in enumerate(found["files"]):
        if number or foreign:
            yield ""
        yield from _file(each)
    if found["run"] is not None:
        yield ""
        yield from _run(found["run"])


def _file(found: Mapping[str, Any]) -> Iterator[str]:
    written = datetime.datetime.fromtimestamp(found["written"], datetime.timezone.utc)
    yield f"{found['file']}: {found['what']}"
    if found["format"] == "fastadapter":
        yield _row("method", found["method"])
        yield _row("options", _listed(found["options"]))
        base = found["base"]
        revision = f" at {base['revision']}" if base.get("revision") else ""
        yield _row(
            "base", f"{base.get('name') or 'not named'}{revision}, {base.get('model_type') or 'unknown type'}"
        )
        sizes = {key: base[key] for key in base if key.startswith(("num_", "hidden_"))}
        yield _row("", _listed(sizes))
        digests = {
            words: base[key][:_DIGITS]
            for key, words in (("fingerprint", "configuration"), ("weights_digest", "weights"))
            if base.get(key)
        }
        yield _row("", _listed(digests) or "no fingerprint: any base of these sizes is taken")
        yield _row("dtype", found["dtype"] or "not told")
        yield _row("task", found["task"] or "not told")
        if found["labels"]:
            yield _row("labels", ", ".join(found["labels"]))
        if found["template"]:
            yield _row("template", repr(found["template"]))
        if found["versions"]:
            yield _row("versions", _listed(found["versions"]))
    if "step" in found:
        yield _row("step", f"{found['step']:,}, {found['epochs']} epochs complete")
    dtypes = sorted({each["dtype"] for each in found["tensors"]})
    yield _row(
        "tensors",
        f"{len(found['tensors']):,} of {', '.join(dtypes) or 'no dtype'}, {found['parameters']:,} numbers, "
        f"{found['bytes']:,} bytes",
    )
    gates = found["gates"]
    if gates is not None:
        span = (
            "NaN or Inf among them" if gates["min"] is None else f"{gates['min']:.4g} to {gates['max']:.4g}"
        )
        yield _row("gates", f"{gates['count']:,}, {span}")
    yield _row("written", written.strftime("%Y-%m-%d %H:%M:%S UTC"))


def _run(record: Mapping[str, Any]) -> Iterator[str]:
    state = "finished" if record["finished"] else "not finished"
    yield f"run: {record['method']}, {record['task']}, {state} after {len(record['epochs'] or [])} epochs"
    yield _row("model", record["base"].get("name") or "not named")
    if record["command"]:
        yield _row("command", " ".join(record["command"]))
    data = record["data"] or {}
    if data:
        yield _row(
            "data",
            f"{', '.join(map(str, data.get('files') or [])) or 'not named'}: {data.get('train_records')} records, "
            f"{data.get('eval_records')} held out",
        )
    for number, epoch in enumerate(record["epochs"] or [], 1):
        yield _row(f"epoch {number}", _listed(epoch) if isinstance(epoch, dict) else str(epoch))
    numbers = {key: each for key, each in (record["eval"] or {}).items() if isinstance(each, int | float)}
    if numbers:
        yield _row("held out", _listed(numbers))


def _row(key: str, value: str) -> str:
    return f"  {key:<9} {value}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {each:.4g}" if isinstance(each, float) else f"{key} {each}"
        for key, each in values.items()
        if each is not None and not isinstance(each, dict | list)
    )


def _clean(line: str) -> str:
    """Text out of a file must not steer a terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)
