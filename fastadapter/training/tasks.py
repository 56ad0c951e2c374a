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
from fastadapter.training.batching import Batch, collate
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Encoded, Example, context_length, encode_examples, label_completions
from fastadapter.training.held_out import HeldOut
from fastadapter.training.loss import supervised_logits, supervised_loss
from fastadapter.training.packing import Layout, pack
from fastadapter.training.trunk.cached import Trunk, beginning


class Task(Protocol):
    """The rows of a run.

    Attributes:
        lengths: tokens of every training row.
        held_out: the rows to evaluate; ``None``: there is no held-out data.
        layout: how rows lie in a forward pass.
        trunk: states to begin the passes with; ``None``: they begin with the tokens.
    """

    lengths: list[int]
    layout: Layout
    trunk: Trunk | None

    @property
    def held_out(self) -> HeldOut | None: ...

    def sequences(self) -> list[tuple[int, ...]]:
        """The tokens of every training row."""

    def inputs(self, sequences: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        """What the model is given for some rows or held-out ones, padded on the right."""

    def weight(self, row: int) -> float:
        """What the row's terms count in the sum of the loss: the mean over a step divides by the sum of it."""

    def settle(self, model: nn.Module, device: torch.device) -> None:
        """Find out what only the model can tell, before the first step."""

    def loss(self, model: nn.Module, rows: Sequence[int], device: torch.device) -> Tensor:
        """Sum of the loss over some training rows, in one forward pass."""

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
        self.trunk: Trunk | None = None
        if config.class_weights is not None:
            raise UserError("class_weights are for task classification, not for generation")
        smoothing = config.label_smoothing_factor
        self.loss_options: dict[str, Any] = {"label_smoothing": smoothing} if smoothing else {}
        encoding = encoding_options(model, train, config)
        self.train = encode_examples(tokenizer, train, **encoding)
        self.lengths = [len(each.input_ids) for each in self.train]
        self.layout = Layout(self.lengths, [example.source for example in train], config)
        self.held_out: evaluation.EvalData | None = None
        if held_out:
            self.held_out = evaluation.prepare(tokenizer, held_out, label_completions(train), **encoding)

    def sequences(self) -> list[tuple[int, ...]]:
        return [each.input_ids for each in self.train]

    def inputs(self, sequences: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        rows = [Encoded(ids, len(ids)) for ids in sequences]
        return collate(rows, device, causal=self.causal).model_inputs()

    def weight(self, row: int) -> float:
        return self.train[row].num_supervised

    def settle(self, model: nn.Module, device: torch.device) -> None:
        def logits(rows: Sequence[int], packed: bool) -> list[Tensor]:
            parts = [self.train[row].num_supervised for row in rows]
            return list(supervised_logits(model, self.batch(rows, device, packed)).split(parts))

        self.layout.settle(model, logits)

    def batch(self, rows: Sequence[int], device: torch.device, packed: bool) -> Batch:
        examples = [self.train[row] for row in rows]
        return pack(examples, device) if packed else collate(examples, device, causal=self.causal)

    def loss(self, model: nn.Module, rows: Sequence[int], device: torch.device) -> Tensor:
        batch = self.batch(rows, device, self.layout.packed)
        sequences = [self.train[row].input_ids for row in rows]
        with beginning(self.trunk, batch.input_ids, batch.places, sequences):
            return supervised_loss(model, batch, **self.loss_options)

    def identity(self) -> dict[str, Any]:
        held_out: list[list[Encoded]] = self.held_out.candidates if self.held_out else []
        return {
            "data": {
                "train_rows": len(self.train),
                "train": state.digest_examples([each] for each in self.train),
                "eval_rows": len(held_out),
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


def encoding_options(model: nn.Module, train: Sequence[Example], config: TrainingConfig) -> dict[str, Any]:
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
