"""``fastadapter compare`` on toys: the figures it reports, what it reads back, and what it refuses.

A run in a process of its own costs seconds of imports, so most tests do the jobs in this process; one uses real ones.
"""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadapter.cli import compare as command
from fastadapter.cli import compare_job
from fastadapter.compare import (
    METHODS_TO_COMPARE,
    resolve_methods,
    summarise,
    with_options,
    worker,
)
from fastadapter.compare import run as runs
from fastadapter.compare.baselines import STRENGTHS, embed, fit_regression, in_context
from fastadapter.compare.report import markdown, table
from fastadapter.training import TrainingConfig, classification
from fastadapter.training.trunk import worth
from tests.training.toy import make_classifier, make_examples, make_model, make_texts, make_tokenizer

FAST = ("features", "last-layers", "llama-adapter")


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_method_gets_a_row_with_its_figures(compare, calls, tmp_path, capsys, kind):
    assert compare(kind=kind, seeds="0") == 0
    assert calls == [f"{name}/0" for name in METHODS_TO_COMPARE]
    record = results(tmp_path / "out")
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == list(METHODS_TO_COMPARE)
    total = record["runs"][0]["model_parameters"]
    undefined = [row["method"] for row in rows.values() if "not_defined" in row]
    assert undefined == ["in-context"]  # an encoder, and a backbone without the head of a language model
    for run in record["runs"]:
        if run["method"] in undefined:
            continue
        assert 0 <= run["accuracy"] <= 1 and run["model_kind"] == ("encoder" if kind == "bert" else "decoder")
        assert (run["seconds"] > 0) == (run["method"] != "in-context") and run["peak_memory_bytes"] > 1 << 20
        assert run["train_rows"] == (0 if run["method"] == "in-context" else 30)
        assert run["test_rows"] == 10 and run["machine"]["cpu"]
        if run["method"] not in ("features", "in-context"):
            assert run["learning_rate"] == METHODS_TO_COMPARE[run["method"]].learning_rates[run["model_kind"]]
            assert len(run["epochs"]) == 2 and len(run["losses"]) == 16
            assert run["accuracy"] == run["epochs"][-1]["eval_accuracy"]
            assert "accuracy_before" not in run, "nobody reads it"
        assert not (tmp_path / "out" / "runs" / run["method"] / "seed-0" / "last").exists()
    assert rows["all-layers"]["trainable_parameters"] == total and rows["all-layers"]["trainable_share"] == 1
    assert rows["features"]["trainable_parameters"] == 33
    assert rows["last-layers"]["trainable_parameters"] < rows["last-blocks"]["trainable_parameters"] <= total
    assert rows["pfeiffer"]["trainable_parameters"] < rows["houlsby"]["trainable_parameters"] < total
    # the article's figures are of movie reviews; beside these texts they would say nothing
    assert not any(row["article"] for row in rows.values())
    for name in ("accuracy_parameters.png", "accuracy_time.png", "learning_curves.png"):
        assert (tmp_path / "out" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "out" / "comparison.md").read_text()
    printed = capsys.readouterr().out
    assert all(line in printed for line in page.splitlines() if line.startswith("|"))
    assert str(tmp_path) not in page and "article" not in page + printed
    assert all(f"| {name} |" in page for name in rows)


