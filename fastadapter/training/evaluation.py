"""Held-out completions: how likely the model finds them, and which label it would give."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.discovery import looks_back_only
from fastadapter.training import metrics
from fastadapter.training.batching import collate
from fastadapter.training.config import UserError
from fastadapter.training.data import Encoded, Example, encode_examples
from fastadapter.training.held_out import Tick
from fastadapter.training.loss import supervised_logit_parts
from fastadapter.training.trunk.cached import Trunk, beginning


@dataclass(frozen=True)
class EvalData:
    """Held-out examples in tokens.

    Attributes:
        candidates: for each example what it could be answered: every label's completion, or its one
            completion.
        truth: for each example the number of the right candidate.
        labels: names of the candidates where they are labels; empty: they are free completions.
        trunk: states to begin the passes with; ``None``: they begin with the tokens.
    """

    candidates: list[list[Encoded]]
    truth: list[int]
    labels: tuple[str, ...] = ()
    trunk: Trunk | None = None

    @property
    def rows(self) -> int:
        return len(self.truth)

    @property
    def width(self) -> int:
        return len(self.labels) or 2

    @property
    def by_accuracy(self) -> bool:
        return bool(self.labels)

    def sequences(self) -> list[tuple[int, ...]]:
        return [each.input_ids for each in _to_score(self.candidates)[0]]

    def predict(self, model: nn.Module, rows: Sequence[int], batch_size: int, tick: Tick | None) -> Tensor:
        """Log-likelihoods of the candidates; of free completions also whether greedy decoding would give them."""
        candidates = [self.candidates[row] for row in rows]
        scores, greedy = score_candidates(model, candidates, batch_size, tick, self.trunk)
        return scores if self.labels else torch.cat([scores, greedy.double()[:, None]], 1)

    def measure(self, table: Tensor) -> dict[str, Any]:
        """``loss`` per token of the right answers and ``accuracy``: a labelled row is correct if the right label is
        the most likely one, any other if each of its completion's tokens is the most likely one given those before.
        Of labels also the metrics of classes, each as probable as its completion is among those of all labels.
        """
        truth = torch.tensor(self.truth, device="cpu")
        right = zip(self.candidates, self.truth, strict=True)
        tokens = sum(row[index].num_supervised for row, index in right)
        if not self.labels:
            return {"loss": -float(table[:, 0].sum()) / tokens, "accuracy": float(table[:, 1].mean())}
        loss = -float(table.gather(1, truth[:, None]).sum()) / tokens
        if not math.isfinite(loss):  # the caller says so; there is nothing to measure
            return {"loss": loss}
        likely = table.log_softmax(-1).numpy()
        return {"loss": loss, **metrics.classification_metrics(likely, truth.numpy(), self.labels)}


def prepare(
    tokenizer: Any, examples: Sequence[Example], completions: Mapping[str, str], **encoding: Any
) -> EvalData:
    """Tokenise held-out examples.

    Args:
        completions: of every label in the training data; empty for prompt/completion examples.
        encoding: options of :func:`encode_examples`.
    Raises: UserError: naming the record: a label that the training data lacks, or what ``encode_examples``
        refuses.
    """
    if not completions:
        return EvalData(
            [[each] for each in encode_examples(tokenizer, examples, **encoding)], [0] * len(examples)
        )
    names = list(completions)
    require_known_labels(examples, names)
    candidates = _candidates(tokenizer, examples, completions, encoding)
    return EvalData(candidates, [names.index(str(example.label)) for example in examples], tuple(names))


def require_known_labels(examples: Sequence[Example], names: Sequence[str]) -> None:
    """Raise UserError, naming the record, if a label is not among those of the training data."""
    known = set(names)
    for example in examples:
        if example.label not in known:
            raise UserError(
                f"{example.source}: label {example.label!r} is not among those of the training data: "
                f"{', '.join(map(repr, names))}"
            )


def predict_labels(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: Mapping[str, str],
    *,
    batch_size: int = 32,
    append_eos: bool = False,
    max_length: int | None = None,
    truncation: str = "error",
    parse_special_tokens: bool = False,
    tick: Tick | None = None,
) -> list[str]:
    """The label whose completion the model finds most likely, for every example.

    Labels that are one token each cost one forward pass for all of them.

    Args:
        model: a transformers causal language model, on any device; put in eval mode for the duration.
        examples: their prompts count; the completion and label they carry do not.
        labels: completion of each label, as from :func:`label_completions`.
        batch_size: rows per forward pass.
        append_eos, max_length, truncation, parse_special_tokens: as in training.
        tick: called after each forward pass with the share of the work that is done, up to 1.0.
    Returns: one label per example; of two equally likely labels the first.
    Raises: UserError: no labels; one label's tokens begin another's (the first would always win;
        ``append_eos`` tells them apart); a prompt too long.
    """
    if not labels:
        raise UserError("labels must name at least one label and its completion")
    encoding = {
        "append_eos": append_eos,
        "max_length": max_length,
        "truncation": truncation,
        "parse_special_tokens": parse_special_tokens,
    }
    candidates = _candidates(tokenizer, examples, labels, encoding)
    scores, _ = score_candidates(model, candidates, batch_size, tick)
    names = list(labels)
    return [names[index] for index in scores.argmax(1).tolist()] if examples else []


@torch.no_grad()
def score_candidates(
    model: nn.Module,
    candidates: Sequence[Sequence[Encoded]],
    batch_size: int,
    tick: Tick | None = None,
    trunk: Trunk | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods, fp64 ``(rows, candidates)`` on the CPU, and whether greedy decoding would give the
    first one.

    Every row has the same number of candidates.
    """
    if not candidates:
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu"), torch.zeros(
            0, dtype=torch.bool, device="cpu"
        )
    rows, width = len(candidates), len(candidates[0])
    device, causal = next(model.parameters()).device, looks_back_only(model)
    flat, shared = _to_score(candidates)
    scores = torch.zeros(len(flat), width if shared else 1, dtype=torch.float64, device="cpu")
    greedy = torch.zeros(len(flat), dtype=torch.bool, device="cpu")
    order = sorted(range(len(flat)), key=lambda index: len(flat[index].input_ids))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = collate([flat[index] for index in chunk], device, causal=causal)
            asked = batch.targets[:, None]
            if shared:
                tokens = [[each.input_ids[-1] for each in candidates[index]] for index in chunk]
                asked = torch.tensor(tokens, device=device)
            sequences = [flat[index].input_ids for index in chunk]
            with beginning(trunk, batch.input_ids, batch.places, sequences):
                parts = [
                    (logits.log_softmax(-1).gather(1, asked[part]), logits.argmax(-1) == batch.targets[part])
                    for part, logits in supervised_logit_parts(model, batch)
                ]
            likely, hit = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
            members, likely = batch.rows, likely.double()
            if shared:
                greedy[chunk] = hit
            else:
                # On the CPU: a scattered sum on a GPU would depend on the order in which its threads arrive.
                likely = torch.zeros(len(chunk), dtype=torch.float64, device="cpu").index_add_(
                    0, members, likely[:, 0]
                )[:, None]
                missed = torch.zeros(len(chunk), dtype=torch.int64, device="cpu").index_add_(
                    0, members, (~hit).long()
                )
                greedy[chunk] = missed == 0
            scores[chunk] = likely
            if tick is not None:
                tick((start + len(chunk)) / len(order))
    finally:
        model.train(training)
    return scores.view(rows, width), greedy.view(rows, -1)[:, 0]


