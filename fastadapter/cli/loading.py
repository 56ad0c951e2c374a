"""Options and loading of a transformers model, shared by the commands that need one."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastadapter.cli import assets
from fastadapter.training import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# the names that transformers uses
_LONG = {"float32": "fp32", "bfloat16": "bf16"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=f"folder or hub name of a model, or one that comes as a package: {', '.join(assets.MODELS)}",
    )
    parser.add_argument("--gguf-file", help="file in the model's folder, if its weights are in GGUF")
    parser.add_argument(
        "--dtype",
        type=lambda word: _LONG.get(word, word),
        choices=("auto", *DTYPES),
        default="auto",
        help="of the frozen model, adapters are fp32; auto: bf16 on a GPU that computes in it, else fp32",
    )
    parser.add_argument(
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


def load_model(name: str, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, on the CPU. No code that comes with a model is run.

    Args:
        name: a folder, a hub name, or the name of a model that comes as a package (:data:`assets.MODELS`).
    Raises:
        UserError: it cannot be loaded, or its files lack weights.
        AssetError: a packaged model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer, missing = _load(AutoModelForCausalLM, name, gguf_file, dtype, {})
    _require_all(name, missing)
    return model.eval(), tokenizer


def load_classifier(
    name: str, gguf_file: str | None, dtype: str, labels: Sequence[str], seed: int
) -> tuple[Any, Any]:
    """A model with a classification head for ``labels``, and its tokenizer, on the CPU.

    A head that the model's files lack is drawn by ``seed``; the rest must be there.

    Raises: as :func:`load_model`; also where the files hold a head for another number of classes.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    with _quiet():  # transformers would warn of the missing head, which is expected here
        model, tokenizer, missing = _load(AutoModelForSequenceClassification, name, gguf_file, dtype, options)
    _require_all(name, [key for key in missing if key.startswith(f"{model.base_model_prefix}.")])
    return model.eval(), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(
    kind: Any, name: str, gguf_file: str | None, dtype: str, more: dict[str, Any]
) -> tuple[Any, Any, list[str]]:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    folder = name
    if Path(name).is_dir():
        options["local_files_only"] = True
    elif name in assets.MODELS:
        folder = str(assets.MODELS[name]())
        options["local_files_only"] = True
    elif Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        what = "a file" if Path(name).exists() else "a path where nothing is"
        raise UserError(f"--model {name}: expected a folder or a hub name, got {what}")
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, info = kind.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, **more, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(f"--model {name}: cannot be loaded: {reason}") from error
    return model, tokenizer, sorted(info["missing_keys"])


def _require_all(name: str, missing: Sequence[str]) -> None:
    if missing:
        # transformers fills them with random numbers and goes on.
        raise UserError(
            f"--model {name}: its files lack {len(missing)} weights, the first of them {missing[0]}"
        )
