"""What the folder of an adapter knows about its use, so that a command need not be told."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints.about import read_about
from fastadapter.checkpoints.files import find, read_tensors
from fastadapter.checkpoints.fingerprint import portable_name
from fastadapter.checkpoints.native import read_base
from fastadapter.cli import assets
from fastadapter.cli.loading import DTYPES, load_classifier, load_model
from fastadapter.training import UserError
from fastadapter.training.classification import LABELS_FILE, TEXT_TEMPLATE
from fastadapter.training.run_record import read_run

GENERATION, CLASSIFICATION, REGRESSION = TASKS = ("generation", "classification", "regression")
# Where the weights of a run's best epoch are; what the run was is written in the folder above.
_BEST = "best"


@dataclass(frozen=True)
class Known:
    """An adapter's file or folder, and what is written there.

    Attributes:
        run: the record of the training run, or what the file of the weights says of it.
        task: what the adapter was trained for.
        labels: of a classification, class 0 first.
        digest: SHA-256 of the weights' file.
    """

    path: str
    run: dict[str, Any]
    task: str
    labels: list[str] | None
    digest: str

    def of_run(self, *keys: str) -> Any:
        """A field of the run's record, by the path to it; ``None`` where it is not given."""
        value: Any = self.run
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def template(self) -> str | None:
        """What texts were put into in training; ``None``: they were taken as they are."""
        template = self.of_run("template")
        return None if template == TEXT_TEMPLATE else template


def read_known(path: str, name: str = "default") -> Known:
    """Look at an adapter before its model is loaded.

    Args:
        name: what it shall be called, which in a folder of several says which.
    Raises:
        UserError: there is no adapter, or one of another library.
        CheckpointError: it is damaged, or the record beside it is malformed.
    """
    if not os.path.exists(path):
        raise UserError(f"--adapter {path}: no such file or folder")
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    file = find(path, name)
    if os.path.isdir(path) and not file.exists():
        other = (Path(path) / "adapter_config.json").exists()
        raise UserError(
            f"--adapter {path}: a folder without {file.name}"
            + ("; the adapter in it is one of PEFT or AdapterHub" if other else "")
        )
    if not os.path.isdir(path) and file != Path(path):
        raise UserError(f"--adapter {path}: expected a folder or a .safetensors file, got another file")
    _, metadata = read_tensors(file)
    run, record_folder = read_run(folder), folder
    if run is None and folder.name == _BEST:
        run, record_folder = read_run(folder.parent), folder.parent
    if run is None:
        run = _said_by_file(file, metadata)
    task, labels = _task(run, folder if (folder / LABELS_FILE).exists() else record_folder)
    return Known(path, run, task, labels, hashlib.sha256(file.read_bytes()).hexdigest())


