"""``fastadapter finetune`` with its options of training, and ``evaluate`` of what it made, from its folder alone."""

import json
import re

import pytest

from fastadapter.cli import main
from fastadapter.training import TrainingConfig, UserError, evaluate
from fastadapter.training.run_record import read_run
from tests.training.test_cli import data, encoder_folder, finetune, model_folder  # noqa: F401
from tests.training.toy import make_classifier, make_examples, make_model, make_texts, make_tokenizer


def words_of(example):
    return example.prompt.removeprefix("Review: ").removesuffix("\nSentiment:")


def write(path, examples, label=lambda example: example.label):
    lines = [json.dumps({"text": words_of(each), "label": label(each)}) + "\n" for each in examples]
    path.write_text("".join(lines))
    return path


def share_of_even(example):
    numbers = [int(word[1:]) for word in words_of(example).split()]
    return sum(n % 2 == 0 for n in numbers) / len(numbers)


@pytest.fixture
def measured(tmp_path, capsys):
    """Metrics that evaluate writes, and what it prints."""

    def command(*words):
        file = tmp_path / "metrics.json"
        capsys.readouterr()
        assert main(["evaluate", *map(str, words), "--json", str(file)]) == 0, capsys.readouterr().err
        return json.loads(file.read_text())["metrics"], capsys.readouterr().out

    return command


@pytest.mark.parametrize("task", ["generation", "classification", "regression"])
def test_evaluate_finds_what_the_run_found(finetune, measured, encoder_folder, tmp_path, task):  # noqa: F811
    """From the folder alone: model, task, labels, template and how texts become tokens."""
    label = share_of_even if task == "regression" else lambda each: each.label
    train, test = (write(tmp_path / f"{seed}.jsonl", make_examples(24, seed), label) for seed in (0, 1))
    options = {"task": task, "data": train, "eval_data": test, "eval_count": None, "num_train_epochs": 1}
    if task != "generation":
        options["model"] = encoder_folder
    assert finetune(template="w1 {text} w2", max_length=40, truncation="prompt", **options) == 0
    run = read_run(tmp_path / "out")
    assert run["task"] == task and run["finished"]
    found, printed = measured("--adapter", tmp_path / "out", "--data", test)
    assert found == run["eval"]["metrics"], "the same numbers, bit for bit"
    for word in ("pearson", "mae") if task == "regression" else ("f1_macro", "ece", "is, predicted as:"):
        assert word in printed
    best, _ = measured("--adapter", tmp_path / "out" / "best", "--data", test)
    assert best["loss"] == min(each["eval_loss"] for each in run["epochs"])


def test_records_of_one_label_are_measured_among_all(finetune, measured, tmp_path):  # noqa: F811
    assert finetune(num_train_epochs=1) == 0
    good = write(tmp_path / "good.jsonl", [each for each in make_examples(30, 2) if each.label == "good"])
    found, _ = measured("--adapter", tmp_path / "out", "--data", good)
    assert set(found["per_class"]) == {"bad", "good"} and found["per_class"]["bad"]["support"] == 0
    assert (
        main(["evaluate", "--adapter", str(tmp_path / "out"), "--data", str(good), "--template", "{text}"])
        == 0
    )


def test_completions_are_measured_by_loss_and_greedy_decoding(finetune, measured, tmp_path):  # noqa: F811
    file = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": each.prompt, "completion": each.completion} for each in make_examples(20, labelled=False)
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in pairs))
    assert finetune(data=file, eval_count=5, num_train_epochs=1) == 0
    found, printed = measured("--adapter", tmp_path / "out", "--data", file)
    assert set(found) == {"loss", "accuracy"} and "20 records of pairs.jsonl" in printed


