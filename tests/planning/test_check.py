"""Every stored row is predicted or listed with the reason; ranges are what the rows give; nothing is hidden."""

import json
from importlib import resources

import pytest

from fastadapter.planning import check, factors
from fastadapter.planning.rows import Measured, results_folder
from fastadapter.training import UserError

STEPS = ("step", "memory of a step", "Python")


@pytest.fixture(scope="module")
def outcome():
    return check.check()


def count_rows(folder):
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.jsonl"))
    kernels = sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("estimates_measured.csv"))
    sweeps = sum(len(json.loads(path.read_text())["rows"]) for path in folder.glob("learning_rates_*.json"))
    return lines + kernels + sweeps


def test_no_row_is_lost(outcome):
    """Runs of comparisons give a row an epoch and one of memory; the rest one each; and the published run."""
    checked, unplanned = outcome
    compared = [row for row in checked if row.row.source.startswith("compare_")]
    left = [row for row in unplanned if row.source.startswith("compare_")]
    others = len(checked) - len(compared) + len(unplanned) - len(left)
    assert others == count_rows(results_folder()) + 1
    assert all(row.reason for row in unplanned)


def test_steps_are_inside_their_ranges(outcome):
    """Of fitted rows nine in ten, by how the ranges are made; fewer would mean that factors.json is old."""
    steps = [each for each in outcome[0] if each.row.fitted and each.row.kind.startswith(STEPS)]
    assert len(steps) > 90
    assert sum(each.inside for each in steps) > 0.8 * len(steps)


def test_the_floor_is_below_what_was_measured(outcome):
    """A step faster than its floor would be a mistake in the floor."""
    rows = [each.row for each in outcome[0] if each.row.kind.startswith("step") and each.row.fitted]
    assert all(row.floor < row.value for row in rows)


def test_memory_of_a_step_is_counted_to_a_few_percent(outcome):
    rows = [each.row for each in outcome[0] if each.row.kind == "memory of a step"]
    # since then norms and gated parts of a model with an adapter of ours keep less on a CPU
    older = [
        row for row in rows if row.source < "cpu.jsonl 2026-11-28T10" and row.what.endswith(": fastadapter")
    ]
    errors = [abs(row.floor / row.value - 1) for row in rows if row not in older]
    assert len(errors) >= 19 and max(errors) < 0.05


def test_the_published_run_is_inside(outcome):
    """LLaMA-Adapter's one hour on 8 A100, of which no factor knows."""
    (paper,) = (each for each in outcome[0] if each.row.source == "arXiv:2303.16199")
    assert paper.inside and abs(paper.error) < 0.2 and not paper.row.fitted


def test_the_table_shows_every_row_and_repeats_what_is_outside(outcome):
    checked, unplanned = outcome
    text = check.table(checked, unplanned)
    outside = [each for each in checked if not each.inside]
    assert outside and f"outside, {len(outside)}:" in text
    listed, again = text.split(f"outside, {len(outside)}:")
    assert listed.count(" [") == len(checked) and again.count(" [") == len(outside)
    assert f"not planned, {len(unplanned)}:" in text


def test_the_stored_factors_are_those_of_the_rows(outcome):
    """Of classes that only the files of rows feed, as far as the rows went when they were fitted."""
    record = json.loads((resources.files("fastadapter.planning") / factors.FILE).read_text(encoding="utf-8"))
    rows = [each.row for each in outcome[0]]
    old = [row for row in rows if "jsonl" not in row.source or row.source.split()[-1] <= record["until"]]
    fitted = json.loads(factors.to_json(factors.fit(old), record["until"]))["factors"]
    for kind, stored in record["factors"].items():
        assert kind in fitted, kind
        if kind.startswith(("Python", "step on a card", "memory of a step")):
            assert fitted[kind] == stored, kind


def measured(kind, value, run="one", floor=1.0, **more):
    return Measured(kind, "a test", "a row", "s", value, floor, run, **more)


def test_a_range_holds_all_of_few_rows_and_nine_in_ten_of_many():
    few = factors.fit([measured("step", value) for value in (1.0, 2.0, 4.0)])["step"]
    assert (few.range.low, few.range.mid, few.range.high) == (1.0, 2.0, 4.0)
    many = factors.fit([measured("step", 1 + value / 100) for value in range(101)])["step"].range
    assert 1.04 < many.low < 1.06 and many.mid == 1.5 and 1.94 < many.high < 1.96


def test_a_range_is_never_narrower_than_is_assumed():
    one = factors.fit([measured("step", 2.0)])["step"].range
    assert (one.low, one.high) == (2.0 / factors.ONE_ROW, 2.0 * factors.ONE_ROW)
    run = factors.fit([measured("step", 2.0)] * 2)["step"].range
    assert (run.low, run.high) == (2.0 / factors.ONE_RUN, 2.0 * factors.ONE_RUN)
    two = factors.fit([measured("step", 2.0), measured("step", 2.0, "two")])["step"].range
    assert (two.low, two.high) == (2.0 / factors.LEAST["times"], 2.0 * factors.LEAST["times"])


def test_rows_that_are_not_fitted_move_nothing():
    rows = [measured("step", 2.0), measured("step", 90.0, fitted=False)]
    assert factors.fit(rows)["step"].range.mid == 2.0


def test_an_unknown_entry_is_listed_not_dropped(tmp_path):
    row = {
        "entry": "training-step", "shape": "all 30 layers, 4x128 tokens", "variant": "frozen model", "backend": "",
        "dtype": "float32", "unit": "ms", "median": 2119.7, "device": "AMD EPYC", "threads": 2,
        "date": "2026-11-24T22:36",
    }  # fmt: skip
    rows = [
        row,
        {**row, "entry": "a new one"},
        {**row, "variant": "a new peer"},
        {**row, "device": "another CPU"},
    ]
    rows.append({**row, "median": 9999.0, "extra": {"busy": 1.0}})
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    checked, unplanned = check.check(tmp_path)
    assert [(each.row.value, each.row.fitted) for each in checked[1:]] == [(2119.7, True), (9999.0, False)]
    assert [each.reason for each in unplanned] == [
        "an entry that is not planned",
        "a variant that is not planned",
        "another CPU is not in the table of devices",
    ]


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "cpu.jsonl").write_text('{"entry": "training-step"}\n')
    with pytest.raises(UserError, match=r"cpu\.jsonl:1: not a row of a benchmark"):
        check.check(tmp_path)
    with pytest.raises(UserError, match="no folder with stored rows"):
        check.check(tmp_path / "nowhere")
