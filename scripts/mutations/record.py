"""One planted mistake."""

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    file: str
    old: str  # is in the file exactly once
    new: str
    tests: str  # arguments of pytest: what has to notice


def of_file(file, tests, **changes):
    """Mutations of one file; a change is ``(old, new)``, or ``(old, new, tests)``."""
    stem = file.split("/")[-1].split(".")[0].replace("_", "-")
    layer = (
        file.split("/")[0].replace("fastadapter", "ops").replace("kernels", "triton").replace("csrc", "cpp")
    )
    return [
        Mutation(f"{layer} {stem}: {name.replace('_', ' ')}", file, *change[:2], *(change[2:] or (tests,)))
        for name, change in changes.items()
    ]
