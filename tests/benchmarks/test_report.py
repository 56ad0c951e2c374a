"""The report: pictures and blocks from rows; roofline, step stack and two versions side by side by made-up numbers."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    lost,
    pictures,
    recipe,
    report,
    roofline,
    rows,
    run,
    runner,
    serve,
    stack,
    table,
    versions,
)
from tests.benchmarks.test_runner import ENVIRONMENT, Clock, make_case, make_row

pyplot = pytest.importorskip("matplotlib.pyplot")
STEP = {f"{part}_ms": 10.0 * place for place, part in enumerate(stack.PARTS, 1)}


def entry_rows(name):
    """Two variants of two cases of a picture, with all that its drawing reads."""
    entry = pictures.PICTURES[name].entries[0]
    extra = {
        **STEP, "gflop_per_s": 20.0, "gb_per_s": 4.0, "peak_gflop_per_s": 60.0, "peak_gb_per_s": 20.0,
        "prefix_len": 10.0, "batch": 4.0,
    }  # fmt: skip
    for number in (1, 2):
        shape = f"LLaMA-Adapter, after epoch {number}, 8 reviews"
        more = {"epoch": float(number), "accuracy": 0.8 + number / 100}
        if name == "roofline":
            shape = f"gated_prefix, forward b{number}"
        for variant, ratio in (("PEFT", 1.0), ("fastadapter", 0.5)):
            unit = "tokens/s" if name in ("recipe", "batch") else "s"
            yield make_row(
                entry=entry, shape=shape, variant=variant, ratio=ratio, floor="PEFT", unit=unit, driver="",
                extra={**extra, **more, "prefix_len": 10.0 * number, "batch": 2.0 * number},
            )  # fmt: skip


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_every_picture_is_drawn_from_its_rows(name, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    (path,) = pictures.draw_all(tmp_path, list(entry_rows(name)))
    monkeypatch.undo()
    assert path.name == f"{name}.png" and path.read_bytes().startswith(b"\x89PNG")
    (figure,) = kept
    said = [text.get_text() for text in figure.findobj(pyplot.Text)]
    assert "a card, 2 threads; float32; torch 2.13.0; abc1234, 2026-11-24" in said
    assert any("fastadapter" in text for text in said) and any("PEFT" in text for text in said)
    pyplot.close(figure)


def test_a_rate_is_said_as_more_not_as_cost(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    pictures.draw_all(tmp_path, list(entry_rows("recipe")))
    monkeypatch.undo()
    said = [text.get_text() for axis in kept[0].axes for text in axis.texts]
    assert said == ["  1250 tokens/s", "  1250 tokens/s (2.00 x)"] * 2
    pyplot.close(kept[0])


def test_a_picture_shows_the_last_run_of_each_entry_on_one_device():
    all_layers, top_layers, _ = pictures.PICTURES["recipe"].entries
    old = make_row(entry=all_layers, date="2026-11-01T10:00:00+00:00")
    first = make_row(entry=top_layers, date="2026-11-02T10:00:00+00:00")
    second = make_row(entry=all_layers, date="2026-11-03T10:00:00+00:00")
    elsewhere = make_row(entry=top_layers, device="another card", date="2026-11-01T11:00:00+00:00")
    busy = make_row(entry=all_layers, date="2026-11-04T10:00:00+00:00", extra={"busy": 1.0})
    assert pictures.shown("recipe", [old, first, second, elsewhere, busy]) == [second, first]
    assert pictures.shown("roofline", [old]) == []


def test_measured_blocks_show_what_is_stored_and_how_to_measure_the_rest():
    stored = list(entry_rows("recipe"))
    text = table.rewrite("<!-- measured: recipe, roofline -->\nold\n<!-- end -->\n", stored)
    assert "![real tokens per second of each party in each epoch](pictures/recipe.png)" in text
    assert "| recipe-all-layers, LLaMA-Adapter, after epoch 1, 8 reviews, float32 " in text
    assert "`python -m benchmarks.run --only recipe-top-layers recipe-pfeiffer` measures it." in text
    assert "`python -m benchmarks.run --only roofline` measures it." in text and "old" not in text
    assert table.rewrite(text, stored) == text
    with pytest.raises(ValueError, match="measured: nothing is none of recipe, "):
        report.measured(["nothing"], stored)
    lines = table.rewrite("<!-- where-we-lose: gpu -->\n<!-- end -->\n", [make_row()]).splitlines()
    assert lines[1] == "No stored row of these devices is lost."


def test_the_short_table_says_how_often_the_floor_s_rate_it_is():
    stored = list(entry_rows("recipe"))
    text = report.recipe_short(["all-layers", "top-layers"], stored)
    title = recipe.RECIPES[0].title
    assert f"| {title} | PEFT | 1250 (1.00 x) | 1250 (1.00 x) |" in text
    assert f"| {title} | fastadapter | 1250 (2.00 x) | 1250 (2.00 x) |" in text and "commit abc1234" in text
    assert "No run on a quiet machine" in report.recipe_short(["pfeiffer"], stored)
    with pytest.raises(ValueError, match="recipe-short: nothing is none of all-layers, "):
        report.recipe_short(["nothing"], stored)


def test_every_entry_of_a_picture_can_be_run():
    assert {each for picture in pictures.PICTURES.values() for each in picture.entries} <= set(run.entries())
    assert set(versions.ENTRIES) <= set(run.entries())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "decode", "nothing"], "unknown nothing"),
        (["--only", "decode", "--skip", "decode"], "leaves nothing"),
        (["--only", "decode", "--records", "8"], "--records is for the recipes"),
        (["--only", "recipe-memory", "--held-out", "8"], "--held-out is for time-to-accuracy"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_wrong_options_of_a_run_are_refused(options, message, capsys, monkeypatch):
    monkeypatch.setattr(runner, "keep_memory", lambda: None)
    with pytest.raises(SystemExit):
        run.main(options)
    assert message in capsys.readouterr().err


# the roofline


def test_share_of_the_roof_is_that_of_the_nearer_peak():
    """Peaks are the best round's: here the medians are twice as slow."""
    found = [
        make_row(
            variant=roofline.GEMM, median=100.0, extra={"gflop_per_s": 40.0, "gb_per_s": 0.1, "best_us": 80.0}
        ),
        make_row(
            variant=roofline.TRIAD, median=50.0, extra={"gflop_per_s": 1.0, "gb_per_s": 10.0, "best_us": 25.0}
        ),
        make_row(variant="wide", extra={"gflop_per_s": 25.0, "gb_per_s": 5.0, "best_us": 1.0}),
        make_row(variant="narrow", extra={"gflop_per_s": 10.0, "gb_per_s": 15.0, "best_us": 1.0}),
    ]
    shares = {row.variant: row.extra["percent_of_roof"] for row in roofline.with_roof(found)}
    assert (shares["wide"], shares["narrow"]) == pytest.approx((50.0, 75.0))
    assert found[2].extra["peak_gflop_per_s"] == pytest.approx(50.0)


