"""Classes instead of words: a text goes in, the model's classification head names its class.

The classes are the labels of the training data in the order of their names: class 0 is the first of them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapter.checkpoints import CheckpointError
from fastadapter.training import metrics
from fastadapter.training.batching import to_device
from fastadapter.training.class_tokens import sparing_unread
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Example, tokenize
from fastadapter.training.evaluation import require_known_labels
from fastadapter.training.held_out import Tick
from fastadapter.training.packing import Layout, packed_outputs
from fastadapter.training.report import write_json
from fastadapter.training.tasks import require_max_length
from fastadapter.training.trunk.cached import Trunk, beginning

TEXT_TEMPLATE = "{text}"
LABELS_FILE = "labels.json"


@dataclass(frozen=True)
class Row:
    """Tokens of a text and the number of its class, or the number that it is rated with."""

    input_ids: tuple[int, ...]
    label: float


@dataclass(frozen=True)
class HeldOutTexts:
    """Held-out texts, the numbers of their classes, and what the classes are called."""

    texts: list[Row]
    labels: list[str]
    pad_token_id: int
    trunk: Trunk | None = None

    by_accuracy = True

    @property
    def rows(self) -> int:
        return len(self.texts)

    @property
    def width(self) -> int:
        return len(self.labels)

    def predict(self, model: nn.Module, rows: Sequence[int], batch_size: int, tick: Tick | None) -> Tensor:
        """Log-probabilities of the classes."""
        ids = [self.texts[row].input_ids for row in rows]
        return class_scores(
            model, ids, len(self.labels), self.pad_token_id, batch_size, tick, trunk=self.trunk
        )

    def sequences(self) -> list[tuple[int, ...]]:
        return [row.input_ids for row in self.texts]

    def measure(self, table: Tensor) -> dict[str, Any]:
        """``loss``, the mean cross-entropy, and the metrics of classes."""
        truth = torch.tensor([row.label for row in self.texts], device="cpu")
        loss = float(F.nll_loss(table, truth, reduction="sum")) / self.rows
        if not math.isfinite(loss):  # the caller says so; there is nothing to measure
            return {"loss": loss}
        return {
            "loss": loss,
            **metrics.classification_metrics(table.numpy(), truth.numpy(), self.labels),
        }


class ClassificationTask:
    """Cross-entropy over the classes of a model with a classification head.

    Raises: UserError: records without labels; one class only in training; a held-out class that training
        lacks; more classes than the head has; a text without tokens, or too long without
        ``truncation``; a model without a classification head; a weight for a class that there is not, or
        none for one that there is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Sequence[Example],
        held_out: Sequence[Example] | None,
        config: TrainingConfig,
    ):
        self.labels = class_names(train, held_out or ())
        self.trunk: Trunk | None = None
        require_head(model, self.labels)
        numbers = {label: number for number, label in enumerate(self.labels)}
        self.train = encode_for(model, tokenizer, train, numbers, config)
        self.pad_token_id = pad_token(model, tokenizer)
        self.held_out: HeldOutTexts | None = None
        if held_out:
            texts = encode_for(model, tokenizer, held_out, numbers, config)
            self.held_out = HeldOutTexts(texts, self.labels, self.pad_token_id)
        self.lengths = [len(row.input_ids) for row in self.train]
        self.layout = Layout(self.lengths, [example.source for example in train], config)
        self.weights = class_weights(self.labels, [int(row.label) for row in self.train], config)
        self.smoothing = config.label_smoothing_factor

    def sequences(self) -> list[tuple[int, ...]]:
        return [row.input_ids for row in self.train]

    def inputs(self, sequences: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        return pad(sequences, self.pad_token_id, device)

    def weight(self, row: int) -> float:
        return 1 if self.weights is None else self.weights[int(self.train[row].label)]

    def settle(self, model: nn.Module, device: torch.device) -> None:
        self.layout.settle(model, lambda rows, packed: list(self.logits(model, rows, device, packed)))

    def logits(self, model: nn.Module, rows: Sequence[int], device: torch.device, packed: bool) -> Tensor:
        texts = [self.train[row].input_ids for row in rows]
        logits = packed_class_logits if packed else class_logits
        return logits(model, texts, len(self.labels), self.pad_token_id, device, self.trunk)

    def loss(self, model: nn.Module, rows: Sequence[int], device: torch.device) -> Tensor:
        chosen = [self.train[row] for row in rows]
        (truth,) = to_device([torch.tensor([row.label for row in chosen], device="cpu")], device)
        logits = self.logits(model, rows, device, self.layout.packed)
        weight = None
        if self.weights is not None:
            (weight,) = to_device([torch.tensor(self.weights, dtype=logits.dtype, device="cpu")], device)
        return F.cross_entropy(logits, truth, weight=weight, reduction="sum", label_smoothing=self.smoothing)

    def identity(self) -> dict[str, Any]:
        return {
            "task": {
                "kind": "classification",
                "labels": list(self.labels),
                "pad_token_id": self.pad_token_id,
            },
            "data": identify_rows(self.train, self.held_out.texts if self.held_out else []),
        }

    def write(self, folder: Path) -> None:
        write_json(folder / LABELS_FILE, {"task": "classification", "labels": list(self.labels)})


def class_weights(labels: Sequence[str], truth: Sequence[int], config: TrainingConfig) -> list[float] | None:
    """What an error on a text of each class counts; ``None``: all the same."""
    asked = config.class_weights
    if asked is None:
        return None
    if isinstance(asked, str):  # "balanced"
        counts = [truth.count(number) for number in range(len(labels))]
        return [len(truth) / (len(labels) * count) for count in counts]
    for label in asked:
        if label not in labels:
            raise UserError(
                f"class_weights: the training data has no label {label!r}, only "
                f"{', '.join(map(repr, labels))}"
            )
    for label in labels:
        if label not in asked:
            raise UserError(f"class_weights: there is none for the label {label!r}")
    return [float(asked[label]) for label in labels]


def class_names(train: Sequence[Example], held_out: Sequence[Example] = ()) -> list[str]:
    """The labels of the training data, ordered by name; class ``i`` is the ``i``-th of them.

    Raises: UserError: naming the record: it has no label, or a held-out label that training lacks; or there is
        nothing to tell apart.
    """
    if not train:
        raise UserError("train holds no examples")
    for example in (*train, *held_out):
        if example.label is None:
            kind = "prompt/completion record" if example.messages is None else "conversation"
            raise UserError(f"{example.source}: classification needs text/label records, this is a {kind}")
    names = sorted({str(example.label) for example in train})
    if len(names) == 1:
        raise UserError(
            f"every training example has the label {names[0]!r}; classification needs at least two classes"
        )
    require_known_labels(held_out, names)
    return names


def require_labels(examples: Sequence[Example], task: str) -> None:
    """Raise UserError, naming the record, if one has no label."""
    for example in examples:
        if example.label is None:
            raise UserError(
                f"{example.source}: {task} needs text/label records, this is a prompt/completion record"
            )


def require_head(model: Any, labels: Sequence[str]) -> None:
    """Raise UserError unless ``model`` has a classification head with a class for every label."""
    require_classifier(model)
    if len(labels) > model.config.num_labels:
        raise UserError(
            f"the data has {len(labels)} classes, but the model's head has {model.config.num_labels}; "
            f"load the model with num_labels={len(labels)}"
        )


def require_classifier(model: Any) -> None:
    """Raise UserError unless ``model`` has a classification head."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise UserError(
            f"{type(model).__name__} has no classification head; load it with AutoModelForSequenceClassification"
        )


def encode_for(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    numbers: Mapping[str, float],
    config: TrainingConfig,
) -> list[Row]:
    """:func:`encode_texts` as a run asks for it."""
    if config.append_eos:
        raise UserError(
            "append_eos is for completions; a text to classify is given as the tokenizer makes it"
        )
    limit = text_limit(model, tokenizer, config)
    return encode_texts(
        tokenizer,
        examples,
        numbers,
        max_length=config.max_length or limit,
        truncate=config.truncation != "error",
        parse_special_tokens=config.parse_special_tokens,
    )


def encode_texts(
    tokenizer: Any,
    examples: Sequence[Example],
    numbers: Mapping[str, float],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    parse_special_tokens: bool = False,
) -> list[Row]:
    """Tokens, with the tokenizer's special ones, and class numbers.

    Args:
        max_length: most tokens of a text; ``None``: no limit.
        truncate: cut a text that is too long, on the side and around the special tokens as the tokenizer does;
            otherwise it is an error.
        parse_special_tokens: special tokens that somebody wrote into a text are tokens; otherwise they are text.
    """
    if not examples:
        return []
    cut = {"truncation": True, "max_length": max_length} if truncate and max_length is not None else {}
    encoded = tokenize(
        tokenizer,
        [example.prompt for example in examples],
        [example.source for example in examples],
        parse_special_tokens=parse_special_tokens,
        **cut,
    )
    rows = []
    for example, ids in zip(examples, encoded, strict=True):
        if not ids:
            raise UserError(f"{example.source}: the text has no tokens")
        if max_length is not None and len(ids) > max_length:
            raise UserError(
                f"{example.source}: the text has {len(ids)} tokens, at most {max_length} fit; "
                "shorten it or set truncation"
            )
        rows.append(Row(tuple(ids), numbers[str(example.label)]))
    return rows


def text_limit(model: Any, tokenizer: Any, config: TrainingConfig | None = None) -> int | None:
    """Most tokens of a text: what the model's positions and the tokenizer allow."""
    context = require_max_length(model, config or TrainingConfig())
    limits = [limit for limit in (context, tokenizer.model_max_length) if limit is not None and limit < 10**9]
    return min(limits) if limits else None


def pad_token(model: Any, tokenizer: Any) -> int:
    """The token that fills rows up. A model that looks for it to find the last token of a row is told which it is."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    return int(config.pad_token_id)


def pad(texts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, int64 ``(batch, seq)``, padded on the right to the longest."""
    width = max(map(len, texts))
    input_ids = torch.full((len(texts), width), pad_token_id, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(input_ids)
    for number, ids in enumerate(texts):
        input_ids[number, : len(ids)] = torch.tensor(ids, device="cpu")
        mask[number, : len(ids)] = 1
    input_ids, mask = to_device([input_ids, mask], device)
    return {"input_ids": input_ids, "attention_mask": mask}


def class_logits(
    model: nn.Module,
    texts: Sequence[tuple[int, ...]],
    classes: int,
    pad_token_id: int,
    device: torch.device,
    trunk: Trunk | None = None,
) -> Tensor:
    """Logits ``(texts, classes)``, fp32, or fp64 of an fp64 model. Classes of the head without a label do not count.

    Args:
        trunk: states of the texts to begin with; ``None``: the pass begins with the tokens.
    """
    inputs = pad(texts, pad_token_id, device)
    places = [(row, 0, len(ids)) for row, ids in enumerate(texts)]
    ids = inputs["input_ids"]
    with beginning(trunk, ids, places, texts), sparing_unread(model, ids, places, texts, pad_token_id):
        return _wide(model(**inputs).logits[:, :classes])


def packed_class_logits(
    model: nn.Module,
    texts: Sequence[tuple[int, ...]],
    classes: int,
    pad_token_id: int,
    device: torch.device,
    trunk: Trunk | None = None,
) -> Tensor:
    """The same of a packed row."""
    return _wide(packed_outputs(model, texts, pad_token_id, device, trunk)[:, :classes])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def class_scores(
    model: nn.Module,
    texts: Sequence[tuple[int, ...]],
    classes: int,
    pad_token_id: int,
    batch_size: int,
    tick: Tick | None = None,
    *,
    trunk: Trunk | None = None,
) -> Tensor:
    """Log-probabilities, fp64 ``(texts, classes)`` on the CPU, computed in eval mode."""
    found = text_outputs(model, texts, classes, pad_token_id, batch_size, tick, trunk=trunk)
    return found.log_softmax(-1)


@torch.no_grad()
def text_outputs(
    model: nn.Module,
    texts: Sequence[tuple[int, ...]],
    outputs: int,
    pad_token_id: int,
    batch_size: int,
    tick: Tick | None = None,
    *,
    trunk: Trunk | None = None,
) -> Tensor:
    """What the head says, fp64 ``(texts, outputs)`` on the CPU, computed in eval mode, short texts first."""
    found = torch.zeros(len(texts), outputs, dtype=torch.float64, device="cpu")
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            chosen = [texts[index] for index in chunk]
            logits = class_logits(model, chosen, outputs, pad_token_id, device, trunk)
            found[chunk] = logits.double().cpu()
            if tick is not None:
                tick((start + len(chunk)) / len(order))
    finally:
        model.train(training)
    return found


def classify(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    truncate: bool = False,
    parse_special_tokens: bool = False,
    tick: Tick | None = None,
) -> list[str]:
    """The most likely class of every text, by name.

    Args:
        model: a transformers model for sequence classification; put in eval mode for the duration.
        labels: names of its classes, as from :func:`read_labels`.
        batch_size: rows per forward pass.
        max_length, truncate, parse_special_tokens: as in training; ``None``: the model's context.
    Raises: UserError: a text without tokens or too long, or more labels than the head has.

    >>> classify(model, tokenizer, ["A delight."], read_labels("out"))  # doctest: +SKIP
    ['positive']
    """
    require_head(model, labels)
    examples = [Example(text, "", labels[0], f"text {number}") for number, text in enumerate(texts, 1)]
    rows = encode_texts(
        tokenizer,
        examples,
        {labels[0]: 0},
        max_length=max_length or text_limit(model, tokenizer),
        truncate=truncate,
        parse_special_tokens=parse_special_tokens,
    )
    ids = [row.input_ids for row in rows]
    scores = class_scores(model, ids, len(labels), pad_token(model, tokenizer), batch_size, tick)
    return [labels[number] for number in scores.argmax(1).tolist()] if texts else []


def read_labels(folder: str | Path) -> list[str]:
    """Names of the classes of a run, class 0 first.

    Raises: CheckpointError: the folder holds none, or a malformed file.
    """
    path = Path(folder) / LABELS_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        if not isinstance(labels, list) or not labels or not all(isinstance(name, str) for name in labels):
            raise ValueError("its labels are not a list of names")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the labels of a run: {error}") from error
    return labels


def identify_rows(train: Sequence[Row], held_out: Sequence[Row]) -> dict[str, Any]:
    """What tells the rows of one run from another's."""
    return {
        "train_rows": len(train),
        "train": _digest(train),
        "eval_rows": len(held_out),
        "eval": _digest(held_out) if held_out else "",
    }


def _digest(rows: Sequence[Row]) -> str:
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr((row.label, row.input_ids)).encode())
    return sha.hexdigest()
