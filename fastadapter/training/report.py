"""What a run tells while it goes on and when it is over."""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastadapter.checkpoints.files import write_atomically
from fastadapter.ops.backends import GPU_TYPES
from fastadapter.training.config import UserError


@dataclass(frozen=True)
class FinetuneResult:
    """Outcome of a run; ``to_dict`` is what ``--json`` writes.

    Attributes:
        config: ``training``, ``adapter``, ``num_processes``, and ``task`` of a classification run.
        epochs: of each epoch the mean loss per supervised token, input tokens and seconds of its steps, and
            ``eval_loss``, ``eval_accuracy`` where there is held-out data.
        eval: ``accuracy_before``, ``accuracy_after``, ``loss_before``, ``loss_after`` of the weights at the
            start and the end, ``rows``, ``best_epoch``; only the first two, ``None``, without held-out data.
        losses: mean loss of every step.
        trainable_parameters, total_parameters: counts.
        train_rows: examples per epoch.
        peak_rss_bytes: largest resident memory of this process so far.
        peak_cuda_bytes: largest allocation on its GPU; ``None`` without one.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reporter:
    """Progress bars of steps and evaluations, and a line per epoch, on stderr; silent unless ``enabled``."""

    def __init__(self, enabled: bool, step: int, total_steps: int, device: torch.device):
        self.enabled = enabled
        self.device = device
        # None: a bar only where stderr is a terminal; log files get the lines alone.
        self.bar = tqdm(
            total=total_steps, initial=step, desc="training", unit="step", disable=None if enabled else True
        )
        self.tokens, self.started, self.paused = 0, time.perf_counter(), 0.0

    def step(self, loss: float, tokens: int) -> None:
        self.tokens += tokens
        elapsed = time.perf_counter() - self.started - self.paused
        memory = peak_cuda_bytes(self.device) or peak_rss_bytes()
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, {self.tokens / elapsed:,.0f} tokens/s, {memory / 2**30:.2f} GiB", refresh=False
        )
        self.bar.update()

    def evaluation(self, rows: int):
        """A callable for the ``tick`` of an evaluation of ``rows`` rows, and the bar it moves."""
        return _EvaluationBar(self, rows)

    def line(self, text: str) -> None:
        if self.enabled:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class _EvaluationBar:
    def __init__(self, reporter: Reporter, rows: int):
        self.reporter, self.rows, self.done = reporter, rows, 0
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=rows, desc="evaluating", unit="row", leave=False, disable=None if reporter.enabled else True
        )

    def __enter__(self):
        return self

    def __call__(self, fraction: float) -> None:
        done = round(fraction * self.rows)
        self.bar.update(done - self.done)
        self.done = done

    def __exit__(self, *_):
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