def _to_score(candidates: Sequence[Sequence[Encoded]]) -> tuple[list[Encoded], bool]:
    """What forward passes are made over, and whether one scores all candidates of a row, each of one token."""
    shared = all(
        each.prompt_len == len(each.input_ids) - 1 and each.input_ids[:-1] == row[0].input_ids[:-1]
        for row in candidates
        for each in row
    )
    flat = [row[0] for row in candidates] if shared else [each for row in candidates for each in row]
    return flat, shared


def _candidates(
    tokenizer: Any, examples: Sequence[Example], completions: Mapping[str, str], encoding: dict[str, Any]
) -> list[list[Encoded]]:
    asked = [
        Example(example.prompt, completion, label, example.source)
        for example in examples
        for label, completion in completions.items()
    ]
    encoded = encode_examples(tokenizer, asked, **encoding)
    width = len(completions)
    rows = [encoded[start : start + width] for start in range(0, len(encoded), width)]
    for example, row in zip(examples, rows, strict=True):
        answers = sorted(
            (each.input_ids[each.prompt_len :], label) for each, label in zip(row, completions, strict=True)
        )
        # Sorted, a sequence that begins others stands right before one of them.
        for (shorter, first), (longer, second) in itertools.pairwise(answers):
            if longer[: len(shorter)] == shorter:
                raise UserError(
                    f"{example.source}: the tokens of {first!r} begin those of {second!r}, which could never "
                    "be more likely; set append_eos or change the completion template"
                )
    return rows
