"""Options that say how a run trains, what it evaluates and when, and where it tells of it."""

import argparse
from collections.abc import Sequence
from typing import Any

from fastadapter.training import Example, TrainingConfig, UserError
from fastadapter.training.classification import class_weights
from fastadapter.training.config import EVAL_STRATEGIES, SCHEDULES
from fastadapter.training.metrics import require_packages
from fastadapter.training.regression import parse_numbers

_DEFAULTS = TrainingConfig()


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The groups training and evaluation."""
    train = parser.add_argument_group("training")
    add = train.add_argument
    length = train.add_mutually_exclusive_group()
    length.add_argument(
        "--num-train-epochs", type=int, default=_DEFAULTS.num_train_epochs, help="passes over the data"
    )
    length.add_argument(
        "--max-steps",
        type=int,
        help="optimiser steps of the run; if not given, --num-train-epochs says how many",
    )
    add("--batch-size", type=int, default=_DEFAULTS.batch_size, help="records per step, over all processes")
    add(
        "--gradient-accumulation-steps",
        type=int,
        default=_DEFAULTS.gradient_accumulation_steps,
        help="forward passes that a step is cut into",
    )
    add(
        "--packing",
        action="store_true",
        help="put the records of a forward pass one behind the other into one row instead of padding them; the loss is "
        "the same. A model that cannot do that gets batches grouped by length, as without it, and the run says so",
    )
    add(
        "--pack-length",
        type=int,
        help="most tokens of such a row, further forward passes take the rest of a step; 8192, or the longest record "
        "if that is longer, if not given",
    )
    add("--learning-rate", type=float, default=_DEFAULTS.learning_rate, help="at the end of the warm-up")
    add(
        "--head-learning-rate",
        type=float,
        help="of heads and of what --modules-to-save names; --learning-rate if not given",
    )
    add(
        "--lr-scheduler-type",
        choices=tuple(SCHEDULES),
        default=_DEFAULTS.lr_scheduler_type,
        help="what the learning rate does after the warm-up",
    )
    warmup = train.add_mutually_exclusive_group()
    warmup.add_argument(
        "--warmup-ratio",
        type=float,
        default=_DEFAULTS.warmup_ratio,
        help="share of the steps over which the learning rate rises",
    )
    warmup.add_argument("--warmup-steps", type=int, help="their number; if not given, --warmup-ratio says it")
    add("--weight-decay", type=float, default=_DEFAULTS.weight_decay, help="of AdamW")
    add("--adam-beta1", type=float, default=_DEFAULTS.betas[0], help="of AdamW")
    add("--adam-beta2", type=float, default=_DEFAULTS.betas[1], help="of AdamW")
    add("--adam-epsilon", type=float, default=_DEFAULTS.eps, help="of AdamW")
    add("--max-grad-norm", type=float, default=_DEFAULTS.max_grad_norm, help="clip to this; 0: do not clip")
    add(
        "--label-smoothing-factor",
        type=float,
        default=_DEFAULTS.label_smoothing_factor,
        help="share of each target that is spread over all classes, or all tokens",
    )
    add(
        "--class-weights",
        type=parse_class_weights,
        metavar="balanced|LABEL=WEIGHT,...",
        help="what an error on a text of each class counts; balanced: inversely to how often the class occurs",
    )
    add("--seed", type=int, default=_DEFAULTS.seed, help="of the adapter, the data order and the split")
    evaluate = parser.add_argument_group("evaluation, of records that are held out")
    add = evaluate.add_argument
    add(
        "--eval-strategy",
        choices=EVAL_STRATEGIES,
        help="when to evaluate, besides before the first step and after the last; epoch if not given, steps with "
        "--eval-steps",
    )
    add(
        "--eval-on-start",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.eval_on_start,
        help="evaluate before the first step",
    )
    add("--eval-steps", type=int, help="evaluate every so many steps; if not given, after epochs")
    add("--eval-batch-size", type=int, default=_DEFAULTS.eval_batch_size, help="records per forward pass")
    add(
        "--early-stopping-patience",
        type=int,
        help="end the run after so many evaluations in a row that were not better than the best; never if not given",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The group output."""
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", required=True, help="gets the adapter, the best one, state and log")
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output-dir, bit for bit; a finished one, with more --num-train-epochs or "
        "--max-steps than it had",
    )
    output.add_argument(
        "--restart-schedule",
        action="store_true",
        help="when a run gets longer by --resume, begin the learning rate's schedule anew for the steps that are left",
    )
    output.add_argument("--save-steps", type=int, default=50, help="steps between two saves of the state")
    output.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="trackers that get every step and evaluation: tensorboard, wandb, mlflow, or another that accelerate "
        "knows; none if not given",
    )
    output.add_argument("--json", metavar="FILE", help="write configuration, history and memory to this file")


def training_config(args: argparse.Namespace, **more: Any) -> TrainingConfig:
    """The configuration that the options ask for.

    Args:
        more: the fields that options of the data decide.
    Raises: TypeError, UserError: naming the field.
    """
    strategy = args.eval_strategy
    if strategy is None:
        strategy = "epoch" if args.eval_steps is None else "steps"
    return TrainingConfig(
        learning_rate=args.learning_rate,
        head_learning_rate=args.head_learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_ratio=args.warmup_ratio,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        eval_strategy=strategy,
        eval_steps=args.eval_steps,
        eval_on_start=args.eval_on_start,
        eval_batch_size=args.eval_batch_size,
        early_stopping_patience=args.early_stopping_patience,
        max_grad_norm=args.max_grad_norm,
        label_smoothing_factor=args.label_smoothing_factor,
        class_weights=args.class_weights,
        packing=args.packing,
        pack_length=args.pack_length,
        seed=args.seed,
        **more,
    )


def require_possible(
    args: argparse.Namespace,
    config: TrainingConfig,
    train: Sequence[Example],
    held_out: Sequence[Example] | None,
    labels: Sequence[str],
) -> None:
    """Look whether options, task and records go together: before a model is loaded, which may take minutes.

    Raises: UserError: naming the option or the record.
    """
    for name in ("eval_strategy", "eval_steps", "early_stopping_patience"):
        if getattr(args, name) not in (None, "no") and not held_out:
            raise UserError(
                f"--{name.replace('_', '-')} needs held-out records: --eval-data, --eval-count or --eval-fraction"
            )
    if args.restart_schedule and not args.resume:
        raise UserError("--restart-schedule goes with --resume")
    if held_out and held_out[0].label is not None:
        require_packages()
    if args.task == "regression":
        parse_numbers([*train, *(held_out or ())])
    if labels:
        class_weights(labels, [labels.index(str(example.label)) for example in train], config)
    elif config.class_weights is not None:
        raise UserError(f"--class-weights are for --task classification, not for {args.task}")
    if args.task == "regression" and config.label_smoothing_factor:
        raise UserError("--label-smoothing-factor: a regression has no classes")


def parse_class_weights(text: str) -> Any:
    """``balanced``, or the weights of ``bad=1,good=2.5`` by label."""
    if text == "balanced":
        return text
    weights: dict[str, float] = {}
    for part in text.split(","):
        label, equals, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = None
        if not equals or number is None or not label:
            raise argparse.ArgumentTypeError(f"must be balanced or LABEL=WEIGHT,..., got {text!r}")
        if label in weights:
            raise argparse.ArgumentTypeError(f"names the label {label!r} twice")
        weights[label] = number
    return weights
