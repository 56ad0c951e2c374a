"""``fastadapter finetune``: train an adapter on prompt/completion or text/label records."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapter.cli.data_options import (
    add_data_arguments,
    describe_data,
    escape,
    mention_special_tokens,
    prompt_template,
    read_data,
)
from fastadapter.cli.loading import add_model_arguments, device_and_dtype, load_classifier, load_model
from fastadapter.cli.method_options import add_method_arguments, method_config
from fastadapter.integrations.verbs.attach import attach
from fastadapter.methods import METHODS
from fastadapter.training import (
    Example,
    FinetuneResult,
    TrainingConfig,
    TrainingInterrupted,
    class_names,
    finetune,
    write_json,
)
from fastadapter.training.classification import LABELS_FILE
from fastadapter.training.folder import require_fresh_or_resume
from fastadapter.training.lock import require_unlocked
from fastadapter.training.loop import TASKS
from fastadapter.training.report import require_writable

_DEFAULTS = TrainingConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="generation",
        help="write completions, or name the class of a text with a classification head",
    )
    data = parser.add_argument_group("data")
    add_data_arguments(data, held_out=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--adapter", choices=METHODS, default="llama-adapter", help="method")
    add_method_arguments(adapter)
    train = parser.add_argument_group("training")
    add = train.add_argument
    add("--learning-rate", type=float, default=_DEFAULTS.learning_rate, help="at the end of the warm-up")
    add("--weight-decay", type=float, default=_DEFAULTS.weight_decay, help="of AdamW")
    add("--adam-beta1", type=float, default=_DEFAULTS.betas[0], help="of AdamW")
    add("--adam-beta2", type=float, default=_DEFAULTS.betas[1], help="of AdamW")
    add("--warmup-ratio", type=float, default=_DEFAULTS.warmup_ratio, help="share of the steps")
    add("--num-train-epochs", type=int, default=_DEFAULTS.num_train_epochs, help="passes over the data")
    add("--batch-size", type=int, default=_DEFAULTS.batch_size, help="records per step, over all processes")
    add("--gradient-accumulation-steps", type=int, default=1, help="forward passes that a step is cut into")
    add("--eval-batch-size", type=int, default=_DEFAULTS.eval_batch_size, help="records per evaluation pass")
    add("--max-grad-norm", type=float, default=_DEFAULTS.max_grad_norm, help="clip to this; 0: do not clip")
    add("--seed", type=int, default=_DEFAULTS.seed, help="of the adapter, the data order and the split")
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", required=True, help="gets the adapter, the best one and the state")
    output.add_argument("--resume", action="store_true", help="continue the run in --output-dir, bit for bit")
    output.add_argument("--save-steps", type=int, default=50, help="steps between two saves of the state")
    output.add_argument("--json", metavar="FILE", help="write configuration, history and memory to this file")


def run(args: argparse.Namespace) -> int:
    from accelerate import Accelerator

    device = device_and_dtype(args)
    accelerator = Accelerator(cpu=device.type == "cpu")
    config = TrainingConfig(
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        warmup_ratio=args.warmup_ratio,
        num_train_epochs=args.num_train_epochs,
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        eval_batch_size=args.eval_batch_size,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        max_length=args.max_length,
        truncation=args.truncation,
        append_eos=args.append_eos,
        parse_special_tokens=args.parse_special_tokens,
    )
    adapter = method_config(args, args.adapter)
    # What can be wrong is found out before the minutes that loading a model may take.
    require_fresh_or_resume(args.output_dir, args.resume)
    if accelerator.is_main_process:
        require_unlocked(args.output_dir)
    train, held_out = read_data(args, accelerator.is_main_process)
    if accelerator.is_main_process and args.json:
        require_writable(Path(args.json).parent)
    labels = class_names(train, held_out or ()) if args.task == "classification" else []
    if labels:
        model, tokenizer = load_classifier(args.model, args.gguf_file, args.dtype, labels, args.seed)
    else:
        model, tokenizer = load_model(args.model, args.gguf_file, args.dtype)
    if accelerator.is_main_process:
        mention_special_tokens(args, tokenizer, train)
    _seed(args.seed)
    attach(model, adapter)
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
            save_steps=args.save_steps,
            accelerator=accelerator,
            details=_details(args, train, held_out),
        )
    except TrainingInterrupted as stop:
        if accelerator.is_main_process:
            print(f"fastadapter: {stop} with --resume", file=sys.stderr)
        return stop.exit_code
    if accelerator.is_main_process:
        if args.json:
            asked = {key: getattr(args, key) for key in ("model", "dtype", "data", "eval_data")}
            record = result.to_dict()
            write_json(args.json, {**record, "config": {**asked, **record["config"]}})
        print(_summary(args, result, prompt_template(args, train[0]), labels))
    return 0


def _details(
    args: argparse.Namespace, train: Sequence[Example], held_out: Sequence[Example] | None
) -> dict[str, Any]:
    """What ``run.json`` says of the command line."""
    base = {"name": args.model, "revision": getattr(args, "revision", None), "gguf_file": args.gguf_file}
    return {"command": ["fastadapter", *args.argv], "base": base, **describe_data(args, train, held_out)}


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _summary(
    args: argparse.Namespace, result: FinetuneResult, template: str | None, labels: list[str]
) -> str:
    share = result.trainable_parameters / result.total_parameters
    seconds = sum(epoch["seconds"] for epoch in result.epochs)
    tokens = sum(epoch["tokens"] for epoch in result.epochs)
    lines = [
        f"trained {result.trainable_parameters:,} parameters ({share:.3%}) on {result.train_rows:,} records: "
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, peak {result.peak_rss_bytes / 2**30:.2f} GiB",
    ]
    outcome = result.eval
    if outcome["accuracy_after"] is not None:
        lines.append(
            f"held-out accuracy {outcome['accuracy_before']:.2%} -> {outcome['accuracy_after']:.2%} "
            f"on {outcome['rows']:,} records; epoch {outcome['best_epoch']} is in {args.output_dir}/best"
        )
    if labels:
        lines.append(f"classes {', '.join(labels)}, in that order in {args.output_dir}/{LABELS_FILE}")
        return "\n".join(lines)
    use = ["fastadapter", "generate", "--model", args.model, "--adapter", args.output_dir]
    if args.gguf_file:
        use += ["--gguf-file", args.gguf_file]
    if template is not None:
        use += ["--template", escape(template)]
    lines.append(f"use it: {shlex.join(use)} --prompt ...")
    return "\n".join(lines)
