"""The whole demo on a toy model and toy reviews: same code, no network, seconds instead of minutes."""

import json

import pytest

from fastadapter.cli import assets, main
from tests.training.toy import make_examples, make_model, make_tokenizer


@pytest.fixture
def toy_assets(tmp_path, monkeypatch, default_threads):
    import torch

    torch.set_num_threads(1)
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    reviews = tmp_path / "reviews.jsonl"
    rows = []
    for example in make_examples(60):
        text = example.prompt.removeprefix("Review: ").removesuffix("\nSentiment:")
        rating = 1.0 if example.label == "good" else -1.0
        rows.append(json.dumps({"text": text, "label": example.label, "rating": rating}) + "\n")
    reviews.write_text("".join(rows))
    monkeypatch.setattr(assets, "fetch_demo_model", lambda: model)
    monkeypatch.setattr(assets, "fetch_demo_reviews", lambda: reviews)


def demo(output, *options):
    sizes = ["--train", "32", "--test", "16", "--layers", "2", "--num-train-epochs", "2"]
    return main(["demo", "--output-dir", str(output), *sizes, *options])


def test_demo_from_data_to_a_fresh_process(toy_assets, tmp_path, capsys):
    """Prints every figure it promises, leaves data, adapter and curve, and the reloaded adapter predicts the same."""
    figures_file = tmp_path / "figures.json"
    assert demo(tmp_path / "out", "--json", str(figures_file)) == 0
    printed = capsys.readouterr().out
    for words in ("before:", "after:", "held-out accuracy", "before,", "tokens/s", "peak memory", "Use it:"):
        assert words in printed, words
    for name in ("train.jsonl", "test.jsonl", "adapter.safetensors", "learning_curve.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    figures = json.loads(figures_file.read_text())
    assert figures["reloaded_predictions_equal"]
    assert figures["reloaded_accuracy"] == pytest.approx(figures["eval"]["accuracy_after"])
    texts = [
        {json.loads(line)["text"] for line in open(tmp_path / "out" / f"{part}.jsonl")}
        for part in ("train", "test")
    ]
    assert len(texts[0]) == 32 and len(texts[1]) == 16 and not texts[0] & texts[1]


def test_demo_replaces_only_what_it_made(toy_assets, tmp_path, capsys):
    """Its own folder is started anew; one with other files is left alone."""
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert demo(other) == 2
    assert "holds files that the demo did not make" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "precious"


def test_demo_asks_for_no_more_reviews_than_there_are(toy_assets, tmp_path, capsys):
    assert demo(tmp_path / "out", "--train", "5000") == 2
    assert "train + test must be at most" in capsys.readouterr().err
