"""Metrics against their definitions, written out; and regression from records to numbers."""

import math

import numpy as np
import pytest
import torch

import fastadapter as fa
from fastadapter.training import Example, TrainingConfig, UserError, finetune, metrics
from fastadapter.training.held_out import measure
from fastadapter.training.regression import HeldOutNumbers, RegressionTask
from tests.training.toy import adapter_bits, history, make_classifier, make_texts, make_tokenizer

LABELS = ["a", "b", "c"]


def draw(rows=200, seed=0):
    generator = np.random.default_rng(seed)
    return np.log(generator.dirichlet([1, 1, 1], rows)), generator.integers(0, 3, rows)


def test_metrics_of_classes_are_their_definitions():
    scores, truth = draw()
    found = metrics.classification_metrics(scores, truth, LABELS)
    predicted, probabilities = scores.argmax(1), np.exp(scores)
    matrix = [[int(((truth == i) & (predicted == j)).sum()) for j in range(3)] for i in range(3)]
    assert found["confusion_matrix"] == matrix
    assert found["accuracy"] == pytest.approx(np.trace(matrix) / 200)
    f1 = []
    for i, label in enumerate(LABELS):
        precision = matrix[i][i] / sum(row[i] for row in matrix)
        recall = matrix[i][i] / sum(matrix[i])
        f1.append(2 * precision * recall / (precision + recall))
        of = found["per_class"][label]
        assert (of["precision"], of["recall"], of["f1"]) == pytest.approx((precision, recall, f1[-1]))
        assert of["support"] == sum(matrix[i])
    assert found["f1_macro"] == pytest.approx(sum(f1) / 3)
    brier = sum(sum((probabilities[row, i] - (truth[row] == i)) ** 2 for i in range(3)) for row in range(200))
    assert found["brier"] == pytest.approx(brier / 200)
    error = 0.0
    for low in range(15):
        here = [r for r in range(200) if low <= probabilities[r].max() * 15 < low + 1]
        if here:
            confidence = sum(probabilities[r].max() for r in here) / len(here)
            correct = sum(predicted[r] == truth[r] for r in here) / len(here)
            error += len(here) / 200 * abs(correct - confidence)
    assert found["ece"] == pytest.approx(error)
    assert f"{found['accuracy']:.2%}".replace("%", " %") in metrics.table({"loss": 1.0, **found})


def test_classes_that_do_not_occur_and_certainty():
    certain = np.array([[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]])
    found = metrics.classification_metrics(certain, np.array([0, 1]), LABELS)
    assert (found["accuracy"], found["f1_macro"], found["brier"], found["ece"]) == (1.0, 1.0, 0.0, 0.0)
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    wrong = metrics.classification_metrics(certain, np.array([1, 0]), LABELS)
    assert (wrong["accuracy"], wrong["brier"], wrong["ece"]) == (0.0, 2.0, 1.0)


def test_many_classes_are_told_in_short():
    labels = [f"c{number}" for number in range(101)]
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(101), 20))
    found = metrics.classification_metrics(scores, np.arange(20), labels)
    assert set(found) == {"accuracy", "f1_macro", "ece", "brier"} and metrics.table({"loss": 1.0, **found})


def test_metrics_of_numbers():
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    found = metrics.regression_metrics(truth**3, truth)
    assert found["spearman"] == pytest.approx(1) and 0.9 < found["pearson"] < 1
    assert found["mae"] == pytest.approx(np.abs(truth**3 - truth).mean())
    constant = metrics.regression_metrics(np.ones(4), truth)
    assert constant["pearson"] is None and "pearson   undefined" in metrics.table({"loss": 1.0, **constant})


