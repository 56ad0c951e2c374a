"""Nothing of the model trained: a logistic regression on what it makes of each text, and the model asked in words."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastadapter.checkpoints.files import write_tensors
from fastadapter.training import TrainingConfig, UserError, predict_labels
from fastadapter.training.classification import (
    class_names,
    encode_texts,
    pad,
    pad_token,
    require_head,
    text_limit,
)
from fastadapter.training.data import COMPLETION_TEMPLATE, Example, context_length

POOLINGS = ("mean", "last")
FILE = "regression.safetensors"
FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def embed(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int,
    pooling: str = "mean",
    progress: bool = False,
) -> Tensor:
    """One fp32 vector per text, ``(texts, hidden)`` on the CPU: the mean of its last hidden states, or the last one."""
    base: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: Tensor | None = None
    model.eval()
    bar = tqdm(total=len(texts), desc="embedding", unit="text", disable=None if progress else True)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        inputs = pad([texts[index] for index in chunk], pad_token_id, device)
        hidden = base(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"]
        if pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = hidden[torch.arange(len(chunk), device=device), mask.sum(1) - 1]
        if found is None:
            found = torch.zeros(len(texts), pooled.shape[1], device="cpu")
        found[chunk] = pooled.cpu()
        bar.update(len(chunk))
    bar.close()
    return torch.zeros(0, 0, device="cpu") if found is None else found


def fit_regression(vectors: np.ndarray, truth: np.ndarray) -> tuple[Any, float]:
    """A scaler with a logistic regression behind it, and its ``C``.

    How strong a regularisation is right depends on the number of texts and on the model, so it is chosen by
    cross-validation on the training texts, as the learning rates of the other methods are.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Scaled, since the optimiser stops long before it is done on features of unequal size.
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = min(FOLDS, int(np.bincount(truth).min()))
    if folds < 2:  # a class of one text cannot be on both sides of a split
        return regression.set_params(logisticregression__C=STRENGTHS[2]).fit(vectors, truth), STRENGTHS[2]
    search = GridSearchCV(regression, {"logisticregression__C": STRENGTHS}, cv=folds)
    search.fit(vectors, truth)
    return search.best_estimator_, float(search.best_params_["logisticregression__C"])


def features(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    test: Sequence[Example],
    config: TrainingConfig,
    folder: Path,
    *,
    pooling: str = "mean",
    progress: bool = True,
) -> dict[str, Any]:
    """Embeddings once, scikit-learn's LogisticRegression on them, and how it does on the test texts.

    Returns: accuracy, seconds of embedding the training texts and of fitting, and the size of the fitted weights.
    """
    labels = class_names(train, test)
    require_head(model, labels)
    numbers = {label: number for number, label in enumerate(labels)}
    limit = text_limit(model, tokenizer, config)
    options: dict[str, Any] = {
        "max_length": config.max_length or limit,
        "truncate": config.truncation != "error",
    }
    pad_token_id = pad_token(model, tokenizer)
    vectors, truth, seconds = [], [], []
    for examples in (train, test):
        rows = encode_texts(tokenizer, examples, numbers, **options)
        started = time.perf_counter()
        ids = [row.input_ids for row in rows]
        vectors.append(embed(model, ids, pad_token_id, config.eval_batch_size, pooling, progress).numpy())
        seconds.append(time.perf_counter() - started)
        truth.append(np.array([row.label for row in rows]))
    started = time.perf_counter()
    regression, strength = fit_regression(vectors[0], truth[0])
    fit_seconds = time.perf_counter() - started
    scaler, logistic = regression[0], regression[1]
    tensors = {
        "mean": scaler.mean_,
        "scale": scaler.scale_,
        "weight": logistic.coef_,
        "bias": logistic.intercept_,
    }
    path = write_tensors(
        folder / FILE,
        {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in tensors.items()},
        {"format": "fastadapter-logistic-regression-1", "pooling": pooling},
    )
    return {
        "accuracy": float(regression.score(vectors[1], truth[1])),
        "trainable_parameters": int(logistic.coef_.size + logistic.intercept_.size),
        "embed_seconds": seconds[0],
        "fit_seconds": fit_seconds,
        "regression_c": strength,
        "file_bytes": path.stat().st_size,
    }


def in_context(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    test: Sequence[Example],
    config: TrainingConfig,
    text: str,
    progress: bool = True,
) -> dict[str, Any] | str:
    """How often a language model finds the right label likeliest behind ``text`` and the record; nothing is trained.

    Returns: accuracy, and the size of what is kept, which is the text; or why labels cannot be told apart.
    """
    labels = {name: COMPLETION_TEMPLATE.format(label=name) for name in class_names(train, test)}
    asked = [dataclasses.replace(example, prompt=text + example.prompt) for example in test]
    with tqdm(total=1.0, desc="asking", disable=None if progress else True, bar_format="{l_bar}{bar}") as bar:
        try:
            found = predict_labels(
                model,
                tokenizer,
                asked,
                labels,
                batch_size=config.eval_batch_size,
                max_length=config.max_length or context_length(model),
                truncation=config.truncation,
                parse_special_tokens=config.parse_special_tokens,
                tick=lambda share: bar.update(share - bar.n),
            )
        except UserError as error:
            return str(error)
    right = sum(answer == example.label for answer, example in zip(found, test, strict=True))
    return {
        "accuracy": right / len(test),
        "trainable_parameters": 0,
        "train_rows": 0,
        "test_rows": len(test),
        "seconds": 0.0,
        "seconds_per_epoch": 0.0,
        "epochs": [],
        "losses": [],
        "file_bytes": len(text.encode()),
    }
