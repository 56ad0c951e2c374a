"""The training loop: what it computes, what it writes, and what it refuses before it writes anything."""

import errno
import itertools
import math
import os
import signal

import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.training import (
    NonFiniteError,
    TrainingConfig,
    TrainingInterrupted,
    UserError,
    finetune,
    tasks,
)
from tests.training.toy import (
    STATE,
    adapter_bits,
    history,
    make_adapted,
    make_examples,
    make_model,
    make_tokenizer,
    run,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_learns_and_writes_what_it_says(tmp_path, dtype):
    examples = make_examples(40)
    model = make_adapted(dtype=dtype)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    config = TrainingConfig(num_train_epochs=4, batch_size=8, learning_rate=0.05)
    result = finetune(
        model, make_tokenizer(), examples[:30], examples[30:], config, output_dir=tmp_path, progress=False
    )
    assert result.epochs[-1]["loss"] < 0.9 * result.epochs[0]["loss"]
    assert result.eval["loss_after"] < result.eval["loss_before"]
    assert len(result.losses) == 16 and result.train_rows == 30 and not model.training
    for name, parameter in fa.trainable_parameters(model):
        assert parameter.dtype == torch.float32 and parameter.grad is None
        assert not name.endswith("gate") or parameter.abs().min() > 0
    assert all(torch.equal(p.cpu(), base[name]) for name, p in model.named_parameters() if name in base)

    best = result.eval["best_epoch"]
    rank = [(epoch["eval_accuracy"], -epoch["eval_loss"]) for epoch in result.epochs]
    assert rank.index(max(rank)) + 1 == best
    batch = torch.tensor([[1, 2, 3]])
    again = fa.load(make_model(dtype=dtype), tmp_path)
    assert torch.equal(again(batch).logits, model(batch).logits)
    fa.load(make_model(dtype=dtype), tmp_path / "best")
    record = result.to_dict()
    assert record["config"]["training"]["learning_rate"] == 0.05
    assert {"loss", "tokens", "seconds"} <= record["epochs"][0].keys() and record["peak_rss_bytes"] > 1 << 20


def test_completions_are_learnt_without_held_out_data(tmp_path):
    examples = make_examples(16, labelled=False)
    config = TrainingConfig(num_train_epochs=3, batch_size=4)
    result = finetune(
        make_adapted(), make_tokenizer(), examples, None, config, output_dir=tmp_path, progress=False
    )
    assert result.epochs[-1]["loss"] < result.epochs[0]["loss"]
    assert result.eval == {"accuracy_before": None, "accuracy_after": None}
    assert not (tmp_path / "best").exists()


def test_accumulation_does_not_change_the_gradient(tmp_path):
    """Completions of 2 to 4 tokens: a mean of the micro-batches' means would be another number."""
    whole = run(tmp_path / "a", labelled=False, gradient_accumulation_steps=1)
    parts = run(tmp_path / "b", labelled=False, gradient_accumulation_steps=3)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_the_first_step_is_adamw_on_the_clipped_mean_loss(tmp_path):
    model, tokenizer, examples = make_adapted(), make_tokenizer(), make_examples(6, labelled=False)
    twin = make_adapted()
    # A large eps: AdamW's first step would otherwise be the same however the gradient is scaled.
    config = TrainingConfig(num_train_epochs=1, batch_size=6, max_grad_norm=0.01, eps=0.01, append_eos=False)
    result = finetune(model, tokenizer, examples, None, config, output_dir=tmp_path, progress=False)
    parameters = [p for _, p in fa.trainable_parameters(twin)]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), eps=0.01, weight_decay=0.02)
    losses, tokens = 0.0, 0
    for example in examples:
        ids = tokenizer(example.prompt + example.completion, return_tensors="pt")["input_ids"]
        start = len(tokenizer(example.prompt)["input_ids"])
        logits = twin(ids).logits[0, start - 1 : -1]
        losses = losses + torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
        tokens += ids.shape[1] - start
    (losses / tokens).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.01)
    optimizer.step()
    assert result.losses == [pytest.approx((losses / tokens).item(), rel=1e-5)]
    for (name, got), want in zip(fa.trainable_parameters(model), parameters):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-7, msg=name)


