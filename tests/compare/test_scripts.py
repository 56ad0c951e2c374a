"""What is done with a finished comparison: keeping it in the repository, and PEFT's methods on its records."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from fastadapter.cli import assets
from tests.training.toy import make_examples

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    def run(name, *words):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
        module.main()

    return run


def test_a_stored_comparison_names_no_folder_and_goes_on(compare, calls, script, tmp_path):
    assert compare("features", "last-layers") == 0
    stored, copy = tmp_path / "stored", tmp_path / "copy"
    script("store_comparison", tmp_path / "out", stored)
    page = (stored / "comparison.md").read_text()
    assert page == (tmp_path / "out" / "comparison.md").read_text()
    assert {file.name for file in stored.glob("*.png")} == {
        "accuracy_parameters.png",
        "accuracy_time.png",
        "learning_curves.png",
    }
    texts = [file.read_text() for file in stored.rglob("*") if file.suffix in (".json", ".md")]
    assert len(texts) == 2 + 2 * 3 and not any(str(tmp_path) in text for text in texts)

    shutil.copytree(stored, copy)
    calls.clear()
    assert compare("features", "last-layers", "llama-adapter", output_dir=copy) == 0
    assert calls == ["llama-adapter/0", "llama-adapter/1"], "stored runs must be read back"


def test_a_second_comparison_is_added_to_the_stored_one(compare, calls, script, tmp_path):
    for folder, method in (("one", "features"), ("two", "last-layers")):
        assert compare(method, seeds="0", output_dir=tmp_path / folder) == 0
        script("store_comparison", tmp_path / folder, tmp_path / "stored")
    page = (tmp_path / "stored" / "comparison.md").read_text()
    assert "| features |" in page and "| last-layers |" in page
    for name in ("comparison.md", "accuracy_time.png"):
        (tmp_path / "stored" / name).unlink()
    script("store_comparison", "--redraw", tmp_path / "stored")
    assert (tmp_path / "stored" / "comparison.md").read_text() == page
    assert (tmp_path / "stored" / "accuracy_time.png").is_file()
    with pytest.raises(SystemExit):
        script("store_comparison", "--redraw", tmp_path / "stored", tmp_path / "other")


def test_a_sweep_takes_steps_and_seeds_and_goes_on(
    folders, calls, script, tmp_path, monkeypatch, capsys, language_model
):
    """The best rate is that of the lowest mean over the seeds; rows of older sweeps, without a seed, stay."""
    rows = [{"text": e.prompt.replace("\n", " "), "label": e.label} for e in make_examples(60)]
    monkeypatch.setattr(assets, "MODELS", {"smollm2": lambda: language_model})
    monkeypatch.setattr(assets, "fetch_demo_reviews", lambda: None)
    monkeypatch.setattr(assets, "split_reviews", lambda *_: (rows, []))
    out = tmp_path / "rates.json"
    words = ("--model", "smollm2", "--template", "Review:{text}", "--steps", 2, "--threads", 1, "--out", out)
    words += ("--methods", "prefix-tuning", "--seeds", 0, 1, "--rates", 0.01)
    script("sweep_learning_rates", *words)
    assert calls == ["prefix-tuning/0", "prefix-tuning/1"]
    record = json.loads(out.read_text())
    assert "32 training and 8 held-out reviews" in record["about"] and "epochs: 1" in record["about"]
    assert [row["seed"] for row in record["rows"]] == [0, 1]
    assert all(row["options"] == {"init_text": "Review:"} for row in record["rows"])
    del record["rows"][0]["seed"]
    out.write_text(json.dumps(record))
    capsys.readouterr()
    script("sweep_learning_rates", *words, 0.1)
    assert len(calls) == 4 and len(json.loads(out.read_text())["rows"]) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prefix-tuning")]
    assert (
        len(lines) == 2
        and sum("*" in line for line in lines) == 1
        and all("2 seeds" in line for line in lines)
    )
    losses = [
        row["held_out_loss"] for row in json.loads(out.read_text())["rows"] if row["learning_rate"] == 0.1
    ]
    assert f"loss {sum(losses) / 2:.4f}" in lines[1]
    for wrong in (("--steps", 0), ("--count", 4)):
        with pytest.raises(SystemExit):
            script("sweep_learning_rates", "--out", out, *wrong)
        assert "--count must be between 5 and" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("sweep_learning_rates", "--out", out, "--count", 5, "--steps", 5)


def test_peft_is_trained_on_the_records_of_a_comparison(compare, calls, script, tmp_path, capsys):
    methods = ("prefix-tuning", "soft-prompt", "llama-adapter")
    assert compare(*methods, kind="llama", seeds="0", num_train_epochs=1, template="w1\n{text}") == 0
    words = (tmp_path / "out", "--seeds", 0, "--threads", 1, "--out", tmp_path / "peft.json")
    script("compare_peft", *words, "--methods", *methods[:1])
    first = json.loads((tmp_path / "peft.json").read_text())["rows"]
    script("compare_peft", *words)
    rows = json.loads((tmp_path / "peft.json").read_text())["rows"]
    assert rows[:1] == first and [row["method"] for row in rows] == list(methods)
    runs = {run["method"]: run for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]}
    for row in rows:
        mine = runs[row["method"]]
        # PEFT has one gate for each of the two layers, we have one for each of their four heads
        gates = 2 * 3 if row["method"] == "llama-adapter" else 0
        assert row["trainable_parameters"] == mine["trainable_parameters"] - gates, row["method"]
        assert len(row["losses"]) == len(mine["losses"]) == 8 and row["losses"] != mine["losses"]
        assert row["start"] == ("text" if row["method"] == "soft-prompt" else "random")
        assert 0 <= row["accuracy"] <= 1 and row["fastadapter_accuracy"] == mine["accuracy"]
    printed = capsys.readouterr().out.rpartition("| method | PEFT's start |")[2]
    for row in rows:
        figures = f"{100 * row['fastadapter_accuracy']:.1f} % | {100 * row['accuracy']:.1f} %"
        assert f"| {row['method']} | {row['start']} | {row['learning_rate']:g} | 0 | {figures} |" in printed
