"""``fastadapter demo``: LLaMA-Adapter on SmolLM2-135M-Instruct and real movie reviews, before and after.

Everything the demo does is done by the same functions as ``fastadapter finetune``; its data files stay in the output
folder, so that the command it prints at the end can be changed and run again.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastadapter.checkpoints import load
from fastadapter.cli import assets
from fastadapter.cli.loading import load_model
from fastadapter.integrations.verbs.attach import attach
from fastadapter.methods import LlamaAdapterConfig
from fastadapter.training import (
    Example,
    FinetuneResult,
    TrainingConfig,
    TrainingInterrupted,
    finetune,
    from_text,
    label_completions,
    predict_labels,
    read_examples,
    task_text,
    write_json,
)
from fastadapter.training.data import TEMPLATE

_SHOWN = 3
# Small batches: a closed gate gives its prompt no gradient, so the first steps only open gates, and a few hundred steps
# are all that one pass over this much data has.
_BATCH_SIZE, _LEARNING_RATE = 4, 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/demo"), help="is replaced when it exists"
    )
    parser.add_argument("--train", type=int, default=1000, help="reviews to train on")
    parser.add_argument("--test", type=int, default=400, help="held-out reviews to judge by")
    parser.add_argument("--layers", type=int, default=30, help="adapt the top so many of 30 layers")
    parser.add_argument("--num-train-epochs", type=int, default=1, help="passes over the training reviews")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draw of reviews, the adapter and their order"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm
    from transformers import set_seed

    started = time.perf_counter()
    model_dir = assets.fetch_demo_model()
    reviews = assets.fetch_demo_reviews()
    train_file, test_file = _write_split(reviews, args)
    train, test = read_examples(train_file), read_examples(test_file)
    labels = label_completions(train)

    print(f"\nSmolLM2-135M-Instruct, {len(train)} reviews to train on, {len(test)} held out")
    model, tokenizer = load_model(str(model_dir), None, "fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    shown = random.Random(args.seed).sample(test, min(_SHOWN, len(test)))

    def predict(when: str) -> list[str]:
        with tqdm(total=1.0, desc=f"held-out reviews {when}", bar_format="{l_bar}{bar}| {elapsed}") as bar:
            return predict_labels(model, tokenizer, test, labels, tick=lambda done: bar.update(done - bar.n))

    before = [_answer(model, tokenizer, example) for example in shown]
    predicted_before = predict("before")
    set_seed(args.seed)
    # A start from what the template says needs half the passes of a random one.
    config = from_text(LlamaAdapterConfig(layers=args.layers), task_text(TEMPLATE))
    attach(model, config, tokenizer=tokenizer)
    training = TrainingConfig(
        num_train_epochs=args.num_train_epochs,
        batch_size=_BATCH_SIZE,
        learning_rate=_LEARNING_RATE,
        seed=args.seed,
    )
    try:
        result = finetune(model, tokenizer, train, None, training, output_dir=args.output_dir)
    except TrainingInterrupted as stop:
        print("fastadapter: the demo was interrupted; it starts anew the next time", file=sys.stderr)
        return stop.exit_code
    after = [_answer(model, tokenizer, example) for example in shown]

    adapter = args.output_dir / "adapter.safetensors"
    print("\na fresh process reloads the adapter meanwhile ...", flush=True)
    with _predicting_in_fresh_process(model_dir, adapter, test_file) as fresh:
        predictions = predict("after")
        again = fresh()
    outcome = {
        "accuracy_before": accuracy(predicted_before, test),
        "accuracy_after": accuracy(predictions, test),
        "rows": len(test),
    }
    curve = plot_learning_curve(result, outcome, args.output_dir / "learning_curve.png")
    figures = {
        **result.to_dict(),
        "eval": outcome,
        "reloaded_accuracy": accuracy(again, test),
        "reloaded_predictions_equal": again == predictions,
        "adapter_bytes": adapter.stat().st_size,
        "total_seconds": time.perf_counter() - started,
    }
    print(_report(figures, shown, before, after, curve, model_dir, adapter))
    if args.json:
        write_json(args.json, figures)
    if again != predictions:
        print(
            "fastadapter: error: the reloaded adapter predicts otherwise than the trained one",
            file=sys.stderr,
        )
        return 1
    return 0


def accuracy(predictions: list[str], examples: list[Example]) -> float:
    """Share of the predictions that are the examples' labels."""
    return sum(a == b.label for a, b in zip(predictions, examples, strict=True)) / len(examples)


def predict_from_files(model_dir: str, adapter: str, test_file: str) -> list[str]:
    """What somebody gets who has the base model, the adapter file and the reviews, and nothing else."""
    model, tokenizer = load_model(model_dir, None, "fp32")
    load(model, adapter)
    examples = read_examples(test_file)
    return predict_labels(model, tokenizer, examples, label_completions(examples))


