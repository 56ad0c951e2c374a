"""``fastadapter finetune`` and ``generate`` on a saved toy model: what they print, write and refuse, and exit codes."""

import argparse
import json
import os
import shutil
import signal
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastadapter as fa
from fastadapter.cli import main
from fastadapter.cli.loading import add_model_arguments, device_and_dtype
from fastadapter.cli.method_options import add_method_arguments, method_config
from fastadapter.training import read_labels, tasks
from tests.training.toy import (
    adapter_bits,
    make_classifier,
    make_examples,
    make_model,
    make_tokenizer,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "reviews.csv"
    rows = [
        (e.prompt.removeprefix("Review: ").removesuffix("\nSentiment:"), e.label) for e in make_examples(30)
    ]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.fixture
def finetune(model_folder, data, tmp_path):
    """Run the command on the toy; options replace its own, ``None`` leaves one away."""

    def command(**options):
        options = {
            "model": model_folder,
            "data": data,
            "eval_count": 10,
            "output_dir": tmp_path / "out",
            "batch_size": 4,
            "prefix_len": 3,
            **options,
        }
        words = []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return main(["finetune", *words])

    return command


def test_passes_begin_behind_the_trunk_where_that_is_asked_for(finetune, tmp_path, capsys):
    cache = {"trunk_cache": True, "trunk_cache_dir": tmp_path / "cache", "num_train_epochs": 1}
    assert finetune(output_dir=tmp_path / "none", **cache) == 2
    assert "trunk_cache: what is trained acts from the first block on" in capsys.readouterr().err
    assert finetune(layers=1, json=tmp_path / "out.json", **cache) == 0
    assert json.loads((tmp_path / "out.json").read_text())["trunk_cache"]["blocks"] == 1
    assert main(["cache", "--trunk-cache-dir", str(tmp_path / "cache"), "--clear"]) == 0
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "options, why",
    [
        (
            {"trunk_cache_dtype": "bf16"},
            "--trunk-cache-dtype bf16 changes the numbers, so it needs --trunk-cache",
        ),
        ({"no_trunk_cache": True, "trunk_cache_dir": "x"}, "--trunk-cache-dir goes without --no-trunk-cache"),
        ({"trunk_cache_gib": 0}, "--trunk-cache-gib must be above 0, got 0"),
        ({"trunk_cache_gib": "nan"}, "--trunk-cache-gib must be above 0, got nan"),
    ],
)
def test_options_of_the_trunk_cache_that_do_not_go_together(finetune, tmp_path, capsys, options, why):
    assert finetune(**options) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["finetune", "generate", "compare"])
