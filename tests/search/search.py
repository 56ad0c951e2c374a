"""Draw cases of one op and check every one of them."""

from collections import Counter

from hypothesis import HealthCheck, given, settings

from tests.search.cases import STRATEGIES
from tests.search.checks import check

CPU = ("reference", "cpp")
TRITON = ("triton",)


def search(op, backends, examples, *, derandomize=False):
    """Counts of what was drawn; raises for the smallest failing case that hypothesis finds, and prints it.

    ``derandomize`` draws the same cases in every run, for the default tests.
    """
    drawn = Counter()

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,  # the printed case is the reproducer
        deadline=None,  # machines differ
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[op](backends))
    def example(case):
        drawn.update(features(case))
        check(case, *backends)

    example()
    return drawn


def features(case):
    """What a summary counts."""
    yield "examples"
    yield case.dtype
    if "dense" not in case.layouts:
        yield "strided"
    if case.ids is not None:
        yield "row_ids"
    if case.batch == 0 or case.q_len == 0:
        yield "empty"
    if case.frozen:
        yield "frozen inputs"
    if case.logits > 1:
        yield "large scores"
