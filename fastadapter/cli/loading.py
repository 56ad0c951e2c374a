"""Options and loading of a transformers model, shared by the commands that need one."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastadapter.cli import assets
from fastadapter.cli.model_files import require_model_files
from fastadapter.training import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the names that transformers uses
_LONG = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def add_model_arguments(
    parser: argparse.ArgumentParser, *, known: bool = False, revision: bool = True
) -> None:
    """Options that say which model, how, and where.

    Args:
        known: the folder of an adapter may answer them: nothing is required, and what is not given is ``None``
            (:func:`fastadapter.cli.runs.complete` fills it in).
        revision: whether the command loads other revisions than the newest.
    """
    group = parser.add_argument_group("model")
    own = "; if not given, that of the adapter's run" if known else ""
    group.add_argument(
        "--model",
        required=not known,
        metavar="NAME",
        help=f"folder or hub name of a model, or one that comes as a package: {', '.join(assets.MODELS)}{own}",
    )
    if revision:
        group.add_argument(
            "--revision",
            help=f"branch, tag or commit of a model on the hub{own or '; the newest if not given'}",
        )
    group.add_argument(
        "--gguf-file", metavar="FILE", help=f"file in the model's folder, if its weights are in GGUF{own}"
    )
    group.add_argument(
        "--dtype",
        type=lambda word: _LONG.get(word, word),
        choices=("auto", *DTYPES),
        default=None if known else "auto",
        help=f"of the frozen model, adapters are fp32; auto: bf16 on a GPU that computes in it, else fp32{own}",
    )
    group.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one"
    )


def add_any_base(parser: Any) -> None:
    """For every command that loads an adapter."""
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="load the adapter into another model than it was trained on, as long as all sizes fit",
    )


def device_and_dtype(args: argparse.Namespace) -> torch.device:
    """The device that ``--device`` asks for; ``args.dtype`` becomes the dtype that "auto" means there.

    Raises: UserError: a GPU was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise UserError(f"--device cuda: torch {torch.__version__} finds no GPU")
    device = torch.device("cuda" if available and args.device != "cpu" else "cpu")
    if args.dtype == "auto":
        # Not torch.cuda.is_bf16_supported, which counts cards that only emulate it.
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        args.dtype = "bf16" if fast else "fp32"
    return device


def load_model(name: str, gguf_file: str | None, dtype: str, revision: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, on the CPU. No code that comes with a model is run.

    Args:
        name: a folder, a hub name, or the name of a model that comes as a package (:data:`assets.MODELS`).
        revision: branch, tag or commit of a model on the hub.
    Raises:
        UserError: it cannot be loaded, or its files lack weights.
        AssetError: a packaged model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer, missing = _load(AutoModelForCausalLM, name, gguf_file, dtype, revision, {})
    _require_all(name, missing)
    return model.eval(), tokenizer


def load_classifier(
    name: str,
    gguf_file: str | None,
    dtype: str,
    labels: Sequence[str],
    seed: int,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """A model with a classification head for ``labels``, and its tokenizer, on the CPU.

    A head that the model's files lack is drawn by ``seed``; the rest must be there.

    Args:
        labels: names of the classes; none: a head with one output, for regression.
    Raises: as :func:`load_model`; also where the files hold a head for another number of classes.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels:
        options = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }
    kind = AutoModelForSequenceClassification
    model, tokenizer, missing = _load(kind, name, gguf_file, dtype, revision, options)
    _require_all(name, [key for key in missing if key.startswith(f"{model.base_model_prefix}.")])
    return model.eval(), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """No report of transformers on what it loaded, for what matters in it is an error of ours; no bars in log files."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_folder(name: str) -> str | None:
    """Where a model lies on this machine; ``None``: the hub knows.

    Raises:
        UserError: ``name`` is a path where no folder is.
        AssetError: a packaged model cannot be had.
    """
    if Path(name).is_dir():
        return name
    if name in assets.MODELS:
        return str(assets.MODELS[name]())
    if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        what = "a file" if Path(name).exists() else "a path where nothing is"
        raise UserError(f"--model {name}: expected a folder or a hub name, got {what}")
    return None


def _load(
    kind: Any, name: str, gguf_file: str | None, dtype: str, revision: str | None, more: dict[str, Any]
) -> tuple[Any, Any, list[str]]:
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    folder = model_folder(name)
    if folder is not None:
        if revision is not None:
            raise UserError(f"--revision {revision}: --model {name} is a folder, which has no revisions")
        require_model_files(name, folder, gguf_file)
        options["local_files_only"] = True
    elif revision is not None:
        options["revision"] = revision
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    with quiet():
        if folder is None:
            with _told_as_its_own(name, "cannot be loaded"):
                AutoConfig.from_pretrained(name, **options)
        with _told_as_its_own(name, "its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder or name, **options)
        with _told_as_its_own(name, "cannot be loaded"):
            model, info = kind.from_pretrained(
                folder or name, dtype=DTYPES[dtype], output_loading_info=True, **more, **options
            )
    return model, tokenizer, sorted(info["missing_keys"])


@contextmanager
def _told_as_its_own(name: str, what: str) -> Iterator[None]:
    """Whatever a model's files make transformers raise, in one line that says who raised it.

    Raises: UserError: in place of any exception but those for which the machine is to blame.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise UserError(f"--model {name}: {what}; transformers says: {reason[:300]}") from error


def _require_all(name: str, missing: Sequence[str]) -> None:
    if missing:
        # transformers fills them with random numbers and goes on.
        raise UserError(
            f"--model {name}: its files lack {len(missing)} weights, the first of them {missing[0]}"
        )
