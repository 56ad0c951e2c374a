"""What a training run is asked to do, and the ways in which it can end early."""

import math
import signal
from dataclasses import asdict, dataclass
from typing import Any


class UserError(ValueError):
    """Something the caller can put right; the message says what was expected and what came."""


class NonFiniteError(UserError):
    """The loss or its gradient became NaN or infinite; the weights are those before the failing step."""


class TrainingInterrupted(Exception):
    """SIGINT or SIGTERM arrived; the state was saved after the last complete step."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
TRUNCATION = ("error", "prompt", "end")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides which numbers a run computes. A resumed run must have the same.

    The defaults are those of LLaMA-Adapter's training code (weight decay 0.02, betas 0.9 and 0.95, a learning
    rate of about 0.01). The short second-moment memory matters: at a closed gate the prompt has no gradient,
    and while the gate opens its gradient grows by orders of magnitude, which 0.999 would follow too slowly.

    Args:
        learning_rate: of AdamW, at the end of the warm-up; falls to 0 along a cosine.
        weight_decay, betas, eps: of AdamW.
        warmup_ratio: share of all steps over which the learning rate rises from 0.
        num_train_epochs: passes over the training data.
        batch_size: rows per optimiser step, over all processes and accumulation steps.
        gradient_accumulation_steps: forward passes per process that share one step; the gradient is the same.
        eval_batch_size: rows per forward pass and process in an evaluation.
        max_grad_norm: the gradient's norm is clipped to this; 0: not clipped.
        seed: of the data order and of everything random in the model.
        max_length: longest prompt and completion in tokens; ``None``: the model's context.
        truncation: what becomes of a longer one. ``"error"``: it is refused; ``"prompt"``: the start of its prompt is
            cut; ``"end"``: its end is cut. Of a text to classify the end is cut in both cases.
        append_eos: train on an end-of-sequence token after each completion; ``None``: after completions of
            prompt/completion records, not after labels, which are compared, not generated.
        parse_special_tokens: special tokens such as ``</s>`` that stand in a record are tokens; otherwise they are
            text like any other.
    Raises: TypeError, UserError: naming the field, what was expected and what came.

    >>> TrainingConfig(num_train_epochs=3).learning_rate
    0.01
    """

    learning_rate: float = 0.01
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_ratio: float = 0.1
    num_train_epochs: int = 2
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 32
    max_grad_norm: float = 1.0
    seed: int = 0
    max_length: int | None = None
    truncation: str = "error"
    append_eos: bool | None = None
    parse_special_tokens: bool = False

    def __post_init__(self):
        for name in ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "eval_batch_size"):
            _require_int(name, getattr(self, name), 1)
        _require_int("seed", self.seed, 0, 2**32 - 2**16)  # numpy takes 32 bits; each process adds its index
        if self.max_length is not None:
            _require_int("max_length", self.max_length, 2)
        if self.truncation not in TRUNCATION:
            raise UserError(f"truncation must be one of {', '.join(TRUNCATION)}, got {self.truncation!r}")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, got {self.betas!r}")
        _require_number("learning_rate", self.learning_rate, 0.0, above=True)
        _require_number("eps", self.eps, 0.0, above=True)
        _require_number("weight_decay", self.weight_decay, 0.0)
        _require_number("max_grad_norm", self.max_grad_norm, 0.0)
        _require_number("warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        for beta in self.betas:
            _require_number("betas", beta, 0.0, 1.0)
            if beta == 1:
                raise UserError("betas must be below 1")
        if self.gradient_accumulation_steps > self.batch_size:
            raise UserError(
                f"gradient_accumulation_steps must be at most batch_size {self.batch_size}, "
                f"got {self.gradient_accumulation_steps}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict."""
        return {**asdict(self), "betas": list(self.betas)}

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step ``step`` (from 0): linear warm-up, then half a cosine."""
        warmup = math.ceil(self.warmup_ratio * total_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} must be {bound}, got {value}")


def _require_number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low or value > high or (above and value == low):
        bound = f"above {low:g}" if above else f"at least {low:g}"
        raise UserError(
            f"{name} must be finite, {bound}{'' if high == math.inf else f', at most {high:g}'}, got {value}"
        )
