"""Stored rows as what a prediction is held against: which model, method and batch each of them measured.

Nothing is left out quietly: a row that no prediction is for comes back with the reason.
"""

import csv
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastadapter.methods import (
    METHODS,
    BottleneckConfig,
    LlamaAdapterConfig,
    MethodConfig,
    PrefixTuningConfig,
    SoftPromptConfig,
)
from fastadapter.planning.cost import Job, Part, op_parts, optimiser_parts, step_parts
from fastadapter.planning.hardware import EPYC, GPUS, Device, epyc
from fastadapter.planning.lengths import ALPACA_RECORDS, Batching, Workload, named_lengths, one_pass, simulate
from fastadapter.planning.memory import step_memory
from fastadapter.planning.shapes import MODELS, ModelShape
from fastadapter.training.config import UserError

LLAMA_8B_SLICE = replace(
    MODELS["llama-3-8b"], name="4 layers of llama-3-8b", num_hidden_layers=4, vocab_size=32000
)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp32": "fp32", "bf16": "bf16"}
# Of one kernel on a card, as the kernel audit has it (benchmarks/audit/estimate.py).
LAUNCH_US = 4.0
# What a process on a CPU holds besides model and step: Python, the libraries, what the allocator keeps.
PROCESS = 1000 * 2**20


@dataclass(frozen=True)
class Measured:
    """One measured number with its floor.

    Attributes:
        kind: class of rows that share a factor.
        unit: ``"ms"``, ``"us"``, ``"s"`` or ``"MiB"``; ``floor`` is in it too.
        run: rows of one run stand or fall together.
        blocks: of a step on a card, blocks that Python walks through.
        fitted: whether the factor of its kind may come from it: not from those of a busy machine.
        device: what it was measured on.
    """

    kind: str
    source: str
    what: str
    unit: str
    value: float
    floor: float
    run: str
    blocks: float = 0
    fitted: bool = True
    device: str = ""


@dataclass(frozen=True)
class Unplanned:
    """A row that no prediction is for."""

    source: str
    what: str
    reason: str


def results_folder() -> Path:
    """Where the rows lie, in a checkout and in an installation."""
    return Path(str(resources.files("fastadapter.benchmarks"))) / "results"


