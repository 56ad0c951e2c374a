"""What a finished model is worth on records that it was not trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.products import fast_products
from fastadapter.training import evaluation, metrics
from fastadapter.training.classification import (
    HeldOutTexts,
    encode_for,
    pad_token,
    require_head,
    require_labels,
)
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Example, label_completions
from fastadapter.training.evaluation import require_known_labels
from fastadapter.training.held_out import HeldOut, Tick, measure
from fastadapter.training.regression import HeldOutNumbers, parse_numbers, require_regressor
from fastadapter.training.tasks import encoding_options


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    config: TrainingConfig | None = None,
    *,
    task: str = "generation",
    labels: Sequence[str] | Mapping[str, str] | None = None,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """The metrics that a run reports of its held-out data, of a model on any device as it is.

    Args:
        model: with its adapter attached and active, if it has one; put in eval mode for the duration.
        examples: as from :func:`read_examples`.
        config: how texts become tokens, and ``eval_batch_size``; nothing else counts.
        task: as in training.
        labels: of a classification, the names of its classes, class 0 first, as from :func:`read_labels`; of a
            generation with labels, the completion of each label to choose among, as from :func:`label_completions`,
            those of the examples if not given.
        tick: called after each forward pass with the share of the work that is done, up to 1.0.
    Returns: ``loss`` and the metrics of the task (:mod:`fastadapter.training.metrics`).
    Raises: UserError: as :func:`finetune`; a label that is not among ``labels``; the loss is not finite.

    >>> evaluate(model, tokenizer, read_examples("test.jsonl"))["accuracy"]  # doctest: +SKIP
    0.88
    """
    config = config or TrainingConfig()
    if not examples:
        raise UserError("examples must hold at least one")
    if task != "generation" or examples[0].label is not None:
        metrics.require_packages()
    held_out = _held_out(unwrap(model), tokenizer, examples, config, task, labels)
    with fast_products(model):  # as in the run
        found = measure(held_out, model, config.eval_batch_size, tick)
    if set(found) == {"loss"}:
        raise UserError(f"the loss of the examples is {found['loss']}")
    return found


def _held_out(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    config: TrainingConfig,
    task: str,
    labels: Sequence[str] | Mapping[str, str] | None,
) -> HeldOut:
    if task == "generation":
        if labels is not None and not isinstance(labels, Mapping):
            raise TypeError("labels of a generation must be a mapping of each label to its completion")
        completions = labels if labels is not None else label_completions(examples)
        options = encoding_options(model, examples, config)
        return evaluation.prepare(tokenizer, examples, completions, **options)
    if task == "regression":
        require_regressor(model)
        numbers = parse_numbers(examples)
        return HeldOutNumbers(
            encode_for(model, tokenizer, examples, numbers, config), pad_token(model, tokenizer)
        )
    if task != "classification":
        raise UserError(f"task must be one of generation, classification, regression, got {task!r}")
    if not labels:
        raise UserError("labels must name the classes of a classification")
    require_head(model, list(labels))
    require_labels(examples, task)
    require_known_labels(examples, list(labels))
    classes = {label: number for number, label in enumerate(labels)}
    texts = encode_for(model, tokenizer, examples, classes, config)
    return HeldOutTexts(texts, list(labels), pad_token(model, tokenizer))
