"""``fastadapter classify`` and ``explain`` on what a classification or regression has trained."""

import json

import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints.about import annotate
from fastadapter.cli import classify
from fastadapter.cli.loading import load_classifier
from tests.cli.conftest import read_lines
from tests.training.toy import CONTEXT, make_model, make_tokenizer

TEXTS = ["w1 w2", "w3", "good w4 w5 w6 w7", "bad w9", "w10 w11"]
LABELS = ["bad", "good", "odd"]


def classifier(base, labels=LABELS):
    """As the command loads it, with a head drawn by a seed."""
    return load_classifier(str(base), None, "fp32", labels, seed=0)[0]


@pytest.fixture
def trained(save_run, encoder_folder):
    """The folder of a classification."""
    return save_run(classifier(encoder_folder), encoder_folder, task="classification", labels=LABELS)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": each, "label": "x"}) + "\n" for each in TEXTS))
    return path


def expected(folder, base, texts, labels=LABELS):
    """Outputs for one text at a time."""
    model = fa.load(classifier(base, labels), folder)
    with torch.no_grad():
        return torch.cat(
            [model(**make_tokenizer()(text, return_tensors="pt")).logits for text in texts]
        ).double()


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("words", [(), ("--batch-size", 2), ("--batch-size", 1)], ids=str)
def test_probabilities_are_those_of_one_text_at_a_time(trained, encoder_folder, texts, fastadapter, words):
    status, out, err = fastadapter("classify", "--adapter", trained, "--file", texts, "--json", *words)
    assert status == 0 and not err
    probabilities = expected(trained, encoder_folder, TEXTS).softmax(-1)
    for text, row, record in zip(TEXTS, probabilities, lines_of(out), strict=True):
        assert record["text"] == text and list(record["probabilities"]) == LABELS
        assert list(record["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert record["label"] == LABELS[int(row.argmax())]


def test_a_decoder_and_a_line_for_a_reader(save_run, model_folder, fastadapter, stdin):
    folder = save_run(classifier(model_folder), model_folder, task="classification", labels=LABELS)
    status, out, err = fastadapter("classify", "--adapter", folder, "--text", *TEXTS)
    assert status == 0 and not err
    probabilities = expected(folder, model_folder, TEXTS).softmax(-1)
    for text, row, line in zip(TEXTS, probabilities, out.splitlines(), strict=True):
        likely = sorted(zip(LABELS, row.tolist()), key=lambda each: -each[1])
        assert line == ", ".join(f"{label} {share:.3f}" for label, share in likely) + f": {text}"
    stdin("\n".join(TEXTS))
    assert fastadapter("classify", "--adapter", folder)[1] == out


def test_a_regression_gives_numbers(save_run, encoder_folder, texts, fastadapter):
    folder = save_run(classifier(encoder_folder, ()), encoder_folder, task="regression")
    status, out, _ = fastadapter("classify", "--adapter", folder, "--file", texts, "--json")
    values = expected(folder, encoder_folder, TEXTS, ())[:, 0]
    assert status == 0 and [list(record) for record in lines_of(out)] == [["text", "value"]] * len(TEXTS)
    assert [record["value"] for record in lines_of(out)] == pytest.approx(values.tolist(), abs=1e-5)
    assert fastadapter("explain", "--adapter", folder)[0] == 0


def test_lines_for_a_reader():
    long = {"text": "a\n" * 100, "value": 12345.678}
    assert classify.readable(long) == f"1.235e+04: {'a ' * 39}a…"


def test_the_template_and_the_length_of_the_training(save_run, encoder_folder, fastadapter):
    training = {"max_length": 4, "truncation": "prompt"}
    known = {"labels": LABELS, "template": "good {text}", "training": training}
    folder = save_run(classifier(encoder_folder), encoder_folder, task="classification", **known)
    words = ("classify", "--adapter", folder, "--text", "w1 w2 w3 w4 w5", "--json")
    (record,) = lines_of(fastadapter(*words)[1])
    row = expected(folder, encoder_folder, ["good w1 w2 w3"])[0].softmax(-1)
    assert record["text"] == "w1 w2 w3 w4 w5"
    assert list(record["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
    status, _, err = fastadapter(*words, "--truncation", "error")
    assert status == 2 and "--text: the text has 6 tokens, at most 4 fit" in err
    (record,) = lines_of(fastadapter(*words, "--max-length", 40, "--template", "{text}")[1])
    row = expected(folder, encoder_folder, ["w1 w2 w3 w4 w5"])[0].softmax(-1)
    assert list(record["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
    assert "--template '{text}' in place of 'good {text}'" in fastadapter(*words, "--template", "{text}")[2]


def test_a_folder_from_before_run_json_needs_its_model(
    trained, encoder_folder, fastadapter, refused, monkeypatch
):
    """labels.json alone names the classes."""
    (trained / "run.json").unlink()
    (trained / "labels.json").write_text(json.dumps({"task": "classification", "labels": LABELS}))
    assert "--model is needed" in refused("classify", "--adapter", trained, "--text", "w1")
    words = ("--model", encoder_folder, "--adapter", trained)
    status, out, _ = fastadapter("classify", *words, "--text", "w1", "--json")
    assert status == 0 and list(lines_of(out)[0]["probabilities"]) == LABELS
    assert fastadapter("explain", *words)[0] == 0
    monkeypatch.chdir(encoder_folder.parent)  # where the name in the adapter's file is that of the folder
    assert fastadapter("classify", "--adapter", trained, "--text", "w1", "--json") == (0, out, "")
    (trained / "labels.json").write_text('{"labels": ["a"]}')
    assert "not the labels of a run" in refused("classify", *words, "--text", "w1")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--text", ""), "--text: is empty"),
        (("--text", "w1", "\ud800"), "--text 2: not valid Unicode"),
        (("--text", "w1 " * (CONTEXT + 1)), "--text: the text has 65 tokens, at most 64 fit"),
        (("--text", "w1", "--file", "x"), "argument --file: not allowed with argument --text"),
        (("--file", "nowhere.txt"), "--file nowhere.txt: no such file"),
        (
            ("--text", "w1", "--max-length", "65"),
            "--max-length must be at most 64, the model's context, got 65",
        ),
        (("--text", "w1", "--max-length", "1"), "--max-length must be at least 2"),
        (("--text", "w1", "--batch-size", "0"), "--batch-size must be at least 1"),
        (("--text", "w1", "--template", "no field"), "--template must hold {text}"),
        (("--text", "w1", "--resume"), "--resume needs --output"),
        (("--text", "w1", "--dtype", "int4"), "invalid choice: 'int4'"),
    ],
    ids=lambda value: (
        " ".join(value)[:30].encode("ascii", "replace").decode() if isinstance(value, tuple) else ""
    ),
)
def test_bad_requests_are_named(trained, refused, words, message):
    assert message in refused("classify", "--adapter", trained, *words)


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"text": "w1"}\n{"text": \n', "texts.jsonl line 2: malformed JSON"),
        (b'{"prompt": "w1"}\n', "field 'text' is missing; its fields are 'prompt'"),
        (b'{"text": null}\n', "field 'text' must be a string, got NoneType"),
        (b'{"text": "\\ud800"}\n', "texts.jsonl line 1"),
        (b"", "texts.jsonl: holds no texts"),
        (b'{"text": " "}\n', "texts.jsonl line 1: the text has no tokens"),
    ],
)
def test_bad_files_are_named_with_their_line(trained, texts, refused, data, message):
    texts.write_bytes(data)
    assert message in refused("classify", "--adapter", trained, "--file", texts)


def test_the_file_alone_knows_its_task(encoder_folder, tmp_path, fastadapter):
    """Moved out of its folder, it names what a run has said of it."""
    model = fa.attach(classifier(encoder_folder), fa.BottleneckConfig(bottleneck_size=4))
    annotate(model, "default", {"task": "classification", "labels": LABELS, "template": "w3 {text}"})
    file = fa.save(model, tmp_path / "moved.safetensors")
    words = ("classify", "--model", encoder_folder, "--adapter", file, "--text", "w1", "--json")
    status, out, err = fastadapter(*words)
    row = expected(file, encoder_folder, ["w3 w1"])[0].softmax(-1)
    assert status == 0 and not err
    assert list(lines_of(out)[0]["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)


def test_adapters_of_another_task_are_sent_to_their_command(save_run, model_folder, trained, refused):
    folder = save_run(make_model(), model_folder, "words")
    assert "was trained for generation; `fastadapter generate` uses it" in refused(
        "classify", "--adapter", folder
    )
    assert "`fastadapter classify` uses it" in refused("generate", "--adapter", trained, "--prompt", "w1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": None}, "the labels of its classes are None; expected a list of names"),
        ({"labels": ["a", 1, "c"]}, "'labels' must hold strings"),
        ({"labels": ["a", "b"]}, "adapter.safetensors: "),  # the head in the file has three
    ],
)
def test_labels_that_do_not_fit(trained, refused, change, message):
    record = json.loads((trained / "run.json").read_text())
    (trained / "run.json").write_text(json.dumps({**record, **change}))
    assert message in refused("classify", "--adapter", trained, "--text", "w1")


def test_an_output_that_is_not_finite_is_no_probability(trained, refused, monkeypatch):
    plain = classify.text_outputs
    monkeypatch.setattr(classify, "text_outputs", lambda *args: plain(*args) * float("nan"))
    assert "the model's output is not finite" in refused("classify", "--adapter", trained, "--text", "w1")


def test_a_file_of_records_goes_on(trained, texts, tmp_path, fastadapter, refused, monkeypatch):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    words = ["classify", "--adapter", trained, "--file", texts, "--batch-size", 2]
    assert fastadapter(*words, "--output", whole)[0] == 0 and len(read_lines(whole)) == 5
    plain, calls = classify.Scorer.__call__, []

    def stop(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(classify.Scorer, "__call__", stop)
        status, _, err = fastadapter(*words, "--output", out)
    assert status == 130 and f"interrupted; {out} holds what is done; --resume goes on" in err
    assert len(read_lines(out)) == 4
    out.write_text("".join(f"{line}\n" for line in out.read_text().splitlines()[:3]) + '{"te')
    assert fastadapter(*words, "--output", out, "--resume")[0] == 0
    assert [record["label"] for record in read_lines(out)] == [
        record["label"] for record in read_lines(whole)
    ]
    lines = texts.read_text().splitlines()
    texts.write_text("\n".join([lines[0], lines[2]]))
    assert "line 2: text was 'w3', now 'good w4 w5 w6 w7'" in refused(*words, "--output", out, "--resume")
    texts.write_text("\n".join(lines[:2]))
    assert "holds 5 records, more than the 2 asked for" in refused(*words, "--output", out, "--resume")
    words += ["--template", "w1 {text}"]
    assert "template was None, now 'w1 {text}'" in refused(*words, "--output", out, "--resume")


def test_explain_needs_nothing_that_the_folder_knows(trained, encoder_folder, fastadapter, refused):
    status, out, err = fastadapter("explain", "--adapter", trained, "--json", "--verify")
    report = json.loads(out)
    assert status == 0 and not err and all(check["passed"] for check in report["checks"])
    assert any(row["module"].endswith("classifier") for row in report["modules"])
    assert "--model is needed" in refused("explain")
