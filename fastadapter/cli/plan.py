"""``fastadapter bench plan``: time and memory of a training run before it is started, and how sure they are.

fastadapter bench plan --model llama-7b --gpu h100 --num-gpus 1 8 --data alpaca-like --layers 30 --num-train-epochs 5
fastadapter bench plan --model smollm2 --device cpu --data reviews --layers 10 --trunk-cache
fastadapter bench plan --check      # every stored row beside its prediction
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastadapter.cli.data_options import parse_columns
from fastadapter.cli.method_options import method_config
from fastadapter.cli.options import Parser, escape, unescape
from fastadapter.methods import METHODS
from fastadapter.planning import check, factors, hardware
from fastadapter.planning.cost import BYTES, Job
from fastadapter.planning.hardware import GPUS, Device, resolve_gpu
from fastadapter.planning.lengths import DATA, Batching, Lengths, drawn_lengths, named_lengths
from fastadapter.planning.predict import Run, baseline, predict, require_fits
from fastadapter.planning.report import report
from fastadapter.planning.rows import Measured, results_folder, stored_rows
from fastadapter.planning.shapes import MODELS, SIZES, ModelShape, changed, resolve_shape
from fastadapter.training import Example, TrainingConfig, UserError, encode_examples, read_examples
from fastadapter.training.config import TRUNCATION
from fastadapter.training.data import TEMPLATE

_DEFAULTS = TrainingConfig()
_PADDING = {"longest": "random", "max_length": "max_length"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan, or hold the stored rows against their predictions."""
    args = _parser().parse_args(argv)
    if args.check or args.fit:
        for option in ("model", "gpu", "device", "data", "mean_tokens"):
            if getattr(args, option) is not None:
                asked = "--check" if args.check else "--fit"
                raise UserError(
                    f"{asked} is about all stored rows; --{option.replace('_', '-')} has no say in it"
                )
    if args.fit:
        _fit(Path(args.fit))
        return 0
    if args.check:
        checked, unplanned = check.check()
        if args.json:
            record = {
                "rows": [each.to_dict() for each in checked],
                "not_planned": [vars(each) for each in unplanned],
            }
            print(json.dumps(record, indent=1))
        else:
            print(check.table(checked, unplanned))
            if not any(results_folder().glob("compare_*/runs")):
                print("\nRows of comparisons and sweeps are in a checkout alone.")
        return 0
    shape, device = _shape(args), _device(args)
    config = method_config(args, args.adapter)
    dtype = args.dtype if args.dtype != "auto" else ("fp32" if device.cpu else "bf16")
    job = Job(
        shape,
        config,
        dtype=dtype,
        trunk_cache=args.trunk_cache,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    batchings = [_batching(args, count) for count in args.num_gpus]
    lengths = _lengths(args, shape)
    runs: list[Run] = []
    too_large: dict[int, UserError] = {}
    for batching in batchings:
        run = predict("fastadapter", job, lengths, batching, device, args.num_train_epochs)
        try:
            require_fits(run, lengths, args.num_train_epochs)
        except UserError as error:
            too_large[batching.num_gpus] = error
            continue
        runs.append(run)
        other = baseline(job, lengths, batching, device, args.num_train_epochs, _PADDING[args.padding])
        runs += [other] if other else []
    if not runs:
        raise next(iter(too_large.values()))
    if args.json:
        planned = {
            "model": vars(shape) | {"parameters": shape.parameters},
            "adapter": {"method": config.method, **config.to_dict()},
            "device": vars(device),
            "data": {"name": lengths.name, "records": len(lengths.prompts), "source": lengths.source},
            "num_train_epochs": args.num_train_epochs,
            "runs": [run.to_dict() for run in runs],
            "too_large": {str(count): str(error) for count, error in too_large.items()},
        }
        print(json.dumps(planned, indent=1))
    else:
        for count, reason in too_large.items():
            print(f"{count} GPU{'s' if count > 1 else ''}: {reason}\n")
        print(report(runs, lengths, args.num_train_epochs))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="fastadapter bench plan", description=(__doc__ or "").splitlines()[0])
    model = parser.add_argument_group("model and device")
    model.add_argument(
        "--model", metavar="NAME", help=f"folder with a config.json, or one of {', '.join(MODELS)}"
    )
    for size in SIZES:
        model.add_argument(f"--{size.replace('_', '-')}", type=int, help="in place of the model's own")
    model.add_argument(
        "--dtype", choices=("auto", *BYTES), default="auto", help="bf16 on a GPU, fp32 on a CPU"
    )
    where = model.add_mutually_exclusive_group()
    where.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    where.add_argument("--device", choices=("cpu",), help="this machine's CPU, timed for half a second")
    model.add_argument(
        "--num-gpus", type=int, nargs="+", default=[1], help="of one machine; several: compared"
    )
    model.add_argument("--threads", type=int, help="of the CPU; as many as it has if not given")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", help=f"file of records; or {'; '.join(f'{name}: {text}' for name, text in DATA.items())}"
    )
    data.add_argument("--mean-tokens", type=float, help="of a record, in place of --data; with --records")
    data.add_argument(
        "--std-tokens", type=float, help="standard deviation of them; half the mean if not given"
    )
    data.add_argument("--records", type=int, help="their number; that of --data if not given")
    data.add_argument(
        "--completion-share", type=float, help="share of the tokens that is learned; 0.5 if not given"
    )
    data.add_argument(
        "--tokenizer", metavar="NAME", help="folder, or minilm or smollm2, to count a file's tokens with"
    )
    data.add_argument(
        "--template", type=unescape, help=f"of text/label records; if not given '{escape(TEMPLATE)}'"
    )
    data.add_argument("--columns", type=parse_columns, metavar="FIELD=COLUMN,...", help="as of finetune")
    data.add_argument("--max-length", type=int, help="most tokens of a record")
    data.add_argument(
        "--truncation", choices=TRUNCATION, help="of longer records of a file; error if not given"
    )
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--adapter", choices=METHODS, default="llama-adapter", help="method")
    for name, text in (
        ("prefix-len", "of llama-adapter, llama-adapter-v2 and prefix-tuning"),
        ("prompt-len", "of soft-prompt"),
        ("layers", "how many of the top blocks; all if not given"),
        ("placement", "of bottleneck: houlsby, pfeiffer or parallel"),
        ("reduction-factor", "of bottleneck"),
        ("bottleneck-size", "of bottleneck, in place of --reduction-factor"),
    ):
        adapter.add_argument(
            f"--{name}",
            dest=f"method_{name.replace('-', '_')}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text,
        )
    train = parser.add_argument_group("training")
    train.add_argument("--num-train-epochs", type=int, default=_DEFAULTS.num_train_epochs, help="passes")
    train.add_argument(
        "--batch-size", type=int, default=_DEFAULTS.batch_size, help="records per step, over all GPUs"
    )
    train.add_argument("--gradient-accumulation-steps", type=int, default=1, help="passes of a step")
    train.add_argument("--packing", action="store_true", help="records in one row, without padding")
    train.add_argument("--pack-length", type=int, help="most tokens of such a row, as of finetune")
    train.add_argument(
        "--trunk-cache", action="store_true", help="states below the lowest adapted block once per record"
    )
    train.add_argument(
        "--gradient-checkpointing", action="store_true", help="blocks computed again instead of kept"
    )
    train.add_argument(
        "--padding",
        choices=_PADDING,
        default="longest",
        help="of the comparison: to the longest of a batch of random records, or to --max-length",
    )
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="print JSON")
    rows = shown.add_mutually_exclusive_group()
    rows.add_argument("--check", action="store_true", help="every stored row beside its prediction")
    rows.add_argument("--fit", metavar="FILE", help="write the factors that the stored rows give to FILE")
    return parser


