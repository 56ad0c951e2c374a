"""What is audited: every op, with the cases of its own file."""

import itertools
from collections.abc import Sequence
from typing import Any

from . import cases_bottleneck, cases_gated_prefix
from .case import Case, Maker, Op

OPS: dict[str, Op] = {
    **cases_gated_prefix.OPS,
    "bottleneck": cases_bottleneck.OP,
}


def run(case: Case, make: Maker) -> Any:
    """Call the launcher with tensors from ``make``; its results."""
    return OPS[case.op].run(case, make)


def bytes_of(case: Case) -> int:
    return OPS[case.op].bytes(case)


def flops_of(case: Case) -> int:
    return OPS[case.op].flops(case)


def all_cases() -> list[Case]:
    """The table in the repository has a row for each of these on every architecture.

    >>> len({(case.op, case.direction, case.dtype, str(case)) for case in all_cases()}) == len(all_cases())
    True
    """
    return [case for op in OPS.values() for case in op.cases()]


def small_cases() -> list[Case]:
    """Whose bytes are counted."""
    return [case for op in OPS.values() for case in op.small()]


def sample(architectures: Sequence[str]) -> list[tuple[Case, str]]:
    """A case of every op and pass, the architectures in rotation: what is checked with every change."""
    groups = itertools.groupby(all_cases(), key=lambda case: (case.op, case.direction))
    return [(next(group), arch) for (_, group), arch in zip(groups, itertools.cycle(architectures))]
