"""The picture at the top of README: only stored rows, ours beside others, the lost ones too."""

import pytest

from benchmarks import overview, plot, rows
from tests.benchmarks.test_runner import make_row

pyplot = pytest.importorskip("matplotlib.pyplot")
CPU = {"driver": "", "device": "a CPU", "floor": "frozen model"}


def stored():
    return [
        make_row(entry="training-step", variant="frozen model", ratio=1.0, **CPU),
        make_row(entry="training-step", variant="fastadapter", **CPU),
        make_row(entry="training-step", variant="PEFT", ratio=1.5, **CPU),
        make_row(
            entry="training-step", variant="fastadapter", date="2026-11-01T10:00:00+00:00", shape="old", **CPU
        ),
        make_row(entry="SmolLM2-shape step", variant="fastadapter", floor="joined embeddings", ratio=2.0),
        make_row(
            entry="SmolLM2-shape step", variant="PEFT", floor="joined embeddings", extra={"red_tests": 3.0}
        ),
        make_row(entry="gated_prefix", variant="fastadapter"),
    ]


def test_a_panel_per_device_with_the_rows_of_its_last_run():
    found = overview.panels(stored())
    assert list(found) == ["a CPU", "a card"]
    assert {what: [row.variant for row in group] for what, group in found["a CPU"].items()} == {
        "step, LLaMA-Adapter, tiny": ["fastadapter", "PEFT"]
    }
    # no floor of the model's own, and no row of a run whose tests were red
    assert {what: len(group) for what, group in found["a card"].items()} == {
        "step, tiny (over: joined embeddings)": 1
    }


def test_it_is_drawn_from_what_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "load", stored)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    assert plot.main([str(tmp_path / "overview.png"), "--overview"]) == 0
    figure = pyplot.gcf()
    monkeypatch.undo()
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["CPU: a CPU, 2 threads; float32; 2026-11-24", "GPU: a card; float32; 2026-11-24"]
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == ["1.25  (1250 ms)", "1.50  (1250 ms)"]
    pyplot.close(figure)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "x.png"), "decode", "--overview"])
    assert "chooses its entries itself" in capsys.readouterr().err


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no stored rows of training-step"):
        overview.draw(tmp_path / "x.png", [make_row()])
