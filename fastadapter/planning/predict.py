"""From a floor and measured factors to time, memory and how sure they are."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from fastadapter.methods import BottleneckConfig
from fastadapter.planning.cost import (
    Job,
    Part,
    exchange_seconds,
    optimiser_parts,
    step_parts,
    trunk_bytes,
    trunk_seconds,
    with_prompt,
)
from fastadapter.planning.factors import (
    Range,
    host_milliseconds,
    memory_factor,
    step_factor,
)
from fastadapter.planning.hardware import GIB, GPUS, Device
from fastadapter.planning.lengths import LAYOUTS, Batching, Lengths, Workload, simulate
from fastadapter.planning.memory import Memory, step_memory
from fastadapter.planning.rows import PROCESS
from fastadapter.training.config import UserError


@dataclass(frozen=True)
class Run:
    """One way to train, with what it will take.

    Attributes:
        step_seconds, epoch_seconds, total_seconds: of the optimiser's step, an epoch without a first-time cost, and
            the whole run.
        cache_seconds: of building the trunk cache, once.
        memory_gib: of one card, or of the process.
        waiting: share of the steps in which the device waits for Python.
        parts: seconds of the step's floor by part, times the middle factor.
        assumptions: what the prediction stands on.
    """

    name: str
    job: Job
    batching: Batching
    load: Workload
    device: Device
    step_seconds: Range
    epoch_seconds: Range
    total_seconds: Range
    cache_seconds: Range
    cache_bytes: int
    memory: Memory
    memory_gib: Range
    waiting: float
    parts: dict[str, float]
    assumptions: tuple[str, ...]

    @property
    def tokens_per_second(self) -> Range:
        """Of real tokens, over all cards."""
        tokens = self.load.epoch_tokens
        epoch = self.epoch_seconds
        return Range(tokens / epoch.high, tokens / epoch.mid, tokens / epoch.low)

    @property
    def fits(self) -> bool:
        return not self.device.memory_gib or self.memory_gib.mid <= self.device.memory_gib

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ranges as low, mid and high."""
        named = {
            field: dataclasses.asdict(getattr(self, field))
            for field in (
                "step_seconds",
                "epoch_seconds",
                "total_seconds",
                "cache_seconds",
                "tokens_per_second",
                "memory_gib",
            )
        }
        return {
            "name": self.name,
            "implementation": self.job.implementation,
            "dtype": self.job.dtype,
            "layout": self.batching.layout,
            "num_gpus": self.batching.num_gpus,
            "steps_per_epoch": self.load.steps,
            "tokens_per_pass": self.load.tokens,
            "useful_share": self.load.useful,
            "trained_parameters": self.job.trained_parameters(),
            **named,
            "cache_bytes": self.cache_bytes,
            "memory_bytes": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "waiting_for_python": self.waiting,
            "parts_seconds": self.parts,
            "assumptions": list(self.assumptions),
        }


def predict(name: str, job: Job, lengths: Lengths, batching: Batching, device: Device, epochs: int) -> Run:
    """What a run takes.

    Args:
        epochs: passes over the data.
    Raises: UserError: nothing is known of the dtype on that device, or the numbers make no sense.
    """
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise UserError(f"--num-train-epochs must be an int of at least 1, got {epochs!r}")
    if job.dtype not in device.tflops:
        raise UserError(f"--dtype {job.dtype}: of {device.name} only {', '.join(device.tflops)} is known")
    if device.cpu and batching.num_gpus > 1:
        raise UserError(f"--num-gpus {batching.num_gpus}: {device.name} is no GPU")
    load = simulate(lengths, batching)
    factor, said = step_factor(job, device)
    assumptions = [said]
    host = Range(0, 0, 0)
    if not device.cpu:
        host, host_said = host_milliseconds(job)
        host = host * 1e-3
        assumptions.append(host_said)
    step, waiting = Range(0, 0, 0), 0.0
    parts: dict[str, float] = {}
    for share, group in load.groups:
        found = step_parts(job, group)
        busy = factor * sum(part.seconds(device, job) for part in found)
        step = step + Range.larger(busy, host) * (share * group.passes)
        waiting += share * (host.mid > busy.mid)
        _add(parts, found, device, job, share * factor.mid * group.passes)
    last = optimiser_parts(job)
    _add(parts, last, device, job, factor.mid)
    exchange = exchange_seconds(job, device, batching.num_gpus)
    step = step + factor * sum(part.seconds(device, job) for part in last)
    step = step + Range(exchange, exchange, exchange)
    epoch = step * load.steps
    cache, cache_size = Range(0, 0, 0), 0
    if job.trunk_cache:
        cache = factor * trunk_seconds(job, device, load, load.epoch_tokens)
        cache_size = trunk_bytes(job, load.epoch_tokens)
        assumptions.append("the trunk's states are written at 1 GB/s and read at 5 GB/s (assumption)")
    memory, memory_gib, memory_said = _memory(job, load, device)
    if batching.num_gpus > 1:
        assumptions.append(
            f"{batching.num_gpus} cards of one machine, {device.link_gb_per_s:g} GB/s from card to card; a step waits "
            "for the card with the most tokens"
        )
    return Run(
        name=name,
        job=job,
        batching=batching,
        load=load,
        device=device,
        step_seconds=step,
        epoch_seconds=epoch,
        total_seconds=epoch * epochs + cache,
        cache_seconds=cache,
        cache_bytes=cache_size,
        memory=memory,
        memory_gib=memory_gib,
        waiting=waiting,
        parts=parts,
        assumptions=(*assumptions, memory_said),
    )


