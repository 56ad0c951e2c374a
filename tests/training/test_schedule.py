"""Length, learning rate and moment of evaluation of a run, and that it goes on bit for bit whatever they are."""

import json
import os
import signal

import pytest
import torch
from transformers import get_scheduler

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.training import TrainingConfig, TrainingInterrupted, UserError, finetune, read_labels
from tests.training.test_classification import run as run_classifier
from tests.training.toy import (
    STATE,
    adapter_bits,
    history,
    make_adapted,
    make_classifier,
    make_examples,
    make_texts,
    make_tokenizer,
    run,
)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_are_those_of_transformers_but_for_the_first_steps(kind, warmup):
    """There step i of the warm-up has the share i, so that the first step trains nothing; here i + 1."""
    config = TrainingConfig(learning_rate=0.3, lr_scheduler_type=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, warmup, 40).lr_lambdas[0]
    for step in range(40):
        wanted = theirs(step) if step >= warmup else (step + 1) / warmup
        assert config.learning_rate_at(step, 40) == pytest.approx(0.3 * wanted, rel=1e-12)
        assert config.learning_rate_at(step, 40, 3.0) == pytest.approx(3.0 * wanted, rel=1e-12)


def test_a_run_of_steps_ends_within_an_epoch(tmp_path):
    """6 steps to an epoch. What is left of the second is an entry of its own."""
    result = run(tmp_path, max_steps=8, lr_scheduler_type="linear", warmup_steps=2)
    assert len(result.losses) == 8 and len(result.epochs) == 2
    assert [each["step"] for each in result.evaluations] == [6, 8]
    assert min(result.losses[6:]) < result.epochs[1]["loss"] < max(result.losses[6:])
    assert result.eval["accuracy_after"] == result.evaluations[-1]["accuracy"]
    steps = [each for each in log_of(tmp_path) if "loss" in each]
    assert [each["step"] for each in steps] == list(range(1, 9))
    assert [each["learning_rate"] for each in steps][:3] == pytest.approx([0.005, 0.01, 0.01])
    assert steps[-1]["learning_rate"] == pytest.approx(0.01 / 6) and steps[-1]["epoch"] == pytest.approx(
        8 / 6, 1e-3
    )
    assert all(each["grad_norm"] > 0 and each["tokens_per_second"] > 0 for each in steps)


@pytest.mark.parametrize("strategy, steps, expected", [("steps", 5, [5, 10, 12]), ("no", None, [12])])
def test_evaluations_by_steps_and_none_on_the_way(tmp_path, strategy, steps, expected):
    result = run(tmp_path, eval_strategy=strategy, eval_steps=steps)
    assert [each["step"] for each in result.evaluations] == expected
    assert result.eval["best_step"] in expected and "eval_loss" not in result.epochs[0]
    logged = [each for each in log_of(tmp_path) if "eval_loss" in each]
    assert [each["step"] for each in logged] == [0, *expected]
    assert [each["eval_accuracy"] for each in logged[1:]] == [each["accuracy"] for each in result.evaluations]
    plain = run(tmp_path / "plain")
    assert plain.losses == result.losses, "looking changes nothing"


def test_nothing_is_evaluated_before_the_first_step_if_not_asked_for(tmp_path, capsys):
    result = run(tmp_path, eval_on_start=False, progress=True)
    assert [each["step"] for each in log_of(tmp_path) if "eval_loss" in each] == [6, 12]
    assert result.eval["accuracy_before"] is None and result.eval["loss_before"] is None
    assert result.eval["accuracy_after"] == result.evaluations[-1]["accuracy"]
    told = capsys.readouterr().err
    assert "epoch 1 of 2" in told and "accuracy" in told and "before" not in told
    assert run(tmp_path, eval_on_start=False, resume=True).eval == result.eval
    assert run(tmp_path / "plain").losses == result.losses
    with pytest.raises(TypeError, match="eval_on_start must be True or False, got 1"):
        TrainingConfig(eval_on_start=1)