def test_work_of_attention_by_hand():
    shape = roofline.bench_prefix_attention.Shape(2, 4, 2, 8, 8, 16, 3, True)
    flops, moved = roofline.attention_work(shape, "forward")
    queries = 2 * 4 * 8
    assert flops == 2 * 2 * queries * 16 * 8 // 2 + 2 * 2 * queries * 16 * 3
    assert moved == 4 * (2 * queries * 16 + 2 * 2 * 2 * 8 * 16)
    both, _ = roofline.attention_work(shape, "forward+backward")
    assert both == flops * 7 // 2


def test_rows_tell_arithmetic_too():
    own = runner.Variant("gemm", print, flops=4 * 10**9)
    case = runner.Case("op", "tiny", "ours", [runner.Variant("ours", print), own], unit="us", flops=10**9)
    ours, gemm = runner.describe(case, {"ours": [0.5], "gemm": [1.0]}, ENVIRONMENT)
    assert (ours.extra["gflop_per_s"], gemm.extra["gflop_per_s"]) == pytest.approx((2.0, 4.0))


# the step stack


def event(name, microseconds, parent=None, shapes=(), flops=0):
    return SimpleNamespace(
        name=name, self_cpu_time_total=microseconds, cpu_parent=parent, input_shapes=list(shapes), flops=flops
    )


