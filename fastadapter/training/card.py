"""The model card of a run: ``README.md`` with numbers and how to load the adapter, as the hub of models shows it."""

import hashlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastadapter.checkpoints.atomic import write_atomically
from fastadapter.checkpoints.fingerprint import portable_name

CARD_FILE = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MARK = re.compile(r"<!-- written by fastadapter, (\w{64}): .*-->\n")
_CLASSES = {"generation": "AutoModelForCausalLM"}
_PIPELINES = {"generation": "text-generation"}
# What is worth a line of a table, and in which words.
_SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "batch_size", "weight_decay", "seed")
_COLUMNS = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "eval_f1_macro": "held-out F1",
    "eval_mse": "held-out MSE",
}


def write_card(folder: Path, record: Mapping[str, Any]) -> bool:
    """Write the card of a finished run, unless there is a ``README.md`` that somebody wrote or changed.

    Returns: whether it was written; if not, a line on stderr says so.
    Raises: CheckpointError: it cannot be written.
    """
    path = folder / CARD_FILE
    if path.exists() and not _is_untouched(path):
        print(f"fastadapter: {path} is not as it was written here, so it stays as it is", file=sys.stderr)
        return False
    text = "\n".join(_lines(folder, record)) + "\n"
    mark = f"<!-- written by fastadapter, {_digest(text)}: a later run replaces this page unless it was changed -->\n"
    write_atomically(path, (text + mark).encode())
    return True


def _is_untouched(path: Path) -> bool:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    body, newline, last = text.removesuffix("\n").rpartition("\n")
    found = _MARK.fullmatch(last + "\n")
    return found is not None and found[1] == _digest(body + newline)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
    base = record["base"]
    name = portable_name(base["name"]) if base["name"] else None
    yield from _front_matter(record, name)
    method, task, data = record["method"], record["task"], record["data"]
    yield f"# {method} for {name or base['model_type'] or 'a model'}"
    yield ""
    yield (
        f"An adapter ({method}, {task}) for {name or 'a frozen model'}, trained with fastadapter on "
        f"{data['train_records']:,} records."
    )
    if record["labels"]:
        yield f"Its classes: {', '.join(record['labels'])}."
    yield ""
    yield from _numbers(record)
    yield "## How to load it"
    yield ""
    yield from _python(folder, record, name)
    yield from _command(folder, record, name)
    yield "## How it was trained"
    yield ""
    yield "| setting | value |"
    yield "| --- | --- |"
    settings = {
        **{key: value for key, value in record["adapter_config"].items() if value is not None},
        **{key: record["training"][key] for key in _SETTINGS if record["training"].get(key) is not None},
        "dtype of the base": record["dtype"],
        "versions": ", ".join(f"{key} {value}" for key, value in record["versions"].items() if value),
    }
    for key, value in settings.items():
        yield f"| {key} | {_cell(value)} |"
    yield ""
    yield "`run.json` has the whole record."
    yield ""


def _on_hub(record: Mapping[str, Any], name: str | None) -> bool:
    """Whether the base is called by a name of the hub: a folder of one's own, or a packaged model, has none there."""
    return name is not None and name == record["base"]["name"] and bool(_HUB_NAME.fullmatch(name))


def _front_matter(record: Mapping[str, Any], name: str | None) -> Iterator[str]:
    from huggingface_hub import ModelCardData

    task = record["task"]
    data = ModelCardData(
        base_model=name if _on_hub(record, name) else None,
        library_name="fastadapter",
        pipeline_tag=_PIPELINES.get(task, "text-classification"),
        tags=["fastadapter", "adapter", record["method"], task],
    )
    yield "---"
    yield from data.to_yaml().splitlines()
    yield "# license: yours to choose"
    yield "---"
    yield ""


def _numbers(record: Mapping[str, Any]) -> Iterator[str]:
    columns = {
        key: words for key, words in _COLUMNS.items() if any(key in epoch for epoch in record["epochs"])
    }
    if not columns:
        return
    yield "## Numbers"
    yield ""
    held_out = record["data"]["eval_records"]
    if held_out:
        best = record["eval"].get("best_epoch")
        yield f"Held out were {held_out:,} records." + (
            f" The weights of epoch {best}, the best, are in `best/`." if best else ""
        )
        yield ""
    yield f"| epoch | {' | '.join(columns.values())} |"
    yield f"| ---: |{' ---: |' * len(columns)}"
    before = {
        f"eval_{key.removesuffix('_before')}": value
        for key, value in record["eval"].items()
        if key.endswith("_before")
    }
    rows = ([("before", before)] if any(before.get(key) is not None for key in columns) else []) + [
        (str(number), epoch) for number, epoch in enumerate(record["epochs"], 1)
    ]
    for title, row in rows:
        yield f"| {title} | {' | '.join(_number(key, row.get(key)) for key in columns)} |"
    yield ""


def _number(key: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.2%}" if key in ("eval_accuracy", "eval_f1_macro") else f"{value:.4f}"


def _python(folder: Path, record: Mapping[str, Any], name: str | None) -> Iterator[str]:
    base, task = record["base"], record["task"]
    kind = _CLASSES.get(task, "AutoModelForSequenceClassification")
    options = [repr(name or "BASE")]
    if base["revision"] and name == base["name"]:
        options.append(f"revision={base['revision']!r}")
    if base["gguf_file"]:
        options.append(f"gguf_file={base['gguf_file']!r}")
    if kind != _CLASSES["generation"]:
        options.append(f"num_labels={len(record['labels'] or [0])}")
    yield "```python"
    yield f"from transformers import {kind}"
    yield ""
    yield "import fastadapter as fa"
    yield ""
    where = "" if _on_hub(record, name) else "  # the folder of the base model"
    yield f"model = {kind}.from_pretrained({', '.join(options)}){where}"
    yield f"fa.load(model, {folder.resolve().name!r})"
    yield "```"
    yield ""
    if record["template"]:
        yield f"Texts were put into the template `{record['template']!r}`, in place of `{{text}}`."
        yield ""


def _command(folder: Path, record: Mapping[str, Any], name: str | None) -> Iterator[str]:
    generates = record["task"] == "generation"
    words = ["fastadapter", "generate" if generates else "classify", "--model", name or "BASE"]
    if record["base"]["gguf_file"]:
        words += ["--gguf-file", record["base"]["gguf_file"]]
    words += ["--adapter", folder.resolve().name, "--prompt" if generates else "--text", "..."]
    yield "```sh"
    yield shlex.join(words)
    yield "```"
    yield ""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