def _shape(args: argparse.Namespace) -> ModelShape:
    sizes = {size: getattr(args, size) for size in SIZES}
    if args.model is not None:
        return changed(resolve_shape(args.model), **sizes)
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    missing = [f"--{size.replace('_', '-')}" for size, value in sizes.items() if value is None]
    if missing:
        raise UserError(f"--model, or all sizes of a decoder, must be given; missing: {', '.join(missing)}")
    return ModelShape("the given sizes", **sizes)


def _device(args: argparse.Namespace) -> Device:
    if args.gpu is None and args.device is None:
        raise UserError(f"--gpu must name a card ({', '.join(GPUS)}), or --device cpu be given")
    if args.gpu is not None:
        if args.threads is not None:
            raise UserError(f"--threads {args.threads} goes with --device cpu")
        return resolve_gpu(args.gpu)
    threads = args.threads if args.threads is not None else os.cpu_count() or 1
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    return hardware.this_cpu(threads)


def _batching(args: argparse.Namespace, num_gpus: int) -> Batching:
    return Batching(
        args.batch_size,
        "packed" if args.packing else "grouped",
        num_gpus,
        args.gradient_accumulation_steps,
        args.max_length,
        args.pack_length,
    )


def _lengths(args: argparse.Namespace, shape: ModelShape) -> Lengths:
    """Token counts of the data that the options name."""
    if (args.data is None) == (args.mean_tokens is None):
        raise UserError("either --data or --mean-tokens must be given")
    if args.data is None:
        if args.records is None:
            raise UserError("--mean-tokens needs --records")
        std = args.mean_tokens / 2 if args.std_tokens is None else args.std_tokens
        share = 0.5 if args.completion_share is None else args.completion_share
        found = drawn_lengths(args.mean_tokens, std, args.records, share)
        return found if args.max_length is None else found.cut(args.max_length)
    for option in ("std_tokens", "completion_share"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} goes with --mean-tokens, not with --data")
    if args.data in DATA:
        for option in ("tokenizer", "template", "columns", "truncation"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option} is for a file of records; the counts of {args.data} are stored")
        if args.records is not None and args.records < 1:
            raise UserError(f"--records must be at least 1, got {args.records}")
        found = named_lengths(args.data, shape.causal, args.records)
        return found if args.max_length is None else found.cut(args.max_length)
    if args.records is not None:
        raise UserError("--records: a file has as many as it has")
    return _counted(args, shape)