def test_own_time_goes_to_the_outermost_operator_that_stands_for_a_part():
    optimizer, attention = (
        event("Optimizer.step#AdamW.step", 50),
        event("aten::scaled_dot_product_attention", 20),
    )
    linear = event("aten::linear", 1, shapes=[[16, 576], [49152, 576]])
    events = [
        optimizer, event("aten::addcmul_", 150, optimizer),
        attention, event("aten::bmm", 1000, attention, flops=10**6),
        linear, event("aten::addmm", 300, linear, [[16, 576]], flops=10**6),
        event("fastadapter::gated_prefix", 40), event("aten::mm", 2000, shapes=[[512, 576]], flops=8 * 10**6),
        event("aten::nll_loss_forward", 7), event("aten::silu", 500),
    ]  # fmt: skip
    found, flops = stack.own_milliseconds(events, head=49152)
    assert found == pytest.approx({
        "gemm": 2.0, "attention": 1.02, "adapter": 0.04, "head": 0.308, "optimizer": 0.2, "rest": 0.0
    })  # fmt: skip
    assert flops == 8 * 10**6


def test_a_profiled_step_adds_up(monkeypatch):
    """On a real one: an encoder of two layers, ours in it; every part that is there has time."""
    torch.manual_seed(0)
    monkeypatch.setattr(stack, "LENGTH", 4)
    steps = dict(stack.encoder(runner.Settings(quick=True)))
    steps["fastadapter"]()
    found = stack.profiled(steps["fastadapter"])
    assert all(found[f"{part}_ms"] > 0 for part in ("gemm", "adapter", "head", "optimizer", "rest"))
    assert found["gflop_per_s"] > 0


# versions


def answers(samples):
    """A side that has one case and these seconds for each question."""
    lines = iter([{"library": f"of {samples}", "extension": "works"}, {"entry": "step", "shape": "tiny"},
                  *({"seconds": each} for each in samples), {"end": True}])  # fmt: skip
    return SimpleNamespace(hear=lambda: next(lines), ask=lambda: next(lines))


def test_rounds_of_two_versions_are_set_side_by_side():
    base, here = (
        answers([{"ours": each} for each in seconds]) for seconds in ([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    )
    base.name, here.name = "base", "here"
    (case,) = versions.compare([base, here], rounds=3)
    assert list(versions.lines_of(case)) == [
        ["step, tiny", "ours", "4000 ms", "2000 ms", "0.500 (0.500 to 0.500)"]
    ]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([{"error": "KeyError: 'roofline'"}], "KeyError: 'roofline'"),
        ([{"library": "a", "extension": "no compiler"}], "its extension does not work: no compiler"),
        ([{"library": "a", "extension": "works"}], "both sides run a"),
    ],
)
def test_what_one_version_cannot_run_is_said(said, why):
    base = SimpleNamespace(name="base", hear=iter(said).__next__)
    here = SimpleNamespace(name="here", hear=iter([{"library": "a", "extension": "works"}]).__next__)
    ((case,),) = [list(versions.compare([base, here], rounds=1))]
    assert case["failed"]["base"] == why


def test_a_version_answers_each_question_with_a_round():
    """The warm-up is over before the first question, and rivals are not timed: the other version is the rival."""
    clock = Clock()
    case = make_case(clock, warmup=1)
    case = dataclasses.replace(
        case, variants=[*case.variants, clock.work("fastadapter", 1.0), clock.work("PEFT", 1.0)]
    )
    out = io.StringIO()

    def meter(run, state, calls):
        run(state)
        return 1.0

    def entry(settings):
        yield runner.measure(case, settings, meter)

    settings = runner.Settings(rounds=2, environment=ENVIRONMENT)
    serve.serve(entry, settings, out, io.StringIO("go\ngo\n"))
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert said[0] == {"entry": "step", "shape": "tiny"} and said[-1] == {"end": True}
    assert [set(each["seconds"]) for each in said[1:-1]] == [{"floor", "fastadapter"}] * 2
    assert "PEFT" not in clock.log and not lost.is_ours("PEFT")
    with pytest.raises(SystemExit, match="comparison has ended"):
        serve.serve(entry, settings, io.StringIO(), io.StringIO("go\n"))


def test_base_must_be_a_commit(tmp_path):
    if rows.commit() == "unknown":
        pytest.skip("not a checkout")
    with pytest.raises(SystemExit, match="BASE must be a commit of this repository, got 'no-such-commit'"):
        versions.environment_of("no-such-commit", tmp_path)


def test_titles_of_recipes_are_those_of_the_entries():
    assert list(recipe.ENTRIES)[:3] == ["recipe-all-layers", "recipe-top-layers", "recipe-pfeiffer"]
