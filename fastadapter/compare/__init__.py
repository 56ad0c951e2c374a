"""The article's comparison: every way to adapt a model, on the same records and seeds, as one table and three plots."""

from fastadapter.compare.methods import (
    DEFAULT_METHODS,
    METHODS_TO_COMPARE,
    STARTS,
    Method,
    resolve_methods,
    with_options,
)
from fastadapter.compare.report import summarise, write_report
from fastadapter.compare.run import Comparison, compare, prepare

__all__ = [
    "DEFAULT_METHODS",
    "METHODS_TO_COMPARE",
    "STARTS",
    "Comparison",
    "Method",
    "compare",
    "prepare",
    "resolve_methods",
    "summarise",
    "with_options",
    "write_report",
]
