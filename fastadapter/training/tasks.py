"""What a run learns: which rows there are, their loss, and how well held-out rows are answered.

A task has everything in tokens already, and every complaint about the data has been made, before a run begins.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.discovery import looks_back_only
from fastadapter.training import evaluation, state
from fastadapter.training.batching import collate
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Encoded, Example, context_length, encode_examples, label_completions
from fastadapter.training.loss import supervised_loss

Sums = tuple[float, int, int, int]


class Task(Protocol):
    """The rows of a run.

    Attributes:
        lengths: tokens of every training row.
        held_out_rows: how many rows there are to evaluate; 0: there is no held-out data.
        by_accuracy: the best epoch is that of the highest held-out accuracy; otherwise of the lowest loss.
    """

    lengths: list[int]
    held_out_rows: int
    by_accuracy: bool

    def weight(self, row: int) -> int:
        """Terms that the row adds to the sum of the loss: the mean over a step divides by their number."""

    def loss(self, model: nn.Module, rows: Sequence[int], device: torch.device) -> Tensor:
        """Sum of the loss over some training rows."""

    def evaluate(
        self, model: nn.Module, rows: Sequence[int], batch_size: int, tick: evaluation.Tick | None
    ) -> Sums:
        """Over some held-out rows: sum of the loss, its terms, correct rows, rows."""

    def identity(self) -> dict[str, Any]:
        """Fields that tell this run's data from another's."""

    def write(self, folder: Path) -> None:
        """Leave beside the weights what is needed to read their predictions."""


class GenerationTask:
    """Completions behind prompts: the loss of the completion's tokens, given all before them."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Sequence[Example],
        held_out: Sequence[Example] | None,
        config: TrainingConfig,
    ):
        self.causal = looks_back_only(model)
        encoding = _encoding(model, train, config)
        self.train = encode_examples(tokenizer, train, **encoding)
        self.lengths = [len(each.input_ids) for each in self.train]
        self.held_out: evaluation.EvalData | None = None
        if held_out:
            self.held_out = evaluation.prepare(tokenizer, held_out, label_completions(train), **encoding)
        self.held_out_rows = len(self.held_out.truth) if self.held_out else 0
        self.by_accuracy = bool(self.held_out and self.held_out.labelled)

    def weight(self, row: int) -> int:
        return self.train[row].num_supervised

    def loss(self, model: nn.Module, rows: Sequence[int], device: torch.device) -> Tensor:
        return supervised_loss(model, collate([self.train[row] for row in rows], device, causal=self.causal))

    def evaluate(
        self, model: nn.Module, rows: Sequence[int], batch_size: int, tick: evaluation.Tick | None
    ) -> Sums:
        assert self.held_out is not None
        return evaluation.evaluate(model, self.held_out, rows, batch_size, tick)

    def identity(self) -> dict[str, Any]:
        held_out: list[list[Encoded]] = self.held_out.candidates if self.held_out else []
        return {
            "data": {
                "train_rows": len(self.train),
                "train": state.digest_examples([each] for each in self.train),
                "eval_rows": self.held_out_rows,
                "eval": state.digest_examples(held_out) if held_out else "",
            }
        }

    def write(self, folder: Path) -> None:
        pass  # an adapter for generation speaks for itself


def require_max_length(model: Any, config: TrainingConfig) -> int | None:
    """Positions the model has, after a look at what the configuration asks for."""
    context = context_length(model)
    if context is not None and config.max_length is not None and config.max_length > context:
        raise UserError(f"max_length must be at most {context}, the model's context, got {config.max_length}")
    return context


def _encoding(model: nn.Module, train: Sequence[Example], config: TrainingConfig) -> dict[str, Any]:
    """The arguments of ``encode_examples``, after the checks that need the model and the data."""
    if not train:
        raise UserError("train holds no examples")
    labelled = {example.label is not None for example in train}
    if len(labelled) > 1:
        raise UserError("train mixes examples with and without labels")
    completions = labelled == {False} and train[0].messages is None
    context = require_max_length(model, config)
    return {
        "append_eos": config.append_eos if config.append_eos is not None else completions,
        "max_length": config.max_length or context,
        "truncation": config.truncation,
        "parse_special_tokens": config.parse_special_tokens,
    }
