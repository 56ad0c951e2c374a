"""The plots of a comparison, read back from matplotlib's own objects: names, markers, lines, words."""

import itertools

import pytest

from fastadapter.compare import METHODS_TO_COMPARE, plots, summarise

pyplot = pytest.importorskip("matplotlib.pyplot")


def run(method, seed=0, accuracy=0.8, parameters=1000, seconds=10.0):
    return {
        "method": method, "seed": seed, "accuracy": accuracy, "trainable_parameters": parameters,
        "model_parameters": 10**6, "seconds": seconds, "seconds_per_epoch": seconds, "peak_memory_bytes": 1,
        "file_bytes": 1, "learning_rate": 0.1, "losses": [0.7, 0.6, 0.5], "accuracy_before": 0.5,
        "epochs": [{"eval_accuracy": accuracy}],
    }  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws the plots and keeps the figures: accuracy against parameters, against time, the curves."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def draw(runs, chance=0.5):
        files = plots.draw(
            tmp_path, summarise(runs), runs, title="m on d", subtitle="10 test records", chance=chance
        )
        assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files)
        return figures

    yield draw
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


@pytest.mark.parametrize("before", [True, False])
def test_curves_begin_where_the_first_evaluation_was(drawn, before):
    runs = [run(name) for name in ("houlsby", "pfeiffer")]
    for each in runs:
        each["epochs"] = [{"eval_accuracy": 0.7}, {"eval_accuracy": 0.8}]
        if not before:
            del each["accuracy_before"]
    axis = drawn(runs)[2].axes[1]
    curves = [line for line in axis.lines if line.get_marker() not in ("", "None", None)]
    assert len(curves) == 2
    for curve in curves:
        assert curve.get_xdata() == pytest.approx([0, 1, 2] if before else [1, 2], abs=0.1)
        assert curve.get_ydata() == pytest.approx([50, 70, 80] if before else [70, 80])


def names(axis):
    return {text.get_text(): text for text in axis.texts}


def test_every_method_has_a_colour_of_its_own_and_its_familys_marker():
    styles = {name: plots.style(name) for name in METHODS_TO_COMPARE}
    assert len({colour for _, colour in styles.values()}) == len(styles) >= 11
    families = [("features", "last-layers", "last-blocks", "all-layers"), ("houlsby", "pfeiffer", "parallel"),
                ("prefix-tuning", "soft-prompt"), ("llama-adapter", "llama-adapter-v2")]  # fmt: skip
    markers = [{styles[name][0] for name in family} for family in families]
    assert all(len(found) == 1 for found in markers) and len(set.union(*markers)) == len(families)


def test_names_stand_beside_their_points_and_cover_nothing(drawn):
    """Three clusters, as in the comparison of the encoder."""
    places = [(400, 0.784), (150_000, 0.731), (3_700_000, 0.841), (22_000_000, 0.861), (226_000, 0.840),
              (113_000, 0.845), (200_000, 0.842), (93_000, 0.831), (8_450, 0.787), (23_900, 0.832),
              (74_600, 0.839)]  # fmt: skip
    methods = [name for name in METHODS_TO_COMPARE if name != "in-context"]  # trains nothing: it has no place
    runs = [run(name, 0, accuracy, size) for name, (size, accuracy) in zip(methods, places, strict=True)]
    figure = drawn(runs)[0]
    (axis,) = figure.axes
    assert set(names(axis)) == set(methods)
    assert [tick.get_text() for tick in axis.get_xticklabels() if tick.get_text() in ("1k", "100k", "10M")]
    renderer = figure.canvas.get_renderer()
    boxes = {}
    for text in axis.texts:
        text.set_bbox(None)
        boxes[text.get_text()] = super(type(text), text).get_window_extent(renderer)
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), f"{one} and {other}"
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "m on d" and words[1].replace("\n", " ") == "10 test records; bars: lowest to highest"


def test_lines_of_chance_of_all_layers_and_of_the_frontier(drawn):
    runs = [run("features", 0, 0.7, 10), run("all-layers", 0, 0.9, 10**6), run("houlsby", 0, 0.6, 1000)]
    figures = drawn(runs, chance=0.55)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [
        "frontier: nothing is both cheaper and better",
        "all layers trained: 90.0 %",
        "chance (the most frequent class): 55.0 %",
    ]
    edge = figures[0].axes[0].lines[0].get_xydata()
    assert edge.round(3).tolist() == [[10, 70], [10**6, 70], [10**6, 90]]
    low, high = figures[0].axes[0].get_ylim()
    assert low < 55 and high > 90
    assert len(figures) == 3 and {*names(figures[2].axes[1])} == {"features", "all-layers", "houlsby"}


def test_equal_points_stand_side_by_side_and_nothing_trained_has_a_place(drawn):
    equal = ("houlsby", "pfeiffer", "llama-adapter")
    runs = [run(name) for name in equal] + [run("features", 0, 0.8, 0)]
    figure = drawn(runs, chance=None)[0]
    (axis,) = figure.axes
    points = {
        line.get_color(): axis.transData.transform(line.get_xydata()[0])
        for line in axis.lines
        if line.get_marker() in "s^Do"
    }
    xs = sorted(points[plots.style(name)[1]][0] for name in equal)
    width = plots._MARKER_SIZE * figure.dpi / 72
    assert xs[1] - xs[0] == pytest.approx(width, rel=0.01) == xs[2] - xs[1]
    assert "features (0)" in names(axis)
