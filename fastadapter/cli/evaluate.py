"""``fastadapter evaluate``: how well a finished adapter does on records that it was not trained on."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastadapter.checkpoints import load
from fastadapter.cli.data_options import add_data_arguments, read_data, templates
from fastadapter.cli.loading import (
    add_any_base,
    add_model_arguments,
    device_and_dtype,
)
from fastadapter.cli.options import require_number
from fastadapter.cli.runs import GENERATION, Known, complete, load_base, read_known
from fastadapter.training import TrainingConfig, evaluate, write_json
from fastadapter.training.data import Example
from fastadapter.training.metrics import require_packages, table
from fastadapter.training.report import require_writable

# What the data options leave open is as it was in training.
_OF_TRAINING = ("max_length", "truncation", "append_eos", "parse_special_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, known=True)
    parser.add_argument_group("adapter").add_argument(
        "--adapter", required=True, metavar="PATH", help="file or folder of an adapter"
    )
    add_any_base(parser)
    add_data_arguments(parser.add_argument_group("data"), held_out=False)
    how = parser.add_argument_group("evaluation")
    how.add_argument(
        "--eval-batch-size",
        type=int,
        default=TrainingConfig.eval_batch_size,
        metavar="N",
        help="records per forward pass",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the metrics to this file, too")


def run(args: argparse.Namespace) -> int:
    require_number("--eval-batch-size", args.eval_batch_size, 1)
    known = read_known(args.adapter)
    complete(args, [known])
    args.task = known.task
    config = _complete_data(args, known)
    if args.json:
        require_writable(Path(args.json).parent)
    examples, _ = read_data(args, True)
    if examples[0].label is not None:
        require_packages()
    labels = _labels(args, known, examples)
    device = device_and_dtype(args)
    model, tokenizer = load_base(args, known)
    load(model, known.path, strict_base=not args.any_base)
    model.to(device)
    with tqdm(total=1.0, desc="evaluating", bar_format="{l_bar}{bar}| {elapsed}", disable=None) as bar:
        found = evaluate(
            model,
            tokenizer,
            examples,
            config,
            task=known.task,
            labels=labels,
            tick=lambda done: bar.update(done - bar.n),
        )
    print(f"{len(examples):,} records of {Path(args.data).name}\n\n{table(found)}")
    if args.json:
        about = {key: getattr(args, key) for key in ("adapter", "model", "dtype", "data", "template")}
        write_json(args.json, {**about, "task": known.task, "records": len(examples), "metrics": found})
    return 0


def _complete_data(args: argparse.Namespace, known: Known) -> TrainingConfig:
    """Read the data as the run did, where the command line does not say otherwise."""
    for name in ("columns", "template", "completion_template", "system_prompt"):
        if getattr(args, name) is None:
            setattr(args, name, known.of_run(name) or None)
    settings: dict[str, Any] = {"eval_batch_size": args.eval_batch_size}
    for name in _OF_TRAINING:
        if getattr(args, name) is None:
            setattr(args, name, known.of_run("training", name))
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return TrainingConfig(**settings)


def _labels(
    args: argparse.Namespace, known: Known, examples: list[Example]
) -> list[str] | dict[str, str] | None:
    """The labels to choose among: those of the training data if the folder knows them, else those that occur."""
    if known.task != GENERATION or examples[0].label is None:
        return known.labels
    labels = known.of_run("labels") or sorted({str(example.label) for example in examples})
    completion = templates(args)["completion_template"]
    return {label: completion.format(label=label) for label in labels}