def stored_rows(folder: Path | None = None) -> Iterator[Measured | Unplanned]:
    """Every stored measurement: rows of benchmarks, of the audit's kernels, of comparisons and of sweeps.

    Raises: UserError: the folder is not there.
    """
    folder = folder or results_folder()
    if not folder.is_dir():
        raise UserError(f"{folder}: no folder with stored rows")
    yield published()
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found = _benchmark(path.name, json.loads(line))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}:{number}: not a row of a benchmark: {error!r}") from error
            yield found
    for path in sorted(folder.glob("estimates_measured.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield _kernel(path.name, row)
    for path in sorted(folder.glob("compare_*/runs/*/*/result.json")):
        yield from _comparison(path, folder)
    for path in sorted(folder.glob("compare_*/peft.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            yield _peft(path, row)
    for path in sorted(folder.glob("learning_rates_*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            yield _sweep(path.name, row)


def published() -> Measured:
    """LLaMA-Adapter's own run: 52,002 records padded to 512, batches of 4 on each of 8 A100, 5 epochs, "one hour"."""
    job = Job(MODELS["llama-7b"], LlamaAdapterConfig(layers=30), "peft", "fp16", all_logits=True)
    load, steps = one_pass(4, 512), 5 * math.ceil(ALPACA_RECORDS / 32)
    floor = steps * _seconds([*step_parts(job, load), *optimiser_parts(job)], GPUS["a100"], job)
    return Measured(
        "step on a card", "arXiv:2303.16199", "llama-7b on 8 A100, 5 epochs, all padded to 512: one hour",
        "s", 3600, floor, "published", fitted=False, device="NVIDIA A100",
    )  # fmt: skip


# ---- rows of benchmarks


_SIZE = re.compile(r"(\d+)x(\d+) tokens")
_LAYERS = re.compile(r"(all|top) (\d+) layers")
_STEP = re.compile(r"(prefix tuning|soft prompt|houlsby), (?:rank )?(\d+), all layers")
_IMPLEMENTATION = {
    "frozen model": "frozen",
    "fastadapter": "fastadapter",
    "PEFT": "peft",
    "joined embeddings": "peft",
    "eager modules": "peft",
}
_NO_TRAINING = ("decode", "mixed-decode", "generate")


def _benchmark(file: str, row: dict[str, Any]) -> Measured | Unplanned:
    found = _planned(file, row)
    if isinstance(found, Measured) and row.get("extra", {}).get("busy"):
        return replace(found, what=f"{found.what} (busy machine)", fitted=False)
    return found


def _planned(file: str, row: dict[str, Any]) -> Measured | Unplanned:
    entry, shape, variant = row["entry"], row["shape"], row["variant"]
    what = f"{entry}, {shape}: {variant}"
    source = f"{file} {row['date'][:16]}"
    if any(word in entry.split() or entry.startswith(word) for word in _NO_TRAINING):
        return Unplanned(source, what, "decoding is not training")
    device = _device(row["device"], row["threads"])
    if device is None:
        return Unplanned(source, what, f"{row['device']} is not in the table of devices")
    run = f"{file} {row['date']}"
    if row["unit"] == "us":
        return _op(source, what, run, device, entry, shape, variant, row)
    found = _step(entry, shape, variant, DTYPES.get(row["dtype"], ""))
    if isinstance(found, str):
        return Unplanned(source, what, found)
    job, load = found
    if row["unit"] == "MiB":
        memory = step_memory(job, load, cpu=device.cpu)
        floor = memory.step + (PROCESS + memory.weights if shape.startswith("whole process") else 0)
        kind = "memory of a process" if shape.startswith("whole process") else "memory of a step"
        return Measured(kind, source, what, "MiB", row["median"], floor / 2**20, run, device=device.rows_name)
    floor = 1e3 * _seconds(step_parts(job, load), device, job)
    kind, blocks = step_kind(job, device), 0.0
    if not device.cpu:
        blocks = job.shape.num_hidden_layers
        if floor < row["median"] / 3:  # the card waits for Python
            kind = host_kind(job)
    return Measured(kind, source, what, "ms", row["median"], floor, run, blocks, device=device.rows_name)


def step_kind(job: Job, device: Device) -> str:
    """The class whose factor a step's time has."""
    if not device.cpu:
        return "step on a card"
    return f"step of {'a decoder' if job.shape.causal else 'an encoder'} on a CPU"


def host_kind(job: Job) -> str:
    """The class of what Python takes for a block."""
    if job.implementation == "frozen":
        return "Python, frozen model"
    return f"Python, {job.implementation}, {job.config.method}"


def _device(name: str, threads: int) -> Device | None:
    if name == EPYC:
        return epyc(threads)
    return next((card for card in GPUS.values() if card.rows_name == name), None)


def _step(entry: str, shape: str, variant: str, dtype: str) -> tuple[Job, Workload] | str:
    """What a row of steps or memory measured, or why nothing is predicted for it."""
    if variant == "(to the lowest adapter)":
        return "a part of another row"
    if variant not in _IMPLEMENTATION or not dtype:
        return "a variant that is not planned"
    size = _SIZE.search(shape)
    model = _step_model(entry)
    if size is None or model is None:
        return "an entry that is not planned"
    config: MethodConfig
    if found := _STEP.search(shape):
        method, number = found[1], int(found[2])
        config = {
            "prefix tuning": lambda: PrefixTuningConfig(number),
            "soft prompt": lambda: SoftPromptConfig(number),
            "houlsby": lambda: BottleneckConfig(bottleneck_size=number),
        }[method]()
    elif layers := _LAYERS.search(shape):
        config = LlamaAdapterConfig(layers=int(layers[2]), gate_per_head=False)
    else:
        return "an entry that is not planned"
    job = Job(model, config, _IMPLEMENTATION[variant], dtype, all_logits=True)
    return job, one_pass(int(size[1]), int(size[2]))


def _step_model(entry: str) -> ModelShape | None:
    if entry.startswith("8B-shape step"):
        return LLAMA_8B_SLICE
    if entry.startswith("SmolLM2-shape step") or entry in ("training-step", "method-step", "peak-memory"):
        return MODELS["smollm2"]
    return None


def _seconds(parts: list[Part], device: Device, job: Job) -> float:
    return sum(part.seconds(device, job) for part in parts)


# ---- rows of single operations

_HEADS = re.compile(r"(\d+)x(\d+), (\d+)/(\d+) heads of (\d+), prefix (\d+)(.*)")
_ROWS = re.compile(r"(\d+) rows, (\d+) -> (\d+)")
_CASE = re.compile(r"b(\d+)-h(\d+)-kv(\d+)-q(\d+)(?:-s\d+)?-d(\d+)-p(\d+)(.*)")
_WIDTH = re.compile(r"b(\d+)-q(\d+)-c(\d+)-r(\d+)(.*)")
# Attention without a prefix, as it stands beside ours in rows of cards.
_ALONE = {"(cudnn alone)": "cudnn", "(flash alone)": "flash"}
_DIRECTIONS = {
    "forward": ("forward",),
    "backward": ("backward",),
    "forward+backward": ("forward", "backward"),
}


def _op(
    source: str,
    what: str,
    run: str,
    device: Device,
    entry: str,
    shape: str,
    variant: str,
    row: dict[str, Any],
) -> Measured | Unplanned:
    alone = _ALONE.get(variant)
    if alone is None and variant not in ("fastadapter", "fastadapter-cpp"):
        return Unplanned(source, what, "a peer, or a form that training does not take")
    if device.cpu:
        words = shape.split()
        op, direction, case = entry, words[0], words[-1]
        if "frozen" in words:
            return Unplanned(source, what, "a part of another row")
    else:
        op, _, direction = entry.partition(" ")
        case = shape
    dtype = DTYPES.get(row["dtype"], "")
    return _op_row(source, what, run, device, op, direction, case, dtype, row["median"], alone)


def _kernel(file: str, row: dict[str, str]) -> Measured | Unplanned:
    what = f"{row['op']} {row['direction']}, {row['case']}"
    if row["note"]:
        return Unplanned(file, what, f"measured {row['note']}")
    direction = row["direction"].replace(" ", "")
    return _op_row(
        file, what, file, GPUS["h200"], row["op"], direction, row["case"], row["dtype"], float(row["us"])
    )


def _op_row(
    source: str,
    what: str,
    run: str,
    device: Device,
    op: str,
    direction: str,
    case: str,
    dtype: str,
    value: float,
    alone: str | None = None,
) -> Measured | Unplanned:
    """A row of an operation; ``alone``: of attention without a prefix, by whom."""
    if direction not in _DIRECTIONS or not dtype:
        return Unplanned(source, what, "a direction that training does not take")
    if "left-padded" in case:
        return Unplanned(source, what, "batches are padded on the right")
    made = _op_job(op, case, dtype)
    if made is None:
        return Unplanned(source, what, "decoding is not training")
    job, load = made
    parts = [
        part
        for each in _DIRECTIONS[direction]
        for part in op_parts(job, load, each)
        if "prompts" not in part.name and not alone
    ]
    if "attention" in op:
        parts += [
            part
            for part in step_parts(replace(job, implementation="frozen"), load)
            if part.name in {f"attention, {each}" for each in _DIRECTIONS[direction]}
        ]
    if alone:
        job = replace(job, implementation="fastadapter" if alone == "cudnn" else "frozen")
        op = f"{alone}'s attention"
    floor = 1e6 * _seconds(parts, device, job)
    if not device.cpu:  # one kernel forward, two backward
        floor += LAUNCH_US * sum({"forward": 1, "backward": 2}[each] for each in _DIRECTIONS[direction])
    where = "a CPU" if device.cpu else "a card"
    kind = f"{op}, {direction}, on {where}"
    return Measured(kind, source, what, "us", value, floor, run, device=device.rows_name)


def _op_job(op: str, case: str, dtype: str) -> tuple[Job, Workload] | None:
    """A model of one block that does nothing but the operation."""
    if op == "bottleneck":
        found = _ROWS.search(case) or _WIDTH.search(case)
        if found is None:
            return None
        numbers = [int(text) for text in found.groups()[:4] if text and text.isdigit()]
        rows, width, size = numbers if len(numbers) == 3 else (numbers[0] * numbers[1], *numbers[2:])
        if found.re is _WIDTH and found[2] == "1":
            return None
        shape = ModelShape("one block", width, 1, 1, 1, width, 1)
        narrow = BottleneckConfig(bottleneck_size=size, placement="pfeiffer")
        return Job(shape, narrow, dtype=dtype), one_pass(1, rows, 0)
    found = _HEADS.search(case)
    if found:
        batch, length, heads, kv, dim, prefix = (int(found[place]) for place in range(1, 7))
    elif found := _CASE.search(case):
        batch, heads, kv, length, dim, prefix = (int(found[place]) for place in range(1, 7))
    else:
        return None
    if length == 1:
        return None
    causal = "full" not in found[7]
    shape = ModelShape("one block", heads * dim, 1, heads, kv, 1, 1, head_dim=dim, causal=causal)
    merged = op in ("prefix_attention", "prefix_merge")
    config = PrefixTuningConfig(prefix) if merged else LlamaAdapterConfig(prefix)
    return Job(shape, config, dtype=dtype), one_pass(batch, length, 0)


# ---- runs on reviews

_COMPARED = {
    "houlsby": BottleneckConfig(),
    "pfeiffer": BottleneckConfig(placement="pfeiffer"),
    "parallel": BottleneckConfig(placement="parallel"),
    **{method: config() for method, config in METHODS.items() if method != "bottleneck"},
}
_BATCH = 16


@functools.cache
def _recipe(
    method: str, model: str, records: int, implementation: str = "fastadapter"
) -> tuple[Job, Workload] | str:
    """A classification: of a decoder too, the head has a class or two, and no label is among the tokens."""
    if method not in _COMPARED:
        return "not an adapter" if method else "no method"
    job = Job(MODELS[model], _COMPARED[method], implementation, dtype="fp32")
    reviews = replace(named_lengths("reviews", job.shape.causal, records), completions=(0,) * records)
    return job, simulate(reviews, Batching(_BATCH))


def _comparison(path: Path, folder: Path) -> Iterator[Measured | Unplanned]:
    result = json.loads(path.read_text(encoding="utf-8"))
    source = str(path.relative_to(folder).parent)
    if reason := result.get("not_defined"):
        yield Unplanned(source, result["method"], reason)
        return
    what = f"{result['method']}, {result['train_rows']:,} reviews, {result['threads']} thread"
    model = path.relative_to(folder).parts[0].removeprefix("compare_")
    training = json.loads((path.parent / "job.json").read_text(encoding="utf-8"))["training"]
    if model not in MODELS or training["batch_size"] != _BATCH or result["device"] != "cpu":
        yield Unplanned(source, what, "a comparison of another kind than those on a CPU")
        return
    made = _recipe(result["method"], model, result["train_rows"])
    if isinstance(made, str):
        yield Unplanned(source, what, made)
        return
    job, load = made
    device = epyc(result["threads"])
    floor = load.steps * _seconds(step_parts(job, load) + optimiser_parts(job), device, job)
    for number, epoch in enumerate(result["epochs"], 1):
        yield Measured(
            step_kind(job, device),
            source,
            f"{what}, epoch {number}",
            "s",
            epoch["seconds"],
            floor,
            source,
            device=device.rows_name,
        )
    if "peak_memory_bytes" in result:
        whole = (step_memory(job, load, cpu=True).total + PROCESS) / 2**20
        peak = result["peak_memory_bytes"] / 2**20
        yield Measured(
            "memory of a process", source, what, "MiB", peak, whole, source, device=device.rows_name
        )


def _peft(path: Path, row: dict[str, Any]) -> Measured | Unplanned:
    """PEFT's methods on the first comparison's 800 records, in our loop. Threads were not stored: one, as beside it."""
    source, model = f"{path.parent.name}/{path.name}", path.parent.name.removeprefix("compare_")
    what = f"{row['method']} of PEFT, seed {row['seed']}"
    made = _recipe(row["method"], model, 800, "peft") if model in MODELS else "another comparison"
    if isinstance(made, str):
        return Unplanned(source, what, made)
    job, load = made
    device = epyc(1)
    floor = load.steps * _seconds([*step_parts(job, load), *optimiser_parts(job)], device, job)
    kind = step_kind(job, device)
    return Measured(
        kind, source, what, "s", row["seconds"], floor, source, fitted=False, device=device.rows_name
    )


def _sweep(file: str, row: dict[str, Any]) -> Measured | Unplanned:
    """A run of a few steps. Equal ones differ up to twofold in time, so they are checked, not fitted."""
    model = "minilm" if "minilm" in file else "smollm2"
    what = f"{row['method']} at {row.get('learning_rate')}, {row.get('threads')} thread"
    if "seconds" not in row:
        return Unplanned(file, what, "the method is not defined for the model")
    records, epochs = (256 if "_256" in file else 800), (2 if model == "minilm" else 1)
    made = _recipe(row["method"], model, records)
    if isinstance(made, str):
        return Unplanned(file, what, made)
    job, load = made
    device = epyc(row["threads"])
    floor = epochs * load.steps * _seconds(step_parts(job, load) + optimiser_parts(job), device, job)
    return Measured(
        step_kind(job, device), file, what, "s", row["seconds"], floor, f"{file} {what}", fitted=False
    )