def test_scikit_learn_is_asked_for_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need scikit-learn: pip install"):
        finetune(
            make_classifier(), make_tokenizer(), make_texts(8), make_texts(4, 1), output_dir=tmp_path / "out",
            task="classification", trainable=["*"], progress=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def make_ratings(count, seed=0):
    """Texts whose number is the share of their words that are even."""
    ratings = []
    for text in make_texts(count, seed):
        numbers = [int(word[1:]) for word in text.prompt.split() if word[1:].isdigit()]
        ratings.append(
            Example(text.prompt, "", str(sum(n % 2 == 0 for n in numbers) / len(numbers)), text.source)
        )
    return ratings


def regress(folder, kind="bert", resume=False, **options):
    torch.manual_seed(1)
    model = fa.attach(
        make_classifier(kind, num_labels=1, dropout=0.1), fa.BottleneckConfig(bottleneck_size=8)
    )
    ratings = make_ratings(40)
    config = TrainingConfig(**{"num_train_epochs": 4, "batch_size": 6, **options})
    return finetune(
        model, make_tokenizer(), ratings[:30], ratings[30:], config, output_dir=folder, task="regression",
        resume=resume, save_steps=2, progress=False,
    ), model  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_regression_learns_numbers(tmp_path, kind):
    result, model = regress(tmp_path, kind)
    assert result.epochs[-1]["loss"] < 0.8 * result.epochs[0]["loss"]
    assert result.eval["accuracy_after"] is None and result.eval["loss_after"] < result.eval["loss_before"]
    found = result.eval["metrics"]
    assert found["mse"] == pytest.approx(found["loss"]) and found["mae"] ** 2 <= found["mse"]
    losses = [each["loss"] for each in result.evaluations]
    assert result.eval["best_epoch"] == losses.index(min(losses)) + 1
    assert result.config["task"]["kind"] == "regression"
    tokenizer, held_out = make_tokenizer(), make_ratings(40)[30:]
    with torch.no_grad():
        alone = [model(**tokenizer(each.prompt, return_tensors="pt")).logits.item() for each in held_out]
    errors = [(number - float(each.label)) ** 2 for number, each in zip(alone, held_out)]
    assert found["mse"] == pytest.approx(sum(errors) / 10, rel=1e-4)
    again, _ = regress(tmp_path, kind, resume=True)
    assert history(again) == history(result) and adapter_bits(tmp_path)


def test_a_regression_measures_padded_rows_as_alone():
    ratings = make_ratings(9)
    model, tokenizer = make_classifier(num_labels=1), make_tokenizer()
    task = RegressionTask(model, tokenizer, ratings, ratings, TrainingConfig())
    assert isinstance(task.held_out, HeldOutNumbers)
    apart = torch.cat([task.held_out.predict(model, [row], 1, None) for row in range(9)])
    assert measure(task.held_out, model, 4)["loss"] == pytest.approx(
        task.held_out.measure(apart)["loss"], rel=1e-5
    )
    loss = task.loss(model, range(9), torch.device("cpu"))
    assert loss.item() / 9 == pytest.approx(measure(task.held_out, model, 4)["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": []}, "train holds no examples"),
        ({"train": [Example("w1", "", "many", "toy line 3")]}, "toy line 3: label 'many' must be a finite number"),
        ({"train": [Example("w1", "", "nan", "toy line 3")]}, "toy line 3: label 'nan' must be a finite number"),
        ({"held_out": [Example("w1", "", "-inf", "toy line 3")]}, "label '-inf' must be a finite number"),
        ({"train": [Example("w1", " w2", None, "toy line 3")]}, "toy line 3: regression needs text/label records"),
        ({"model": make_classifier(num_labels=2)}, "head has 2 outputs, a regression needs one"),
        ({"config": TrainingConfig(class_weights="balanced")}, "class_weights: a regression has no classes"),
        ({"config": TrainingConfig(label_smoothing_factor=0.1)}, "label_smoothing_factor: a regression has no"),
        ({"config": TrainingConfig(append_eos=True)}, "append_eos is for completions"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(tmp_path, change, message):
    given = {"train": make_ratings(6), "held_out": make_ratings(3, 1), "model": make_classifier(num_labels=1),
             "config": None, **change}  # fmt: skip
    with pytest.raises(UserError, match=message):
        finetune(
            given["model"], make_tokenizer(), given["train"], given["held_out"], given["config"],
            output_dir=tmp_path / "out", task="regression", trainable=["*"], progress=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
