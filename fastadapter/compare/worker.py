"""One method, one seed, in a process of its own: nothing another run left in memory can reach its figures."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastadapter.compare.baselines import features, in_context
from fastadapter.compare.environment import describe_machine
from fastadapter.compare.methods import DECODER, ENCODER, METHODS_TO_COMPARE, Method
from fastadapter.integrations.verbs.attach import attach
from fastadapter.methods import METHODS
from fastadapter.training import (
    Example,
    TrainingConfig,
    TrunkCache,
    UserError,
    class_names,
    finetune,
    last_layers,
    peak_rss_bytes,
    read_examples,
    write_json,
)
from fastadapter.training.report import peak_cuda_bytes
from fastadapter.training.targets import AdapterTarget, ParameterTarget

RESULT = "result.json"
# Called as load(model, gguf_file, dtype, labels, seed); gives the model and its tokenizer.
Load = Callable[[str, str | None, str, list[str], int], tuple[Any, Any]]
# Called as load(model, gguf_file, dtype); gives the language model and its tokenizer.
LoadLanguageModel = Callable[[str, str | None, str], tuple[Any, Any]]


def execute(job: dict[str, Any], folder: Path, load: Load, load_language_model: LoadLanguageModel) -> None:
    """Do what ``job`` says, going on where an earlier process stopped, and leave ``result.json`` in ``folder``.

    Args:
        load: of classifiers; ``load_language_model``: for what is asked in words.

    Raises: what :func:`fastadapter.training.finetune` raises.
    """
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    method = METHODS_TO_COMPARE[job["method"]]
    templates = {"template": job["template"], "completion_template": "{label}"}
    train, test = (read_examples(job[part], **templates) for part in ("train", "test"))
    model, tokenizer = load(
        job["model"], job["gguf_file"], job["dtype"], class_names(train, test), job["seed"]
    )
    kind = model_kind(model)
    rate = job["learning_rate"] or method.learning_rates.get(kind)
    head_rate = job.get("head_learning_rate") or job.get("default_head_learning_rates", {}).get(kind)
    rates = {"learning_rate": rate, "head_learning_rate": head_rate}
    options: dict[str, Any] = {**job["training"], **{name: value for name, value in rates.items() if value}}
    # The new head of every run is as good as chance, so nobody needs to be told before the first step.
    config = TrainingConfig(seed=job["seed"], eval_on_start=False, **options)
    device = torch.device("cuda" if job["device"] != "cpu" and torch.cuda.is_available() else "cpu")
    total = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {
        "method": method.name,
        "seed": job["seed"],
        "model_kind": kind,
        "model_parameters": total,
        **rates,
        "options": job["options"],
        "threads": torch.get_num_threads(),
        "jobs": job.get("jobs", 1),
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    if method.kind == "features":
        model.to(device)
        result |= _features(model, tokenizer, train, test, config, folder, job["progress"])
    else:
        found: dict[str, Any] | str
        if method.kind == "in-context":
            found = f"{type(model).__name__} is of an encoder, which writes no words"
            if kind == DECODER:
                del model  # one of them in memory is enough
                found = _in_context(job, train, test, config, device, load_language_model)
        else:
            found = _train(method, job, model, tokenizer, train, test, config, folder)
        if isinstance(found, str):
            write_json(folder / RESULT, {**result, "not_defined": found})
            return
        result |= found
    result["peak_memory_bytes"] = peak_cuda_bytes(device) or peak_process_bytes()
    write_json(folder / RESULT, result)
    for leftover in ("last", "best"):  # the states of large models are larger than all else
        shutil.rmtree(folder / leftover, ignore_errors=True)


def model_kind(model: Any) -> str:
    """Decoders classify by the last token, with a head that transformers names ``score``."""
    return DECODER if hasattr(model, "score") else ENCODER


def _features(
    model: Any,
    tokenizer: Any,
    train: list[Example],
    test: list[Example],
    config: TrainingConfig,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    found = features(model, tokenizer, train, test, config, folder, progress=progress)
    seconds = found["embed_seconds"] + found["fit_seconds"]
    return {
        **found,
        "train_rows": len(train),
        "test_rows": len(test),
        "seconds": seconds,
        "seconds_per_epoch": seconds,
        "epochs": [],
        "losses": [],
    }


def _in_context(
    job: dict[str, Any],
    train: list[Example],
    test: list[Example],
    config: TrainingConfig,
    device: torch.device,
    load: LoadLanguageModel,
) -> dict[str, Any] | str:
    try:
        model, tokenizer = load(job["model"], job["gguf_file"], job["dtype"])
    except UserError as error:  # a backbone alone makes a classifier, but no sentence
        return f"no language model: {str(error).removeprefix('--model ' + job['model'] + ': ')}"
    text = job["options"]["init_text"]
    return in_context(model.to(device), tokenizer, train, test, config, text, job["progress"])


def _train(
    method: Method,
    job: dict[str, Any],
    model: Any,
    tokenizer: Any,
    train: list[Example],
    test: list[Example],
    config: TrainingConfig,
    folder: Path,
) -> dict[str, Any] | str:
    """The figures of a run, or why the method is not defined for the model."""
    from accelerate import Accelerator

    trainable = None
    if method.kind == "adapter":
        torch.manual_seed(job["seed"])
        try:
            attach(model, METHODS[str(method.adapter)](**job["options"]), tokenizer=tokenizer)
        except TypeError as error:
            return str(error)
    else:
        trainable = ["*"] if method.blocks is None else last_layers(model, method.blocks)
    trunk_cache = job.get("trunk_cache")
    outcome = finetune(
        model,
        tokenizer,
        train,
        test,
        config,
        output_dir=folder,
        task="classification",
        trainable=trainable,
        resume=True,
        save_steps=job["save_steps"],
        progress=job["progress"],
        accelerator=Accelerator(cpu=job["device"] == "cpu"),
        trunk_cache=TrunkCache(**trunk_cache) if isinstance(trunk_cache, dict) else trunk_cache,
    )
    seconds = [epoch["seconds"] for epoch in outcome.epochs]
    file = folder / (ParameterTarget.file if trainable else AdapterTarget.file)
    return {
        # Of the last epoch, not of the best: choosing that would be looking at the test rows.
        "accuracy": outcome.eval["accuracy_after"],
        "trainable_parameters": outcome.trainable_parameters,
        "train_rows": outcome.train_rows,
        "test_rows": outcome.eval["rows"],
        "seconds": sum(seconds) + (outcome.trunk_cache["seconds"] if outcome.trunk_cache else 0.0),
        "seconds_per_epoch": sum(seconds) / len(seconds),
        "epochs": outcome.epochs,
        "losses": outcome.losses,
        "trunk_cache": outcome.trunk_cache,
        "file_bytes": file.stat().st_size,
    }


def peak_process_bytes() -> int:
    """Largest resident memory of this process since it began.

    Not ``getrusage`` where Linux offers better: that starts at what the parent held when it forked.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_rss_bytes()
    found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return peak_rss_bytes() if found is None else int(found) * 1024


def read_job(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
