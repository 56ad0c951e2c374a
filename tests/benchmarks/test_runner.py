"""The benchmarks' own arithmetic: interleaving by a clock that is made up, rows, tables. Nothing is timed here."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from benchmarks import comparisons, rows, runner, table
from benchmarks.runner import Case, Settings, Variant

ENVIRONMENT = {
    "device": "a card",
    "driver": "550.1",
    "clocks": "",
    "threads": 2,
    "torch": "2.13.0",
    "triton": "3.9.0",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "fastadapter": "0.1.0",
    "commit": "abc1234",
    "date": "2026-11-24T10:00:00+00:00",
}


class Clock:
    """Time that passes only when a variant says so; the machine gets slower from round to round."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def run(state):
            self.log.append(name)
            # every round (floor and rival once each) is 1.5 times as slow as the one before
            self.now += seconds * 1.5 ** ((len(self.log) - 1) // 2)

        return Variant(name, run)


def make_case(clock, **options):
    variants = [clock.work("floor", 1.0), clock.work("rival", 1.25)]
    return Case("step", "tiny", floor="floor", variants=variants, **{"warmup": 0, "unit": "ms", **options})


def make_row(**changes):
    values = {
        "entry": "step",
        "shape": "tiny",
        "variant": "rival",
        "backend": "cpp",
        "dtype": "float32",
        "unit": "ms",
        "median": 1250.0,
        "p20": 1200.0,
        "p80": 1300.0,
        "samples": 5,
        "floor": "floor",
        "ratio": 1.25,
        "ratio_p20": 1.2,
        "ratio_p80": 1.3,
        "extra": {},
    }
    return rows.Row(**{**values, **ENVIRONMENT, **changes})


def test_ratio_is_taken_within_a_round():
    """A machine that slows down fivefold moves the medians, not the ratio."""
    clock = Clock()
    settings = Settings(rounds=5, environment=ENVIRONMENT)
    floor, rival = runner.measure(make_case(clock), settings, runner.wall_meter(clock))
    assert (rival.ratio, rival.ratio_p20, rival.ratio_p80) == pytest.approx((1.25, 1.25, 1.25))
    assert floor.median == pytest.approx(1000 * 1.5**2)
    assert floor.p20 < floor.median < floor.p80
    assert (floor.samples, floor.unit, floor.ratio) == (5, "ms", 1.0)


def test_every_round_runs_every_variant_and_the_order_varies():
    clock = Clock()
    runner.interleave(make_case(clock), 12, runner.wall_meter(clock))
    pairs = [tuple(clock.log[i : i + 2]) for i in range(0, 24, 2)]
    assert set(pairs) == {("floor", "rival"), ("rival", "floor")}


def test_warm_up_is_not_counted():
    clock = Clock()
    samples = runner.interleave(make_case(clock, warmup=3), 2, runner.wall_meter(clock))
    assert len(clock.log) == 2 * (3 + 2)
    assert [len(values) for values in samples.values()] == [2, 2]


def test_short_work_is_repeated_within_a_sample():
    clock = Clock()

    def run(state):
        clock.now += 0.001

    case = Case("op", "tiny", floor="copy", variants=[Variant("copy", run)], sample_seconds=0.05, warmup=0)
    samples = runner.interleave(case, 3, runner.wall_meter(clock))
    assert samples["copy"] == pytest.approx([0.001] * 3)
    assert clock.now == pytest.approx(
        0.001 + 3 * 0.05
    )  # one call to see how long it takes, then samples of 50


def test_preparation_is_not_timed():
    clock = Clock()
    seen = []

    def prepare():
        clock.now += 100.0
        return len(seen)

    def run(state):
        seen.append(state)
        clock.now += 2.0

    case = Case("op", "tiny", floor="a", variants=[Variant("a", run, prepare)], warmup=0)
    assert runner.interleave(case, 2, runner.wall_meter(clock)) == {"a": [2.0, 2.0]}
    assert seen == [0, 1]


@pytest.mark.parametrize("names", [["a", "b"], ["floor", "floor"]])
def test_a_case_needs_its_floor_and_distinct_names(names):
    case = Case("op", "tiny", floor="floor", variants=[Variant(name, print) for name in names])
    with pytest.raises(ValueError, match="distinct names, one of them 'floor'"):
        runner.interleave(case, 1, runner.wall_meter())


def test_spread():
    assert runner.spread([3.0]) == (3.0, 3.0, 3.0)
    assert runner.spread([10.0, 30.0, 20.0, 50.0, 40.0, 60.0]) == pytest.approx((35.0, 20.0, 50.0))


def test_rates_and_bandwidth():
    """A rate is turned round, its ratio is not: more than 1 always costs more."""
    variants = [Variant("copy", print), Variant("ours", print)]
    samples = {"copy": [0.5, 0.5, 0.5], "ours": [1.0, 1.0, 2.0]}
    case = Case("op", "tiny", "copy", variants, unit="tokens/s", tokens=100, bytes_moved=10**9)
    copy, ours = runner.describe(case, samples, ENVIRONMENT)
    assert (copy.median, ours.median, ours.p20, ours.ratio) == pytest.approx((200.0, 100.0, 70.0, 2.0))
    assert copy.extra == pytest.approx({"gb_per_s": 2.0, "percent_of_copy": 100.0})
    assert ours.extra == pytest.approx({"gb_per_s": 1.0, "percent_of_copy": 50.0})


def test_other_units_are_stored_as_they_are():
    case = Case("memory", "tiny", "a", [Variant("a", print)], unit="MiB")
    (row,) = runner.describe(case, {"a": [7.0, 8.0, 9.0]}, ENVIRONMENT)
    assert (row.median, row.unit) == (8.0, "MiB")


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "new" / "cpu.jsonl"
    first, second = make_row(), make_row(variant="floor", extra={"gb_per_s": 1.5})
    rows.append(path, [first])
    rows.append(path, [second])
    assert rows.load(path) == [first, second]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ('{"entry": "step"}', "missing or unknown"), ("[]", "missing or unknown: list")],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "cpu.jsonl"
    rows.append(path, [make_row()])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"cpu\.jsonl:2: .*{message}"):
        rows.load(path)