def test_learning_rate_rises_and_falls():
    config = TrainingConfig(learning_rate=1.0, warmup_ratio=0.1)
    rates = [config.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.001
    assert TrainingConfig(warmup_ratio=0.0).learning_rate_at(0, 1) == 0.01


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_and_it_resumes_bit_for_bit(tmp_path, monkeypatch, number, code):
    expected = run(tmp_path / "a", dropout=0.2)
    handler = signal.getsignal(number)
    _call_at(monkeypatch, 9, lambda loss: os.kill(os.getpid(), number) or loss)
    with pytest.raises(TrainingInterrupted, match=signal.Signals(number).name) as stop:
        run(tmp_path / "b", dropout=0.2)
    monkeypatch.undo()
    assert stop.value.exit_code == code and signal.getsignal(number) is handler
    assert len(read_tensors(tmp_path / "b" / STATE)[0]["losses"]) == 5  # two micro-batches to a step
    assert history(run(tmp_path / "b", dropout=0.2, resume=True)) == history(expected)
    assert adapter_bits(tmp_path / "b") == adapter_bits(tmp_path / "a")


def test_a_signal_during_an_evaluation_ends_it(tmp_path, monkeypatch):
    score = tasks.evaluation.score_candidates

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*args)

    monkeypatch.setattr(tasks.evaluation, "score_candidates", interrupted)
    with pytest.raises(TrainingInterrupted, match="after step 0"):
        run(tmp_path)
    assert (tmp_path / STATE).exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_save(tmp_path, monkeypatch, value):
    expected = run(tmp_path / "a")
    _call_at(monkeypatch, 7, lambda loss: loss * value)
    with pytest.raises(NonFiniteError, match=rf"step 4: loss is {value}.*prompt.*{STATE}"):
        run(tmp_path / "b")
    monkeypatch.undo()
    tensors, _ = read_tensors(tmp_path / "b" / STATE)
    assert len(tensors["losses"]) == 2 and all(t.isfinite().all() for t in tensors.values())
    assert history(run(tmp_path / "b", resume=True)) == history(expected)


def test_held_out_loss_that_is_not_finite_is_named(tmp_path):
    model = make_adapted()
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="held-out loss before the first step is nan"):
        finetune(
            model, make_tokenizer(), make_examples(4), make_examples(2), output_dir=tmp_path, progress=False
        )


