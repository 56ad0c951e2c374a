"""The article's comparison: every way to adapt a model, on the same records and seeds, as one table and three plots."""

from fastadapter.compare.methods import DEFAULT_METHODS, METHODS_TO_COMPARE, Method, resolve_methods
from fastadapter.compare.report import summarise, write_report
from fastadapter.compare.run import Comparison, compare, prepare

__all__ = [
    "DEFAULT_METHODS",
    "METHODS_TO_COMPARE",
    "Comparison",
    "Method",
    "compare",
    "prepare",
    "resolve_methods",
    "summarise",
    "write_report",
]
