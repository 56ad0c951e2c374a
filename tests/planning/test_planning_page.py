"""Numbers of docs/planning.md are those that the command gives today."""

from pathlib import Path

import pytest

import fastadapter as fa
from fastadapter.planning import factors
from fastadapter.planning.cost import Job
from fastadapter.planning.hardware import GPUS
from fastadapter.planning.lengths import Batching, named_lengths
from fastadapter.planning.predict import baseline, predict
from fastadapter.planning.shapes import MODELS

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
JOB = Job(MODELS["llama-7b"], fa.LlamaAdapterConfig(layers=30))


def minutes(seconds):
    def shown(value):
        return f"{value / 60:.0f}" if value >= 600 else f"{value / 60:.1f}"

    return f"{shown(seconds.mid)} ({shown(seconds.low)} to {shown(seconds.high)})"


@pytest.fixture(scope="module")
def records():
    return named_lengths("alpaca-like", True).cut(512)


@pytest.mark.parametrize(
    ("card", "cards", "batch", "layout"),
    [
        ("a100", 8, 32, "max_length"),
        ("h100", 1, 32, "packed"),
        ("h100", 1, 32, "random"),
        ("h100", 8, 32, "packed"),
        ("h100", 8, 192, "packed"),
        ("h100", 8, 192, "random"),
    ],
)
def test_the_worked_example(card, cards, batch, layout, records):
    ours = layout == "packed"
    batching = Batching(batch, layout, cards, max_length=512)
    if ours:
        run = predict("", JOB, records, batching, GPUS[card], 5)
    else:
        run = baseline(JOB, records, batching, GPUS[card], 5, layout)
    where = f"| {cards} {card.upper()}"
    lines = [line for line in PAGE.splitlines() if where in line and f" {batch} |" in line]
    assert any(
        minutes(run.total_seconds) in line and f"{run.memory_gib.mid:.1f}" in line for line in lines
    ), minutes(run.total_seconds)


def test_factors():
    for kind, factor in factors.stored().items():
        if kind.startswith(("step", "memory")):
            found = factor.range
            shown = f"| {found.mid:.2f} ({found.low:.2f} to {found.high:.2f}) | {factor.rows} |"
            assert shown in PAGE, f"{kind}: {shown}"
