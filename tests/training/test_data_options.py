"""The options that name records: what a run is given, and what is refused before a model is loaded."""

import argparse
import json

import pytest

from fastadapter.cli import main
from fastadapter.cli.data_options import add_data_arguments, describe_data, read_data, templates
from fastadapter.training import UserError
from tests.training.toy import make_model, make_tokenizer

TEXTS = [{"text": f"w{n}", "label": "good" if n % 2 else "bad"} for n in range(10)]
PAIRS = [{"prompt": f"w{n}", "completion": "good"} for n in range(10)]
CHATS = [
    {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "good"}]} for n in range(10)
]  # fmt: skip


@pytest.fixture
def parse(tmp_path):
    """The options, with ``--data`` a file of the records."""

    def options(records, *words, task="generation", held_out=True, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        parser = argparse.ArgumentParser()
        parser.add_argument("--seed", type=int, default=0)
        add_data_arguments(parser.add_argument_group("data"), held_out=held_out)
        parser.set_defaults(task=task)
        return parser.parse_args(["--data", str(path), *words])

    return options


def test_defaults(parse):
    args = parse(TEXTS)
    assert (args.truncation, args.parse_special_tokens, args.columns) == ("error", False, None)
    train, held_out = read_data(args, tell=False)
    assert (len(train), held_out, train[1].prompt) == (10, None, "Review: w1\nSentiment:")
    kept = parse(TEXTS, held_out=False)
    assert (kept.truncation, kept.parse_special_tokens) == (None, None)
    assert read_data(kept, tell=False)[0] == train and not hasattr(kept, "eval_data")


@pytest.mark.parametrize("words, expected", [
    (["--truncate-prompt"], "prompt"), (["--truncation", "end"], "end"), (["--truncation", "prompt"], "prompt")
])  # fmt: skip
def test_spellings_of_truncation(parse, words, expected):
    assert parse(TEXTS, *words).truncation == expected


def test_splits_by_file_count_and_fraction(parse, tmp_path, capsys):
    for words in (["--eval-count", "3"], ["--eval-fraction", "0.3"]):
        train, held_out = read_data(parse(TEXTS, *words), tell=True)
        assert (len(train), len(held_out)) == (7, 3)
    other = tmp_path / "other.csv"
    other.write_text("text,label\nw1,good\nw99,bad\n")
    train, held_out = read_data(parse(TEXTS, "--eval-data", str(other)), tell=True)
    assert (len(train), len(held_out)) == (9, 2)
    assert "1 training records left out" in capsys.readouterr().err


@pytest.mark.parametrize("records, words, task, message", [
    (PAIRS, ["--template", "{text}"], "generation", "--template is for text/label records, but .* prompt/completion"),
    (CHATS, ["--completion-template", "{label}"], "generation", "--completion-template is for text/label records"),
    (TEXTS, ["--system-prompt", "s"], "generation", "--system-prompt is for conversation records, but .* text/label"),
    (CHATS, ["--system-prompt", " "], "generation", "--system-prompt is empty"),
    (CHATS, ["--append-eos"], "generation", "--append-eos is for completions"),
    (TEXTS, ["--completion-template", "{label}"], "classification", "a classification has no completions"),
    (TEXTS, ["--template", "{label}"], "generation", r"--template must hold \{text\} and no other field"),
    (TEXTS, ["--template", "{text"], "classification", r"--template '\{text'"),
    (TEXTS, ["--completion-template", "x"], "generation", r"--completion-template must hold \{label\}"),
    (TEXTS, ["--max-record-bytes", "0"], "generation", "--max-record-bytes must be at least 1, got 0"),
    (TEXTS, ["--max-record-bytes", "5"], "generation", "a.jsonl line 1: the record has more than 5 bytes"),
    (TEXTS, ["--columns", "text=review"], "generation", r"line 1: has no field 'review' \(columns: text=review\)"),
    (TEXTS, ["--eval-fraction", "1"], "generation", "--eval-fraction must be between 0 and 1"),
    (TEXTS, [], "regression", "line 1: field 'label' must be a finite number, got 'bad'"),
    (CHATS, ["--eval-data", "PAIRS"], "generation", "hold records of different kinds"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(parse, tmp_path, records, words, task, message):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    args = parse(records, *[str(pairs) if word == "PAIRS" else word for word in words], task=task)
    with pytest.raises(UserError, match=message):
        read_data(args, tell=False)


@pytest.mark.parametrize("value, message", [
    ("prompt", "expected FIELD=COLUMN,FIELD=COLUMN, got 'prompt'"),
    ("prompt=", "expected FIELD=COLUMN"),
    ("prompt=q,prompt=r", "names 'prompt' twice"),
    ("answer=a", "a field is one of prompt, completion"),
    ("", "expected FIELD=COLUMN"),
])  # fmt: skip
def test_columns_that_name_nothing_are_refused(parse, capsys, value, message):
    with pytest.raises(SystemExit):
        parse(PAIRS, "--columns", value)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--truncation", "start"], ["--truncation", "end", "--truncate-prompt"]])
def test_truncation_is_one_of_three(parse, capsys, words):
    with pytest.raises(SystemExit):
        parse(PAIRS, *words)
    assert "--truncat" in capsys.readouterr().err


def test_what_a_run_says_of_its_data(parse):
    args = parse(TEXTS, "--eval-count", "3", "--columns", "text=text,label=label")
    said = describe_data(args, *read_data(args, tell=False))
    assert said["template"] == templates(args)["template"] and said["completion_template"] == " {label}"
    assert (said["chat"], said["columns"], said["system_prompt"]) == (
        False,
        {"text": "text", "label": "label"},
        None,
    )
    assert said["data"] | {"digest": ""} == {
        "files": ["a.jsonl"], "digest": "", "train_records": 7, "eval_records": 3}  # fmt: skip
    assert len(said["data"]["digest"]) == 64
    for other in (parse(TEXTS, "--eval-count", "4"), parse(TEXTS[1:], "--eval-count", "3")):
        assert describe_data(other, *read_data(other, tell=False))["data"]["digest"] != said["data"]["digest"]
    chat = parse(CHATS, "--system-prompt", "s")
    said = describe_data(chat, *read_data(chat, tell=False))
    assert (said["chat"], said["template"], said["system_prompt"]) == (True, None, "s")
    asked = parse([{"instruction": "Sing {it}.", "output": "la"}])
    said = describe_data(asked, *read_data(asked, tell=False))
    assert said["template"].format(text="Sing {it}.") == read_data(asked, tell=False)[0][0].prompt
    # Who evaluates that run is told the same template, and reads the same records.
    asked.template = said["template"]
    assert (
        read_data(asked, tell=False)[0]
        == read_data(parse([{"instruction": "Sing {it}.", "output": "la"}]), True)[0]
    )
    texts = parse(TEXTS, task="classification")
    said = describe_data(texts, *read_data(texts, tell=False))
    assert (said["template"], said["completion_template"]) == ("{text}", None)


@pytest.mark.parametrize("name", ["chat", "columns", "instruction"])
def test_finetune_takes_every_kind(tmp_path, capsys, name):
    """From the file to a trained adapter, with held-out records."""
    folder = tmp_path / "model"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file, words = tmp_path / "data.json", []
    if name == "chat":
        file.write_text(json.dumps(CHATS))
    elif name == "columns":
        file.write_text(json.dumps([{"q": f"w{n}", "a": "good </s>"} for n in range(10)]))
        words = ["--columns", "prompt=q,completion=a"]
    else:
        file.write_text(json.dumps([{"instruction": f"w{n}", "output": "good"} for n in range(10)]))
        words = ["--max-length", "12", "--truncate-prompt"]
    out = [
        "--output-dir",
        str(tmp_path / "out"),
        "--num-train-epochs",
        "1",
        "--eval-count",
        "2",
        "--layers",
        "1",
    ]
    assert (
        main(["finetune", "--model", str(folder), "--data", str(file), "--device", "cpu", *words, *out]) == 0
    )
    printed, said = capsys.readouterr()
    assert ("8 of 8 records hold special tokens, the first of them '</s>'" in said) == (name == "columns")
    assert "on 8 records" in printed and (tmp_path / "out" / "adapter.safetensors").exists()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["template"] is not None) == (name == "instruction")