def test_finished_runs_are_read_back_and_more_can_be_added(compare, calls, tmp_path):
    assert compare(*FAST[:2]) == 0
    assert calls == ["features/0", "last-layers/0", "last-layers/1"], "no seed changes features"
    before = results(tmp_path / "out")["runs"]
    calls.clear()
    assert compare(*FAST, seeds="0 1 2") == 0
    assert calls == ["last-layers/2", "llama-adapter/0", "llama-adapter/1", "llama-adapter/2"]
    record = results(tmp_path / "out")
    assert [run for run in record["runs"] if run in before] == before
    row = record["rows"][1]
    accuracies = [run["accuracy"] for run in record["runs"] if run["method"] == "last-layers"]
    assert row["seeds"] == [0, 1, 2] and row["accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert (row["accuracy_min"], row["accuracy_max"]) == (min(accuracies), max(accuracies))
    losses = [run["losses"] for run in record["runs"] if run["method"] == "last-layers"]
    assert losses[0] != losses[1] != losses[2], "seeds must differ in head and order"
    splits = {run["test_rows"] for run in record["runs"]}
    assert splits == {10}


def test_seeds_share_the_states_of_a_trunk(compare, calls, tmp_path, monkeypatch):
    """Heads and orders of the rows differ, the blocks below do not."""
    monkeypatch.setitem(worth._LEAST, "cpu", 0)
    assert compare("last-layers", trunk_cache_dir=tmp_path / "cache", num_train_epochs=1) == 0
    caches = [run["trunk_cache"] for run in results(tmp_path / "out")["runs"]]
    assert [each["computed_tokens"] > 0 for each in caches] == [True, False]
    assert caches[0]["trunk"] == caches[1]["trunk"]
    assert compare("last-layers", seeds="2", no_trunk_cache=True, num_train_epochs=1) == 0
    assert results(tmp_path / "out")["runs"][0]["trunk_cache"] is None
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_an_interrupted_run_goes_on_where_it_was(compare, calls, tmp_path, monkeypatch, capsys):
    assert compare("last-layers", "llama-adapter", output_dir=tmp_path / "whole", seeds="0") == 0
    plain, passes = classification.class_logits, []

    def stopping(*args):
        passes.append(1)
        if len(passes) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(classification, "class_logits", stopping)
    calls.clear()
    capsys.readouterr()
    assert compare("last-layers", "llama-adapter", seeds="0", save_steps=1) == 143
    assert "stopped in last-layers, seed 0; the same command goes on" in capsys.readouterr().err
    assert calls == []
    assert compare("last-layers", "llama-adapter", seeds="0", save_steps=1) == 0
    assert calls == ["last-layers/0", "llama-adapter/0"]
    whole, resumed = results(tmp_path / "whole"), results(tmp_path / "out")
    for one, other in zip(whole["runs"], resumed["runs"], strict=True):
        assert (one["losses"], one["accuracy"]) == (other["losses"], other["accuracy"])


def test_another_comparison_or_another_rate_in_the_folder_is_refused(compare, calls, tmp_path, capsys):
    assert compare("last-layers", seeds="0") == 0
    page = (tmp_path / "out" / "comparison.md").read_text()
    for options, message in (
        ({"num_train_epochs": 3}, "another comparison: training.num_train_epochs was 2, now 3; choose"),
        ({"eval_count": 11}, "rows.test was 10, now 11; rows.train was 30, now 29"),
        ({"split_seed": 1}, "data_sha256.test was"),
        ({"template": "w1{text}"}, "template was '{text}', now 'w1{text}'"),
        ({"learning_rate": "last-layers=0.5"}, "learning_rate was None, now 0.5; remove it to run it again"),
    ):
        capsys.readouterr()
        assert compare("last-layers", seeds="0", **options) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert compare("last-layers", output_dir=tmp_path / "mine") == 2
    assert "holds files, but no comparison" in capsys.readouterr().err
    assert (tmp_path / "out" / "comparison.md").read_text() == page


def test_a_new_rate_of_the_other_kind_of_model_leaves_finished_runs_valid(compare, calls, tmp_path):
    assert compare("last-layers", seeds="0") == 0
    job = tmp_path / "out" / "runs" / "last-layers" / "seed-0" / "job.json"
    old = json.loads(job.read_text())
    assert old["default_learning_rates"].keys() == {"encoder", "decoder"}
    for kind, status in (("decoder", 0), ("encoder", 2)):
        job.write_text(
            json.dumps({**old, "default_learning_rates": {**old["default_learning_rates"], kind: 0.7}})
        )
        assert compare("last-layers", seeds="0") == status
    assert calls == ["last-layers/0"]


@pytest.mark.parametrize(
    "methods, options, message",
    [
        (["features", "lora"], {}, "method 'lora' is unknown; there is features, in-context, last-layers"),
        (["features"], {"data": "none.jsonl"}, "none.jsonl: no such file"),
        (["features"], {"seeds": "0 0"}, "--seeds must differ"),
        (["features"], {"seeds": "-1"}, "seed must be between 0 and"),
        (["features"], {"threads": 0}, "--threads must be at least 1"),
        (["features"], {"jobs": 0}, "--jobs must be at least 1, got 0"),
        (["features"], {"train_count": 0}, "--train-count must be at least 1"),
        (["features"], {"train_count": 31, "quick": True}, "--train-count must be at most 30"),
        (["features"], {"eval_count": 40}, "held-out examples must be between 1 and 39, got 40"),
        (["features"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["features"], {"learning_rate": "features=1"}, "features has none"),
        (["in-context"], {"learning_rate": "in-context=1"}, "in-context has none"),
        (["all-layers"], {"head_learning_rate": "all-layers=1"}, "all-layers=1: all-layers has none"),
        (["features"], {"head_learning_rate": "houlsby=1"}, "--head-learning-rate houlsby=1: houlsby is not among"),
        (["prefix-tuning"], {"init": "random", "init_text": "w1"}, "init_text goes with init 'text', got init"),
        (["prefix-tuning"], {"init_text": "\\n"}, "init_text must hold a word"),
        (["in-context"], {"init_text": "\\n"}, "init_text must hold a word"),
        (["soft-prompt"], {"reparam_size": 8}, "reparam_size 8 is of prefix-tuning, which is not among the methods"),
        (["prefix-tuning"], {"reparam_size": 0}, "reparam_size must be at least 1"),
        (["prefix-tuning"], {"reparam_size": 8, "init_text": "w1"}, "reparam_size must be at least prefix_len 20"),
        (["features"], {"learning_rate": "all-layers=1"}, "all-layers is not among --methods"),
        (["all-layers"], {"learning_rate": "all-layers=fast"}, "'fast' is not a number"),
        (["all-layers"], {"learning_rate": "all-layers"}, "must be METHOD=RATE"),
        (["all-layers"], {"learning_rate": "all-layers=0"}, "learning_rate must be finite, above 0"),
        (["all-layers"], {"data": "reviews", "eval_count": None, "eval_data": "x.csv"}, "reviews bring their own test"),
    ],
)  # fmt: skip
def test_bad_arguments_print_one_line_and_write_nothing(
    compare, calls, tmp_path, capsys, methods, options, message
):
    assert compare(*methods, **options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not calls


@pytest.mark.skipif(
    "head_learning_rate" not in TrainingConfig.__dataclass_fields__,
    reason="heads have no rate of their own here",
)
def test_a_head_may_have_a_rate_of_its_own(compare, calls, tmp_path, capsys):
    same, own = tmp_path / "same", tmp_path / "own"
    rate = {"head_learning_rate": "llama-adapter=0.5"}
    assert compare("llama-adapter", "last-layers", seeds="0", output_dir=same) == 0
    assert compare("llama-adapter", "last-layers", seeds="0", output_dir=own, **rate) == 0
    runs = {run["method"]: [run] for run in results(same)["runs"]}
    for run in results(own)["runs"]:
        runs[run["method"]].append(run)
    assert runs["last-layers"][0]["losses"] == runs["last-layers"][1]["losses"]
    assert runs["llama-adapter"][0]["losses"] != runs["llama-adapter"][1]["losses"]
    assert "| 0.03, head 0.5 |" in (own / "comparison.md").read_text()
    capsys.readouterr()
    assert compare("llama-adapter", seeds="0", output_dir=own) == 2
    assert "head_learning_rate was 0.5, now None" in capsys.readouterr().err


@pytest.mark.parametrize(
    "records, message",
    [
        ([("w1", "good"), ("w2", "good"), ("w3", "good")], "every training example has the label 'good'"),
        ([("w1", "good"), ("w2", "bad"), ("w3", "odd")], "is not among those of the training data"),
    ],
)
def test_bad_labels_are_refused_before_anything_is_written(
    compare, calls, tmp_path, capsys, records, message
):
    test = tmp_path / "test.csv"
    test.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in records[2:]))
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in records[:2]))
    assert compare("features", data=train, eval_data=test, eval_count=None) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_method_without_its_adapter_names_what_there_is(monkeypatch):
    monkeypatch.delitem(runs.Method.__init__.__globals__["METHODS"], "prefix-tuning")
    with pytest.raises(
        ValueError, match="'prefix-tuning' needs the adapter 'prefix-tuning'; this release has llama"
    ):
        resolve_methods(["prefix-tuning"])
    with pytest.raises(ValueError, match="at least one method"):
        resolve_methods([])
    assert [method.name for method in resolve_methods(["all-layers", "features"])] == [
        "features",
        "all-layers",
    ]


