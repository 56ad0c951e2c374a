"""What the configurations of all methods share: checks of their fields, and the fields as JSON."""

import math
from dataclasses import asdict
from typing import Any, ClassVar

MAX_PREFIX_LEN = 1024


class MethodConfig:
    """Base of every method's configuration; ``method`` is its name in checkpoints and on the command line."""

    method: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict."""
        return asdict(self)  # type: ignore[call-overload]


def require_count(name: str, value: Any, high: int | None = None, *, optional: str = "") -> None:
    """An int from 1 up to ``high``; ``None`` where ``optional`` says what it means."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{' or None' if optional else ''}, got {value!r}")
    if value < 1 or (high is not None and value > high):
        bound = f"at least 1{optional}" if high is None else f"between 1 and {high}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def require_number(name: str, value: Any, *, above: float = -math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value <= above:
        raise ValueError(
            f"{name} must be a finite number{f' above {above:g}' * (above > -math.inf)}, got {value}"
        )
