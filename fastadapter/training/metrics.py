"""How good predictions are: of classes with their probabilities, and of numbers. By scikit-learn and SciPy."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastadapter.training.config import UserError

DETAILED = 100  # classes; of more, the confusion matrix would be larger than the adapter
WIDEST = 10  # classes of a confusion matrix that a terminal has room for
BINS = 15  # of the calibration error, as in Guo et al.
# What a run reports after every evaluation, in this order, where its task has it.
SCALARS = ("accuracy", "f1_macro", "pearson", "spearman", "mse", "mae", "ece", "brier")


def require_packages() -> None:
    """Raise UserError where scikit-learn is missing: to be found out before a run, not after its first epoch."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            'the metrics of held-out records need scikit-learn: pip install "fastadapter[hf]" brings it'
        )


def classification_metrics(log_probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Metrics of predicted classes, as numbers and lists that JSON can hold.

    Args:
        log_probs: fp64 ``(rows, classes)``; one row at least.
        truth: int ``(rows,)``, the number of the right class.
        labels: names of the classes.
    Returns:
        ``accuracy``; ``f1_macro``, the mean over the classes that occur in truth or predictions; of at most 100 classes
        ``per_class``: ``precision``, ``recall``, ``f1`` and ``support`` of each, and ``confusion_matrix``, rows are the
        right classes and columns the predicted ones; ``ece``, the expected calibration error of the predicted
        class's probability over 15 bins of equal width (arXiv:1706.04599, eq. 3); ``brier``, the mean over the
        rows of the squared distance between probabilities and truth, summed over the classes (0 to 2).

    >>> scores = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]))
    >>> found = classification_metrics(scores, np.array([0, 1, 1]), ["bad", "good"])
    >>> found["confusion_matrix"], round(found["brier"], 4)
    ([[1, 0], [1, 1]], 0.44)
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = np.arange(len(labels))
    predicted = log_probs.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=numbers, average=None, zero_division=0.0
    )
    occurring = np.union1d(truth, predicted)
    probabilities = np.exp(log_probs)
    found: dict[str, Any] = {
        "accuracy": float((predicted == truth).mean()),
        "f1_macro": float(f1[occurring].mean()),
        "ece": _calibration_error(probabilities.max(1), predicted == truth),
        "brier": float(((probabilities - np.eye(len(labels))[truth]) ** 2).sum(1).mean()),
    }
    if len(labels) > DETAILED:
        return found
    return found | {
        "per_class": {
            label: {
                "precision": float(precision[number]),
                "recall": float(recall[number]),
                "f1": float(f1[number]),
                "support": int(support[number]),
            }
            for number, label in enumerate(labels)
        },
        "confusion_matrix": confusion_matrix(truth, predicted, labels=numbers).tolist(),
    }


def regression_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """``mse``, ``mae``, ``pearson`` and ``spearman`` of predicted numbers; a correlation is ``None`` where either
    side is constant.

    >>> regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["mae"]
    0.3333333333333333
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    constant = len(truth) < 2 or np.ptp(predicted) == 0 or np.ptp(truth) == 0

    def correlation(function: Any) -> float | None:
        value = math.nan if constant else float(function(predicted, truth)[0])
        return value if math.isfinite(value) else None

    return {
        "mse": float(mean_squared_error(truth, predicted)),
        "mae": float(mean_absolute_error(truth, predicted)),
        "pearson": correlation(pearsonr),
        "spearman": correlation(spearmanr),
    }


def scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``loss`` and the metrics that are one number, in the order in which they are shown."""
    return {key: metrics[key] for key in ("loss", *SCALARS) if key in metrics}


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = 0.0
    for number in np.unique(bins):
        here = bins == number
        error += here.mean() * abs(correct[here].mean() - confidence[here].mean())
    return float(error)


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics of an evaluation as a few lines of text.

    >>> print(table({"loss": 0.5, "accuracy": 0.875}))
    loss      0.5000
    accuracy  87.50 %
    """
    lines = [f"{key:<9} {_shown(key, value)}" for key, value in scalars(metrics).items()]
    per_class = metrics.get("per_class", {})
    if per_class:
        width = max(map(len, (*per_class, "label")))
        lines += ["", f"{'label':<{width}}  precision   recall       f1   records"]
        for label, of in per_class.items():
            shares = "  ".join(f"{of[key]:7.2%}" for key in ("recall", "f1"))
            lines.append(f"{label:<{width}}  {of['precision']:9.2%}  {shares}  {of['support']:8,}")
    if 0 < len(per_class) <= WIDEST:
        corner = "is, predicted as:"
        width, cell = max(map(len, (*per_class, corner))), max(map(len, (*per_class, "1,000")))
        lines += ["", f"{corner:<{width}}  " + "  ".join(f"{label:>{cell}}" for label in per_class)]
        for label, row in zip(per_class, metrics["confusion_matrix"], strict=True):
            lines.append(f"{label:<{width}}  " + "  ".join(f"{count:>{cell},}" for count in row))
    return "\n".join(lines)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.2%}".replace("%", " %") if key in ("accuracy", "f1_macro") else f"{value:.4f}"
