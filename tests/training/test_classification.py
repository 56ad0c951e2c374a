"""Classification: values against one forward pass per text, runs without and with an adapter, and what is refused."""

import os
import signal

import pytest
import torch
from torch.nn import functional as F

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.training import (
    Example,
    TrainingConfig,
    TrainingInterrupted,
    UserError,
    classification,
    classify,
    finetune,
    last_layers,
    load_parameters,
    read_labels,
    training_only,
)
from fastadapter.training.held_out import measure
from tests.training.toy import (
    CONTEXT,
    STATE,
    history,
    make_classifier,
    make_model,
    make_texts,
    make_tokenizer,
)

KINDS = ("bert", "llama")
EVERYTHING = ["*"]


def run(folder, kind="bert", trainable=EVERYTHING, dropout=0.0, model=None, **options):
    texts = make_texts(32)
    resume = options.pop("resume", False)
    options = {"num_train_epochs": 2, "batch_size": 4, "learning_rate": 0.005, **options}
    return finetune(
        model or make_classifier(kind, dropout=dropout), make_tokenizer(), texts[:22], texts[22:],
        TrainingConfig(**options), output_dir=folder, task="classification", trainable=trainable,
        resume=resume, save_steps=2, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_accuracy_are_those_of_one_text_at_a_time(kind):
    """Rows of one batch have other lengths: padding must not reach a result."""
    model, tokenizer, texts = make_classifier(kind), make_tokenizer(), make_texts(12)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(each.prompt, return_tensors="pt")).logits for each in texts])
    truth = torch.tensor([["bad", "good"].index(each.label) for each in texts])
    task = classification.ClassificationTask(model, tokenizer, texts, texts, TrainingConfig())
    expected = F.cross_entropy(logits, truth, reduction="sum").item()
    assert task.loss(model, range(12), torch.device("cpu")).item() == pytest.approx(expected, rel=1e-5)
    found = measure(task.held_out, model, 5)
    assert found["loss"] == pytest.approx(expected / 12, rel=1e-5) and task.held_out.rows == 12
    assert found["accuracy"] == float((logits.argmax(1) == truth).double().mean()) > 0
    table = torch.cat([task.held_out.predict(model, [row], 1, None) for row in range(12)])
    assert task.held_out.measure(table)["loss"] == pytest.approx(found["loss"], rel=1e-6)
    names = classify(model, tokenizer, [each.prompt for each in texts], ["bad", "good"], batch_size=5)
    assert names == [["bad", "good"][number] for number in logits.argmax(1).tolist()]
    assert len(set(lengths := task.lengths)) > 4 and max(lengths) > 2 * min(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_its_weights_come_back(tmp_path, kind):
    model = make_classifier(kind)
    result = run(tmp_path, model=model, num_train_epochs=6)
    assert result.epochs[-1]["loss"] < 0.8 * result.epochs[0]["loss"]
    assert result.trainable_parameters == result.total_parameters
    assert result.eval["accuracy_after"] is not None and not model.training
    assert result.config["task"] == {"kind": "classification", "labels": ["bad", "good"], "pad_token_id": 0}
    assert read_labels(tmp_path) == ["bad", "good"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    texts = [each.prompt for each in make_texts(8, seed=3)]
    fresh = make_classifier(kind, seed=9)
    load_parameters(fresh, tmp_path)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(fresh.parameters(), model.parameters()))
    wanted = classify(model, make_tokenizer(), texts, ["bad", "good"])
    assert classify(fresh, make_tokenizer(), texts, read_labels(tmp_path)) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_named_parameters_are_trained(tmp_path, kind):
    model = make_classifier(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = last_layers(model, 1)
    run(tmp_path, model=model, trainable=names)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p.cpu(), before[name])]
    # The bias of BERT's keys shifts all scores of a query alike, so it has no gradient but rounding.
    assert set(changed) <= set(names) and len(changed) >= len(names) - 1
    assert set(read_tensors(tmp_path / "weights.safetensors")[0]) == set(names)
    assert all(p.requires_grad for p in model.parameters()), "what was frozen for the run is as it was"


def test_last_layers_are_the_head_and_what_the_blocks_feed():
    assert last_layers(make_classifier("bert")) == [
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    ]  # fmt: skip
    assert last_layers(make_classifier("llama")) == ["model.norm.weight", "score.weight"]
    names = last_layers(make_classifier("bert"), 2)
    assert "bert.encoder.layer.0.output.dense.weight" in names and not any("embeddings" in n for n in names)
    with pytest.raises(UserError, match=r"between 0 and 2, the blocks of bert.encoder.layer, got 3"):
        last_layers(make_classifier("bert"), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_and_reloaded(tmp_path, kind):
    torch.manual_seed(1)
    model = fa.attach(make_classifier(kind), fa.LlamaAdapterConfig(prefix_len=3))
    result = run(tmp_path, model=model, trainable=None, learning_rate=0.05)
    assert result.config["adapter"]["method"] == "llama-adapter"
    texts, labels = [each.prompt for each in make_texts(8, seed=3)], read_labels(tmp_path)
    again = fa.load(make_classifier(kind), tmp_path)
    ids = make_tokenizer()(texts[0], return_tensors="pt")
    assert torch.equal(again(**ids).logits, model(**ids).logits)
    assert classify(again, make_tokenizer(), texts, labels) == classify(
        model, make_tokenizer(), texts, labels
    )


@pytest.mark.parametrize("trainable", [EVERYTHING, None], ids=["parameters", "adapter"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, trainable):
    def fresh():
        torch.manual_seed(1)
        model = make_classifier(dropout=0.2)
        return model if trainable else fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3))

    expected = run(tmp_path / "a", model=fresh(), trainable=trainable)
    plain, calls = classification.class_logits, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(classification, "class_logits", stopping)
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step"):
        run(tmp_path / "b", model=fresh(), trainable=trainable)
    monkeypatch.undo()
    steps = len(read_tensors(tmp_path / "b" / STATE)[0]["losses"])
    assert 1 < steps < 12
    resumed = run(tmp_path / "b", model=fresh(), trainable=trainable, resume=True)
    assert history(resumed) == history(expected)
    file = "weights.safetensors" if trainable else "adapter.safetensors"
    for name in (file, f"best/{file}"):
        (one, _), (other, _) = (read_tensors(tmp_path / folder / name) for folder in "ab")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match="holds a run"):
        run(tmp_path / "a", model=fresh(), trainable=trainable)
    with pytest.raises(UserError, match=r"task was \{'kind': 'classification'.*, now None"):
        finetune(
            fa.attach(make_model(), fa.LlamaAdapterConfig(prefix_len=3)), make_tokenizer(), make_texts(8), None,
            output_dir=tmp_path / "a", resume=True, progress=False,
        )  # fmt: skip


