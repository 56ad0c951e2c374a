"""What a training run is asked to do, and the ways in which it can end early."""

import math
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# After the warm-up, the share of the learning rate as a function of the progress from 0 to 1: the schedules of
# transformers by their names there.
SCHEDULES = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
EVAL_STRATEGIES = ("no", "epoch", "steps")
# What a finished run may be continued with; everything else must be what it was.
LENGTH_FIELDS = ("num_train_epochs", "max_steps", "early_stopping_patience")


class UserError(ValueError):
    """Something the caller can put right; the message says what was expected and what came."""


class NonFiniteError(UserError):
    """The loss or its gradient became NaN or infinite; the weights are those before the failing step."""


class TrainingInterrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived; the state was saved after the last complete step."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


TRUNCATION = ("error", "prompt", "end")
# Windows has no SIGHUP.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides which numbers a run computes. A resumed run must have the same.

    The defaults are those of LLaMA-Adapter's training code (weight decay 0.02, betas 0.9 and 0.95, a learning
    rate of about 0.01). The short second-moment memory matters: at a closed gate the prompt has no gradient,
    and while the gate opens its gradient grows by orders of magnitude, which 0.999 would follow too slowly.

    Args:
        learning_rate: of AdamW, at the end of the warm-up.
        head_learning_rate: that of the heads and of what ``modules_to_save`` names; ``None``: the same.
        weight_decay, betas, eps: of AdamW; the decay is of all that is trained.
        lr_scheduler_type: what the learning rate does after the warm-up: falls to 0 along a ``"cosine"`` or a
            straight line (``"linear"``), or stays (``"constant"``).
        warmup_ratio: share of all steps over which the learning rate rises.
        warmup_steps: their number, in place of ``warmup_ratio``.
        num_train_epochs: passes over the training data.
        max_steps: optimiser steps of the run, in place of ``num_train_epochs``.
        batch_size: rows per optimiser step, over all processes and accumulation steps.
        gradient_accumulation_steps: forward passes per process that share one step; the gradient is the same.
        eval_strategy: when held-out data is evaluated, besides after the last step and, with ``eval_on_start``, before
            the first:
            ``"epoch"``, after each; ``"steps"``, every ``eval_steps``; ``"no"``.
        eval_steps: steps between two evaluations, for ``eval_strategy="steps"``.
        eval_on_start: evaluate before the first step, too.
        eval_batch_size: rows per forward pass and process in an evaluation.
        early_stopping_patience: end the run after so many evaluations in a row that were not better than the
            best one before; ``None``: never.
        label_smoothing_factor: share of each target that is spread over all classes, or all tokens.
        class_weights: of a classification, what an error on a text of each class counts: ``"balanced"``,
            inversely to how often the class occurs in the training data (scikit-learn's formula), or a weight
            for each label by name. The loss of held-out data is not weighted.
        max_grad_norm: the gradient's norm is clipped to this; 0: not clipped.
        seed: of the data order and of everything random in the model.
        max_length: longest prompt and completion in tokens; ``None``: the model's context.
        truncation: what becomes of a longer one. ``"error"``: it is refused; ``"prompt"``: the start of its prompt is
            cut; ``"end"``: its end is cut. Of a text to classify the end is cut in both cases.
        append_eos: train on an end-of-sequence token after each completion; ``None``: after completions of
            prompt/completion records, not after labels, which are compared, not generated.
        parse_special_tokens: special tokens such as ``</s>`` that stand in a record are tokens; otherwise they are
            text like any other.
        packing: put the rows of a forward pass one behind the other into one row, where none sees another, instead
            of padding them. The loss is the same; a model that cannot do that gets padded rows, and the run says so.
        pack_length: most tokens of such a row; a step that has more takes further forward passes. ``None``: 8192, or
            the longest row where that is longer. It may exceed the model's context, which each row keeps to by itself.
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
    head_learning_rate: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: int | None = None
    max_steps: int | None = None
    eval_strategy: str = "epoch"
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    label_smoothing_factor: float = 0.0
    class_weights: str | Mapping[str, float] | None = None
    packing: bool = False
    pack_length: int | None = None
    eval_on_start: bool = True

    def __post_init__(self):
        for name in ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "eval_batch_size"):
            _require_int(name, getattr(self, name), 1)
        _require_int("seed", self.seed, 0, 2**32 - 2**16)  # numpy takes 32 bits; each process adds its index
        for name, low in (
            ("max_length", 2),
            ("warmup_steps", 0),
            ("max_steps", 1),
            ("eval_steps", 1),
            ("early_stopping_patience", 1),
            ("pack_length", 2),
        ):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), low)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, got {self.betas!r}")
        _require_number("learning_rate", self.learning_rate, 0.0, above=True)
        if self.head_learning_rate is not None:
            _require_number("head_learning_rate", self.head_learning_rate, 0.0, above=True)
        _require_number("eps", self.eps, 0.0, above=True)
        _require_number("weight_decay", self.weight_decay, 0.0)
        _require_number("max_grad_norm", self.max_grad_norm, 0.0)
        _require_number("warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        _require_number("label_smoothing_factor", self.label_smoothing_factor, 0.0, 1.0)
        for beta in self.betas:
            _require_number("betas", beta, 0.0, 1.0)
            if beta == 1:
                raise UserError("betas must be below 1")
        if self.gradient_accumulation_steps > self.batch_size:
            raise UserError(
                f"gradient_accumulation_steps must be at most batch_size {self.batch_size}, "
                f"got {self.gradient_accumulation_steps}"
            )
        _require_one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        _require_one_of("truncation", self.truncation, TRUNCATION)
        _require_one_of("eval_strategy", self.eval_strategy, EVAL_STRATEGIES)
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            raise UserError(
                f'eval_steps goes with eval_strategy "steps", and that needs it; got eval_strategy '
                f"{self.eval_strategy!r} and eval_steps {self.eval_steps}"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise UserError('early_stopping_patience needs evaluations: eval_strategy is "no"')
        if not isinstance(self.packing, bool):
            raise TypeError(f"packing must be a bool, got {self.packing!r}")
        if self.pack_length is not None and not self.packing:
            raise UserError("pack_length goes with packing")
        if not isinstance(self.eval_on_start, bool):
            raise TypeError(f"eval_on_start must be True or False, got {self.eval_on_start!r}")
        self._check_class_weights()

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        if isinstance(weights, str):
            if weights != "balanced":
                raise UserError(
                    f'class_weights must be "balanced" or a weight for each label, got {weights!r}'
                )
            return
        if not isinstance(weights, Mapping) or not weights:
            raise TypeError(f'class_weights must be "balanced" or a weight for each label, got {weights!r}')
        for label, weight in weights.items():
            _require_number(f"class_weights of {label!r}", weight, 0.0, above=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict."""
        weights = dict(self.class_weights) if isinstance(self.class_weights, Mapping) else self.class_weights
        return {**asdict(self), "betas": list(self.betas), "class_weights": weights}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "TrainingConfig":
        """The configuration that :meth:`to_dict` gave, in this version or an earlier one.

        Raises: TypeError, UserError: a field that this version does not know, or a value that makes no sense.
        """
        given = up_to_date(record)
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise UserError(f"the training settings hold {unknown[0]}, which this version does not know")
        if isinstance(given.get("betas"), list):
            given["betas"] = tuple(given["betas"])
        return cls(**given)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of a run whose epochs have ``steps_per_epoch``."""
        return self.max_steps if self.max_steps is not None else self.num_train_epochs * steps_per_epoch

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps over which the learning rate rises, of ``total_steps``."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)

    def learning_rate_at(self, step: int, total_steps: int, peak: float | None = None) -> float:
        """Learning rate of step ``step`` (from 0), of a parameter whose highest rate is ``peak``.

        As in transformers, but for the warm-up, in which step ``i`` has the share ``i + 1`` of the warm-up
        instead of ``i``: no step at rate 0.
        """
        peak = self.learning_rate if peak is None else peak
        warmup = self.num_warmup_steps(total_steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * SCHEDULES[self.lr_scheduler_type]((step - warmup) / max(1, total_steps - warmup))


def up_to_date(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a configuration of an earlier version, with the names and the fields of this one.

    What that version did not know was then what is the default now.
    """
    given = {**TrainingConfig().to_dict(), **record}
    if "truncate_prompt" in given:
        given["truncation"] = "prompt" if given.pop("truncate_prompt") else "error"
    return given


def _require_one_of(name: str, value: Any, names: Any) -> None:
    if not isinstance(value, str) or value not in names:
        raise UserError(f"{name} must be one of {', '.join(names)}, got {value!r}")


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
