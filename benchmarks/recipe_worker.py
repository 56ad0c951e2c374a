"""Our own party of the recipe: ``fastadapter.training.finetune`` as it is, paced by a tracker of accelerate.

    python -m benchmarks.recipe_worker JOB.json

Trackers are told of every step after its time was taken, which is where the party waits for its turn.
"""

import dataclasses
import inspect
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import fastadapter as fa
from fastadapter.cli.loading import load_model
from fastadapter.training import (
    Encoded,
    TrainingConfig,
    collate,
    epoch_batches,
    finetune,
    read_examples,
    supervised_loss,
)

from .peers import common, protocol

# The options of a version that has them; a folder of its own for the states, so that they are built, not found.
OPTIONS = ("packing", "trunk_cache")


def lacks(options: list[str]) -> list[str]:
    """Those of ``options`` that this version of the library does not have."""
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    arguments = set(inspect.signature(finetune).parameters)
    return [each for each in options if each not in fields | arguments]


class Turns(GeneralTracker):
    """Hands every step to the pacer."""

    name = "turns"
    requires_logging_directory = False

    def __init__(self, pacer: protocol.Pacer, tokens: Iterator[int]):
        super().__init__()
        self.pacer, self.tokens = pacer, tokens

    @property
    def tracker(self) -> "Turns":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The job has all of it."""

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        tokens = next(self.tokens)
        if step == 1:
            self.pacer.first_step(tokens / values["tokens_per_second"])
        self.pacer.step(tokens, values["loss"])


def tokens_of_steps(job: dict[str, Any]) -> Iterator[int]:
    """In the order in which ``finetune`` takes the rows."""
    lengths = [len(row["input_ids"]) for row in job["train"]]
    for epoch in range(job["num_train_epochs"]):
        for rows in epoch_batches(lengths, job["batch_size"], job["seed"], epoch):
            yield sum(lengths[row] for row in rows)


def settings(job: dict[str, Any]) -> tuple[TrainingConfig, dict[str, Any]]:
    """The training's configuration and what else goes to ``finetune``."""
    names = (
        "learning_rate",
        "weight_decay",
        "warmup_ratio",
        "num_train_epochs",
        "batch_size",
        "max_grad_norm",
        "seed",
    )
    given = {name: job[name] for name in names} | {"betas": tuple(job["betas"])}
    wanted = set(job["options"])
    config = TrainingConfig(**given, **({"packing": True} if "packing" in wanted else {}))
    # where there is such a cache, a variant without it must not get it by default
    knows = not lacks(["trunk_cache"])
    return config, {"trunk_cache": "trunk_cache" in wanted} if knows else {}


def config_of(job: dict[str, Any], model: Any) -> Any:
    """The adapter; its size and place are those of the peer."""
    if job["method"] == "pfeiffer":
        return fa.BottleneckConfig("pfeiffer", reduction_factor=job["reduction_factor"], activation="relu")
    return fa.LlamaAdapterConfig(job["prefix_len"], job["layers"])


def main() -> None:
    job = protocol.read_job(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    model, tokenizer = load_model(job["model"], None, "fp32")
    fa.attach(model, config_of(job, model))

    def judge() -> float:
        return common.accuracy(job, model, lambda ids: model(input_ids=ids, use_cache=False).logits)

    def loss_of(rows: list[dict[str, Any]]) -> torch.Tensor:
        batch = collate([Encoded(tuple(row["input_ids"]), row["prompt_len"]) for row in rows])
        return supervised_loss(model, batch) / batch.num_supervised

    pacer = protocol.Pacer(job, judge if job["held_out"] else None)
    loss = common.first_loss(job, model, loss_of)
    config, options = settings(job)
    with tempfile.TemporaryDirectory() as folder:
        if options.get("trunk_cache"):
            options["trunk_cache"] = str(Path(folder, "trunk"))
        pacer.ready(loss, common.trainable(model), fa.__version__)
        finetune(
            model,
            tokenizer,
            read_examples(job["records"]),
            config=config,
            output_dir=Path(folder, "run"),
            save_steps=10**9,
            progress=False,
            accelerator=Accelerator(cpu=True, log_with=[Turns(pacer, tokens_of_steps(job))]),
            **options,
        )
        pacer.finish()


if __name__ == "__main__":
    main()
