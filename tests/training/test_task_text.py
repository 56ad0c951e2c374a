"""Prompts and prefixes of ``finetune`` start from what the template says of the task, and from nothing it does not."""

import json

import pytest
from safetensors import safe_open

import fastadapter as fa
from fastadapter.cli import main
from fastadapter.training import from_text, task_text
from tests.training.toy import make_classifier, make_examples, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def finetune(model_folder, tmp_path):
    """One epoch on 6 toy records; the configuration that is saved with the adapter."""

    def command(*words, kind="text", model=model_folder, status=0):
        data, out = tmp_path / f"{kind}.jsonl", tmp_path / "out"
        fields = {"text": ("text", "label"), "prompt": ("prompt", "completion")}[kind]
        values = [(e.prompt.replace("\n", " "), e.label) for e in make_examples(6)]
        data.write_text("".join(json.dumps(dict(zip(fields, each, strict=True))) + "\n" for each in values))
        more = ("--num-train-epochs", "1", "--output-dir", str(out))
        assert main(["finetune", "--model", str(model), "--data", str(data), *more, *words]) == status
        if status:
            return None
        with safe_open(out / "adapter.safetensors", "pt") as file:
            return json.loads(file.metadata()["config"])

    return command


@pytest.mark.parametrize(
    "template, text",
    [
        ("Review: {text}\nSentiment:", "Review: \nSentiment:"),
        ("{text}", None),
        ("{text}\n", None),
        ("{{{text}}} is", "{} is"),
        ("### {instruction}\n{input}\n###", "### \n\n###"),
    ],
)
def test_the_task_text_is_the_template_without_its_record(template, text):
    assert task_text(template) == text


def test_only_methods_with_such_a_start_take_the_text():
    for config in (fa.PrefixTuningConfig(4), fa.LlamaAdapterConfig(4), fa.SoftPromptConfig(4)):
        started = from_text(config, "some text")
        assert (started.init, started.init_text) == ("text", "some text")
        assert from_text(config, None) is config and from_text(started, "another") is started
    for config in (fa.BottleneckConfig(), fa.PrefixTuningConfig(4, reparam_size=3)):
        assert from_text(config, "some text") is config
    assert from_text(fa.PrefixTuningConfig(4, reparam_size=4), "some text").init == "text"


@pytest.mark.parametrize("method", ["prefix-tuning", "soft-prompt", "llama-adapter"])
def test_finetune_starts_from_its_template(finetune, method):
    assert finetune("--adapter", method)["init_text"] == "Review: \nSentiment:"


@pytest.mark.parametrize(
    "words, kind, init, text",
    [
        (("--template", "{text} ?"), "text", "text", " ?"),
        (("--init", "random"), "text", "random", None),
        (("--init-text", r"w1\nw2"), "text", "text", "w1\nw2"),
        ((), "prompt", "random", None),
        (("--init-text", "w1"), "prompt", "text", "w1"),
        (("--reparam-size", "8"), "text", "random", None),
    ],
)  # fmt: skip
def test_what_is_chosen_counts_and_without_a_template_the_start_is_random(finetune, words, kind, init, text):
    found = finetune("--adapter", "prefix-tuning", *words, kind=kind)
    assert (found["init"], found["init_text"]) == (init, text)


def test_a_classifiers_template_says_nothing_unless_it_is_given(finetune, tmp_path):
    folder = tmp_path / "classifier"
    make_classifier("bert").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    words = ("--adapter", "prefix-tuning", "--task", "classification")
    assert finetune(*words, model=folder)["init"] == "random"
    for file in (tmp_path / "out").rglob("*.*"):
        file.unlink()
    assert finetune(*words, "--template", "Review: {text}", model=folder)["init_text"] == "Review: "


@pytest.mark.parametrize(
    "words, message",
    [
        (("--adapter", "prefix-tuning", "--init", "text"), "init_text must hold the text that init='text' starts"),
        (("--adapter", "prefix-tuning", "--init", "words"), "init must be one of random, zero, text, got 'words'"),
        (("--adapter", "llama-adapter", "--init-text", " "), "init_text must hold a word"),
        (("--adapter", "bottleneck", "--init-text", "w1"), "--init-text: bottleneck has no such option"),
        (("--adapter", "soft-prompt", "--init", "random", "--init-text", "w1"), "init must be 'text' where init_text"),
    ],
)  # fmt: skip
def test_a_start_that_makes_no_sense_is_one_line_before_a_model_is_loaded(
    finetune, words, message, capsys, tmp_path
):
    finetune(*words, model=tmp_path / "none", status=2)
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_model_that_cannot_read_the_text_is_said_to_start_at_random(finetune, monkeypatch, capsys):
    def refuse(*_):
        raise TypeError("nothing to read with")

    monkeypatch.setattr("fastadapter.integrations.verbs.attach.start_from_text", refuse)
    assert finetune("--adapter", "prefix-tuning")["init"] == "random"
    assert "no start from the template's text, but a random one: nothing to read" in capsys.readouterr().err


def test_a_run_that_started_from_a_text_goes_on(finetune, capsys):
    words = ("--adapter", "prefix-tuning", "--save-steps", "1")
    found = finetune(*words)
    assert finetune(*words, "--resume") == found
    finetune(*words, "--resume", "--init", "random", status=2)
    assert "fastadapter: error" in capsys.readouterr().err
