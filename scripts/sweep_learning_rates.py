"""Find the learning rates of ``fastadapter compare``: each method with a few, judged on training records alone.

    python scripts/sweep_learning_rates.py --model minilm --out benchmarks/results/learning_rates_minilm.json
    python scripts/sweep_learning_rates.py --model smollm2 --template 'Review: {text}\\nSentiment:' --steps 50 \\
        --seeds 0 1 --out benchmarks/results/learning_rates_smollm2.json

The reviews that ``compare`` trains on are drawn as it draws them; a fifth of those taken is held out to judge by, so
that no test record has a say. The best rate is that of the lowest held-out loss after the last epoch, the mean over the
seeds: on a few hundred records it tells more than the accuracy. A second call goes on where the first one stopped.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastadapter.cli import assets  # noqa: E402
from fastadapter.cli.compare import REVIEW_TEST, REVIEW_TRAIN  # noqa: E402
from fastadapter.cli.options import unescape  # noqa: E402
from fastadapter.compare import METHODS_TO_COMPARE, STARTS, compare, prepare, resolve_methods, with_options  # noqa: E402
from fastadapter.training import Example, write_json  # noqa: E402

BATCH_SIZE = 16
# What rows of older sweeps have no field for.
_BEFORE = {"seed": 0, "head_learning_rate": None}
# Over and under the range in which each kind of method has been published.
CANDIDATES = {
    "last-layers": (1e-3, 3e-3, 1e-2),
    "last-blocks": (3e-5, 1e-4, 3e-4, 1e-3),
    "all-layers": (1e-5, 3e-5, 1e-4, 3e-4),
    "houlsby": (1e-3, 3e-3, 1e-2),
    "pfeiffer": (1e-3, 3e-3, 1e-2),
    "parallel": (1e-3, 3e-3, 1e-2),
    "prefix-tuning": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "soft-prompt": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "llama-adapter": (3e-3, 1e-2, 3e-2),
    "llama-adapter-v2": (1e-3, 3e-3, 1e-2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=assets.MODELS, default="minilm")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--count", type=int, default=2000, help="of the training records, to train and judge by"
    )
    size.add_argument(
        "--steps", type=int, help="as many records as make so many steps in one epoch, and one epoch"
    )
    parser.add_argument("--num-train-epochs", type=int, default=2, help="with --count")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--init", choices=STARTS, default=STARTS[0], help="as of fastadapter compare")
    parser.add_argument("--init-text", type=unescape, help="as of fastadapter compare")
    parser.add_argument(
        "--head-learning-rate", type=float, help="of the head beside an adapter; its own if not given"
    )
    parser.add_argument("--reparam-size", type=int, help="as of fastadapter compare")
    parser.add_argument("--methods", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--rates", nargs="+", type=float, help="in place of each method's own candidates")
    parser.add_argument(
        "--template", type=unescape, default="{text}", help=r"around each text; \n is a new line"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work-dir", type=Path, help="gets the runs; beside --out if not given")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every run")
    args = parser.parse_args()
    work = args.work_dir or args.out.with_suffix("")
    if args.steps is not None:  # of the records a fifth is held out
        args.count, args.num_train_epochs = args.steps * BATCH_SIZE * 5 // 4, 1
    if not 5 <= args.count <= REVIEW_TRAIN:
        parser.error(f"--count must be between 5 and the {REVIEW_TRAIN} training records, got {args.count}")
    methods = with_options(
        resolve_methods(args.methods),
        args.template,
        init=args.init,
        init_text=args.init_text,
        reparam_size=args.reparam_size,
    )

    drawn, _ = assets.split_reviews(assets.fetch_demo_reviews(), REVIEW_TRAIN, REVIEW_TEST)
    examples = [Example(row["text"], row["label"], row["label"], "reviews") for row in drawn[: args.count]]
    held_out = args.count // 5
    training = {
        "num_train_epochs": args.num_train_epochs,
        "batch_size": BATCH_SIZE,
        "max_length": None,
        "truncation": "error",
    }
    record = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    record["about"] = (
        f"{args.model}, {len(examples) - held_out} training and {held_out} held-out reviews, all from the training "
        f"records of fastadapter compare, epochs: {args.num_train_epochs}, batches of {BATCH_SIZE}, template "
        f"{args.template!r}"
    )
    for method in methods:
        for rate in args.rates or CANDIDATES[method.name]:
            head = args.head_learning_rate if method.adapter else None
            comparison = prepare(
                work / (f"{rate:g}" + (f"-head-{head:g}" if head else "")),
                str(assets.MODELS[args.model]()),
                examples[held_out:],
                examples[:held_out],
                names={"model": args.model, "data": "training reviews"},
                training=training,
                template=args.template,
            )
            for seed in args.seeds:
                result = compare(
                    comparison,
                    [method],
                    [seed],
                    command=[sys.executable, "-m", "fastadapter.cli.compare_job"],
                    learning_rates={method.name: rate},
                    head_learning_rates={method.name: head} if head else None,
                    threads=args.threads,
                )[0]
                row = {"method": method.name, "learning_rate": rate, "head_learning_rate": head, "seed": seed}
                others = [old for old in record["rows"] if not row.items() <= {**_BEFORE, **old}.items()]
                record["rows"] = sorted([*others, {**row, **_figures(result)}], key=_place)
                write_json(args.out, record)
                if "not_defined" in result:
                    break
            if "not_defined" in result:
                break
    print(table(record["rows"]))


def _place(row: dict) -> tuple:
    row = {**_BEFORE, **row}
    order = list(METHODS_TO_COMPARE).index(row["method"])
    return order, row["learning_rate"], row["head_learning_rate"] or 0.0, row["seed"]


def _figures(result: dict) -> dict:
    if "not_defined" in result:
        return {"not_defined": result["not_defined"]}
    return {
        "held_out_loss": result["epochs"][-1]["eval_loss"],
        "held_out_accuracy": result["accuracy"],
        "training_loss": result["epochs"][-1]["loss"],
        "options": result["options"],
        "seconds": result["seconds"],
        **{key: result[key] for key in ("threads", "machine", "date")},
    }


def table(rows: list[dict]) -> str:
    """Means over the seeds as text, the best rate of each method with a star, a method without figures with why."""
    cells: dict[tuple[str, float, float | None], list[dict]] = {}
    for row in rows:
        key = row["method"], row["learning_rate"], row.get("head_learning_rate")
        cells.setdefault(key, []).append(row)
    means = {
        key: [
            sum(row[figure] for row in found) / len(found)
            for figure in ("held_out_loss", "held_out_accuracy")
        ]
        for key, found in cells.items()
        if not any("not_defined" in row for row in found)
    }
    lines = []
    for key, found in cells.items():
        method, rate, head = key
        if key not in means:
            lines.append(f"{method:17} not defined: {found[0]['not_defined']}")
            continue
        loss, accuracy = means[key]
        star = "*" if loss == min(mean[0] for each, mean in means.items() if each[0] == method) else " "
        seeds = f"{len(found)} seed{'s' * (len(found) > 1)}"
        lines.append(
            f"{method:17} {rate:<8g} loss {loss:.4f} accuracy {accuracy:.1%} {star} {seeds}"
            + (f", head {head:g}" if head else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
