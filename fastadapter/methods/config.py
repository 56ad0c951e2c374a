"""What the configurations of all methods share: checks of their fields, and the fields as JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

MAX_PREFIX_LEN = 1024
TEXT = "text"  # the start that every method with a prompt knows: what the frozen model makes of a text


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's configuration; ``method`` is its name in checkpoints and on the command line.

    Args:
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    modules_to_save: tuple[str, ...] | None = field(default=None, kw_only=True)

    method: ClassVar[str]

    def __post_init__(self):
        if self.modules_to_save is not None:
            names = require_names("modules_to_save", self.modules_to_save)
            object.__setattr__(self, "modules_to_save", names)  # from JSON it is a list

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict."""
        return asdict(self)


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


def require_names(name: str, value: Any) -> tuple[str, ...]:
    """A sequence of one name or more, as a tuple."""
    if not isinstance(value, tuple | list) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be a sequence of names, got {value!r}")
    if not value or not all(value):
        raise ValueError(f"{name} must name at least one module, got {value!r}")
    return tuple(value)


def settle_init(config: Any, choices: tuple[str, ...]) -> None:
    """Check ``init`` and ``init_text`` of a configuration, and write down what is meant.

    ``init=None`` means ``"text"`` where there is a text, else the first of ``choices``. Texts in a list become a tuple.

    Raises: ValueError, TypeError: naming the argument.
    """
    text, init = config.init_text, config.init
    if text is not None:
        texts = (text,) if isinstance(text, str) else text
        if not isinstance(texts, tuple | list) or not all(isinstance(each, str) for each in texts):
            raise TypeError(f"init_text must be a text, a sequence of texts or None, got {text!r}")
        if not texts or not all(each.strip() for each in texts):
            raise ValueError(f"init_text must hold a word{' in each text' * (text is texts)}, got {text!r}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"init_text must be valid Unicode: {error.reason}") from None
        object.__setattr__(config, "init_text", text if isinstance(text, str) else tuple(texts))
    if init is None:
        init = choices[0] if text is None else TEXT
    require_choice("init", init, (*choices, TEXT))
    if init == TEXT and text is None:
        raise ValueError("init_text must hold the text that init='text' starts from, got None")
    if init != TEXT and text is not None:
        raise ValueError(f"init must be 'text' where init_text is given, got {init!r}")
    object.__setattr__(config, "init", init)


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
