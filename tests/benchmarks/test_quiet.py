"""A run beside other work is marked by each of the four looks, and neither table nor picture shows it."""

import pytest

from benchmarks import quiet, rows, run, table
from benchmarks.quiet import Look
from tests.benchmarks.test_runner import make_row

BEFORE = Look(clock=100.0, all_work=1000.0, steal=10.0, own=50.0, calibration=0.010)


def after(seconds=10.0, ours=18.0, others=0.1, steal=0.0, calibration=0.011):
    all_work = BEFORE.all_work + ours + others
    return Look(BEFORE.clock + seconds, all_work, BEFORE.steal + steal, BEFORE.own + ours, calibration)


def test_a_quiet_machine_is_not_marked():
    marks = quiet.judge(BEFORE, after(), load=1.9, cores=2)
    assert quiet.MARK not in marks
    assert marks == pytest.approx({
        "load_average": 1.9, "others_percent": 0.5, "steal_percent": 0.0, "calibration_change_percent": 10.0
    })  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"others": 2.0}, {"steal": 1.0}, {"calibration": 0.020}, {"calibration": 0.007}], ids=str
)
def test_each_look_can_mark_it(change):
    assert quiet.judge(BEFORE, after(**change), load=0.0, cores=2)[quiet.MARK] == 1.0


def test_where_the_counters_cannot_be_read_the_load_average_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "PROC", tmp_path / "absent")
    blind = quiet.look()
    assert (blind.all_work, blind.steal, blind.own) == (None, None, None)
    same = {"clock": 1.0, "all_work": None, "steal": None, "own": None, "calibration": 1.0}
    assert quiet.MARK not in quiet.judge(Look(**same), Look(**same), load=0.4, cores=2)
    assert quiet.MARK in quiet.judge(Look(**same), Look(**same), load=1.4, cores=2)


def test_the_counters_are_read_as_linux_writes_them(tmp_path, monkeypatch):
    """Our own processor time is that of the process, of its living descendants and of those that have ended."""
    monkeypatch.setattr(quiet, "PROC", tmp_path)
    monkeypatch.setattr(quiet, "TICKS", 100)
    monkeypatch.setattr(quiet.os, "getpid", lambda: 5)
    (tmp_path / "stat").write_text("cpu  100 200 300 9000 50 10 20 70 0 0\ncpu0 1 1 1 1\n")
    for pid, parent, name in ((5, 1, "py (a) b"), (6, 5, "child"), (7, 6, "grandchild"), (8, 1, "other")):
        (tmp_path / str(pid)).mkdir()
        times = "100 20 3 7"
        (tmp_path / str(pid) / "stat").write_text(
            f"{pid} ({name}) S {parent} 5 5 0 -1 0 0 0 0 0 {times} 20 0\n"
        )
    seen = quiet.look()
    assert (seen.all_work, seen.steal) == pytest.approx((6.3, 0.7))
    assert seen.own == pytest.approx(3 * 1.3)


def test_rows_get_the_marks_of_the_time_in_which_they_were_measured():
    class Watch:
        made = 0

        def __init__(self):
            Watch.made += 1

        def marks(self):
            return {"load_average": float(Watch.made)}

    parts = ([make_row(shape=str(number), extra={"gb_per_s": 2.0})] for number in range(2))
    found = [row.extra for part in run.watched(parts, Watch) for row in part]
    assert found == [{"gb_per_s": 2.0, "load_average": 1.0}, {"gb_per_s": 2.0, "load_average": 2.0}]


def test_an_entry_of_a_busy_run_is_shown_whole_or_not_at_all():
    """One case beside other work takes the entry's other cases of that run with it; the run before stays."""
    old = [make_row(shape=shape, date="2026-11-20T10:00:00+00:00") for shape in ("a", "b")]
    new = [make_row(shape="a"), make_row(shape="b", extra={quiet.MARK: 1.0})]
    other = make_row(entry="decode")
    assert rows.latest(rows.published([*old, *new, other])) == [*old, other]
    with pytest.raises(ValueError, match="no stored rows of step; of a busy machine alone, not shown: step"):
        table.render(["step"], [*new, other])
