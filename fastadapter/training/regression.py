"""Numbers instead of classes: a text goes in, the one output of the model's head is its number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.training import metrics
from fastadapter.training.batching import to_device
from fastadapter.training.classification import (
    Row,
    class_logits,
    encode_for,
    identify_rows,
    packed_class_logits,
    pad,
    pad_token,
    require_classifier,
    require_labels,
    text_outputs,
)
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Example
from fastadapter.training.held_out import Tick
from fastadapter.training.packing import Layout
from fastadapter.training.trunk.cached import Trunk


@dataclass(frozen=True)
class HeldOutNumbers:
    """Held-out texts and their numbers."""

    texts: list[Row]
    pad_token_id: int
    trunk: Trunk | None = None

    by_accuracy = False
    width = 1

    @property
    def rows(self) -> int:
        return len(self.texts)

    def predict(self, model: nn.Module, rows: Sequence[int], batch_size: int, tick: Tick | None) -> Tensor:
        """The numbers that the model names."""
        ids = [self.texts[row].input_ids for row in rows]
        return text_outputs(model, ids, 1, self.pad_token_id, batch_size, tick, trunk=self.trunk)

    def sequences(self) -> list[tuple[int, ...]]:
        return [row.input_ids for row in self.texts]

    def measure(self, table: Tensor) -> dict[str, Any]:
        """``loss``, the mean squared error, and the metrics of numbers."""
        truth = torch.tensor([row.label for row in self.texts], dtype=torch.float64, device="cpu")
        loss = float((table[:, 0] - truth).square().mean())
        if not math.isfinite(loss):  # the caller says so; there is nothing to measure
            return {"loss": loss}
        return {"loss": loss, **metrics.regression_metrics(table[:, 0].numpy(), truth.numpy())}


class RegressionTask:
    """The mean squared error of the one output of a model with a classification head.

    Labels are taken as they are: numbers far from 1 want a learning rate to match, or scaling beforehand.

    Raises: UserError: naming the record: it has no label, or one that is no finite number; a text without tokens, or
        too long without ``truncation``; a model whose head has not one output.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Sequence[Example],
        held_out: Sequence[Example] | None,
        config: TrainingConfig,
    ):
        self.trunk: Trunk | None = None
        if not train:
            raise UserError("train holds no examples")
        for name, value in (
            ("class_weights", config.class_weights),
            ("label_smoothing_factor", config.label_smoothing_factor),
        ):
            if value:
                raise UserError(f"{name}: a regression has no classes")
        numbers = parse_numbers([*train, *(held_out or ())])
        require_regressor(model)
        self.train = encode_for(model, tokenizer, train, numbers, config)
        self.pad_token_id = pad_token(model, tokenizer)
        self.held_out: HeldOutNumbers | None = None
        if held_out:
            self.held_out = HeldOutNumbers(
                encode_for(model, tokenizer, held_out, numbers, config), self.pad_token_id
            )
        self.lengths = [len(row.input_ids) for row in self.train]
        self.layout = Layout(self.lengths, [example.source for example in train], config)

    def sequences(self) -> list[tuple[int, ...]]:
        return [row.input_ids for row in self.train]

    def inputs(self, sequences: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        return pad(sequences, self.pad_token_id, device)

    def weight(self, row: int) -> float:
        return 1

    def settle(self, model: nn.Module, device: torch.device) -> None:
        self.layout.settle(model, lambda rows, packed: list(self.numbers(model, rows, device, packed)))

    def numbers(self, model: nn.Module, rows: Sequence[int], device: torch.device, packed: bool) -> Tensor:
        texts = [self.train[row].input_ids for row in rows]
        logits = packed_class_logits if packed else class_logits
        return logits(model, texts, 1, self.pad_token_id, device, self.trunk)[:, 0]

    def loss(self, model: nn.Module, rows: Sequence[int], device: torch.device) -> Tensor:
        found = self.numbers(model, rows, device, self.layout.packed)
        truth_of = torch.tensor([self.train[row].label for row in rows], dtype=found.dtype, device="cpu")
        (truth,) = to_device([truth_of], device)
        return (found - truth).square().sum()

    def identity(self) -> dict[str, Any]:
        return {
            "task": {"kind": "regression", "pad_token_id": self.pad_token_id},
            "data": identify_rows(self.train, self.held_out.texts if self.held_out else []),
        }

    def write(self, folder: Path) -> None:
        pass  # a number needs no name


def parse_numbers(examples: Sequence[Example]) -> dict[str, float]:
    """The number that each label writes.

    Raises: UserError: naming the record: it has no label, or one that is no finite number.
    """
    require_labels(examples, "regression")
    numbers = {}
    for example in examples:
        label = str(example.label)
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{example.source}: label {label!r} must be a finite number")
        numbers[label] = value
    return numbers


def require_regressor(model: Any) -> None:
    """Raise UserError unless ``model`` has a classification head with one output."""
    require_classifier(model)
    if model.config.num_labels != 1:
        raise UserError(
            f"the model's head has {model.config.num_labels} outputs, a regression needs one; load the model with "
            "num_labels=1"
        )
