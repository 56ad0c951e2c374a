"""A plan as a person reads it."""

import dataclasses
from collections.abc import Sequence

from fastadapter.planning.factors import Range
from fastadapter.planning.hardware import GIB
from fastadapter.planning.lengths import Lengths
from fastadapter.planning.predict import Run, computed_tokens, describe_layout, predict
from fastadapter.training.config import UserError

NOT_MODELLED = (
    "loading the model, evaluation, saving, compiling of kernels (seconds a form, once), other work on the machine, "
    "cards that throttle, networks between machines, LLaMA-Adapter's gates that are closed, quantised weights"
)


def report(runs: Sequence[Run], lengths: Lengths, epochs: int) -> str:
    """Table of the runs, where the first one's time goes, what would help, and what all of it stands on."""
    first = runs[0]
    job, shape = first.job, first.job.shape
    where = f"the top {job.adapted} of {shape.num_hidden_layers} blocks" if job.lowest else "all blocks"
    if job.prompt_length:
        where = f"{job.prompt_length} positions in front"
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:.3g} billion parameters, {job.dtype}; {job.config.method}, {where}, "
        f"{job.trained_parameters():,} numbers trained",
        f"{lengths.name}: {lengths.describe()}; {lengths.source}",
        f"{first.device.name}: {_rates(first)}; {first.device.source}",
        f"batches of {first.batching.batch_size}, {epochs} epoch{'s' * (epochs > 1)}; "
        f"{describe_layout(first.batching)}",
        "",
        *_table(runs, epochs),
        "",
        f"where a step of {first.name} goes, if nothing waits:",
        *_shares(first),
        "",
        *_hints(first, lengths, epochs),
        "ranges, and what they stand on:",
    ]
    said: dict[str, None] = {}
    for run in runs:
        for text in run.assumptions:
            said.setdefault(text)
    lines += [f"- {text}" for text in said]
    lines.append(f"not modelled: {NOT_MODELLED}; see docs/planning.md")
    return "\n".join(lines)


def _rates(run: Run) -> str:
    device = run.device
    rate = device.product(run.job.dtype)
    shown = f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
    memory = f", {device.memory_gib:.3g} GiB" if device.memory_gib else ""
    return f"{shown}, {device.gb_per_s:,.0f} GB/s{memory}"


def _table(runs: Sequence[Run], epochs: int) -> list[str]:
    heads = [
        f"{run.name}{f', {run.batching.num_gpus} GPUs' if run.batching.num_gpus > 1 else ''}" for run in runs
    ]
    cells = [
        ("", heads),
        ("tokens of a pass", [f"{computed_tokens(run):,.0f}" for run in runs]),
        ("real tokens among them", [f"{run.load.useful:.0%}" for run in runs]),
        ("step", [_span(run.step_seconds) for run in runs]),
        ("waits for", [_waits(run) for run in runs]),
        ("tokens/s", [_numbers(run.tokens_per_second) for run in runs]),
        ("epoch", [_span(run.epoch_seconds) for run in runs]),
    ]
    if any(run.job.trunk_cache for run in runs):
        cells.append(
            (
                "trunk cache, once",
                [
                    f"{_span(run.cache_seconds)}, {run.cache_bytes / GIB:.2f} GiB" if run.cache_bytes else "-"
                    for run in runs
                ],
            )
        )
    cells += [
        (f"{epochs} epoch{'s' * (epochs > 1)}", [_span(run.total_seconds) for run in runs]),
        ("memory", [_memory(run) for run in runs]),
    ]
    widths = [max(len(row[1][at]) for row in cells) for at in range(len(runs))]
    name = max(len(row[0]) for row in cells)
    return [
        f"{row[0]:{name}}  "
        + "  ".join(f"{text:>{width}}" for text, width in zip(row[1], widths, strict=True))
        for row in cells
    ]


def _waits(run: Run) -> str:
    return f"Python, in {run.waiting:.0%} of the steps" if run.waiting else "the device"


def _memory(run: Run) -> str:
    gib = run.memory_gib
    text = f"{gib.mid:.3g} GiB ({gib.low:.3g} to {gib.high:.3g})"
    if not run.fits:
        return f"{text}: DOES NOT FIT"
    tight = run.device.memory_gib and gib.high > run.device.memory_gib
    return f"{text}: may not fit" if tight else text


def _shares(run: Run) -> list[str]:
    total = sum(run.parts.values())
    shown = sorted(run.parts.items(), key=lambda item: -item[1])
    return [f"  {seconds / total:4.0%}  {_time(seconds):>8}  {name}" for name, seconds in shown]


def _hints(run: Run, lengths: Lengths, epochs: int) -> list[str]:
    """Options that would make the run shorter, with what they would give."""
    changes = []
    if run.batching.layout != "packed":
        changes.append(("--packing", run.job, dataclasses.replace(run.batching, layout="packed")))
    if run.job.lowest and not run.job.trunk_cache:
        changes.append(("--trunk-cache", dataclasses.replace(run.job, trunk_cache=True), run.batching))
    if run.waiting > 0.5:
        larger = dataclasses.replace(run.batching, batch_size=4 * run.batching.batch_size)
        text = f"--batch-size {larger.batch_size}, which makes other, fewer steps"
        changes.append((text, run.job, larger))
    lines = []
    for text, job, batching in changes:
        try:
            other = predict(run.name, job, lengths, batching, run.device, epochs)
        except UserError:
            continue
        if other.fits and other.total_seconds.mid < 0.97 * run.total_seconds.mid:
            lines.append(f"  {text}: {_span(other.total_seconds)}")
    return [f"shorter than {_time(run.total_seconds.mid)} would be, each alone:", *lines, ""] if lines else []


def _span(seconds: Range) -> str:
    return f"{_time(seconds.mid)} ({_time(seconds.low)} to {_time(seconds.high)})"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5940 else f"{seconds / 3600:.3g} h"


def _numbers(rate: Range) -> str:
    return f"{_three(rate.mid)} ({_three(rate.low)} to {_three(rate.high)})"


def _three(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
