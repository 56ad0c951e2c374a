"""Fine-tune the adapter of a frozen model."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.training import report, state
from fastadapter.training.batching import epoch_batches, share
from fastadapter.training.classification import ClassificationTask
from fastadapter.training.config import (
    STOP_SIGNALS,
    NonFiniteError,
    TrainingConfig,
    TrainingInterrupted,
    UserError,
)
from fastadapter.training.data import Example
from fastadapter.training.folder import RunFolder
from fastadapter.training.step import GradientBuffer, StopSignals
from fastadapter.training.targets import AdapterTarget, ParameterTarget, Target, training_only
from fastadapter.training.tasks import GenerationTask, Task

TASKS: dict[str, Callable[..., Task]] = {"generation": GenerationTask, "classification": ClassificationTask}


def finetune(
    model: nn.Module,
    tokenizer: Any,
    train: Sequence[Example],
    evaluation_data: Sequence[Example] | None = None,
    config: TrainingConfig | None = None,
    *,
    output_dir: str | Path,
    task: str = "generation",
    name: str = "default",
    trainable: Sequence[str] | None = None,
    resume: bool = False,
    save_steps: int = 50,
    progress: bool = True,
    accelerator: Any = None,
    details: Mapping[str, Any] | None = None,
) -> report.FinetuneResult:
    """Train the adapter ``name`` of ``model`` on the completions or the classes of ``train``.

    ``output_dir`` gets ``adapter.safetensors`` (the weights at the end), ``best/adapter.safetensors`` (those
    of the epoch with the best held-out accuracy for labels, the lowest held-out loss for other completions)
    and ``last/training_state.safetensors``, which ``resume`` continues from: with the same arguments, on the
    same machine, the result is bit for bit that of a run without interruption, whenever it was killed. SIGINT
    and SIGTERM end the run after the current step and a save.

    ``run.json`` says what was asked and what came of it, epoch by epoch, and ``README.md`` how to use the adapter.
    While the run lasts, the folder is locked: a second run in it is refused.

    A classification run also leaves ``labels.json``, the names of the classes. Without an adapter, ``trainable``
    names parameters of the model itself; they are saved as ``weights.safetensors``.

    Under ``torchrun`` or ``accelerate launch`` every process calls this with the same arguments and a model
    with the same weights; the rows of each step are shared out, the loss and its gradient are those of one
    process, and the first process writes.

    Args:
        model: a transformers causal language model, or a model for sequence classification, with an adapter
            attached; moved to the accelerator's device.
        tokenizer: the model's.
        train: examples, as from :func:`read_examples`.
        evaluation_data: held-out examples, evaluated before the first step and after each epoch.
        config: what decides the numbers.
        task: ``"generation"``, or ``"classification"`` by the labels of the examples, given their prompts.
        name: the adapter to train; it must be the active one and hold every trainable parameter.
        trainable: names of the model's own parameters (``*`` matches anything) to train in place of an adapter;
            the others are frozen for the duration.
        resume: continue the run in ``output_dir``, or start one if nothing of a run is there; one whose state is gone
            is an error. Otherwise a folder with a run is refused.
        save_steps: optimiser steps between two saves; the state is also saved at the start and after each
            epoch.
        progress: bars and lines on stderr.
        accelerator: an ``accelerate.Accelerator``; one is made if ``None``.
        details: what the caller alone knows, for ``run.json``: some of
            :data:`fastadapter.training.run_record.DETAILS`.
    Returns: history, accuracies, memory.
    Raises:
        UserError: before anything is written, what is wrong with data, configuration, folder or a run to
            resume.
        CheckpointError: a file cannot be written or read; the previous one is intact.
        NonFiniteError: NaN or Inf in the loss or gradient, naming the step; the last save is from before it.
        TrainingInterrupted: a signal came; the state is saved, ``exit_code`` is 130 or 143.

    >>> result = finetune(model, tokenizer, train, held_out, output_dir="out")  # doctest: +SKIP
    >>> result.eval["accuracy_after"]  # doctest: +SKIP
    0.88
    """
    from accelerate import Accelerator

    if not isinstance(save_steps, int) or isinstance(save_steps, bool) or save_steps < 1:
        raise UserError(f"save_steps must be an int, at least 1, got {save_steps!r}")
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    accelerator, config = accelerator or Accelerator(), config or TrainingConfig()
    rows = TASKS[task](unwrap(model), tokenizer, train, evaluation_data, config)
    model.to(accelerator.device)
    with nullcontext() if trainable is None else training_only(model, trainable):
        target = AdapterTarget(model, name) if trainable is None else ParameterTarget(model)
        run = _Run(model, rows, target, config, Path(output_dir), accelerator, details)
        with run.folder:
            run.begin(resume, save_steps, progress)
            try:
                return run.go()
            finally:
                run.reporter.close()
                run.buffer.release()
                unwrap(model).eval()


class _Run:
    """One call of :func:`finetune`."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        target: Target,
        config: TrainingConfig,
        output_dir: Path,
        accelerator: Any,
        details: Mapping[str, Any] | None = None,
    ):
        self.model, self.task, self.target, self.config = model, task, target, config
        self.output_dir, self.accelerator = output_dir, accelerator
        self.folder = RunFolder(output_dir, accelerator, details)
        self.steps_per_epoch = math.ceil(len(task.lengths) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_train_epochs
        self.parameters = target.parameters
        self.buffer = GradientBuffer(self.parameters, 1 + len(STOP_SIGNALS))
        self.optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self.parameters],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.progress = state.Progress()
        self.signals = StopSignals()
        self.batches: tuple[int, list[list[int]]] = (-1, [])
        self.identity = {
            "training": config.to_dict(),
            "adapter": target.identity,
            "model": state.identify_model(unwrap(model)),
            **task.identity(),
            "num_processes": accelerator.num_processes,
        }

    def begin(self, resume: bool, save_steps: int, progress: bool) -> None:
        """Seed or restore; nothing is written before everything that can be checked has been."""
        from accelerate.utils import broadcast, set_seed

        self.save_steps = save_steps
        self.state_file = self.output_dir / state.STATE_FILE
        self.folder.claim(resume)
        self.saved = resume and self.state_file.exists()
        if self.saved:
            self.progress = state.load_state(
                self.state_file, self.parameters, self.optimizer, self.identity, self.accelerator
            )
        self.agree()
        if not self.saved:
            set_seed(self.config.seed, device_specific=True)
            for _, parameter in self.parameters:
                parameter.data.copy_(broadcast(parameter.data))
        self.folder.begin(self.target, self.identity)
        self.reporter = report.Reporter(
            progress and self.accelerator.is_main_process,
            self.progress.step,
            self.total_steps,
            self.accelerator.device,
        )
        if resume and not self.saved:
            self.reporter.line(f"{self.output_dir} holds nothing to resume: a new run begins")

    def agree(self) -> None:
        """Wait until every process has looked for a run, before the first one writes, and compare what they found."""
        step = self.progress.step if self.saved else -1
        found = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(found)) > 1:
            steps = ", ".join("none" if step < 0 else str(step) for step in found)
            raise UserError(
                f"output_dir must be one folder that all processes share; they found a run at the steps {steps}"
            )

    def go(self) -> report.FinetuneResult:
        progress = self.progress
        with self.signals:
            if self.accelerator.is_main_process:
                self.task.write(self.output_dir)
            if not self.saved:
                self.save()  # a disk too full for the state is found out now, not after an hour
            self.folder.update(progress.epochs, self.outcome())
            if self.task.held_out_rows and progress.before is None:
                progress.before = self.evaluate("before the first step")
                self.save()
            self.model.train()
            while len(progress.epochs) < self.config.num_train_epochs:
                if progress.step // self.steps_per_epoch > len(progress.epochs):
                    self.finish_epoch()
                    continue
                stop = self.train_step()
                if stop or progress.step % self.save_steps == 0 or progress.step % self.steps_per_epoch == 0:
                    self.save()
                if stop:
                    self.interrupt(stop)
        if self.accelerator.is_main_process:
            self.target.save(self.output_dir)
        self.folder.update(progress.epochs, self.outcome(), finished=True)
        self.accelerator.wait_for_everyone()
        return self.result()

    def train_step(self) -> int | None:
        """One optimiser step; the number of a signal that any process received."""
        config, progress, buffer, accelerator = self.config, self.progress, self.buffer, self.accelerator
        started = time.perf_counter()
        rows = self.step_rows(progress.step)
        supervised = sum(self.task.weight(row) for row in rows)
        parts = share(rows, accelerator.num_processes * config.gradient_accumulation_steps)
        buffer.clear()
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            if part:
                loss = self.task.loss(self.model, part, accelerator.device) / supervised
                loss.backward()
                buffer.sums[0] += loss.detach()
        for index, number in enumerate(STOP_SIGNALS, 1):
            if self.signals.received == number:
                buffer.sums[index] = 1
        buffer.reduce(accelerator)
        # One transfer from the device per step, for all that the host has to know.
        loss, *stops, norm = torch.cat([buffer.sums, buffer.norm()[None]]).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.fail(f"loss is {loss}, gradient norm {norm}", buffer.non_finite())
        if config.max_grad_norm and norm > config.max_grad_norm:
            buffer.gradient.mul_(config.max_grad_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(progress.step, self.total_steps)
        self.optimizer.step()

        tokens = sum(self.task.lengths[row] for row in rows)
        progress.step += 1
        progress.losses.append(loss)
        progress.epoch_loss += loss * supervised
        progress.epoch_supervised += supervised
        progress.epoch_tokens += tokens
        progress.epoch_seconds += time.perf_counter() - started
        self.reporter.step(loss, tokens)
        return next((number for number, stop in zip(STOP_SIGNALS, stops) if stop), None)

    def step_rows(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.batches[0] != epoch:
            lengths, config = self.task.lengths, self.config
            self.batches = epoch, epoch_batches(lengths, config.batch_size, config.seed, epoch)
        return self.batches[1][index]

    def finish_epoch(self) -> None:
        progress, number = self.progress, len(self.progress.epochs) + 1
        entry = {
            "loss": progress.epoch_loss / progress.epoch_supervised,
            "tokens": progress.epoch_tokens,
            "seconds": progress.epoch_seconds,
        }
        line = f"epoch {number} of {self.config.num_train_epochs}: loss {entry['loss']:.4f}"
        if self.task.held_out_rows and progress.before:
            result = self.evaluate(f"after epoch {number}")
            entry |= {f"eval_{key}": value for key, value in result.items()}
            line += (
                f"; held-out loss {result['loss']:.4f} (before {progress.before['loss']:.4f}), "
                f"accuracy {result['accuracy']:.2%} (before {progress.before['accuracy']:.2%})"
            )
            rank = _by_accuracy if self.task.by_accuracy else _by_loss
            if progress.best is None or rank(result) > rank(progress.best):
                # Before the state that says so: after a kill in between, this is run again to the same end.
                if self.accelerator.is_main_process:
                    self.target.save(self.output_dir / "best")
                progress.best = {"epoch": number, **result}
        progress.epochs.append(entry)
        progress.epoch_loss, progress.epoch_supervised, progress.epoch_tokens, progress.epoch_seconds = (
            0.0,
            0,
            0,
            0.0,
        )
        self.save()
        self.folder.update(progress.epochs, self.outcome())
        self.reporter.line(line)

    def evaluate(self, when: str) -> dict[str, float]:
        accelerator = self.accelerator
        mine = range(accelerator.process_index, self.task.held_out_rows, accelerator.num_processes)
        with self.reporter.evaluation(len(mine)) as bar:

            def tick(fraction: float) -> None:
                bar(fraction)
                # With several processes the others would wait for this one's sums: it goes on.
                if self.signals.received and accelerator.num_processes == 1:
                    self.interrupt(self.signals.received)

            sums = self.task.evaluate(self.model, mine, self.config.eval_batch_size, tick)
        loss, tokens, correct, rows = sums
        if accelerator.num_processes > 1:
            # As float32 the loss would lose the digits that make it comparable; counts stay exact too.
            reduced = accelerator.reduce(
                torch.tensor(sums, dtype=torch.float64, device=accelerator.device), "sum"
            )
            loss, tokens, correct, rows = reduced.tolist()
        if not math.isfinite(loss):
            self.fail(f"held-out loss {when} is {loss}", [])
        return {"loss": loss / tokens, "accuracy": correct / rows}

    def save(self) -> None:
        state.save_state(
            self.state_file, self.parameters, self.optimizer, self.progress, self.identity, self.accelerator
        )

    def fail(self, what: str, names: list[str]) -> NoReturn:
        where = f" (first of {len(names)}: {names[0]})" if names else ""
        raise NonFiniteError(
            f"step {self.progress.step + 1}: {what}{where}; stopped. {self.state_file} is older; "
            "lower the learning rate or look at the data of this step"
        )

    def interrupt(self, number: int) -> NoReturn:
        raise TrainingInterrupted(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.progress.step}; "
            f"{self.output_dir} can be resumed",
        )

    def outcome(self) -> dict[str, Any]:
        """Of the held-out records, as far as the run is."""
        progress = self.progress
        outcome: dict[str, Any] = {"accuracy_before": None, "accuracy_after": None}
        if progress.before and progress.best:
            last = progress.epochs[-1]
            outcome = {
                "accuracy_before": progress.before["accuracy"],
                "accuracy_after": last["eval_accuracy"],
                "loss_before": progress.before["loss"],
                "loss_after": last["eval_loss"],
                "rows": self.task.held_out_rows,
                "best_epoch": progress.best["epoch"],
            }
        return outcome

    def result(self) -> report.FinetuneResult:
        progress = self.progress
        return report.FinetuneResult(
            config={
                key: self.identity[key]
                for key in ("training", "adapter", "task", "num_processes")
                if key in self.identity
            },
            epochs=progress.epochs,
            eval=self.outcome(),
            losses=progress.losses,
            trainable_parameters=sum(parameter.numel() for _, parameter in self.parameters),
            total_parameters=sum(parameter.numel() for parameter in unwrap(self.model).parameters()),
            train_rows=len(self.task.lengths),
            peak_rss_bytes=report.peak_rss_bytes(),
            peak_cuda_bytes=report.peak_cuda_bytes(self.accelerator.device),
        )


def _by_accuracy(result: dict[str, Any]) -> tuple[float, float]:
    return result["accuracy"], -result["loss"]


def _by_loss(result: dict[str, Any]) -> tuple[float, float]:
    return -result["loss"], result["accuracy"]
