"""``fastadapter fold``: a model folder for plain transformers that holds an adapter, as far as weights can hold it."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastadapter.checkpoints import load
from fastadapter.checkpoints.describe import describe_file
from fastadapter.checkpoints.files import find
from fastadapter.checkpoints.folded import require_something_to_fold, write_folded
from fastadapter.checkpoints.native import read_config
from fastadapter.cli.loading import (
    add_any_base,
    add_model_arguments,
    device_and_dtype,
)
from fastadapter.cli.runs import complete, load_base, read_known
from fastadapter.training import UserError

_NAME = "default"
_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, known=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--adapter",
        required=True,
        metavar="PATH",
        help="file or folder of a LLaMA-Adapter V2, or of prefix tuning with a network behind the prefix",
    )
    add_any_base(adapter)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        required=True,
        help="new folder for the model, its tokenizer, and as adapter.safetensors what no weight can hold",
    )


def run(args: argparse.Namespace) -> int:
    target = _new_folder(args.output_dir)
    found = describe_file(find(args.adapter, _NAME))
    if found["format"] != "fastadapter":
        raise UserError(
            f"--adapter {args.adapter}: it is {found['what']}; expected one of fastadapter's adapters"
        )
    try:
        require_something_to_fold(read_config(found["metadata"]))
    except ValueError as error:
        raise UserError(f"--adapter {args.adapter} cannot be folded: {error}") from None
    known = read_known(args.adapter)
    complete(args, [known])
    device = device_and_dtype(args)
    model, tokenizer = load_base(args, known)
    load(model, args.adapter, _NAME, strict_base=not args.any_base)
    model.to(device)
    before = _logits(model)
    # Beside the target, so that it is there whole or not at all.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as parent:
        folder = Path(parent) / target.name
        folder.mkdir()
        rest = write_folded(model, folder, _NAME)
        tokenizer.save_pretrained(folder)
        difference = float((_logits(model) - before).abs().max())
        os.replace(folder, target)
    print(
        f"{target}: {type(model).__name__} in {args.dtype} with the adapter in its weights; logits of {_TOKENS} tokens "
        f"differ by at most {difference:.2g}, the largest is {float(before.abs().max()):.3g}"
    )
    if rest is None:
        print("nothing of the adapter remains: from_pretrained gives the whole")
    else:
        shown = ", ".join(f"{key} {value}" for key, value in rest.to_dict().items() if value is not None)
        print(
            f"what no weight can hold is in {target / 'adapter.safetensors'} ({rest.method}: {shown}): call "
            f"fastadapter.load(model, {str(args.output_dir)!r}) after from_pretrained, which leaves it out"
        )
    return 0


def _new_folder(given: str) -> Path:
    path = Path(given)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is not a folder"
        raise UserError(f"--output-dir {given} {what}; choose another")
    return path


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Of a few random tokens, to compare."""
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, _TOKENS), generator=generator, device="cpu").to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