def _memory(job: Job, load: Workload, device: Device) -> tuple[Memory, Range, str]:
    memory = step_memory(job, load, cpu=device.cpu)
    factor, said = memory_factor(cpu=device.cpu)
    if device.cpu:
        memory = dataclasses.replace(memory, context=PROCESS)
        return memory, factor * (memory.total / GIB), f"{said}; 1,000 MiB of it Python and libraries"
    rest = (memory.total - memory.step) / GIB
    whole = factor * (memory.step / GIB) + Range(rest, rest, rest)
    return memory, whole, f"{said}; 0.6 GiB besides for the driver (assumption)"


def _add(named: dict[str, float], parts: list[Part], device: Device, job: Job, times: float) -> None:
    for part in parts:
        named[part.name] = named.get(part.name, 0.0) + part.seconds(device, job) * times


def baseline_name(job: Job) -> str | None:
    """What the comparison is called; ``None``: no library has the method."""
    if job.config.method == "llama-adapter-v2":
        return None
    return "plain modules" if isinstance(job.config, BottleneckConfig) else "PEFT"


def baseline(
    job: Job, lengths: Lengths, batching: Batching, device: Device, epochs: int, padding: str
) -> Run | None:
    """The same training as others do it: padded batches, logits everywhere, no cache.

    Args:
        padding: ``"random"`` or ``"max_length"``, of :data:`fastadapter.planning.lengths.LAYOUTS`.
    """
    name = baseline_name(job)
    if name is None:
        return None
    theirs = dataclasses.replace(job, implementation="peft", all_logits=True, trunk_cache=False)
    padded = dataclasses.replace(batching, layout=padding, pack_length=None)
    return predict(f"{name}, padded", theirs, lengths, padded, device, epochs)


def require_fits(run: Run, lengths: Lengths, epochs: int) -> None:
    """Raise UserError if the run needs more memory than there is: by how much, and what would help."""
    if run.fits:
        return
    needs, has = run.memory_gib.mid, run.device.memory_gib
    weights = run.memory.weights / GIB
    helps = _remedies(run, lengths, epochs)
    raise UserError(
        f"{run.job.shape.name} in {run.job.dtype} with batches of {run.batching.batch_size} needs {needs:.1f} GiB "
        f"on {run.device.name} of {has:g} GiB, {needs - has:.1f} GiB too much ({weights:.1f} GiB of it weights, "
        "which every card holds whole). What would help: "
        + ("; ".join(helps) or "a smaller model; models split over cards are not modelled")
    )


def _remedies(run: Run, lengths: Lengths, epochs: int) -> list[str]:
    """Changes that make it fit: each alone; where none does, two together, then three."""
    device = run.device

    def gib(job: Job, batching: Batching, card: Device = device) -> float:
        return predict("", job, lengths, batching, card, epochs).memory_gib.mid

    changes = _changes(run)
    found: list[str] = []
    for count in range(1, len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            for options in itertools.product(*chosen):
                job, batching = run.job, run.batching
                for _, of_job, of_batching in options:
                    job = dataclasses.replace(job, **of_job)
                    batching = dataclasses.replace(batching, **of_batching)
                needed = gib(job, batching)
                if needed <= device.memory_gib:
                    found.append(f"{' with '.join(text for text, *_ in options)} ({needed:.1f} GiB)")
                    break
        if found:
            break
    larger = [card for card in GPUS.values() if not device.cpu and card.memory_gib > device.memory_gib]
    enough = [card.name for card in larger if gib(run.job, run.batching, card) <= card.memory_gib]
    return found + ([f"--gpu {' or '.join(enough)}"] if enough else [])


_Option = tuple[str, dict[str, Any], dict[str, Any]]


def _changes(run: Run) -> list[list[_Option]]:
    """What could be asked for instead, weaker forms first: the option, and what it sets in job and batching."""
    job, batching = run.job, run.batching
    changes: list[list[_Option]] = []
    count, most = batching.gradient_accumulation_steps, batching.batch_size // batching.num_gpus
    more = [count * 2**power for power in range(1, 20) if count * 2**power < most] + [most] * (most > count)
    if more:
        name = "gradient_accumulation_steps"
        changes.append([(f"--gradient-accumulation-steps {steps}", {}, {name: steps}) for steps in more])
    if not job.gradient_checkpointing:
        text = "--gradient-checkpointing (in training: model.gradient_checkpointing_enable() from Python)"
        changes.append([(text, {"gradient_checkpointing": True}, {})])
    if job.dtype == "fp32" and "bf16" in run.device.tflops:
        changes.append([("--dtype bf16", {"dtype": "bf16"}, {})])
    if job.form != "whole" and (fewer := job.adapted // 2):
        config: Any = job.config
        changes.append([(f"--layers {fewer}", {"config": dataclasses.replace(config, layers=fewer)}, {})])
    return changes


def describe_layout(batching: Batching) -> str:
    return LAYOUTS[batching.layout]


def computed_tokens(run: Run) -> float:
    """Positions of a pass with what a soft prompt adds."""
    return with_prompt(run.job, run.load).tokens
