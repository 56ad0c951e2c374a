"""``fastadapter finetune``: train an adapter on prompt/completion or text/label records."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapter.cli.data_options import (
    add_data_arguments,
    describe_data,
    mention_special_tokens,
    prompt_template,
    read_data,
)
from fastadapter.cli.loading import add_model_arguments, device_and_dtype, load_classifier, load_model
from fastadapter.cli.method_options import add_method_arguments, attach_from_task, method_config
from fastadapter.cli.training_options import (
    add_output_arguments,
    add_training_arguments,
    require_possible,
    training_config,
)
from fastadapter.cli.trunk_options import add_trunk_arguments, trunk_cache
from fastadapter.methods import METHODS
from fastadapter.training import (
    Example,
    FinetuneResult,
    TrainingInterrupted,
    class_names,
    finetune,
    write_json,
)
from fastadapter.training.classification import LABELS_FILE
from fastadapter.training.folder import require_fresh_or_resume
from fastadapter.training.lock import require_unlocked
from fastadapter.training.log import require_trackers
from fastadapter.training.loop import TASKS
from fastadapter.training.metrics import table
from fastadapter.training.report import require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="generation",
        help="write completions, or name the class of a text, or a number for it, with a classification head",
    )
    data = parser.add_argument_group("data")
    add_data_arguments(data, held_out=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--adapter", choices=METHODS, default="llama-adapter", help="method")
    add_method_arguments(adapter)
    add_training_arguments(parser)
    add_trunk_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from accelerate import Accelerator

    device = device_and_dtype(args)
    trackers = require_trackers(args.report_to)
    accelerator = Accelerator(
        cpu=device.type == "cpu", log_with=trackers or None, project_dir=args.output_dir if trackers else None
    )
    config = training_config(
        args,
        max_length=args.max_length,
        truncation=args.truncation,
        append_eos=args.append_eos,
        parse_special_tokens=args.parse_special_tokens,
    )
    adapter = method_config(args, args.adapter)
    trunk = trunk_cache(args)
    # What can be wrong is found out before the minutes that loading a model may take.
    require_fresh_or_resume(args.output_dir, args.resume)
    if accelerator.is_main_process:
        require_unlocked(args.output_dir)
    train, held_out = read_data(args, accelerator.is_main_process)
    if accelerator.is_main_process and args.json:
        require_writable(Path(args.json).parent)
    labels = class_names(train, held_out or ()) if args.task == "classification" else []
    require_possible(args, config, train, held_out, labels)
    if args.task != "generation":
        model, tokenizer = load_classifier(
            args.model, args.gguf_file, args.dtype, labels, args.seed, args.revision
        )
    else:
        model, tokenizer = load_model(args.model, args.gguf_file, args.dtype, args.revision)
    if accelerator.is_main_process:
        mention_special_tokens(args, tokenizer, train)
    _seed(args.seed)
    attach_from_task(args, model, adapter, tokenizer, prompt_template(args, train[0]))
    try:
        result = finetune(
            model,
            tokenizer,
            train,
            held_out,
            config,
            output_dir=args.output_dir,
            task=args.task,
            resume=args.resume,
            restart_schedule=args.restart_schedule,
            save_steps=args.save_steps,
            accelerator=accelerator,
            details=_details(args, train, held_out),
            trunk_cache=trunk,
        )
    except TrainingInterrupted as stop:
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(f"fastadapter: {stop} with --resume", file=sys.stderr)
        return stop.exit_code
    if accelerator.is_main_process:
        if args.json:
            asked = {key: getattr(args, key) for key in ("model", "dtype", "data", "eval_data")}
            record = result.to_dict()
            write_json(args.json, {**record, "config": {**asked, **record["config"]}})
        print(_summary(args, result, labels))
    return 0


def _details(
    args: argparse.Namespace, train: Sequence[Example], held_out: Sequence[Example] | None
) -> dict[str, Any]:
    """What ``run.json`` says of the command line and the data."""
    base = {"name": args.model, "revision": args.revision, "gguf_file": args.gguf_file}
    labels = sorted({str(example.label) for example in train if example.label is not None})
    return {
        "command": ["fastadapter", *args.argv],
        "base": base,
        "labels": labels if args.task != "regression" else [],
        **describe_data(args, train, held_out),
    }


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _summary(args: argparse.Namespace, result: FinetuneResult, labels: list[str]) -> str:
    share = result.trainable_parameters / result.total_parameters
    seconds = sum(epoch["seconds"] for epoch in result.epochs)
    tokens = sum(epoch["tokens"] for epoch in result.epochs)
    lines = [
        f"trained {result.trainable_parameters:,} parameters ({share:.3%}) on {result.train_rows:,} records: "
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, peak {result.peak_rss_bytes / 2**30:.2f} GiB",
    ]
    outcome = result.eval
    if "rows" in outcome:
        name, shown = ("accuracy", ".2%") if outcome["accuracy_after"] is not None else ("loss", ".4f")
        at = f"step {outcome['best_step']}" if args.eval_steps else f"epoch {outcome['best_epoch']}"
        if result.stopped_early:
            lines.append(f"stopped early, after step {len(result.losses)}")
        values = [outcome[f"{name}_{when}"] for when in ("before", "after")]
        course = " -> ".join(f"{value:{shown}}" for value in values if value is not None)
        lines.append(
            f"held-out {name} {course} on {outcome['rows']:,} records; {at} is in {args.output_dir}/best"
        )
        if outcome["metrics"] is not None:
            lines += ["", table(outcome["metrics"]), ""]
    if labels:
        lines.append(f"classes {', '.join(labels)}, in that order in {args.output_dir}/{LABELS_FILE}")
    # the folder knows the rest
    command, given = ("generate", "--prompt") if args.task == "generation" else ("classify", "--text")
    lines.append(f"use it: {shlex.join(['fastadapter', command, '--adapter', args.output_dir])} {given} ...")
    return "\n".join(lines)