WITH_PROMPTS = ("prefix-tuning", "soft-prompt", "llama-adapter", "llama-adapter-v2")


def options_of(methods):
    return {method.name: dict(method.options) for method in methods}


def test_prompts_start_from_what_the_template_says():
    methods = resolve_methods(list(METHODS_TO_COMPARE))
    started = options_of(with_options(methods, "w1 {text} w2"))
    assert {name for name, options in started.items() if "init_text" in options} == {
        *WITH_PROMPTS,
        "in-context",
    }
    assert all(started[name] == {"init_text": "w1  w2"} for name in WITH_PROMPTS)
    assert started["houlsby"] == {"placement": "houlsby"}
    random = options_of(with_options(methods, "w1 {text} w2", init="random"))
    assert not any(random[name] for name in WITH_PROMPTS) and random["in-context"] == {"init_text": "w1  w2"}
    bare = options_of(with_options(methods, "{text}"))
    assert not any(bare[name] for name in WITH_PROMPTS) and bare["in-context"] == {"init_text": ""}
    told = options_of(with_options(methods, "{text}", init_text="w3", reparam_size=24))
    assert told["prefix-tuning"] == {"reparam_size": 24, "init_text": "w3"} and told["in-context"] == {
        "init_text": "w3"
    }
    narrow = options_of(with_options(methods, "w1 {text}", reparam_size=8))
    assert narrow["prefix-tuning"] == {"reparam_size": 8}, "too narrow to give chosen keys: starts at random"
    with pytest.raises(ValueError, match="init must be one of text, random, got 'zero'"):
        with_options(methods, "{text}", init="zero")


