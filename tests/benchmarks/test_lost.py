"""Where we lose: every stored row that somebody else wins is in the document, and nothing can take it out."""

import pytest

from benchmarks import lost, rows
from tests.benchmarks.test_runner import make_row

CPU = {"device": "a CPU", "driver": ""}
# What computes less than was asked for, or is ours in another form: no rival. Spelled out here once more, so that a
# name that is added there by mistake is missed here.
NO_RIVALS = {
    "copy", "frozen model", "bare model", "joined embeddings", "one adapter", "sdpa-ready", "gemm peak", "triad peak",
    "idle adapter",
}  # fmt: skip


def document():
    return (rows.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_every_lost_row_is_in_the_document():
    """Counted here from the rows themselves: what is ours, what is a rival, whose ratio is larger."""
    text = document()
    block = text[text.index("<!-- where-we-lose: cpu, gpu -->") :].partition("<!-- end -->")[0]
    shown = rows.latest(rows.published(rows.load()))
    lines = 0
    for ours in shown:
        if ours.variant not in ("fastadapter", "fastadapter-cpp", "8 adapters") or ours.extra.get(
            "red_tests"
        ):
            continue
        for rival in shown:
            same = ("entry", "shape", "dtype", "floor", "device", "threads")
            if any(getattr(ours, name) != getattr(rival, name) for name in same):
                continue
            other = rival.variant
            if (
                other in NO_RIVALS
                or other.startswith(("(", "fastadapter"))
                or other.endswith("fastadapter epilogue")
            ):
                continue
            if other in ("8 adapters", "sdpa+gated_prefix") or (ours.entry, other) == (
                "gated_prefix_attention",
                "sdpa",
            ):
                continue
            if ours.ratio > rival.ratio:
                lines += 1
                wanted = f"{ours.entry}, {ours.shape}, {ours.dtype}"
                assert any(wanted in line and f"| {other}, " in line for line in block.splitlines()), (
                    wanted,
                    other,
                )
    assert lines >= 1


def test_a_loss_is_told_by_the_ratios_of_one_run():
    """Not by medians, which drift; and beside the spread, where that decides nothing."""
    ours = make_row(variant="fastadapter", ratio=1.2, ratio_p20=1.15, ratio_p80=1.25, median=1.0, **CPU)
    rival = make_row(variant="PEFT", ratio=1.1, ratio_p20=1.05, ratio_p80=1.12, median=2.0, **CPU)
    near = make_row(variant="eager", ratio=1.19, ratio_p20=1.0, ratio_p80=1.3, **CPU)
    floor = make_row(variant="frozen model", ratio=1.0, **CPU)
    worse = make_row(variant="modules", ratio=1.3, **CPU)
    stored = [floor, ours, rival, near, worse]
    found = [(loss.rival.variant, round(loss.factor, 3), loss.within_spread) for loss in lost.losses(stored)]
    assert found == [("PEFT", 1.091, False), ("eager", 1.008, True)]
    text = lost.block(["cpu"], stored)
    assert "| step, tiny, float32 | fastadapter, 1 ms | PEFT, 2 ms | 1.09 x |" in text
    assert "1.01 x, within the spread" in text and "modules" not in text
    assert lost.block(["gpu"], stored) == "No stored row of these devices is lost."


def test_a_row_leaves_only_by_a_later_run_that_is_won():
    ours = {"variant": "fastadapter", **CPU}
    stored = [make_row(ratio=1.2, **ours), make_row(variant="PEFT", ratio=1.1, **CPU)]
    assert len(list(lost.losses(stored))) == 1
    later = "2026-12-01T10:00:00+00:00"
    won = [make_row(ratio=1.0, date=later, **ours), make_row(variant="PEFT", ratio=1.1, date=later, **CPU)]
    assert list(lost.losses([*stored, *won])) == []
    busy = [make_row(ratio=1.0, date=later, extra={"busy": 1.0}, **ours), won[1]]
    assert len(list(lost.losses([*stored, *busy]))) == 1


@pytest.mark.parametrize(
    ("entry", "variant", "rival"),
    [
        ("prefix_attention", "sdpa", True),
        ("gated_prefix_attention", "sdpa", False),
        ("gated_prefix_attention", "sdpa+gated_prefix", False),
        ("gated_prefix_attention forward", "cudnn + fastadapter epilogue", False),
        ("prefix_attention forward", "(flash alone)", False),
        ("recipe-all-layers", "PEFT", True),
        ("recipe-top-layers", "fastadapter, packed, trunk cached", False),
        ("training-step", "fastadapter, reference op", False),
    ],
)
def test_who_is_a_rival(entry, variant, rival):
    assert lost.is_rival(make_row(entry=entry, variant=variant)) is rival


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="for cpu and gpu, got tpu"):
        lost.block(["cpu", "tpu"], [])
