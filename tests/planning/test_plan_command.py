"""``fastadapter bench plan``: what it prints, its JSON, its own calibration, and what it refuses."""

import json

import pytest

from fastadapter.cli import main
from fastadapter.planning import calibrate
from tests.training.toy import make_tokenizer

PAPER = "--model llama-7b --layers 30 --data alpaca-like --max-length 512 --batch-size 32 --num-train-epochs 5".split()


def plan(*words):
    return main(["bench", "plan", *words])


def test_help_names_models_and_cards(capsys):
    with pytest.raises(SystemExit) as stopped:
        plan("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "llama-7b" in said and "h100-pcie" in said and "alpaca-like" in said


def test_the_papers_run_on_one_and_on_eight_cards(capsys):
    assert plan(*PAPER, "--gpu", "h100", "--num-gpus", "1", "8", "--records", "2000") == 0
    said = capsys.readouterr().out
    assert (
        "llama-7b: 6.74 billion parameters, bf16; llama-adapter, the top 30 of 32 blocks, 1,229,760" in said
    )
    assert "fastadapter, 8 GPUs" in said and "PEFT, padded, 8 GPUs" in said
    for word in ("step", "tokens/s", "5 epochs", "memory", "products, forward", "assumption", "not modelled"):
        assert word in said, word


def test_what_fits_on_some_cards_alone_is_planned_there(capsys):
    words = (
        "--model llama-7b --gpu h100 --data alpaca-like --records 2000 --num-gpus 1 8 --batch-size 64".split()
    )
    assert plan(*words) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 GPU: llama-7b") and "GiB too much" in said and "fastadapter, 8 GPUs" in said
    assert plan(*words, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["too_large"]) == ["1"] and len(record["runs"]) == 2


def test_json_holds_ranges_and_assumptions(capsys):
    assert plan(*PAPER, "--gpu", "h200", "--records", "500", "--packing", "--trunk-cache", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    ours, theirs = record["runs"]
    assert (ours["layout"], theirs["layout"]) == ("packed", "random")
    assert ours["total_seconds"]["low"] < ours["total_seconds"]["mid"] < ours["total_seconds"]["high"]
    assert ours["useful_share"] == 1 and ours["cache_bytes"] > 0 and ours["assumptions"]
    assert record["adapter"]["method"] == "llama-adapter" and record["model"]["parameters"] > 6e9


def test_this_cpu_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "SECONDS", 0.01)
    assert plan("--model", "smollm2", "--device", "cpu", "--threads", "1", "--data", "reviews", "--json") == 0
    device = json.loads(capsys.readouterr().out)["device"]
    assert device["tflops"]["fp32"] > 1e-4 and device["gb_per_s"] > 0.1 and "1 thread" in device["name"]


@pytest.mark.parametrize("adapter", ["llama-adapter-v2", "prefix-tuning", "soft-prompt", "bottleneck"])
def test_every_method_and_given_sizes(adapter, capsys):
    sizes = "--hidden-size 512 --num-hidden-layers 4 --num-attention-heads 8 --intermediate-size 1024 --vocab-size 1000"
    words = f"{sizes} --gpu a100 --mean-tokens 50 --records 64 --adapter {adapter}".split()
    assert plan(*words) == 0
    assert adapter in capsys.readouterr().out


def test_a_file_is_counted_with_a_tokenizer(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "model")
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2).save_pretrained(
        tmp_path / "model"
    )
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"prompt": "good", "completion": " film"}\n{"prompt": "bad bad", "completion": " film"}\n'
    )
    words = ["--model", str(tmp_path / "model"), "--gpu", "h100", "--data", str(data), "--batch-size", "2"]
    assert plan(*words, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["data"]["records"] == 2 and record["runs"][0]["steps_per_epoch"] == 1


def test_rows_beside_their_predictions(capsys):
    assert plan("--check") == 0
    said = capsys.readouterr().out
    assert "rows are inside the stated range" in said and "outside," in said and "not planned," in said


def test_factors_are_written(tmp_path):
    assert plan("--fit", str(tmp_path / "factors.json")) == 0
    record = json.loads((tmp_path / "factors.json").read_text())
    assert record["until"] >= "2026-11-27" and "step on a card" in record["factors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model llama-7b --data reviews", "--gpu must name a card (h200, h100"),
        ("--model llama-7b --gpu b999 --data reviews", "--gpu 'b999' is unknown: there is h200"),
        ("--model gpt-9 --gpu h100 --data reviews", "--model 'gpt-9' is unknown: there is minilm"),
        ("--gpu h100 --data reviews --hidden-size 64", "missing: --num-hidden-layers, --num-attention-heads"),
        ("--model llama-7b --gpu h100", "either --data or --mean-tokens must be given"),
        ("--model llama-7b --gpu h100 --mean-tokens 9", "--mean-tokens needs --records"),
        (
            "--model llama-7b --gpu h100 --data reviews --num-gpus 0",
            "--num-gpus must be an int of at least 1, got 0",
        ),
        ("--model llama-7b --gpu h100 --data reviews --records 0", "--records must be at least 1, got 0"),
        ("--model llama-7b --gpu h100 --data reviews --std-tokens 3", "--std-tokens goes with --mean-tokens"),
        (
            "--model llama-7b --gpu h100 --data reviews --template {text}",
            "--template is for a file of records",
        ),
        ("--model llama-7b --gpu h100 --data reviews --threads 2", "--threads 2 goes with --device cpu"),
        ("--model llama-7b --gpu h100 --data reviews --prompt-len 3", "llama-adapter has no such option"),
        ("--model llama-7b --gpu h100 --data reviews --layers 0", "layers must be at least 1"),
        ("--check --gpu h100", "--check is about all stored rows; --gpu has no say in it"),
        ("--model llama-65b --gpu l40s --data reviews", "GiB too much"),
        (
            "--model llama-7b --gpu h100 --data nowhere.jsonl",
            "--tokenizer must say what to count nowhere.jsonl with",
        ),
    ],
    ids=lambda value: value,
)
def test_what_is_refused(words, said, capsys):
    assert plan(*words.split()) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_records_is_refused(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    words = ["--model", "llama-7b", "--gpu", "h100", "--tokenizer", str(tmp_path)]
    assert plan(*words, "--data", str(tmp_path / "empty.jsonl")) == 2
    assert "empty.jsonl" in capsys.readouterr().err