def test_a_text_start_is_what_runs_and_what_the_folder_knows(
    compare, calls, language_model, tmp_path, monkeypatch, capsys
):
    attached = []
    plain = worker.attach

    def attach(model, config, **options):
        attached.append(config)
        return plain(model, config, **options)

    monkeypatch.setattr(worker, "attach", attach)
    options = {"model": language_model, "seeds": "0", "num_train_epochs": 1}
    options |= {"template": r"Review:{text}\nSentiment:", "reparam_size": 30}
    assert compare("prefix-tuning", "soft-prompt", "llama-adapter", "in-context", **options) == 0
    assert [each.init_text for each in attached] == ["Review:\nSentiment:"] * 3
    assert attached[0].reparam_size == 30
    page = (tmp_path / "out" / "comparison.md").read_text()
    start = r'From the text `"Review:\nSentiment:"`: in-context, prefix-tuning, soft-prompt, llama-adapter.'
    assert start in page
    row = next(line for line in page.splitlines() if line.startswith("| in-context |"))
    assert row.split("|")[3:5] == [" 0 ", " 0.000% "]
    assert compare("prefix-tuning", **options) == 0 and len(attached) == 3, "read back"
    capsys.readouterr()
    assert compare("prefix-tuning", **options, init="random") == 2
    assert r"options.init_text was 'Review:\nSentiment:', now None" in capsys.readouterr().err


def test_in_context_asks_the_language_model_behind_the_text():
    """Against candidates scored one at a time by hand, and with labels that cannot be told apart."""
    model, tokenizer = make_model(), make_tokenizer()
    examples = make_texts(12)
    found = in_context(model, tokenizer, examples, examples, TrainingConfig(), "w1 w2 ", progress=False)
    right = 0
    for example in examples:
        scores = {}
        for label in ("bad", "good"):
            ids = tokenizer(f"w1 w2 {example.prompt} {label}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores[label] = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item()
        right += max(scores, key=scores.get) == example.label
    assert found["accuracy"] == right / 12 and found["file_bytes"] == 6 and found["trainable_parameters"] == 0
    same = [dataclasses.replace(each, label={"good": "w1", "bad": "w1 w2"}[each.label]) for each in examples]
    reason = in_context(model, tokenizer, same, same, TrainingConfig(), "", progress=False)
    assert "the tokens of 'w1' begin those of 'w1 w2'" in reason


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_embeddings_are_those_of_one_text_at_a_time(kind):
    model, tokenizer = make_classifier(kind), make_tokenizer()
    texts = [tokenizer(example.prompt)["input_ids"] for example in make_examples(9)]
    base = model.bert if kind == "bert" else model.model
    with torch.no_grad():
        states = [base(torch.tensor([ids])).last_hidden_state[0] for ids in texts]
    mean = embed(model, texts, 0, 4)
    torch.testing.assert_close(mean, torch.stack([each.mean(0) for each in states]), rtol=1e-4, atol=1e-5)
    last = embed(model, texts, 0, 4, "last")
    torch.testing.assert_close(last, torch.stack([each[-1] for each in states]), rtol=1e-4, atol=1e-5)


def test_the_strength_of_the_regression_is_chosen_by_the_training_texts():
    """Noise asks for more regularisation than a clear rule; a class of one text cannot be split."""
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(120, 40))
    rule = (vectors[:, 0] > 0).astype(int)
    clear, loose = fit_regression(np.repeat(vectors, 3, 0), np.repeat(rule, 3))
    _, tight = fit_regression(vectors, draw.integers(0, 2, 120))
    assert tight < loose and clear.score(vectors, rule) > 0.95
    again, strength = fit_regression(vectors[:3], np.array([0, 1, 1]))
    assert strength == STRENGTHS[2] and again.predict(vectors[:3]).shape == (3,)


