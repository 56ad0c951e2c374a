"""What a run tells on the way, in a log file, in log.jsonl and to trackers; and what it survives."""

import json
import os
import pty
import select
import signal
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors
from fastadapter.training import NonFiniteError, TrainingConfig, UserError, finetune, report, step
from fastadapter.training.log import require_trackers
from tests.training.toy import (
    STATE,
    adapter_bits,
    history,
    make_adapted,
    make_examples,
    make_tokenizer,
    run,
)


def test_a_log_file_gets_a_line_every_few_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "LINE_SECONDS", 0.0)
    run(tmp_path, progress=True, num_train_epochs=1)
    lines = capsys.readouterr().err.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 6 and "step 6 of 6: loss " in steps[-1] and "00:00 left" in steps[-1]
    assert all("tokens/s" in line and "learning rate" in line for line in steps)
    assert any(line.startswith("epoch 1 of 1: loss") for line in lines)
    monkeypatch.setattr(report, "LINE_SECONDS", 3600.0)
    run(tmp_path / "quick", progress=True, num_train_epochs=1)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith(("step ", "evaluating"))]) == 1, (
        "the first is at once"
    )
    run(tmp_path / "quiet", num_train_epochs=1)
    assert not capsys.readouterr().err


def test_a_terminal_that_goes_away_does_not_end_a_run_without_a_save(tmp_path):
    """The hangup comes with a terminal that cannot be written to any more."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            sys.stderr = os.fdopen(2, "w")  # pytest has put a file of its own in its place
            signal.alarm(120)  # whatever goes wrong, the test ends
            run(tmp_path, progress=True, num_train_epochs=100_000)
        except BaseException as stop:
            code = getattr(stop, "exit_code", 2)
        finally:
            os._exit(code)
    seen = b""
    while b"epoch 1 of" not in seen and select.select([terminal], [], [], 60)[0]:
        seen += os.read(terminal, 65536)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 129 and len(read_tensors(tmp_path / STATE)[0]["losses"]) >= 6


class Tracker(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__(_blank=True)
        self.told, self.config, self.finished = [], None, 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.told.append((step, values))

    def finish(self):
        self.finished += 1


def test_trackers_get_what_the_log_gets(tmp_path):
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    run(tmp_path, accelerator=accelerator, num_train_epochs=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in tracker.told] == [each.pop("step") for each in lines]
    assert [values for _, values in tracker.told] == lines and tracker.finished == 1
    assert tracker.config["learning_rate"] == 0.01 and tracker.config["lr_scheduler_type"] == "cosine"
    assert all(isinstance(value, (bool, int, float, str)) for value in tracker.config.values())


def test_trackers_that_are_not_there_are_named():
    with pytest.raises(UserError, match=r"report_to must be among aim, .*wandb, got 'paper'"):
        require_trackers(["paper"])
    available = {str(getattr(each, "value", each)) for each in get_available_trackers()}
    for name in {"aim", "comet_ml", "dvclive"} - available:
        with pytest.raises(UserError, match=f"report_to: {name} is not installed: pip install"):
            require_trackers([name])
    assert require_trackers([]) == []


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir(parents=True)
    with pytest.raises(fa.CheckpointError, match=r"log.jsonl: cannot be written: Is a directory"):
        run(tmp_path)


def half(folder, scale=None, monkeypatch=None, dropout=0.2, **options):
    """A run on a base in fp16, whose loss is scaled."""
    if scale is not None:
        plain = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device: plain(device, init_scale=scale))
    examples = make_examples(32)
    config = TrainingConfig(**{"batch_size": 4, "num_train_epochs": 2, **options.pop("config", {})})
    model = make_adapted(dtype=torch.float16, dropout=dropout)
    result = finetune(
        model, make_tokenizer(), examples[:22], examples[22:], config, output_dir=folder, save_steps=2,
        progress=False, **options,
    )  # fmt: skip
    return result, model


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [each for each in lines if "loss" in each]


def test_half_precision_trains_what_full_precision_does(tmp_path, monkeypatch):
    """Scaled up and down by a power of two, so nothing is lost but what fp16 loses."""
    result, model = half(tmp_path / "half", 256.0, monkeypatch, dropout=0.0)
    examples = make_examples(32)
    config = TrainingConfig(batch_size=4)
    whole = finetune(
        make_adapted(), make_tokenizer(), examples[:22], examples[22:], config, output_dir=tmp_path / "whole",
        progress=False,
    )  # fmt: skip
    assert result.losses == pytest.approx(whole.losses, rel=0.05)
    norms = [[each["grad_norm"] for each in logged(tmp_path / name)][:4] for name in ("half", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=0.02), "before the runs part for good"
    assert all(p.dtype == torch.float32 for _, p in fa.trainable_parameters(model))


def test_a_gradient_that_overflows_is_skipped_and_the_scale_comes_down(tmp_path, monkeypatch):
    result, model = half(tmp_path / "a", 2.0**19, monkeypatch)
    norms = [each["grad_norm"] for each in logged(tmp_path / "a")]
    skipped = norms.count(None)
    assert 0 < skipped < 12 and norms[-1] is not None and norms[0] is None
    progress = json.loads(read_tensors(tmp_path / "a" / STATE)[1]["progress"])
    assert progress["skipped"] == skipped and progress["scaler"]["scale"] == 2.0 ** (19 - skipped)
    assert all(p.isfinite().all() for _, p in fa.trainable_parameters(model))
    assert len(result.losses) == 12


@pytest.mark.parametrize("stop", [2, 11])
def test_half_precision_resumes_bit_for_bit(tmp_path, monkeypatch, stop):
    """Also behind steps that were skipped, when AdamW has taken fewer than the run, or none."""
    options = {"scale": 2.0**19, "monkeypatch": monkeypatch}
    plain, calls = report.Reporter.step, []

    def stopping(self, *args):
        calls.append(1)
        if len(calls) == 12 + stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    monkeypatch.setattr(report.Reporter, "step", stopping)
    expected, _ = half(tmp_path / "a", **options)
    with pytest.raises(Exception, match="SIGTERM after step"):
        half(tmp_path / "b", monkeypatch=monkeypatch)
    calls.extend([1] * 100)
    resumed, _ = half(tmp_path / "b", resume=True)
    assert history(resumed) == history(expected)
    assert adapter_bits(tmp_path / "b") == adapter_bits(tmp_path / "a")
    assert None in [each["grad_norm"] for each in logged(tmp_path / "a")]


def test_a_gradient_that_always_overflows_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(step.GradientBuffer, "norm", lambda self: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteError, match=r"step 5: the gradient overflows even at a loss scale of 0\.5"):
        half(tmp_path, 2.0**3, monkeypatch)


def test_other_precisions_are_not_scaled():
    assert step.make_scaler(make_adapted(dtype=torch.bfloat16), Accelerator(cpu=True)) is None
    assert step.make_scaler(make_adapted(), Accelerator(cpu=True)) is None
