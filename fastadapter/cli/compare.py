"""``fastadapter compare``: every way to adapt a model, on the same records and seeds, as one table and three plots."""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch

from fastadapter.cli import assets
from fastadapter.cli.loading import add_model_arguments, device_and_dtype
from fastadapter.cli.options import unescape
from fastadapter.cli.trunk_options import add_trunk_arguments, trunk_cache
from fastadapter.compare import (
    DEFAULT_METHODS,
    METHODS_TO_COMPARE,
    STARTS,
    compare,
    prepare,
    resolve_methods,
    with_options,
    write_report,
)
from fastadapter.compare.report import REVIEWS, markdown, summarise
from fastadapter.training import (
    Example,
    TrainingConfig,
    TrainingInterrupted,
    UserError,
    class_names,
    read_examples,
    split_examples,
    without_prompts_of,
    write_json,
)
from fastadapter.training.classification import TEXT_TEMPLATE
from fastadapter.training.config import TRUNCATION
from fastadapter.training.report import require_writable

# All reviews whose rating is clear enough to have a sign.
REVIEW_TRAIN, REVIEW_TEST = 8309, 2000
QUICK_TRAIN, QUICK_TEST = 400, 200
_WEIGHTS = (".safetensors", ".gguf", ".bin")
# All parameters of a model of 1 GiB trained with AdamW, with what a step and the libraries need.
_MEMORY_OF_A_RUN = 4 * 2**30
_QUICK = {"seeds": [0], "num_train_epochs": 1}
_FULL = {"seeds": [0, 1, 2], "num_train_epochs": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, revision=False)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        help=f".jsonl or .csv of text and label; {REVIEWS!r}: movie reviews that come as a package",
    )
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument("--eval-data", help="test records; training records with their texts are left out")
    held_out.add_argument(
        "--eval-count",
        type=int,
        help=f"test records; if not given, a fifth, of the reviews {REVIEW_TEST} (with --quick {QUICK_TEST} at most)",
    )
    data.add_argument(
        "--train-count",
        type=int,
        help=f"train on so many of the records; if not given, all, with --quick {QUICK_TRAIN}",
    )
    data.add_argument("--split-seed", type=int, default=0, help="of the draw of training and test records")
    data.add_argument(
        "--template", type=unescape, default=TEXT_TEMPLATE, help=r"around each text; \n is a new line"
    )
    data.add_argument(
        "--max-length", type=int, help="most tokens of a text; the model's context if not given"
    )
    data.add_argument(
        "--truncation",
        choices=TRUNCATION,
        default="error",
        help="of longer texts: refuse them, or cut their end, as prompt does too",
    )
    what = parser.add_argument_group("comparison")
    what.add_argument(
        "--methods", nargs="+", metavar="METHOD", default=list(DEFAULT_METHODS), help="rows of the table"
    )
    what.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="of head, adapter and data order (default: 0 1 2; with --quick 0)",
    )
    what.add_argument(
        "--num-train-epochs", type=int, help="passes over the training records (default: 3; with --quick 1)"
    )
    what.add_argument("--batch-size", type=int, default=TrainingConfig.batch_size, help="records per step")
    what.add_argument(
        "--learning-rate",
        nargs="+",
        metavar="METHOD=RATE",
        default=[],
        help="of a method, if not that of its row in docs/comparison.md",
    )
    what.add_argument(
        "--head-learning-rate",
        nargs="+",
        metavar="METHOD=RATE",
        default=[],
        help="of the classification head beside an adapter, where it shall have a rate of its own",
    )
    what.add_argument(
        "--init",
        choices=STARTS,
        default=STARTS[0],
        help="start of prompts and prefixes: what the template says without the record, where it says something; "
        "random: each method's own",
    )
    what.add_argument(
        "--init-text",
        type=unescape,
        help=r"text to start from, and to put in front of in-context's records, in place of what the template says; "
        r"\n is a new line",
    )
    what.add_argument(
        "--reparam-size", type=int, help="width of the network behind prefix tuning; none if not given"
    )
    what.add_argument(
        "--quick", action="store_true", help="400 training and 200 test records, 1 seed, 1 epoch"
    )
    what.add_argument(
        "--jobs",
        type=int,
        help="runs at a time; if not given, as many as PyTorch would use threads, for a model of less than 1 GiB on a "
        "CPU with 4 GiB for each, and otherwise 1",
    )
    what.add_argument(
        "--threads", type=int, help="of PyTorch in every run; if not given, its own choice over --jobs"
    )
    add_trunk_arguments(parser, one_run=False)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        required=True,
        type=Path,
        help="gets runs, table and plots; a second call goes on there",
    )
    output.add_argument(
        "--save-steps", type=int, default=200, help="steps between two saves of a run's state"
    )
    output.add_argument("--json", metavar="FILE", help="write settings, rows and runs to this file, too")