def test_a_run_that_gets_no_better_stops(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 3.0}
    result = run(tmp_path, num_train_epochs=20, warmup_steps=0, **options)
    last, best = len(result.losses), result.eval["best_step"]
    assert result.stopped_early and last == best + 2 < 120
    assert sum(epoch["tokens"] for epoch in result.epochs) > 0 and len(result.epochs) == -(-last // 6)
    again = run(tmp_path, num_train_epochs=20, warmup_steps=0, resume=True, **options)
    assert history(again) == history(result) and again.stopped_early


EVERYTHING_NEW = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "max_steps": 11,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "early_stopping_patience": 4,
    "label_smoothing_factor": 0.1,
}


@pytest.mark.parametrize("stop", [3, 4, 7, 10])
def test_a_hangup_saves_and_the_run_goes_on_bit_for_bit(tmp_path, monkeypatch, stop):
    """A closed terminal: exit code 129. The log has every step once, also the one whose line was torn."""
    expected = run(tmp_path / "a", dropout=0.2, **EVERYTHING_NEW)
    from fastadapter.training import tasks

    plain, calls = tasks.supervised_loss, []

    def stopping(model, batch, **options):
        calls.append(1)
        if len(calls) == 2 * stop:  # two micro-batches to a step
            os.kill(os.getpid(), signal.SIGHUP)
        return plain(model, batch, **options)

    monkeypatch.setattr(tasks, "supervised_loss", stopping)
    with pytest.raises(TrainingInterrupted, match=f"SIGHUP after step {stop}") as stopped:
        run(tmp_path / "b", dropout=0.2, **EVERYTHING_NEW)
    monkeypatch.undo()
    assert stopped.value.exit_code == 129
    log = tmp_path / "b" / "log.jsonl"
    with log.open("a") as file:  # steps of a life that was killed before it saved them
        file.write(json.dumps({"step": stop + 1, "loss": 9.0}) + "\n" + '{"step": ')
    resumed = run(tmp_path / "b", dropout=0.2, resume=True, **EVERYTHING_NEW)
    assert history(resumed) == history(expected) and resumed.evaluations == expected.evaluations
    assert adapter_bits(tmp_path / "b") == adapter_bits(tmp_path / "a")
    timeless = [
        [
            {key: value for key, value in each.items() if key != "tokens_per_second"}
            for each in log_of(tmp_path / name)
        ]
        for name in "ab"
    ]
    assert timeless[0] == timeless[1]


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from fastadapter.training import tasks

        plain = tasks.supervised_loss
        monkeypatch.setattr(
            tasks, "supervised_loss", lambda *args: os.kill(os.getpid(), signal.SIGHUP) or plain(*args)
        )
        assert len(run(tmp_path, num_train_epochs=1).losses) == 6
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path):
    """A constant rate behind a warm-up in steps: what was trained is the beginning of the longer run."""
    options = {"lr_scheduler_type": "constant", "warmup_steps": 3, "dropout": 0.2}
    run(tmp_path / "a", num_train_epochs=2, **options)
    longer = run(tmp_path / "a", num_train_epochs=4, resume=True, **options)
    whole = run(tmp_path / "b", num_train_epochs=4, **options)
    assert history(longer) == history(whole) and adapter_bits(tmp_path / "a") == adapter_bits(tmp_path / "b")
    assert [each["step"] for each in log_of(tmp_path / "a") if "loss" in each] == list(range(1, 25))


def test_another_schedule_goes_on_only_if_it_is_begun_anew_knowingly(tmp_path):
    run(tmp_path)
    bits = adapter_bits(tmp_path)
    with pytest.raises(
        UserError, match=r"first 12 steps of a run of 18 .*lr_scheduler_type cosine.*restart_schedule"
    ):
        run(tmp_path, num_train_epochs=3, resume=True)
    with pytest.raises(UserError, match="has taken 12 steps, more than the 6 that are asked for"):
        run(tmp_path, num_train_epochs=1, resume=True, restart_schedule=True)
    with pytest.raises(UserError, match="restart_schedule goes with resume"):
        run(tmp_path, num_train_epochs=3, restart_schedule=True)
    assert adapter_bits(tmp_path) == bits
    longer = run(tmp_path, num_train_epochs=4, resume=True, restart_schedule=True)
    rates = [each["learning_rate"] for each in log_of(tmp_path) if "loss" in each]
    assert len(longer.losses) == 24 and rates[12:] == rates[:12], "the schedule of 12 steps, once more"
    # The longer run is what the state is of now, and can be resumed like any other.
    again = run(tmp_path, num_train_epochs=4, resume=True)
    assert history(again) == history(longer)


