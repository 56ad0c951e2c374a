"""Draw cases of one op and check every one of them."""

import time
from collections import Counter

from hypothesis import HealthCheck, Phase, given, settings

from tests.search.cases import strategy
from tests.search.checks import check

CPU = ("reference", "cpp")
TRITON = ("triton",)


def search(op, backends, examples, *, derandomize=False, shrink=True, drawn=None):
    """Counts of what was drawn; raises for the smallest failing case that hypothesis finds, and prints it.

    ``derandomize`` draws the same cases in every run, for the default tests. Without ``shrink`` the first failing case
    is the one that is shown. ``drawn`` is counted in where it is given, and then known after a failure as well.
    """
    drawn = Counter() if drawn is None else drawn

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,  # the printed case is the reproducer
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        deadline=None,  # machines differ
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(op, backends))
    def example(case):
        drawn.update(features(case))
        check(case, *backends)

    example()
    return drawn


def search_until(deadline, op, backends, examples):
    """What was drawn before the deadline (``time.monotonic()``) or the first failure, and that failure or ``None``."""
    drawn = Counter()
    while drawn["examples"] < examples and time.monotonic() < deadline:
        try:
            search(op, backends, min(5, examples - drawn["examples"]), shrink=False, drawn=drawn)
        except Exception as error:  # also what a kernel raises, or the device
            return drawn, error
    return drawn, None


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
