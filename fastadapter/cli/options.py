"""How options are declared, shown in help, and refused: one way for every command."""

import argparse
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def unescape(text: str) -> str:
    """New lines and tabs as one can type them in any shell."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def escape(text: str) -> str:
    """What :func:`unescape` makes the text of."""
    return text.replace("\n", "\\n").replace("\t", "\\t")


class HelpFormatter(argparse.HelpFormatter):
    """Help that ends with the default of an option where it has one; nothing is said where it has none."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 30, **options})

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        numbers: dict[Any, str] = {int: "N", float: "X"}
        return numbers.get(action.type, action.dest.rpartition("_")[2].upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        # some versions of Python write it into the help of a --x/--no-x option themselves
        text = (action.help or "").replace(" (default: %(default)s)", "")
        shown = shown_default(action)
        if shown is None or "%(default)" in text:
            return text
        return f"{text} (default: {shown.replace('%', '%%')})"


def shown_default(action: argparse.Action) -> str | None:
    """The default as one would type it; ``None`` where there is none, or nothing to say about it."""
    value = action.default
    if value is None or value is argparse.SUPPRESS or value == [] or action.required:
        return None
    if isinstance(value, bool):
        if isinstance(action, argparse.BooleanOptionalAction):
            return next(o for o in action.option_strings if o.startswith("--no-") != value)
        return None
    if not isinstance(value, str) and isinstance(value, Iterable):
        return " ".join(map(str, value))
    return escape(str(value))


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, and takes options by their whole names only.

    An option that is added later must not change what an abbreviation in somebody's script means.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def require_known(self, rest: Sequence[str]) -> None:
        """Complain of arguments that no option took, with the option that was probably meant."""
        if not rest:
            return
        options = [option for action in self._actions for option in action.option_strings]
        near = [found[0] for word in rest if (found := get_close_matches(word.partition("=")[0], options, 1))]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")

    def error(self, message: str) -> Any:
        self.exit(2, f"fastadapter: error: {' '.join(message.split())}; see {self.prog} --help\n")


def require_number(
    option: str, value: float, low: float, high: float = math.inf, *, above: bool = False, why: str = ""
) -> None:
    """Raise UserError, naming the option, unless ``value`` is finite and between the bounds.

    Args:
        above: ``low`` itself is refused too.
        why: what is wrong with values outside.
    """
    from fastadapter.training import UserError  # help must not take the seconds that importing it takes

    if not math.isfinite(value) or value < low or value > high or (above and value == low):
        bound = f"above {low:g}" if above else f"at least {low:g}"
        bound += "" if high == math.inf else f", at most {high:g}"
        raise UserError(f"{option} must be {bound}{f' ({why})' if why else ''}, got {value:g}")