def _said_by_file(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """A record made of an adapter's file alone. A name in it that may be a folder's last part is not looked for."""
    try:
        said, base = read_about(metadata), read_base(metadata)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    name = said.get("base_name") or base.get("name")
    if name is not None and "/" not in name and name not in assets.MODELS and not os.path.isdir(name):
        name = None
    return {**said, "base": {"name": name, "revision": base.get("revision"), "gguf_file": None}}


def _task(run: dict[str, Any], folder: Path) -> tuple[str, list[str] | None]:
    task, labels = run.get("task"), run.get("labels")
    if task is None:
        task = GENERATION
        path = folder / LABELS_FILE
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                task, labels = found["task"], found["labels"] if found["task"] == CLASSIFICATION else None
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{path}: not the labels of a run: {error}") from error
    if task not in TASKS:
        raise CheckpointError(f"{folder}: its task is {task!r}; expected one of {', '.join(TASKS)}")
    fine = isinstance(labels, list) and len(labels) > 1 and all(isinstance(each, str) for each in labels)
    if task == CLASSIFICATION and not fine:
        raise CheckpointError(f"{folder}: the labels of its classes are {labels!r}; expected a list of names")
    return task, labels if task == CLASSIFICATION else None


def complete(args: argparse.Namespace, adapters: list[Known]) -> None:
    """Fill in what the command line does not say about the model; tell where it says something else.

    Raises: UserError: nobody names the model, or the adapters were trained on different ones.
    """
    bases: list[tuple[Known, dict[str, Any]]] = []
    for known in adapters:
        base = known.of_run("base")
        if base and base.get("name"):
            bases.append((known, {**base, "dtype": known.of_run("dtype")}))
    if args.model is None:
        if not bases:
            why = f"; {adapters[0].path} does not name the model it was trained on" if adapters else ""
            raise UserError(f"--model is needed{why}")
        _require_one_base(bases)
        args.model = _there(*bases[0])
    for known, base in bases:
        if not _same_model(args.model, base["name"]):
            _tell(f"--model {args.model} in place of {base['name']}, on which {known.path} was trained")
            continue
        for option in ("revision", "gguf_file"):
            given, trained = getattr(args, option), base.get(option)
            if given is None:
                # a folder that the hub filled knows its revision, but has no other
                here = option == "revision" and (os.path.isdir(args.model) or args.model in assets.MODELS)
                setattr(args, option, None if here else trained)
            elif given != trained:
                _tell(
                    f"--{option.replace('_', '-')} {given} in place of {trained or 'none'}, "
                    f"with which {known.path} was trained"
                )
    if args.dtype is None:
        args.dtype = next((base["dtype"] for _, base in bases if base["dtype"] is not None), "auto")
        if args.dtype not in ("auto", *DTYPES):
            raise UserError(
                f"{bases[0][0].path}: its run has the dtype {args.dtype!r}; --dtype says which to take"
            )


def _require_one_base(bases: list[tuple[Known, dict[str, Any]]]) -> None:
    (first, base), *others = bases
    for known, other in others:
        for key in ("name", "revision", "gguf_file"):
            if base.get(key) != other.get(key):
                raise UserError(
                    f"{first.path} was trained on a model with {key} {base.get(key)!r}, {known.path} on one with "
                    f"{other.get(key)!r}; --model says which to take"
                )


def _there(known: Known, base: dict[str, Any]) -> str:
    """The model's name in the record. Raises: UserError: it is that of a folder which is not there."""
    name = str(base["name"])
    looks_like_a_path = Path(name).is_absolute() or name.startswith((".", "~"))
    if looks_like_a_path and not Path(name).exists():
        raise UserError(
            f"--model is needed: {known.path} was trained on {name}, which is not there any more, or not from here"
        )
    return name


def _same_model(given: str, trained: str) -> bool:
    """Whether two names are of one model; the last part of a folder's path stands for it in a file."""
    if os.path.isdir(given) and os.path.isdir(trained):
        return os.path.samefile(given, trained)
    return trained in (given, portable_name(given))


def load_base(args: argparse.Namespace, known: Known | None) -> tuple[Any, Any]:
    """The model that an adapter was trained on, with the head that its task needs, and its tokenizer.

    Args:
        args: with the options of the model completed (:func:`complete`).
        known: ``None``: there is no adapter, a language model is wanted.
    Raises: UserError: it cannot be loaded.
    """
    where = (args.model, args.gguf_file, args.dtype)
    try:
        if known is None or known.task == GENERATION:
            return load_model(*where, args.revision)
        # the adapter's file holds the head's weights
        return load_classifier(*where, known.labels or [], seed=0, revision=args.revision)
    except UserError as error:
        if known is None or args.model != known.of_run("base", "name"):
            raise
        raise UserError(f"{error} ({known.path} names this model; --model says where it is)") from error


def resolve_template(given: str | None, known: Known | None) -> str | None:
    """The template that texts are put into: the one that was given, else the one of the training run.

    A template that differs from that of the training is said, for it changes what the model is asked.
    """
    trained = known.template if known is not None else None
    if given is None:
        return trained
    if known is not None and given != (trained or TEXT_TEMPLATE):
        _tell(
            f"--template {given!r} in place of {trained or TEXT_TEMPLATE!r}, with which {known.path} was trained"
        )
    return None if given == TEXT_TEMPLATE else given


def parses_special_tokens(adapters: Sequence[Known]) -> bool:
    """Whether special tokens in texts were tokens in training.

    Raises: UserError: in that of some adapters, and not in that of others.
    """
    found = {bool(each.of_run("training", "parse_special_tokens")) for each in adapters}
    if len(found) > 1:
        raise UserError(
            "special tokens in texts were tokens in the training of some of the adapters; say "
            "--parse-special-tokens or --no-parse-special-tokens"
        )
    return found == {True}


def _tell(text: str) -> None:
    print(f"fastadapter: {text}", file=sys.stderr)
