"""Find the learning rates of ``fastadapter compare``: each method with a few, judged on training records alone.

    python scripts/sweep_learning_rates.py --model minilm --out benchmarks/results/learning_rates_minilm.json
    python scripts/sweep_learning_rates.py --model smollm2 --template 'Review: {text}\\nSentiment:' --count 320 \\
        --num-train-epochs 1 --out benchmarks/results/learning_rates_smollm2.json

The reviews that ``compare`` trains on are drawn as it draws them; a fifth of those taken is held out to judge by, so
that no test record has a say. The best rate is that of the lowest held-out loss after the last epoch: on a few hundred
records it tells more than the accuracy. A second call goes on where the first one stopped.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastadapter.cli import assets  # noqa: E402
from fastadapter.cli.compare import REVIEW_TEST, REVIEW_TRAIN  # noqa: E402
from fastadapter.cli.data_options import unescape  # noqa: E402
from fastadapter.compare import METHODS_TO_COMPARE, compare, prepare, resolve_methods  # noqa: E402
from fastadapter.training import Example, write_json  # noqa: E402

# Over and under the range in which each kind of method has been published.
CANDIDATES = {
    "last-layers": (1e-3, 3e-3, 1e-2),
    "last-blocks": (3e-5, 1e-4, 3e-4, 1e-3),
    "all-layers": (1e-5, 3e-5, 1e-4, 3e-4),
    "houlsby": (1e-3, 3e-3, 1e-2),
    "pfeiffer": (1e-3, 3e-3, 1e-2),
    "parallel": (1e-3, 3e-3, 1e-2),
    "prefix-tuning": (3e-3, 1e-2, 3e-2),
    "soft-prompt": (1e-2, 3e-2, 1e-1),
    "llama-adapter": (3e-3, 1e-2, 3e-2),
    "llama-adapter-v2": (1e-3, 3e-3, 1e-2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=assets.MODELS, default="minilm")
    parser.add_argument(
        "--count", type=int, default=2000, help="of the training records, to train and judge by"
    )
    parser.add_argument("--num-train-epochs", type=int, default=2)
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

    drawn, _ = assets.split_reviews(assets.fetch_demo_reviews(), REVIEW_TRAIN, REVIEW_TEST)
    examples = [Example(row["text"], row["label"], row["label"], "reviews") for row in drawn[: args.count]]
    held_out = args.count // 5
    training = {
        "num_train_epochs": args.num_train_epochs,
        "batch_size": 16,
        "max_length": None,
        "truncation": "error",
    }
    record = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    record["about"] = (
        f"{args.model}, {len(examples) - held_out} training and {held_out} held-out reviews, all from the training "
        f"records of fastadapter compare, {args.num_train_epochs} epochs, batches of 16, seed 0, "
        f"template {args.template!r}"
    )
    for method in resolve_methods(args.methods):
        for rate in args.rates or CANDIDATES[method.name]:
            comparison = prepare(
                work / f"{rate:g}",
                str(assets.MODELS[args.model]()),
                examples[held_out:],
                examples[:held_out],
                names={"model": args.model, "data": "training reviews"},
                training=training,
                template=args.template,
            )
            result = compare(
                comparison,
                [method],
                [0],
                command=[sys.executable, "-m", "fastadapter.cli.compare_job"],
                learning_rates={method.name: rate},
                threads=args.threads,
            )[0]
            row = {"method": method.name, "learning_rate": rate}
            record["rows"] = [old for old in record["rows"] if {key: old[key] for key in row} != row]
            record["rows"].append({**row, **_figures(result)})
            order = list(METHODS_TO_COMPARE)
            record["rows"].sort(key=lambda each: (order.index(each["method"]), each["learning_rate"]))
            write_json(args.out, record)
            if "not_defined" in result:
                break
    print(table(record["rows"]))


def _figures(result: dict) -> dict:
    if "not_defined" in result:
        return {"not_defined": result["not_defined"]}
    return {
        "held_out_loss": result["epochs"][-1]["eval_loss"],
        "held_out_accuracy": result["accuracy"],
        "training_loss": result["epochs"][-1]["loss"],
        "seconds": result["seconds"],
        **{key: result[key] for key in ("threads", "machine", "date")},
    }


def table(rows: list[dict]) -> str:
    """The rows as text, the best of each method with a star."""
    lines = []
    for row in rows:
        if "not_defined" in row:
            lines.append(f"{row['method']:17} not defined: {row['not_defined']}")
            continue
        others = [each["held_out_loss"] for each in rows if each["method"] == row["method"]]
        star = "*" if row["held_out_loss"] == min(others) else " "
        lines.append(
            f"{row['method']:17} {row['learning_rate']:<8g} loss {row['held_out_loss']:.4f} "
            f"accuracy {row['held_out_accuracy']:.1%} {star}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
