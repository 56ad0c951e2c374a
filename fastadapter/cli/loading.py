"""Options and loading of a transformers model, shared by the commands that need one."""

import argparse
from pathlib import Path
from typing import Any

import torch

from fastadapter.training import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--gguf-file", help="file in the model's folder, if its weights are in GGUF")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the frozen model; adapters are fp32"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one"
    )


def load_model(name: str, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer, on the CPU. No code that comes with a model is run.

    Raises: UserError: it cannot be loaded, or its files lack weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    if Path(name).is_dir():
        options["local_files_only"] = True
    elif Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        what = "a file" if Path(name).exists() else "a path where nothing is"
        raise UserError(f"--model {name}: expected a folder or a hub name, got {what}")
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(f"--model {name}: cannot be loaded: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on.
        raise UserError(
            f"--model {name}: its files lack {len(missing)} weights, the first of them {missing[0]}"
        )
    return model.eval(), tokenizer
