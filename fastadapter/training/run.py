"""One run of the training loop: its steps, evaluations and saves."""

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.training import continuing, held_out, metrics, report, state
from fastadapter.training.batching import epoch_batches, share
from fastadapter.training.config import (
    STOP_SIGNALS,
    NonFiniteError,
    TrainingConfig,
    TrainingInterrupted,
    UserError,
)
from fastadapter.training.folder import RunFolder
from fastadapter.training.log import RunLog
from fastadapter.training.step import GradientBuffer, StopSignals, make_optimizer, make_scaler
from fastadapter.training.targets import Target
from fastadapter.training.tasks import Task


class Run:
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
        self.total_steps = config.total_steps(self.steps_per_epoch)
        if config.num_warmup_steps(self.total_steps) > self.total_steps:
            raise UserError(
                f"warmup_steps must be at most the run's {self.total_steps} steps, got {config.warmup_steps}"
            )
        if config.early_stopping_patience is not None and task.held_out is None:
            raise UserError("early_stopping_patience needs held-out data")
        self.parameters = target.parameters
        self.buffer = GradientBuffer(self.parameters, 1 + len(STOP_SIGNALS))
        self.optimizer = make_optimizer(target, config)
        self.scaler = make_scaler(model, accelerator)
        self.progress = state.Progress()
        self.signals = StopSignals()
        self.batches: tuple[int, list[list[int]]] = (-1, [])
        self.log: RunLog | None = None
        self.trunk: dict[str, Any] | None = None
        self.identity = {
            "training": config.to_dict(),
            "adapter": target.identity,
            "model": state.identify_model(unwrap(model)),
            **task.identity(),
            "num_processes": accelerator.num_processes,
        }
        if accelerator.mixed_precision != "no":
            self.identity["mixed_precision"] = accelerator.mixed_precision

    def begin(self, resume: bool, save_steps: int, progress: bool, restart_schedule: bool = False) -> None:
        """Seed or restore; nothing is written before everything that can be checked has been."""
        from accelerate.utils import broadcast, set_seed

        self.save_steps = save_steps
        self.state_file = self.output_dir / state.STATE_FILE
        self.folder.claim(resume)
        self.task.settle(self.model, self.accelerator.device)
        self.saved = resume and self.state_file.exists()
        if self.saved:
            self.restore(restart_schedule)
        self.agree()
        if not self.saved:
            set_seed(self.config.seed, device_specific=True)
            for _, parameter in self.parameters:
                parameter.data.copy_(broadcast(parameter.data))
        self.folder.begin(self.target, self.identity)
        if self.config.packing:
            self.folder.record["packing"] = self.task.layout.describe()
        self.reporter = report.Reporter(
            progress and self.accelerator.is_main_process,
            self.progress.step,
            self.total_steps,
            self.accelerator.device,
        )
        if resume and not self.saved:
            self.reporter.line(f"{self.output_dir} holds nothing to resume: a new run begins")
        if line := self.task.layout.line():
            self.reporter.line(line)

    def restore(self, restart_schedule: bool) -> None:
        """Take up the saved run, or refuse to where it is another one."""

        def continued(saved: dict[str, Any], progress: state.Progress) -> dict[str, Any]:
            old = continuing.settings_of(saved)
            if old is None:
                return self.identity
            settings = continuing.change_length(
                old, self.config, progress, self.steps_per_epoch, restart_schedule
            )
            return {**self.identity, "training": settings.to_dict()}

        self.progress = state.load_state(
            self.state_file, self.parameters, self.optimizer, self.identity, self.accelerator, continued
        )
        continuing.fill_in(self.progress, self.steps_per_epoch)
        if self.scaler is not None and self.progress.scaler is not None:
            self.scaler.load_state_dict(self.progress.scaler)

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
                evaluated = {each["step"] for each in progress.evaluations} | (
                    {0} if progress.before else set()
                )
                self.log = RunLog(
                    self.output_dir, progress.step, evaluated, self.accelerator, self.identity["training"]
                )
            if not self.saved:
                self.save()  # a disk too full for the state is found out now, not after an hour
            self.folder.update(progress.epochs, self.outcome())
            if self.task.held_out is not None and self.config.eval_on_start and progress.before is None:
                progress.before = metrics.scalars(self.evaluate("before the first step"))
                if self.log is not None:
                    self.log.evaluation(0, 0.0, progress.before)
                self.save()
            self.model.train()
            while True:
                evaluated_now = self.is_evaluation_due()
                if evaluated_now:
                    self.evaluate_step()
                ended = progress.epoch_supervised > 0 and (self.is_epoch_end() or self.is_over())
                if ended:
                    self.finish_epoch()
                if evaluated_now or ended:
                    self.save()
                    self.folder.update(progress.epochs, self.outcome())
                if self.is_over():
                    break
                stop = self.train_step()
                if (
                    stop
                    or progress.step % self.save_steps == 0
                    or self.is_evaluation_due()
                    or self.is_epoch_end()
                ):
                    self.save()
                if stop:
                    self.interrupt(stop)
        if self.accelerator.is_main_process:
            self.target.save(self.output_dir)
        self.folder.update(progress.epochs, self.outcome(), finished=True)
        self.accelerator.wait_for_everyone()
        return self.result()

    def close(self) -> None:
        self.reporter.close()
        if self.log is not None:
            self.log.close()

    def is_epoch_end(self) -> bool:
        return self.progress.step % self.steps_per_epoch == 0

    def is_stopped_early(self) -> bool:
        progress, patience = self.progress, self.config.early_stopping_patience
        if patience is None or progress.best is None:
            return False
        return sum(each["step"] > progress.best["step"] for each in progress.evaluations) >= patience

    def is_over(self) -> bool:
        return self.progress.step >= self.total_steps or self.is_stopped_early()

    def is_evaluation_due(self) -> bool:
        progress, config = self.progress, self.config
        done = progress.evaluations[-1]["step"] if progress.evaluations else 0
        if self.task.held_out is None or progress.step == done:
            return False
        every = {"epoch": self.steps_per_epoch, "steps": config.eval_steps}.get(config.eval_strategy)
        return progress.step == self.total_steps or (every is not None and progress.step % every == 0)

    def train_step(self) -> int | None:
        """One optimiser step; the number of a signal that any process received."""
        config, progress, buffer, accelerator = self.config, self.progress, self.buffer, self.accelerator
        started = time.perf_counter()
        rows = self.step_rows(progress.step)
        supervised = sum(self.task.weight(row) for row in rows)
        parts = self.parts(rows)
        buffer.clear()
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            for together in self.task.layout.passes(part):
                with accelerator.autocast():
                    loss = self.task.loss(self.model, together, accelerator.device) / supervised
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                buffer.sums[0] += loss.detach()
        for index, number in enumerate(STOP_SIGNALS, 1):
            if self.signals.received == number:
                buffer.sums[index] = 1
        buffer.reduce(accelerator)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        # One transfer from the device per step, for all that the host has to know.
        loss, *stops, norm = torch.cat([buffer.sums, buffer.norm()[None]]).tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["peak"])
        if self.scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
            self.skip_step()
        elif not math.isfinite(loss) or not math.isfinite(norm):
            self.fail(f"loss is {loss}, gradient norm {norm}", buffer.non_finite())
        else:
            if config.max_grad_norm and norm > config.max_grad_norm:
                buffer.gradient.mul_(config.max_grad_norm / norm)
            self.optimizer.step()
            if self.scaler is not None:
                self.scaler.update()

        tokens = sum(self.task.lengths[row] for row in rows)
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.losses.append(loss)
        progress.epoch_loss += loss * supervised
        progress.epoch_supervised += supervised
        progress.epoch_tokens += tokens
        progress.epoch_seconds += seconds
        self.tell_step(loss, norm, tokens, seconds)
        return next((number for number, stop in zip(STOP_SIGNALS, stops) if stop), None)

    def parts(self, rows: list[int]) -> list[list[int]]:
        """The rows of a step, shared out to all processes and what each of them accumulates."""
        return share(rows, self.accelerator.num_processes * self.config.gradient_accumulation_steps)

    def learning_rate(self, peak: float) -> float:
        start = self.progress.schedule_start
        return self.config.learning_rate_at(self.progress.step - start, self.total_steps - start, peak)

    def skip_step(self) -> None:
        """A gradient that overflowed: halve the scale of the loss and leave the weights as they are."""
        assert self.scaler is not None
        scale = self.scaler.get_scale()
        if scale < 1:
            self.fail(f"the gradient overflows even at a loss scale of {scale:g}", self.buffer.non_finite())
        self.scaler.update(scale * self.scaler.get_backoff_factor())
        self.progress.skipped += 1

    def tell_step(self, loss: float, norm: float, tokens: int, seconds: float) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.reporter.step(loss, tokens, rates[0])
        if self.log is not None:
            values = {
                "loss": loss,
                "learning_rate": rates[0],
                "grad_norm": norm,
                "tokens_per_second": round(tokens / seconds, 1),
            }
            if len(rates) > 1:
                values["head_learning_rate"] = rates[1]
            self.log.step(self.progress.step, self.progress.step / self.steps_per_epoch, values)

    def step_rows(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.batches[0] != epoch:
            lengths, config = self.task.lengths, self.config
            self.batches = epoch, epoch_batches(lengths, config.batch_size, config.seed, epoch)
        return self.batches[1][index]

    def evaluate_step(self) -> None:
        """Evaluate the weights as they are, and keep them if they are the best so far."""
        progress, held = self.progress, self.task.held_out
        assert held is not None
        epoch = math.ceil(progress.step / self.steps_per_epoch)
        progress.metrics = self.evaluate(f"after step {progress.step}")
        result = metrics.scalars(progress.metrics)
        progress.evaluations.append({"step": progress.step, **result})
        if progress.best is None or held_out.rank(held, result) > held_out.rank(held, progress.best):
            # Before the state that says so: after a kill in between, this is run again to the same end.
            if self.accelerator.is_main_process:
                self.target.save(self.output_dir / "best")
            progress.best = {"epoch": epoch, "step": progress.step, **result}
        if self.log is not None:
            self.log.evaluation(progress.step, progress.step / self.steps_per_epoch, result)
        if not self.is_epoch_end():
            self.reporter.line(f"step {progress.step}: {self.compared(result)}")

    def compared(self, result: dict[str, Any]) -> str:
        """An evaluation, beside the one before the first step if there was one, in words."""
        shown = {"loss": ".4f", "accuracy": ".2%"}
        parts = []
        for key in (key for key in shown if key in result):
            text = f"{key} {result[key]:{shown[key]}}"
            if self.progress.before:
                text += f" (before {self.progress.before[key]:{shown[key]}})"
            parts.append(text)
        return f"held-out {', '.join(parts)}"

    def finish_epoch(self) -> None:
        progress = self.progress
        number = math.ceil(progress.step / self.steps_per_epoch)
        entry = {
            "loss": progress.epoch_loss / progress.epoch_supervised,
            "tokens": progress.epoch_tokens,
            "seconds": progress.epoch_seconds,
        }
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        line = f"epoch {number} of {epochs}: loss {entry['loss']:.4f}"
        if self.config.packing:
            entry["utilisation"] = self.utilisation(number - 1)
            line += f", utilisation {entry['utilisation']:.1%}"
        if progress.evaluations and progress.evaluations[-1]["step"] == progress.step:
            result = metrics.scalars(progress.evaluations[-1])
            entry |= {f"eval_{key}": value for key, value in result.items()}
            line += f"; {self.compared(result)}"
        progress.epochs.append(entry)
        progress.epoch_loss, progress.epoch_supervised, progress.epoch_tokens, progress.epoch_seconds = (
            0.0,
            0,
            0,
            0.0,
        )
        self.reporter.line(line)
        if self.is_stopped_early() and progress.best is not None:
            self.reporter.line(
                f"stopped early: no evaluation after step {progress.best['step']} was better than the one there"
            )

    def utilisation(self, epoch: int) -> float:
        """Tokens of rows among all that were computed in an epoch, or in what was taken of it."""
        first = epoch * self.steps_per_epoch
        steps = range(first, min(first + self.steps_per_epoch, self.progress.step))
        return self.task.layout.utilisation(
            [part for step in steps for part in self.parts(self.step_rows(step))]
        )

    def evaluate(self, when: str) -> dict[str, Any]:
        accelerator, held = self.accelerator, self.task.held_out
        assert held is not None
        rows = math.ceil(held.rows / accelerator.num_processes)
        with self.reporter.evaluation(rows) as bar:

            def tick(fraction: float) -> None:
                bar(fraction)
                # With several processes the others would wait for this one's rows: it goes on.
                if self.signals.received and accelerator.num_processes == 1:
                    self.interrupt(self.signals.received)

            with accelerator.autocast():
                result = held_out.measure(held, self.model, self.config.eval_batch_size, tick, accelerator)
        if not math.isfinite(result["loss"]):
            self.fail(f"held-out loss {when} is {result['loss']}", [])
        return result

    def save(self) -> None:
        if self.scaler is not None:
            self.progress.scaler = self.scaler.state_dict()
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
        progress, held = self.progress, self.task.held_out
        outcome: dict[str, Any] = {"accuracy_before": None, "accuracy_after": None}
        if held is not None and progress.best:
            last = progress.evaluations[-1]
            outcome = {
                f"{key}_{when}": each.get(key)
                for key in ("accuracy", "loss")
                for when, each in (("before", progress.before or {}), ("after", last))
            }
            outcome |= {
                "rows": held.rows,
                "best_epoch": progress.best["epoch"],
                "best_step": progress.best["step"],
                "metrics": progress.metrics,
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
            evaluations=progress.evaluations,
            stopped_early=self.is_stopped_early(),
            trunk_cache=self.trunk,
        )