@pytest.mark.parametrize(
    "label, words, message",
    [
        ("odd", [], "line 1: label 'odd' is not among those of the training data: 'bad', 'good'"),
        ("good", ["--eval-batch-size", "0"], "--eval-batch-size must be"),
        ("good", ["--max-length", "3"], "at most 3 fit"),
        ("good", ["--max-length", "99"], "max_length must be at most 64"),
        ("good", ["--template", "none"], "--template must hold {text}"),
        ("good", ["--adapter", "nowhere"], "nowhere: no such file or folder"),
        ("good", ["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)  # fmt: skip
def test_evaluate_refuses_with_one_line(finetune, tmp_path, capsys, label, words, message):  # noqa: F811
    assert finetune(num_train_epochs=1, eval_count=None) == 0
    test = write(tmp_path / "test.jsonl", make_examples(3), lambda each: label)
    capsys.readouterr()
    assert main(["evaluate", "--adapter", str(tmp_path / "out"), "--data", str(test), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastadapter: error: ") and message in error


def test_options_of_training_reach_the_run(finetune, tmp_path, capsys):  # noqa: F811
    options = {
        "num_train_epochs": None, "max_steps": 7, "lr_scheduler_type": "linear", "warmup_steps": 2, "eval_steps": 3,
        "early_stopping_patience": 5, "label_smoothing_factor": 0.1, "adam_epsilon": 1e-7, "dtype": "fp16",
        "no_eval_on_start": True,
    }  # fmt: skip
    assert finetune(**options) == 0
    training = read_run(tmp_path / "out")["training"]
    wanted = {key: value for key, value in options.items() if key in training and value is not None}
    assert {key: training[key] for key in wanted} == wanted and len(wanted) == 6
    assert training["eval_strategy"] == "steps" and training["eps"] == 1e-7 and not training["eval_on_start"]
    printed = capsys.readouterr()
    assert "f1_macro" in printed.out and "step 3: held-out loss" in printed.err
    assert "before" not in printed.err and re.search(
        r"held-out accuracy \d+\.\d\d% on 10 records", printed.out
    )
    steps = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps if "loss" in each] == list(range(1, 8))


def test_a_finished_run_gets_longer(finetune, tmp_path, capsys):  # noqa: F811
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    assert finetune(num_train_epochs=1, **constant) == 0
    assert finetune(num_train_epochs=2, resume=True, **constant) == 0
    assert len(read_run(tmp_path / "out")["epochs"]) == 2
    falling = {"output_dir": tmp_path / "falling"}
    assert finetune(num_train_epochs=1, **falling) == 0
    capsys.readouterr()
    assert finetune(num_train_epochs=2, resume=True, **falling) == 2
    assert "restart_schedule begins the schedule anew" in capsys.readouterr().err
    assert finetune(num_train_epochs=2, resume=True, restart_schedule=True, **falling) == 0


def test_class_weights_by_name(finetune, encoder_folder, tmp_path):  # noqa: F811
    options = {"task": "classification", "model": encoder_folder, "num_train_epochs": 1, "eval_count": None}
    assert finetune(class_weights="bad=1,good=2.5", head_learning_rate=0.1, **options) == 0
    training = read_run(tmp_path / "out")["training"]
    assert training["class_weights"] == {"bad": 1.0, "good": 2.5} and training["head_learning_rate"] == 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": 99}, "warmup_steps must be at most the run's 10 steps, got 99"),
        ({"eval_steps": 0}, "eval_steps must be at least 1, got 0"),
        ({"eval_steps": 2, "eval_strategy": "epoch"}, "eval_steps goes with eval_strategy"),
        ({"eval_strategy": "steps"}, "eval_steps goes with eval_strategy"),
        ({"eval_count": None, "eval_steps": 2}, "--eval-steps needs held-out records"),
        ({"eval_count": None, "early_stopping_patience": 2}, "--early-stopping-patience needs held-out records"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be at least 1"),
        ({"head_learning_rate": -1.0}, "head_learning_rate must be finite, above 0"),
        ({"head_learning_rate": 0.1}, "head_learning_rate: no head is trained"),
        ({"label_smoothing_factor": 2}, "label_smoothing_factor must be finite, at least 0, at most 1"),
        ({"class_weights": "balanced"}, "--class-weights are for --task classification, not for generation"),
        ({"class_weights": "balanced", "task": "regression"}, "field 'label' must be a finite number"),
        ({"restart_schedule": True}, "--restart-schedule goes with --resume"),
        ({"report_to": "paper"}, "report_to must be among"),
        ({"adam_epsilon": 0}, "eps must be finite, above 0"),
        ({"save_steps": 0}, "save_steps must be an int, at least 1"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense_are_named(finetune, tmp_path, capsys, options, message):  # noqa: F811
    assert finetune(**options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastadapter: error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max-steps", "3", "--num-train-epochs", "5"], "not allowed with"),
        (["--warmup-steps", "3", "--warmup-ratio", "0.5"], "not allowed with"),
        (["--lr-scheduler-type", "square"], "invalid choice: 'square'"),
        (["--eval-strategy", "often"], "invalid choice: 'often'"),
        (["--class-weights", "bad"], "must be balanced or LABEL=WEIGHT"),
        (["--class-weights", "bad=x"], "must be balanced or LABEL=WEIGHT"),
        (["--class-weights", "bad=1,bad=2"], "names the label 'bad' twice"),
    ],
)
def test_options_that_cannot_be_read_are_named(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--model", "m", "--data", "d", "--output-dir", str(tmp_path / "out"), *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_evaluate_from_python():
    texts, labels = make_texts(8), ["bad", "good"]
    model, tokenizer = make_classifier(), make_tokenizer()
    found = evaluate(model, tokenizer, texts, task="classification", labels=labels)
    assert set(found["per_class"]) == set(labels) and not model.training
    assert (
        evaluate(make_model(), tokenizer, make_examples(6), labels={"bad": " bad", "good": " good"})[
            "accuracy"
        ]
        <= 1
    )
    for change, message in (
        ({"examples": []}, "at least one"),
        ({"task": "ranking"}, "task must be one of generation, classification, regression"),
        ({"labels": None}, "labels must name the classes"),
        ({"labels": ["bad", "fine"]}, "label 'good' is not among those of the training data"),
        ({"labels": ["bad", "good", "odd"]}, "3 classes, but the model's head has 2"),
        ({"config": TrainingConfig(max_length=65)}, "max_length must be at most 64"),
        ({"task": "generation", "labels": None}, "no output embeddings|classification"),
    ):
        given = {"task": "classification", "labels": labels, "examples": texts, "config": None, **change}
        with pytest.raises((UserError, TypeError), match=message):
            evaluate(model, tokenizer, given.pop("examples"), given.pop("config"), **given)
