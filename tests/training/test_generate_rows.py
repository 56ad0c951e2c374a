"""``fastadapter generate --adapters``: one adapter per line, many lines in one batch."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastadapter as fa
from fastadapter.cli import main
from tests.support.methods import train_a_little
from tests.training.toy import make_model, make_tokenizer

METHODS = {"a": fa.PrefixTuningConfig(prefix_len=3), "b": fa.BottleneckConfig(bottleneck_size=4)}


@pytest.fixture
def folders(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name, config in METHODS.items():
        model = fa.attach(make_model(), config)
        train_a_little(model)
        fa.save(model, tmp_path / name)
    return tmp_path


def ask(folders, lines, *options):
    file = folders / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", folders / "model", "--file", file, "--max-new-tokens", "4", *options]
    return main(["generate", *map(str, words)])


def test_every_line_is_answered_by_its_adapter(folders, capsys):
    names = ["a", None, "b", "a", "b"]
    lines = [{"prompt": f"w{n} w2 w{n + 1}"[: 5 + n], "adapter": name} for n, name in enumerate(names)]
    given = [f"{name}={folders / name}" for name in METHODS]
    answers = folders / "answers.jsonl"
    assert ask(folders, lines, "--adapters", *given, "--batch-size", "3", "--output", answers) == 0
    capsys.readouterr()
    assert ask(folders, lines, "--adapters", *given, "--batch-size", "3") == 0
    printed = capsys.readouterr().out
    tokenizer = make_tokenizer()
    for line, record in zip(lines, map(json.loads, answers.read_text().splitlines()), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folders / "model")
        if line["adapter"]:
            fa.load(model, folders / line["adapter"])
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        expected = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert record["completion"] == expected and record["adapter"] == line["adapter"]
        assert expected in printed


@pytest.mark.parametrize(
    "lines, options, message",
    [
        ([{"prompt": "w1"}], ("a={}/a",), "field 'adapter' is missing"),
        ([{"prompt": "w1", "adapter": "c"}], ("a={}/a",), "no adapter 'c'; --adapters names a"),
        ([{"prompt": "w1", "adapter": "a"}], ("a",), "--adapters must be NAME=PATH, got 'a'"),
        ([{"prompt": "w1", "adapter": "a"}], ("a={}/a", "a={}/b"), "names 'a' twice"),
        (
            [{"prompt": "w1", "adapter": "a"}],
            ("a={}/a", "--batch-size", "0"),
            "--batch-size must be at least 1, got 0",
        ),
    ],
)
def test_bad_requests(folders, capsys, lines, options, message):
    given = [option.format(folders) for option in options]
    assert ask(folders, lines, "--adapters", *given) == 2
    assert message in capsys.readouterr().err