def test_the_table_says_what_a_method_that_is_not_defined_is_not():
    place = {"device": "cpu", "threads": 1, "date": "2026-01-01",
             "machine": {"cpu": "toy", "cores": 2, "torch": "2", "transformers": "5"}}  # fmt: skip
    run = {"accuracy": 0.5, "trainable_parameters": 5, "model_parameters": 100, "seconds_per_epoch": 1.0,
           "seconds": 2.0, "peak_memory_bytes": 2**20, "file_bytes": 1024, "learning_rate": 0.1, **place}  # fmt: skip
    made = [
        {"method": "last-layers", "seed": 0, **run},
        {"method": "last-layers", "seed": 1, **run, "accuracy": 0.7},
        {"method": "soft-prompt", "seed": 0, "not_defined": "no decoder", **place},
    ]  # fmt: skip
    rows = summarise(made)
    assert rows[0]["accuracy"] == pytest.approx(0.6) and rows[0]["accuracy_sd"] == pytest.approx(0.02**0.5)
    lines = table(rows)
    assert lines[2].startswith(
        "| last-layers | 60.0 % (50.0 to 70.0) | 5 | 5.000% | 1.0 | 2.0 | 1 MiB | 1 KiB | 0.1 | 87%"
    )
    assert lines[3].startswith("| soft-prompt | not defined for this model |")
    assert {line.count("|") for line in lines} == {11}
    settings = {"model": "m", "data": "d", "template": "It says:\n{text}", "rows": {"train": 3, "test": 100},
                "training": {"num_train_epochs": 1, "batch_size": 2}}  # fmt: skip
    page = markdown(settings, rows, made)
    assert "soft-prompt: no decoder." in page and "±4.9 points" in page
    assert r'texts put into `"It says:\n{text}"`; seeds 0, 1; 0 of soft-prompt.' in page


def test_the_quick_form_is_small(compare, calls, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(command.assets, "fetch_demo_reviews", lambda: Path("reviews.jsonl"))

    def split(path, train, test, seed):
        asked.update(train=train, test=test)
        rows = [{"text": f"w{i} w{i % 7}", "label": ("bad", "good")[i % 2]} for i in range(train + test)]
        return rows[:train], rows[train:]

    monkeypatch.setattr(command.assets, "split_reviews", split)
    options = {"data": "reviews", "seeds": None, "eval_count": None, "num_train_epochs": None, "quick": True}
    assert compare("last-layers", **options, batch_size=32) == 0
    assert asked == {"train": 400, "test": 200} and calls == ["last-layers/0"]
    settings = results(tmp_path / "out")["settings"]
    assert settings["training"]["num_train_epochs"] == 1 and settings["data"] == "reviews"
    (row,) = results(tmp_path / "out")["rows"]
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert row["article"] == 0.87 and "| the article's accuracy |" in page and "DistilBERT" in page
    options = {"seeds": None, "eval_count": None, "num_train_epochs": None, "quick": True}
    assert compare("last-layers", **options, output_dir=tmp_path / "file") == 0
    assert results(tmp_path / "file")["settings"]["rows"] == {"train": 32, "test": 8}
    assert compare("last-layers", **options, train_count=5, output_dir=tmp_path / "few") == 0
    assert results(tmp_path / "few")["settings"]["rows"] == {"train": 5, "test": 8}


def test_a_job_reports_a_bad_model_in_one_line(tmp_path, capsys):
    job = {"method": "features", "model": "/nowhere", "gguf_file": None, "dtype": "fp32", "seed": 0, "threads": 1,
           "template": "{text}", "train": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "a.jsonl")}  # fmt: skip
    (tmp_path / "a.jsonl").write_text('{"text": "w1", "label": "a"}\n{"text": "w2", "label": "b"}\n')
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert compare_job.main(tmp_path) == 2
    assert "fastadapter: error: --model /nowhere: expected a folder" in capsys.readouterr().err