def test_a_run_resumes_from_nothing_and_after_its_end(tmp_path):
    first = run(tmp_path, resume=True)
    before = adapter_bits(tmp_path)
    assert history(run(tmp_path, resume=True)) == history(first)
    assert adapter_bits(tmp_path) == before


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, num_train_epochs=1)
    before = adapter_bits(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        run(tmp_path, num_train_epochs=1)
    (tmp_path / STATE).unlink()
    with pytest.raises(UserError, match="holds an adapter but no"):
        run(tmp_path, num_train_epochs=1, resume=True)
    assert adapter_bits(tmp_path) == before


def test_resuming_another_run_is_refused_naming_each_difference(tmp_path):
    run(tmp_path, num_train_epochs=1)
    state = (tmp_path / STATE).read_bytes()
    with pytest.raises(UserError) as error:
        run(tmp_path, resume=True, num_train_epochs=3, learning_rate=0.5, labelled=False, seed=1)
    for part in (
        "training.learning_rate was 0.01, now 0.5",
        "training.num_train_epochs was 1, now 3",
        "training.seed was 0, now 1",
        "data.train was",
        "data.eval was",
    ):
        assert part in str(error.value)
    assert "batch_size" not in str(error.value) and "model" not in str(error.value)

    examples, tokenizer, config = make_examples(32), make_tokenizer(), TrainingConfig(num_train_epochs=1)
    other = fa.attach(make_model(seed=5), fa.LlamaAdapterConfig(prefix_len=3, gate="identity"))
    arguments = (tokenizer, examples[:22], examples[22:], config)
    with pytest.raises(
        UserError, match=r"adapter.gate was 'tanh', now 'identity'; model.weights was \w{12}\.\.\., now"
    ):
        finetune(other, *arguments, output_dir=tmp_path, resume=True, progress=False)
    half = make_adapted(dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"model.dtype was 'float32', now 'bfloat16'"):
        finetune(half, *arguments, output_dir=tmp_path, resume=True, progress=False)
    assert (tmp_path / STATE).read_bytes() == state


def test_a_damaged_state_is_refused(tmp_path):
    run(tmp_path, num_train_epochs=1)
    state = (tmp_path / STATE).read_bytes()
    for damaged in (state[:-1], state[: len(state) // 2], b"", state[:-9] + b"\1" + state[-8:]):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(fa.CheckpointError, match=STATE.name):
            run(tmp_path, num_train_epochs=1, resume=True)
    (tmp_path / STATE).write_bytes((tmp_path / "adapter.safetensors").read_bytes())
    with pytest.raises(fa.CheckpointError, match="not a training state"):
        run(tmp_path, num_train_epochs=1, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, m: t.pop("losses"), r"other tensors than this run: \['losses'\]"),
        (lambda t, m: t.update(losses=t["losses"][1:]), r"losses must be torch.float64 \(6,\), got .* \(5,\)"),
        (lambda t, m: t["losses"].fill_(math.nan), "losses holds NaN"),
        (lambda t, m: t["generator.numpy"][0, 624:625].fill_(2**40), "position 1099511627776 of 624"),
        (lambda t, m: t["generator.python"].fill_(-1), "no state of a random generator"),
        (lambda t, m: m.update(progress="[]"), "its record of the run is damaged"),
        (lambda t, m: m.update(progress='{"step": "6"}'), "its record of the run is damaged"),
        (lambda t, m: m.pop("identity"), "its record of the run is damaged"),
    ],
)  # fmt: skip
def test_a_forged_state_is_refused(tmp_path, change, message):
    run(tmp_path, num_train_epochs=1)
    tensors, metadata = read_tensors(tmp_path / STATE)
    change(tensors, metadata)
    write_tensors(tmp_path / STATE, tensors, metadata)
    with pytest.raises(fa.CheckpointError, match=message):
        run(tmp_path, num_train_epochs=1, resume=True)


def test_unwritable_folders_are_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(tasks, "supervised_loss", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match="is not a folder"):
        run(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .*file/out"):
        run(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_keeps_the_last_save(tmp_path, monkeypatch):
    expected = run(tmp_path / "a")
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(fa.CheckpointError, match=rf"{STATE.name}: cannot be written: No space left"):
        run(tmp_path / "b")
    monkeypatch.undo()
    assert history(run(tmp_path / "b", resume=True)) == history(expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.lm_head.weight.requires_grad_(True), "lm_head.weight is trainable but not part of adapter"),
        (lambda m: fa.set_active(m, None), "adapter 'default' is not the active one"),
        (lambda m: fa.detach(m), "no adapter is attached"),
        (lambda m: m.requires_grad_(False), "no parameter of adapter 'default' is trainable"),
    ],
)  # fmt: skip
def test_models_that_would_train_something_else_are_refused(tmp_path, change, message):
    model = make_adapted()
    change(model)
    with pytest.raises(ValueError, match=message):
        finetune(model, make_tokenizer(), make_examples(4), output_dir=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": []}, "train holds no examples"),
        ({"train": make_examples(2) + make_examples(2, labelled=False)}, "mixes examples with and without labels"),
        ({"train": [make_examples(1)[0]] * 3}, "label '(good|bad)' is not among those of the training data"),
        ({"config": TrainingConfig(max_length=65)}, "max_length must be at most 64, the model's context"),
        ({"config": TrainingConfig(max_length=8)}, r"toy line \d+: prompt and completion have \d+ tokens, at most 8"),
        ({"save_steps": 0}, "save_steps"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_before_anything_is_written(tmp_path, options, message):
    arguments = {"train": make_examples(8), "config": TrainingConfig(), "save_steps": 5, **options}
    train, config = arguments.pop("train"), arguments.pop("config")
    with pytest.raises(UserError, match=message):
        finetune(
            make_adapted(), make_tokenizer(), train, make_examples(8, seed=2), config,
            output_dir=tmp_path / "out", progress=False, **arguments,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, error",
    [
        ({"learning_rate": 0}, ValueError), ({"learning_rate": math.nan}, ValueError),
        ({"learning_rate": "1"}, TypeError), ({"weight_decay": -1}, ValueError), ({"betas": (0.9, 1.0)}, ValueError),
        ({"betas": 0.9}, TypeError), ({"warmup_ratio": 1.5}, ValueError), ({"num_train_epochs": 0}, ValueError),
        ({"batch_size": 2.0}, TypeError), ({"batch_size": True}, TypeError), ({"seed": -1}, ValueError),
        ({"max_grad_norm": math.inf}, ValueError), ({"gradient_accumulation_steps": 17}, ValueError),
        ({"max_length": 1}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_make_no_sense_are_refused_naming_the_field(options, error):
    with pytest.raises(error, match=next(iter(options))):
        TrainingConfig(**options)


def _call_at(monkeypatch, number, change):
    """Pass the loss of the ``number``-th forward pass of training through ``change``."""
    plain, calls = tasks.supervised_loss, []

    def changed(model, batch):
        calls.append(1)
        loss = plain(model, batch)
        return change(loss) if len(calls) == number else loss

    monkeypatch.setattr(tasks, "supervised_loss", changed)