LONG = Example("w1 " * (CONTEXT + 1), "good", "good", "toy line 9")
PROMPTED = Example("w1", " w2", None, "toy line 3")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": []}, "train holds no examples"),
        ({"train": [*make_texts(4), PROMPTED]}, "toy line 3: classification needs text/label records"),
        ({"held_out": [PROMPTED]}, "toy line 3: classification needs text/label records"),
        ({"train": [make_texts(1)[0]] * 3}, "every training example has the label '(good|bad)'"),
        ({"held_out": [Example("w1", "odd", "odd", "toy line 7")]}, "toy line 7: label 'odd' is not among those of "
                                                                   "the training data: 'bad', 'good'"),
        ({"train": [*make_texts(6), Example("w1", "odd", "odd")]}, "3 classes, but the model's head has 2"),
        ({"train": [*make_texts(6), LONG]}, "toy line 9: the text has 65 tokens, at most 64 fit"),
        ({"held_out": [LONG]}, "toy line 9: the text has 65 tokens, at most 64 fit"),
        ({"train": [*make_texts(6), Example(" ", "good", "good", "toy line 5")]}, "toy line 5: the text has no tokens"),
        ({"config": TrainingConfig(max_length=65)}, "max_length must be at most 64, the model's context"),
        ({"config": TrainingConfig(append_eos=True)}, "append_eos is for completions"),
        ({"model": make_model()}, "LlamaForCausalLM has no classification head"),
        ({"trainable": ["no.such.*"]}, r"no parameter of BertForSequenceClassification has a name like 'no.such"),
        ({"trainable": []}, "patterns must name at least one parameter"),
        ({"trainable": None}, "no adapter is attached"),
        ({"task": "ranking"}, "task must be one of generation, classification, regression, got 'ranking'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(tmp_path, change, message):
    given = {"train": make_texts(8), "held_out": make_texts(4, seed=2), "model": make_classifier(),
             "config": None, "trainable": EVERYTHING, "task": "classification", **change}  # fmt: skip
    before = {name: p.requires_grad for name, p in given["model"].named_parameters()}
    with pytest.raises(UserError, match=message):
        finetune(
            given["model"], make_tokenizer(), given["train"], given["held_out"], given["config"],
            output_dir=tmp_path / "out", task=given["task"], trainable=given["trainable"], progress=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert before == {name: p.requires_grad for name, p in given["model"].named_parameters()}


def test_parameters_and_an_adapter_are_not_trained_together(tmp_path):
    model = fa.attach(make_classifier(), fa.LlamaAdapterConfig(prefix_len=3))
    with pytest.raises(UserError, match="an adapter is attached"):
        run(tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()
    with training_only(model, ["*.gate"]) as names:
        assert names and [n for n, p in model.named_parameters() if p.requires_grad] == names


def test_a_long_text_is_cut_when_asked(tmp_path):
    task = classification.ClassificationTask(
        make_classifier(),
        make_tokenizer(),
        [*make_texts(6), LONG],
        None,
        TrainingConfig(truncation="end"),
    )
    assert task.lengths[-1] == CONTEXT and task.held_out is None


def test_more_classes_in_the_head_than_labels_never_win(tmp_path):
    model = make_classifier(num_labels=5)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0, 9.0]))
    texts = [each.prompt for each in make_texts(8)]
    assert set(classify(model, make_tokenizer(), texts, ["bad", "good"])) <= {"bad", "good"}
    assert classify(model, make_tokenizer(), [], ["bad", "good"]) == []


def test_files_that_are_not_of_this_model_are_refused(tmp_path):
    run(tmp_path, trainable=["classifier.*"])
    other = make_classifier(num_labels=3)
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(fa.CheckpointError, match=r"classifier.bias must be torch.float32 \(3,\), got"):
        load_parameters(other, tmp_path)
    with pytest.raises(fa.CheckpointError, match="the model has no parameter classifier"):
        load_parameters(make_classifier("llama"), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(fa.CheckpointError, match="holds no trained parameters"):
        load_parameters(make_classifier(), tmp_path)
    for text, message in (
        ("[]", "not the labels"),
        ("{", "not the labels"),
        ('{"labels": [1]}', "not a list of names"),
    ):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(fa.CheckpointError, match=message):
            read_labels(tmp_path)
    with pytest.raises(fa.CheckpointError, match="No such file"):
        read_labels(tmp_path / "nowhere")
