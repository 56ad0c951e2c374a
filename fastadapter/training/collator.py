"""Packed rows for somebody else's training loop: transformers' ``Trainer``, TRL's ``SFTTrainer``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastadapter.training.batching import sequence_arguments
from fastadapter.training.loss import IGNORED

# Columns that say which tokens are trained on, where there are no labels: transformers' and TRL's names.
_TRAINED = ("completion_mask", "assistant_masks")
_KNOWN = ("input_ids", "labels", "attention_mask", *_TRAINED)


class DataCollatorWithPacking:
    """Puts the examples of a batch one behind the other into one row, where none sees another.

    What transformers' ``DataCollatorWithFlattening`` does, for every attention implementation: the row takes no cache,
    with which a model under sdpa or eager attention makes no mask that keeps its sequences apart; and it says where
    they are to flash attention and to FastAdapter's own, which then runs over each by itself.

    An example holds ``input_ids`` and, where not all of them are trained on, ``labels`` (-100 elsewhere) or TRL's
    ``completion_mask`` or ``assistant_masks``. Tokens that its ``attention_mask`` hides are left out, and an example
    without tokens is. The first token of an example is never trained on: nothing stands before it.

    Returns: a dict of ``input_ids``, ``labels``, ``position_ids``, ``(1, tokens)`` each, offsets and lengths of the
        sequences, and ``use_cache=False``: arguments of the model.
    Raises: ValueError: no example has a token; a column that is not known here, or not as long as the tokens.

    >>> batch = DataCollatorWithPacking()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9]], [[-100, 6, 7, -100, 9]], [[0, 1, 2, 0, 1]])
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        input_ids: list[int] = []
        labels: list[int] = []
        position_ids: list[int] = []
        starts = [0]
        for number, feature in enumerate(features):
            ids, targets = _read(feature, f"features[{number}]")
            if ids:
                input_ids += ids
                labels += [IGNORED, *targets[1:]]
                position_ids += range(len(ids))
                starts.append(len(input_ids))
        if not input_ids:
            raise ValueError(f"features must hold a token, got none in {len(features)} examples")
        ends = torch.tensor(starts, dtype=torch.int32, device="cpu")
        return {
            "input_ids": torch.tensor([input_ids], device="cpu"),
            "labels": torch.tensor([labels], device="cpu"),
            "position_ids": torch.tensor([position_ids], device="cpu"),
            **sequence_arguments(ends, int(ends.diff().max())),
            "use_cache": False,
        }


def _read(feature: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of one example."""
    columns = {name: _list(value) for name, value in feature.items() if value is not None}
    if unknown := sorted(columns.keys() - set(_KNOWN)):
        raise ValueError(
            f"{where} must hold some of {', '.join(_KNOWN)}, got {unknown[0]!r}; remove the column"
        )
    if "input_ids" not in columns:
        raise ValueError(f"{where} must hold input_ids, got {', '.join(sorted(columns)) or 'nothing'}")
    ids = columns["input_ids"]
    for name, values in columns.items():
        if len(values) != len(ids):
            raise ValueError(
                f"{where}: {name} must have {len(ids)} entries like input_ids, got {len(values)}"
            )
    labels = columns.get("labels", ids)
    for mask in (columns[name] for name in _TRAINED if name in columns):
        labels = [label if trained else IGNORED for label, trained in zip(labels, mask, strict=True)]
    seen = columns.get("attention_mask", [1] * len(ids))
    kept = [at for at, each in enumerate(seen) if each]
    return [ids[at] for at in kept], [labels[at] for at in kept]


def _list(value: Any) -> list[int]:
    return value.tolist() if hasattr(value, "tolist") else list(value)
