"""What a run tells while it goes on and when it is over."""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastadapter.checkpoints.files import write_atomically
from fastadapter.ops.backends import GPU_TYPES
from fastadapter.training.config import UserError

LINE_SECONDS = 10.0  # between two lines in a log file


@dataclass(frozen=True)
class FinetuneResult:
    """Outcome of a run; ``to_dict`` is what ``--json`` writes.

    Attributes:
        config: ``training``, ``adapter``, ``num_processes``, and ``task`` of a run with a head.
        epochs: of each epoch the mean loss per supervised token, input tokens and seconds of its steps, and
            ``eval_loss``, ``eval_accuracy`` and the other metrics that are one number, where held-out data was
            evaluated after it.
        eval: ``accuracy_before``, ``accuracy_after``, ``loss_before``, ``loss_after`` of the weights at the
            start and the end, ``rows``, ``best_epoch``, ``best_step``, ``metrics``, all metrics of the weights at
            the end; only the first two, ``None``, without held-out data. A regression has no accuracy.
        losses: mean loss of every step.
        trainable_parameters, total_parameters: counts.
        train_rows: examples per epoch.
        peak_rss_bytes: largest resident memory of this process so far.
        peak_cuda_bytes: largest allocation on its GPU; ``None`` without one.
        evaluations: of each evaluation but the one before the first step, ``step``, ``loss`` and the other metrics
            that are one number.
        stopped_early: whether the run ended by ``early_stopping_patience``.
        trunk_cache: of a run whose passes began from cached states, how many ``blocks`` ``of`` how many were below
            them, the states' ``tokens`` and ``bytes``, how many tokens this run computed, the ``seconds`` it took to
            have them, and the name of the ``trunk``'s folder; ``None``: passes began with the tokens.
    """

    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    eval: dict[str, Any]
    losses: list[float]
    trainable_parameters: int
    total_parameters: int
    train_rows: int
    peak_rss_bytes: int
    peak_cuda_bytes: int | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False
    trunk_cache: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reporter:
    """Progress of steps and evaluations, and a line per epoch, on stderr; silent unless ``enabled``.

    A terminal gets bars, a log file a line every few seconds. A terminal that has gone away is no reason to lose a
    run: nothing more is written then.
    """

    def __init__(self, enabled: bool, step: int, total_steps: int, device: torch.device):
        self.enabled = enabled
        self.device = device
        self.lines = enabled and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps, initial=step, desc="training", unit="step", disable=self.lines or not enabled
        )
        self.tokens, self.started, self.paused = 0, time.perf_counter(), 0.0
        self.first, self.done, self.total, self.told = step, step, total_steps, -math.inf

    def step(self, loss: float, tokens: int, learning_rate: float = 0.0) -> None:
        self.tokens += tokens
        self.done += 1
        elapsed = time.perf_counter() - self.started - self.paused
        memory = peak_cuda_bytes(self.device) or peak_rss_bytes()
        speed = f"{self.tokens / elapsed:,.0f} tokens/s, {memory / 2**30:.2f} GiB"
        with self._forgiving():
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
            self.bar.update()
        if self.is_due():
            left = elapsed / (self.done - self.first) * (self.total - self.done)
            self.line(
                f"step {self.done} of {self.total}: loss {loss:.4f}, learning rate {learning_rate:.3g}, {speed}, "
                f"{tqdm.format_interval(left)} left"
            )

    def is_due(self) -> bool:
        """Whether a log file is to get a line again."""
        now = time.monotonic()
        if not self.lines or now - self.told < LINE_SECONDS:
            return False
        self.told = now
        return True

    def evaluation(self, rows: int):
        """A callable for the ``tick`` of an evaluation of ``rows`` rows, and the bar it moves."""
        return _EvaluationBar(self, rows)

    def line(self, text: str) -> None:
        if self.enabled:
            with self._forgiving():
                self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        with self._forgiving():
            self.bar.close()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.enabled = self.lines = False
            self.bar.disable = True


class _EvaluationBar:
    def __init__(self, reporter: Reporter, rows: int):
        self.reporter, self.rows, self.done = reporter, rows, 0
        self.started = time.perf_counter()
        self.bar = tqdm(disable=True)
        with reporter._forgiving():
            self.bar = tqdm(
                total=rows,
                desc="evaluating",
                unit="row",
                leave=False,
                disable=reporter.lines or not reporter.enabled,
            )

    def __enter__(self):
        return self

    def __call__(self, fraction: float) -> None:
        done = round(fraction * self.rows)
        with self.reporter._forgiving():
            self.bar.update(done - self.done)
        self.done = done
        if done < self.rows and self.reporter.is_due():
            self.reporter.line(f"evaluating: {done:,} of {self.rows:,} records")

    def __exit__(self, *_):
        with self.reporter._forgiving():
            self.bar.close()
        self.reporter.paused += time.perf_counter() - self.started


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource  # not on Windows, where only this number is missing

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_cuda_bytes(device: torch.device) -> int | None:
    """Largest memory allocated on a GPU so far; ``None`` for another device."""
    return torch.cuda.max_memory_allocated(device) if device.type in GPU_TYPES else None


def require_writable(folder: Path) -> None:
    """Create ``folder`` if need be and prove that a file can be written there.

    Raises: UserError: it cannot, with the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastadapter-") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON whole or not at all: a kill or a full disk leaves the file that was there.

    Raises: CheckpointError: it cannot be written.
    """
    write_atomically(Path(path), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