@contextlib.contextmanager
def _predicting_in_fresh_process(
    model_dir: Path, adapter: Path, test_file: Path
) -> Iterator[Callable[[], list[str]]]:
    """Gives a function that waits for the predictions of a process that knows these files alone.

    Loading the model keeps one core busy, so the process begins while this one still predicts.
    """
    program = (
        "import json, sys; from fastadapter.cli.demo import predict_from_files; "
        "print(json.dumps(predict_from_files(*sys.argv[1:])))"
    )
    command = [sys.executable, "-c", program, str(model_dir), str(adapter), str(test_file)]
    # Each has half of the threads: with all of them twice, both wait for each other at the end of every product.
    threads = torch.get_num_threads()
    share = max(1, threads // 2)
    environment = {**os.environ, "OMP_NUM_THREADS": str(share)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    torch.set_num_threads(share)

    def wait() -> list[str]:
        printed, _ = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, "the fresh process")
        return json.loads(printed.splitlines()[-1])

    try:
        yield wait
    finally:
        torch.set_num_threads(threads)
        process.kill()  # nothing, if it has ended
        process.wait()


def _write_split(reviews: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """Start the output folder anew and put both halves of the data in it."""
    import shutil

    split = assets.split_reviews(reviews, args.train, args.test, args.seed)
    owned = args.output_dir / "demo.json"
    if args.output_dir.exists():
        if any(args.output_dir.iterdir()) and not owned.exists():
            raise ValueError(f"--output-dir {args.output_dir}: holds files that the demo did not make")
        shutil.rmtree(args.output_dir)
    args.output_dir.mkdir(parents=True)
    write_json(owned, {"train": args.train, "test": args.test, "seed": args.seed})
    files = args.output_dir / "train.jsonl", args.output_dir / "test.jsonl"
    for file, rows in zip(files, split, strict=True):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files


def _answer(model: Any, tokenizer: Any, example: Example, new_tokens: int = 1) -> str:
    """The word the model itself goes on with; it is trained on one."""
    inputs = tokenizer(example.prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def plot_learning_curve(result: FinetuneResult, outcome: dict[str, Any], path: Path) -> Path:
    """Loss of every step, its running mean, and the held-out accuracy before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, loss_axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(result.losses) + 1)
    window = max(1, len(result.losses) // 20)
    sums = [sum(result.losses[max(0, i - window) : i]) / min(i, window) for i in steps]
    loss_axis.plot(steps, result.losses, color="0.8", linewidth=0.8, label="loss of a step")
    loss_axis.plot(steps, sums, color="tab:blue", label=f"mean of {window} steps")
    loss_axis.set_xlabel("step")
    loss_axis.set_ylabel("loss per supervised token")
    accuracies = [100 * outcome[f"accuracy_{when}"] for when in ("before", "after")]
    accuracy_axis = loss_axis.twinx()
    marks = [0, len(result.losses)]
    accuracy_axis.plot(marks, accuracies, "o--", color="tab:orange", label="held-out accuracy")
    accuracy_axis.set_ylabel("held-out accuracy, %")
    accuracy_axis.set_ylim(50, 100)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _report(figures, shown, before, after, curve, model_dir, adapter) -> str:
    seconds = sum(epoch["seconds"] for epoch in figures["epochs"])
    tokens = sum(epoch["tokens"] for epoch in figures["epochs"])
    trainable, total = figures["trainable_parameters"], figures["total_parameters"]
    evaluation = figures["eval"]
    lines = ["", "Three held-out reviews, the model's own next word before and after:"]
    for example, old, new in zip(shown, before, after, strict=True):
        lines += [f"  {example.prompt!r}", f"    is {example.label}; before: {old!r}; after: {new!r}"]
    lines += [
        "",
        f"held-out accuracy      {evaluation['accuracy_before']:.1%} before, {evaluation['accuracy_after']:.1%} after, "
        f"{figures['reloaded_accuracy']:.1%} reloaded in a fresh process"
        + ("" if figures["reloaded_predictions_equal"] else " (OTHER PREDICTIONS)"),
        f"trainable parameters   {trainable:,} of {total:,} ({trainable / total:.3%})",
        f"training               {tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s",
        f"peak memory            {figures['peak_rss_bytes'] / 2**30:.2f} GiB resident",
        f"adapter file           {figures['adapter_bytes'] / 1024:.0f} KiB, {adapter}",
        f"learning curve         {curve}",
        f"everything took        {figures['total_seconds']:.0f} s",
        "",
        "Use it:",
        f"  fastadapter generate --model {model_dir} --adapter {adapter} --max-new-tokens 1 \\",
        "      --prompt $'Review: A quiet film that stays with you.\\nSentiment:'",
    ]
    return "\n".join(lines)