def test_a_continued_run_that_is_stopped_keeps_its_schedule(tmp_path, monkeypatch):
    from fastadapter.training import tasks

    for name in "ab":
        run(tmp_path / name, dropout=0.2)
    longer = {"num_train_epochs": 4, "resume": True, "restart_schedule": True, "dropout": 0.2}
    expected = run(tmp_path / "a", **longer)
    plain, calls = tasks.supervised_loss, []

    def stopping(*args):
        calls.append(1)
        return os.kill(os.getpid(), signal.SIGTERM) or plain(*args) if len(calls) == 8 else plain(*args)

    monkeypatch.setattr(tasks, "supervised_loss", stopping)
    with pytest.raises(TrainingInterrupted, match="after step 16"):
        run(tmp_path / "b", **longer)
    monkeypatch.undo()
    assert history(run(tmp_path / "b", **longer)) == history(expected)
    assert adapter_bits(tmp_path / "b") == adapter_bits(tmp_path / "a")


def test_a_state_of_an_earlier_version_goes_on(tmp_path):
    """It knows nothing of what has come since, which then had its default."""
    expected = run(tmp_path)
    tensors, metadata = read_tensors(tmp_path / STATE)
    identity, progress = (json.loads(metadata[key]) for key in ("identity", "progress"))
    for key in ("lr_scheduler_type", "max_steps", "eval_strategy", "class_weights", "head_learning_rate"):
        del identity["training"][key]
    for key in ("evaluations", "metrics", "schedule_start", "skipped", "scaler"):
        del progress[key]
    del progress["best"]["step"]
    metadata |= {"identity": json.dumps(identity), "progress": json.dumps(progress)}
    write_tensors(tmp_path / STATE, tensors, metadata)
    again = run(tmp_path, resume=True)
    assert again.losses == expected.losses and again.eval["best_step"] == expected.eval["best_step"]
    assert [each["step"] for each in again.evaluations] == [6, 12]


@pytest.mark.parametrize(
    "weights, of", [({"bad": 1.0, "good": 3.0}, {"bad": 1, "good": 3}), ("balanced", None)]
)
def test_class_weights_and_smoothing_are_those_of_torch(tmp_path, weights, of):
    texts = make_texts(12)
    labels = ["bad", "good"]
    config = TrainingConfig(
        num_train_epochs=1,
        batch_size=12,
        class_weights=weights,
        label_smoothing_factor=0.2,
        learning_rate=0.01,
    )
    model, tokenizer = make_classifier("bert"), make_tokenizer()
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(each.prompt, return_tensors="pt")).logits for each in texts])
    truth = torch.tensor([labels.index(each.label) for each in texts])
    if of is None:
        of = {label: 12 / (2 * sum(each.label == label for each in texts)) for label in labels}
    wanted = torch.nn.functional.cross_entropy(
        logits, truth, weight=torch.tensor([float(of[label]) for label in labels]), label_smoothing=0.2
    )
    result = finetune(
        model, tokenizer, texts, None, config, output_dir=tmp_path, task="classification", trainable=["*"],
        progress=False,
    )  # fmt: skip
    assert result.losses == [pytest.approx(wanted.item(), rel=1e-5)] and read_labels(tmp_path) == labels


def test_a_classifier_with_every_option_resumes_bit_for_bit(tmp_path, monkeypatch):
    from fastadapter.training import classification

    options = {"class_weights": "balanced", "head_learning_rate": 0.1, "label_smoothing_factor": 0.1, "eval_steps": 4,
               "eval_strategy": "steps", "trainable": None}  # fmt: skip

    def adapted():
        torch.manual_seed(1)
        return fa.attach(make_classifier(dropout=0.2), fa.LlamaAdapterConfig(prefix_len=3))

    expected = run_classifier(tmp_path / "a", model=adapted(), **options)
    plain, calls = classification.class_logits, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(classification, "class_logits", stopping)
    with pytest.raises(TrainingInterrupted):
        run_classifier(tmp_path / "b", model=adapted(), **options)
    monkeypatch.undo()
    resumed = run_classifier(tmp_path / "b", model=adapted(), resume=True, **options)
    assert history(resumed) == history(expected)
    assert adapter_bits(tmp_path / "b") == adapter_bits(tmp_path / "a")
    rates = {each["step"]: each for each in log_of(tmp_path / "b") if "loss" in each}
    assert all(
        each["head_learning_rate"] == pytest.approx(20 * each["learning_rate"]) for each in rates.values()
    )