def _counted(args: argparse.Namespace, shape: ModelShape) -> Lengths:
    from transformers import AutoTokenizer

    from fastadapter.cli.loading import model_folder, quiet

    name = args.tokenizer or args.model
    folder = model_folder(name) if name else None
    if folder is None and name and (Path(name) / "config.json").is_file():
        folder = name
    if folder is None:
        raise UserError(
            f"--tokenizer must say what to count {args.data} with (a folder, minilm or smollm2): the sizes of "
            f"{shape.name} come without one"
        )
    template = args.template or (TEMPLATE if shape.causal else "{text}")
    examples: list[Example] = read_examples(args.data, template=template, columns=args.columns)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not shape.causal:
        counts = [len(ids) for ids in tokenizer([each.prompt for each in examples])["input_ids"]]
        prompts, learned = counts, [0] * len(counts)
    else:
        encoded = encode_examples(
            tokenizer,
            examples,
            append_eos=examples[0].label is None and examples[0].messages is None,
            max_length=args.max_length,
            truncation=args.truncation or "error",
        )
        learned = [len(each.supervised) for each in encoded]
        prompts = [len(each.input_ids) - count for each, count in zip(encoded, learned, strict=True)]
    source = f"{args.data}, counted with the tokenizer of {name}"
    found = Lengths(Path(args.data).name, tuple(prompts), tuple(learned), source)
    return found if shape.causal or args.max_length is None else found.cut(args.max_length)


def _fit(path: Path) -> None:
    rows = [row for row in stored_rows() if isinstance(row, Measured)]
    dates = [word for row in rows for word in row.source.split() if word[:2] == "20"]
    path.write_text(factors.to_json(factors.fit(rows), max(dates, default="")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