def test_a_gpu_that_is_asked_for_must_be_there(command, model_folder, data, tmp_path, capsys):
    """No fallback to the CPU; and nothing is written."""
    out = ["--data", str(data), "--output-dir", str(tmp_path / "out")]
    words = ["--prompt", "w1"] if command == "generate" else out
    assert main([command, "--model", str(model_folder), "--device", "cuda", *words]) == 2
    assert "--device cuda: torch" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "device, capability, word, expected",
    [
        ("auto", None, "auto", ("cpu", "fp32")),
        ("auto", (9, 0), "auto", ("cuda", "bf16")),
        ("cuda", (7, 5), "auto", ("cuda", "fp32")),
        ("cpu", (9, 0), "auto", ("cpu", "fp32")),
        ("auto", (9, 0), "float32", ("cuda", "fp32")),
        ("auto", None, "bfloat16", ("cpu", "bf16")),
    ],
)
def test_device_and_dtype(device, capability, word, expected, monkeypatch):
    """auto: a GPU if there is one, and bf16 on one that computes in it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    args = parser.parse_args(["--model", "m", "--device", device, "--dtype", word])
    assert (device_and_dtype(args).type, args.dtype) == expected


@pytest.mark.parametrize("more", [(), ("--cache-implementation", "static")], ids=["dynamic", "static"])
def test_generate_with_either_cache(more, model_folder, capsys):
    words = ["--model", str(model_folder), "--prompt", "w1 w2", "--max-new-tokens", "4"]
    assert main(["generate", *words]) == 0
    printed = capsys.readouterr().out
    assert main(["generate", *words, *more]) == 0 and capsys.readouterr().out == printed


def test_finetune_then_generate(finetune, model_folder, tmp_path, capsys):
    report = tmp_path / "reports" / "run.json"
    assert finetune(json=report, layers=1, num_train_epochs=3) == 0
    printed = capsys.readouterr()
    assert f"use it: fastadapter generate --adapter {tmp_path / 'out'} --prompt ..." in printed.out
    assert "epoch 3 of 3: loss" in printed.err
    record = json.loads(report.read_text())
    assert record["config"]["training"]["batch_size"] == 4 and record["config"]["adapter"]["layers"] == 1
    assert record["config"]["model"] == str(model_folder)
    assert len(record["epochs"]) == 3 and record["epochs"][0].keys() >= {"loss", "tokens", "seconds"}
    assert 0 <= record["eval"]["accuracy_before"] <= 1 and 0 <= record["eval"]["accuracy_after"] <= 1
    assert record["peak_rss_bytes"] > 0

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    answers = tmp_path / "answers.jsonl"
    words = [
        "--model",
        model_folder,
        "--adapter",
        tmp_path / "out",
        "--max-new-tokens",
        "4",
        "--file",
        prompts,
    ]
    words = ["generate", *map(str, words), "--template", r"Review: {text}\nSentiment:"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert main([*words, "--output", str(answers)]) == 0 and not capsys.readouterr().out
    model = fa.load(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "out")
    tokenizer = make_tokenizer()
    for text, line in zip(("w1 w2", "w3"), answers.read_text().splitlines(), strict=True):
        record = json.loads(line)
        ids = tokenizer(f"Review: {text}\nSentiment:", return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert record["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert record["completion"].strip() in printed.out
        assert (record["prompt_tokens"], record["new_tokens"]) == (ids.shape[1], len(new))


def test_sampling_is_seeded_and_the_bare_model_can_be_asked(model_folder, tmp_path, capsys):
    def ask(*options):
        words = ["--prompt", "w1 w2", "--max-new-tokens", "12", *options]
        assert main(["generate", "--model", str(model_folder), *words]) == 0
        return capsys.readouterr().out

    sampled = ["--do-sample", "--temperature", "2.0", "--top-p", "0.9"]
    assert ask(*sampled, "--seed", "3") == ask(*sampled, "--seed", "3") != ask(*sampled, "--seed", "4")
    assert ask() == ask("--seed", "5")


def test_held_out_file_and_dropped_rows(finetune, data, tmp_path, capsys):
    held_out = tmp_path / "held_out.jsonl"
    lines = [line.split(",") for line in data.read_text().splitlines()[1:4]]
    held_out.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in lines))
    assert finetune(eval_count=None, eval_data=held_out, num_train_epochs=1) == 0
    assert "3 training records left out" in capsys.readouterr().err


def test_packing_says_what_became_of_it(finetune, tmp_path, capsys):
    assert finetune(packing=True, pack_length=60, num_train_epochs=1) == 0
    told = capsys.readouterr().err
    assert "packing: up to 60 tokens in a forward pass, attention " in told and "utilisation 100.0%" in told
    assert json.loads((tmp_path / "out" / "run.json").read_text())["packing"]["pack_length"] == 60


def test_fraction_split_bf16_and_resume_after_the_end(finetune, tmp_path, capsys):
    options = {"eval_count": None, "eval_fraction": 0.2, "num_train_epochs": 1, "dtype": "bf16"}
    assert finetune(**options) == 0
    bits = adapter_bits(tmp_path / "out")
    assert finetune(**options) == 2
    assert "holds a run" in capsys.readouterr().err
    assert finetune(**options, resume=True) == 0
    assert adapter_bits(tmp_path / "out") == bits
    capsys.readouterr()
    assert finetune(**options, resume=True, learning_rate=0.5) == 2
    assert "training.learning_rate was 0.01, now 0.5" in capsys.readouterr().err


def test_sigterm_gives_143_and_resumes(finetune, tmp_path, monkeypatch, capsys):
    assert finetune(output_dir=tmp_path / "whole") == 0
    plain = tasks.supervised_loss
    calls = []

    def stopping(model, batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    monkeypatch.setattr(tasks, "supervised_loss", stopping)
    capsys.readouterr()
    assert finetune() == 143
    printed = capsys.readouterr()
    assert "fastadapter: stopped by SIGTERM after step 3" in printed.err and not printed.out
    assert finetune(resume=True) == 0
    assert adapter_bits(tmp_path / "out") == adapter_bits(tmp_path / "whole")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"model": "/nowhere/model"}, "--model /nowhere/model: expected a folder or a hub name"),
        ({"model": "no/such-model"}, "--model no/such-model: cannot be loaded"),
        ({"template": "no field"}, "template must hold {text}"),
        ({"eval_count": 30}, "held-out examples must be between 1 and 29, got 30"),
        ({"eval_count": None, "eval_fraction": 1.5}, "--eval-fraction must be between 0 and 1"),
        ({"learning_rate": -1}, "learning_rate must be finite, above 0, got -1"),
        ({"prefix_len": 0}, "prefix_len must be between 1 and"),
        ({"layers": 3}, "layers must be at most 2"),
        ({"max_length": 5}, "reviews.csv line"),
        ({"pack_length": 40}, "pack_length goes with packing"),
        ({"packing": True, "pack_length": 9}, "tokens, a pack at most 9; raise pack_length"),
        ({"gguf_file": "none.gguf"}, "cannot be loaded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_print_one_line_and_write_nothing(finetune, tmp_path, capsys, options, message):
    assert finetune(**options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastadapter: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_malformed_data_is_named_with_its_line(finetune, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w1", "label": "good"}\n{"text": "w1", \n')
    assert finetune(data=bad) == 2
    assert f"{bad} line 2: malformed JSON" in capsys.readouterr().err


def test_a_model_that_lacks_weights_is_refused(finetune, model_folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    make_model().save_pretrained(broken)
    make_tokenizer().save_pretrained(broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert finetune(model=broken) == 2
    assert "lack 1 weights, the first of them model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_found_out_first(finetune, data, tmp_path, capsys):
    assert finetune(json=data / "run.json") == 2
    assert f"cannot write to {data}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """An encoder without a classification head."""
    folder = tmp_path_factory.mktemp("encoder")
    make_classifier("bert").bert.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_classification_names_its_classes(finetune, encoder_folder, model_folder, tmp_path, capsys, decoder):
    model = model_folder if decoder else encoder_folder
    report = tmp_path / "run.json"
    options = {"task": "classification", "model": model, "json": report, "layers": 1}
    assert finetune(**options) == 0
    printed = capsys.readouterr().out
    assert "classes bad, good" in printed and "use it: fastadapter classify --adapter" in printed
    record = json.loads(report.read_text())
    assert (
        record["config"]["task"]["labels"] == ["bad", "good"] and record["config"]["adapter"]["layers"] == 1
    )
    assert read_labels(tmp_path / "out") == ["bad", "good"]
    # The same head in the base, by the seed, and the same data order: the same run, bit for bit.
    assert finetune(**options, output_dir=tmp_path / "again") == 0
    assert adapter_bits(tmp_path / "again") == adapter_bits(tmp_path / "out")
    assert finetune(**options, resume=True) == 0
    assert finetune(**options, output_dir=tmp_path / "other", seed=1) == 0
    assert adapter_bits(tmp_path / "other") != adapter_bits(tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"completion_template": " {label}"}, "--completion-template: a classification has no completions"),
        ({"template": "no field"}, "template must hold {text}"),
        ({"reduction_factor": 3}, "--reduction-factor: llama-adapter has no such option; it has --modules-to-save"),
        ({"prefix_len": "many"}, "--prefix-len must be int, got 'many'"),
        ({"gate": "linear"}, "gate must be one of tanh, identity"),
    ],
)  # fmt: skip
def test_classification_refuses_with_one_line(finetune, encoder_folder, tmp_path, capsys, options, message):
    options = {"task": "classification", "model": encoder_folder, **options}
    assert finetune(**options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_constant_label_and_prompts_are_refused(finetune, encoder_folder, tmp_path, capsys):
    options = {"task": "classification", "model": encoder_folder, "eval_count": None}
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "w1", "label": "good"}\n{"text": "w2", "label": "good"}\n')
    assert finetune(**options, data=file) == 2
    assert "every training example has the label 'good'" in capsys.readouterr().err
    file.write_text('{"prompt": "w1", "completion": "good"}\n')
    assert finetune(**options, data=file) == 2
    assert "classification needs text/label records" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_lacks_more_than_its_head_is_refused(finetune, encoder_folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(encoder_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert finetune(task="classification", model=broken) == 2
    assert "lack 1 weights, the first of them bert.encoder.layer.0.output" in capsys.readouterr().err


@dataclass(frozen=True)
class _One:
    """A method.

    Args:
        size: how large; more words.
        rate: how fast. Another sentence.
    """

    size: int | None = 4
    rate: float | str = 0.5
    names: tuple[str, ...] | None = None
    method: ClassVar[str] = "one"


@dataclass(frozen=True)
class _Two:
    size: int = 8
    quick: bool = False
    method: ClassVar[str] = "two"


def test_every_field_of_a_method_is_an_option():
    methods = {"one": _One, "two": _Two}
    parser = argparse.ArgumentParser()
    add_method_arguments(parser, methods)

    def read(method, *words):
        return method_config(parser.parse_args(words), method, methods)

    assert read("one") == _One() and read("two") == _Two()
    assert read("one", "--size", "none", "--rate", "learned") == _One(None, "learned")
    assert read("one", "--rate", "2", "--names", "a.b, c") == _One(rate=2.0, names=("a.b", "c"))
    assert read("two", "--size", "3", "--quick") == _Two(3, True)
    with pytest.raises(ValueError, match="--quick: one has no such option; it has --size, --rate, --names"):
        read("one", "--no-quick")
    with pytest.raises(ValueError, match="--size must be int, got 'none'"):
        read("two", "--size", "none")
    help_text = " ".join(parser.format_help().split())
    assert "how large (default: 4, 8 of two)" in help_text and "how fast (one) (default: 0.5)" in help_text