def test_the_head_moves_at_its_own_rate(tmp_path):
    """AdamW's first step is as long as the rate, whatever the gradient."""
    model = fa.attach(make_classifier(), fa.BottleneckConfig(bottleneck_size=4, modules_to_save=("pooler",)))
    before = {name: p.detach().clone() for name, p in fa.trainable_parameters(model)}
    texts = make_texts(8)
    config = TrainingConfig(
        max_steps=1, learning_rate=1e-3, head_learning_rate=0.1, warmup_steps=0, weight_decay=0.0
    )
    finetune(
        model,
        make_tokenizer(),
        texts,
        None,
        config,
        output_dir=tmp_path,
        task="classification",
        progress=False,
    )
    moved = {
        name: float((p.detach() - before[name]).abs().max()) for name, p in fa.trainable_parameters(model)
    }
    heads = {name for name in moved if "classifier" in name or "pooler" in name}
    assert len(heads) == 4 and len(moved) > 4
    for name, distance in moved.items():
        assert distance == pytest.approx(0.1, rel=1e-3) if name in heads else distance <= 1.001e-3, name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_learning_rate": 0.1}, "head_learning_rate: no head is trained"),
        ({"class_weights": "balanced"}, "class_weights are for task classification, not for generation"),
        ({"warmup_steps": 13}, "warmup_steps must be at most the run's 12 steps, got 13"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"bad": 1, "fine": 2}, "class_weights: the training data has no label 'fine', only 'bad', 'good'"),
        ({"bad": 1}, "class_weights: there is none for the label 'good'"),
    ],
)
def test_weights_of_other_classes_are_refused(tmp_path, weights, message):
    with pytest.raises(UserError, match=message):
        run_classifier(tmp_path / "out", class_weights=weights)
    assert not (tmp_path / "out").exists()


def test_patience_needs_something_to_wait_for(tmp_path):
    with pytest.raises(UserError, match="early_stopping_patience needs held-out data"):
        finetune(
            make_adapted(), make_tokenizer(), make_examples(8), None, TrainingConfig(early_stopping_patience=2),
            output_dir=tmp_path / "out", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, error",
    [
        ({"lr_scheduler_type": "polynomial"}, ValueError), ({"lr_scheduler_type": None}, ValueError),
        ({"warmup_steps": -1}, ValueError), ({"warmup_steps": 1.5}, TypeError), ({"max_steps": 0}, ValueError),
        ({"max_steps": True}, TypeError), ({"eval_strategy": "often"}, ValueError), ({"eval_steps": 3}, ValueError),
        ({"eval_steps": 0, "eval_strategy": "steps"}, ValueError), ({"eval_strategy": "steps"}, ValueError),
        ({"early_stopping_patience": 0}, ValueError),
        ({"early_stopping_patience": 1, "eval_strategy": "no"}, ValueError),
        ({"head_learning_rate": 0}, ValueError), ({"head_learning_rate": float("inf")}, ValueError),
        ({"label_smoothing_factor": 1.1}, ValueError), ({"label_smoothing_factor": "0.1"}, TypeError),
        ({"class_weights": "even"}, ValueError), ({"class_weights": {}}, TypeError),
        ({"class_weights": 2.0}, TypeError),
        ({"class_weights": {"bad": 0}}, ValueError), ({"class_weights": {"bad": float("nan")}}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_naming_the_field(options, error):
    with pytest.raises(error, match=next(iter(options))):
        TrainingConfig(**options)


def test_settings_come_back_from_their_record():
    config = TrainingConfig(class_weights={"bad": 2.0}, betas=(0.8, 0.9), eval_strategy="steps", eval_steps=3)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="hold momentum, which this version does not know"):
        TrainingConfig.from_dict({"momentum": 1})
