"""Draw cases of one op and check every one of them."""

from collections import Counter

from hypothesis import HealthCheck, given, settings

from tests.search.cases import strategy
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
    @given(strategy(op, backends))
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
    lengths = getattr(case, "lengths", None)
    if case.q_len == 0 or case.batch == 0 or (lengths is not None and 0 in lengths):
        yield "empty rows"
    for name in ("lengths", "mask", "window", "softcap"):
        if getattr(case, name, None) is not None:
            yield {"lengths": "packed"}.get(name, name)
    if case.frozen:
        yield "frozen inputs"
    if case.logits > 1:
        yield "large scores"