def test_environment_fills_every_field_of_a_row():
    environment = rows.environment()
    assert set(environment) == set(ENVIRONMENT)
    assert environment["device"] and environment["threads"] >= 1 and environment["driver"] == ""


def test_latest_run_of_every_entry_and_device():
    old = make_row(date="2026-11-23T10:00:00+00:00")
    other_device = make_row(date="2026-11-20T10:00:00+00:00", device="another card")
    new = [make_row(), make_row(variant="floor")]
    assert rows.latest([old, other_device, *new]) == [other_device, *new]


def test_table():
    floor = make_row(variant="floor", backend="", median=1000.0, p20=990.0, p80=1010.0)
    text = table.table([floor, make_row(extra={"gb_per_s": 0.5})])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert cells[0] == ["what", "variant", "median (p20 to p80)", "relative to the floor", "GB/s"]
    assert cells[2] == ["step, tiny, float32", "floor", "1000 ms (990 to 1010)", "floor", ""]
    assert cells[3] == ["", "rival (cpp)", "1250 ms (1200 to 1300)", "1.250 (1.200 to 1.300)", "0.5"]
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (12.345, "12.3"), (0.5, "0.5"), (3e-5, "< 0.001")]
)
def test_numbers(value, text):
    assert table.number(value) == text


def test_tables_between_markers_are_drawn_anew():
    document = "before\n<!-- benchmark: step, decode -->\nold\n<!-- end -->\nafter\n"
    stored = [make_row(), make_row(entry="decode"), make_row(entry="unrelated", shape="never shown")]
    drawn = table.rewrite(document, stored)
    assert drawn.startswith("before\n<!-- benchmark: step, decode -->\n| what")
    assert drawn.endswith("<!-- end -->\nafter\n")
    assert "old" not in drawn and "never shown" not in drawn
    assert "a card, driver 550.1, 2 threads; torch 2.13.0" in drawn and "commit abc1234, 2026-11-24." in drawn
    assert table.rewrite(drawn, stored) == drawn