def run(args: argparse.Namespace) -> int:
    for key, value in (_QUICK if args.quick else _FULL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    device = device_and_dtype(args)
    methods = with_options(
        resolve_methods(args.methods),
        args.template,
        init=args.init,
        init_text=args.init_text,
        reparam_size=args.reparam_size,
    )
    _require_packages()
    rates, head_rates = (
        _rates(option, words, [method.name for method in methods])
        for option, words in (
            ("learning_rate", args.learning_rate),
            ("head_learning_rate", args.head_learning_rate),
        )
    )
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must differ, got {' '.join(map(str, args.seeds))}")
    for name in ("threads", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    trunk = trunk_cache(args, runs=len(args.seeds))
    training = {
        "num_train_epochs": args.num_train_epochs,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "truncation": args.truncation,
    }
    for seed in args.seeds:
        TrainingConfig(seed=seed, **training)  # refuses what makes no sense
    train, test = _read(args)
    class_names(train, test)
    if args.json:
        require_writable(Path(args.json).parent)
    folder = (
        assets.MODELS[args.model]() if args.model in assets.MODELS and not Path(args.model).is_dir() else None
    )
    comparison = prepare(
        args.output_dir,
        str(folder or args.model),
        train,
        test,
        names={"model": _shown(args.model), "data": _shown(args.data)},
        training=training,
        gguf_file=args.gguf_file,
        dtype=args.dtype,
        template=args.template,
    )
    try:
        results = compare(
            comparison,
            methods,
            args.seeds,
            command=[sys.executable, "-m", "fastadapter.cli.compare_job"],
            learning_rates=rates,
            head_learning_rates=head_rates,
            jobs=args.jobs if args.jobs is not None else _jobs(comparison.model, device.type, args.threads),
            threads=args.threads,
            device=device.type,
            save_steps=args.save_steps,
            trunk_cache=trunk,
            after_run=lambda so_far: _write(args, comparison.settings, so_far),
        )
    except TrainingInterrupted as stop:
        print(f"fastadapter: {stop}", file=sys.stderr)
        return stop.exit_code
    print(markdown(comparison.settings, summarise(results, comparison.settings), results))
    print(f"table, figures and plots are in {args.output_dir}")
    return 0


def _write(args: argparse.Namespace, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    write_report(args.output_dir, settings, results)
    if args.json:
        write_json(args.json, {"settings": settings, "rows": summarise(results, settings), "runs": results})


def _jobs(model: str, device: str, threads: int | None) -> int:
    """Runs at a time on this machine.

    A small model does not keep two threads busy: two runs of one thread each are done sooner than one after the other
    with both. A large one does, and has to fit into memory as often. Of a model from a hub it is not known yet.
    """
    import psutil  # comes with accelerate

    folder = Path(model)
    if device != "cpu" or not folder.is_dir():
        return 1
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
    if size >= 2**30:
        return 1
    fitting = psutil.virtual_memory().available // _MEMORY_OF_A_RUN
    return max(1, min(torch.get_num_threads() // (threads or 1), fitting))


def _require_packages() -> None:
    """A method that ends an hour's comparison for want of a package should say so now."""
    import importlib.util

    for module in ("sklearn", "matplotlib", "transformers", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f'the comparison needs {module}: pip install "fastadapter[compare]"')


def _rates(field: str, words: list[str], methods: list[str]) -> dict[str, float]:
    option, rates = f"--{field.replace('_', '-')}", {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in METHODS_TO_COMPARE:
            raise UserError(f"{option} must be METHOD=RATE, got {word!r}")
        method = METHODS_TO_COMPARE[name]
        if not method.learning_rates or (field == "head_learning_rate" and method.adapter is None):
            raise UserError(f"{option} {word}: {name} has none")
        if name not in methods:
            raise UserError(f"{option} {word}: {name} is not among --methods")
        try:
            rates[name] = float(value)
        except ValueError:
            raise UserError(f"{option} {word}: {value!r} is not a number") from None
        fields: dict[str, Any] = {field: rates[name]}
        TrainingConfig(**fields)
    return rates


def _read(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    for name in ("train_count", "eval_count"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.data == REVIEWS:
        if args.eval_data is not None:
            raise UserError(
                f"--eval-data: {REVIEWS} bring their own test records; --eval-count says how many"
            )
        halves = assets.split_reviews(
            assets.fetch_demo_reviews(),
            args.train_count or (QUICK_TRAIN if args.quick else REVIEW_TRAIN),
            args.eval_count or (QUICK_TEST if args.quick else REVIEW_TEST),
            args.split_seed,
        )
        train, test = ([Example(r["text"], r["label"], r["label"], REVIEWS) for r in rows] for rows in halves)
        return train, test
    # The template is put around the texts where they are read by the runs.
    templates: dict[str, Any] = {"template": TEXT_TEMPLATE, "completion_template": "{label}"}
    train = read_examples(args.data, **templates)
    if args.eval_data is not None:
        test = read_examples(args.eval_data, **templates)
        train = without_prompts_of(train, test)
    else:
        fifth = max(1, len(train) // 5)
        count = args.eval_count or (min(QUICK_TEST, fifth) if args.quick else fifth)
        train, test = split_examples(train, count, args.split_seed)
    if args.train_count is not None and args.train_count > len(train):
        raise UserError(f"--train-count must be at most {len(train)}, the records left to train on")
    count = args.train_count or (QUICK_TRAIN if args.quick else len(train))
    if count < len(train):
        chosen = random.Random(f"subset-{args.split_seed}").sample(range(len(train)), count)
        train = [train[index] for index in sorted(chosen)]
    return train, test


def _shown(name: str) -> str:
    """A folder or file by its last name alone: where it lies on this machine is of no use to a reader."""
    last = Path(name).name
    return last if Path(name).exists() and last != REVIEWS else name