def test_missing_rows_and_missing_markers_are_errors():
    with pytest.raises(ValueError, match="no stored rows of decode; stored: step"):
        table.rewrite("<!-- benchmark: step, decode -->\n<!-- end -->", [make_row()])
    with pytest.raises(ValueError, match="no <!-- benchmark: NAME -->"):
        table.rewrite("text", [make_row()])


def test_document_is_checked_or_rewritten(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.append(tmp_path / "cpu.jsonl", [make_row()])
    document = tmp_path / "README.md"
    document.write_text("<!-- benchmark: step -->\n<!-- end -->\n")
    assert table.main([str(document), "--check"]) == 1
    assert table.main([str(document)]) == 0
    assert table.main([str(document), "--check"]) == 0


def test_stored_comparisons_are_drawn_too(tmp_path, monkeypatch):
    def store(folder, method, **figures):
        run = tmp_path / folder / "runs" / method / f"seed-{figures['seed']}"
        run.mkdir(parents=True)
        common = {"method": method, "trainable_parameters": 50, "model_parameters": 1000, "seconds_per_epoch": 7.4,
                  "seconds": 14.8, "peak_memory_bytes": 2**20, "file_bytes": 2**10, "learning_rate": 0.01}  # fmt: skip
        (run / "result.json").write_text(json.dumps(common | figures))

    monkeypatch.setattr(comparisons, "ROOT", tmp_path)
    store("compare_one", "soft-prompt", seed=0, accuracy=0.80)
    store("compare_one", "soft-prompt", seed=1, accuracy=0.85)
    store("compare_two", "features", seed=0, accuracy=0.70)
    both = table.rewrite("<!-- comparison-short: compare_one, compare_two -->\nold\n<!-- end -->", [])
    assert "| method | one: accuracy | one: trained | one: s per epoch | two: accuracy |" in both
    assert "| soft-prompt | 82.5 % (80.0 to 85.0) | 5.000% | 7 |  |  |  |" in both
    assert "| features |  |  |  | 70.0 % | 5.000% | 7 |" in both and "old" not in both
    one = table.rewrite("<!-- comparison: compare_one -->\n<!-- end -->", [])
    assert "| soft-prompt | 82.5 % (80.0 to 85.0) | 50 | 5.000% | 7.4 |" in one and "features" not in one
    with pytest.raises(ValueError, match="no stored comparison in benchmarks/results/compare_three"):
        table.rewrite("<!-- comparison: compare_three -->\n<!-- end -->", [])

    peft = [{"method": "soft-prompt", "learning_rate": 0.01, "seed": seed, "accuracy": 0.5 + seed / 10,
             "start": "text", "fastadapter_accuracy": 0.8} for seed in (0, 1)]  # fmt: skip
    (tmp_path / "compare_one" / "peft.json").write_text(json.dumps({"rows": peft}))
    beside = table.rewrite("<!-- comparison-peft: compare_one -->\n<!-- end -->", [])
    assert "| soft-prompt | text | 0.01 | 0, 1 | 80.0 % (80.0 to 80.0) | 55.0 % (50.0 to 60.0) |" in beside


def test_process_restarts_once_with_the_allocator_that_timing_needs():
    code = "from benchmarks import runner; runner.keep_memory(); import os; print(os.environ['MALLOC_MMAP_MAX_'])"
    clean = {name: value for name, value in os.environ.items() if name not in runner.ALLOCATOR}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=rows.ROOT, env=clean, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


def test_row_fields_are_flat():
    """A line of the file reads without this code: plain values, and one table of extra numbers."""
    kinds = {field.name: field.type for field in dataclasses.fields(rows.Row)}
    assert set(map(str, kinds.values())) <= {str(kind) for kind in (str, int, float, dict[str, float])}
