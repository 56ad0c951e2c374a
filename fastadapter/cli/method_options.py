"""Options of the methods, read off their configuration classes: one option per field, whatever the methods are."""

import argparse
import dataclasses
import re
import sys
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastadapter.cli.options import unescape
from fastadapter.integrations.verbs.attach import attach
from fastadapter.methods import METHODS
from fastadapter.training import UserError, from_text, task_text


def add_method_arguments(group: Any, methods: Mapping[str, Any] = METHODS) -> None:
    """One option per field of the configurations of all methods; the value is read once the method is known."""
    fields: dict[str, dict[str, dataclasses.Field]] = {}
    for method, config in methods.items():
        for field in dataclasses.fields(config):
            if field.init:
                fields.setdefault(field.name, {})[method] = field
    for name, owners in fields.items():
        flags = [_types(methods[method], name) == {bool} for method in owners]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"method_{name}",
            default=argparse.SUPPRESS,
            help=_help(name, owners, methods).replace("%", "%%"),
            **({"action": argparse.BooleanOptionalAction} if all(flags) else {"metavar": "VALUE"}),
        )


def _help(name: str, owners: Mapping[str, dataclasses.Field], methods: Mapping[str, Any]) -> str:
    """What the field does, in which methods, and its default in each.

    Fields of one name and of other types do other things, so each has a part of its own.
    """
    alike: dict[frozenset[Any], list[str]] = {}
    for method in owners:
        alike.setdefault(frozenset(_types(methods[method], name) - {type(None)}), []).append(method)
    parts = []
    for group in alike.values():
        described = next((text for method in group if (text := _described(methods[method], name))), name)
        taken = f" ({', '.join(group)})" if len(group) < len(methods) else ""
        defaults: dict[str, list[str]] = {}
        for method in group:
            defaults.setdefault(_shown(owners[method].default), []).append(method)
        ((first, _), *others) = defaults.items()
        shown = ", ".join([first, *(f"{value} of {' and '.join(where)}" for value, where in others)])
        parts.append(f"{described}{taken} (default: {shown})")
    return "; ".join(parts)


def _shown(value: Any) -> str:
    """A default as one would type it."""
    if value is None or value is dataclasses.MISSING:
        return "none"
    return "yes" if value is True else "no" if value is False else str(value)


def method_config(args: argparse.Namespace, method: str, methods: Mapping[str, Any] = METHODS) -> Any:
    """The configuration that the options ask for.

    Raises: UserError: an option that ``method`` does not have, or no value of its type; ValueError, TypeError: what
        the configuration itself refuses.
    """
    config = methods[method]
    known = [field.name for field in dataclasses.fields(config) if field.init]
    given = {
        key.removeprefix("method_"): value for key, value in vars(args).items() if key.startswith("method_")
    }
    for name in given:
        if name not in known:
            raise UserError(
                f"--{name.replace('_', '-')}: {method} has no such option; it has "
                f"{', '.join('--' + each.replace('_', '-') for each in known)}"
            )
    return config(**{name: _parse(name, value, _types(config, name)) for name, value in given.items()})


def attach_from_task(
    args: argparse.Namespace, model: Any, config: Any, tokenizer: Any, template: str | None
) -> Any:
    """Attach a method; where the options choose no start, from what the template says of the task.

    Returns: the configuration that was attached.
    """
    chosen = hasattr(args, "method_init") or hasattr(args, "method_init_text")
    started = config if chosen or template is None else from_text(config, task_text(template))
    if started is not config:
        try:
            attach(model, started, tokenizer=tokenizer)
            return started
        except TypeError as error:
            print(
                f"fastadapter: no start from the template's text, but a random one: {error}", file=sys.stderr
            )
    attach(model, config, tokenizer=tokenizer)
    return config


def _types(config: Any, name: str) -> set[Any]:
    hint = get_type_hints(config)[name]
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _parse(name: str, value: Any, kinds: set[Any]) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() == "none" and type(None) in kinds:
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if name == "init_text":
        return unescape(value)
    if str in kinds:
        return value
    if tuple in kinds or list in kinds:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    names = sorted("none" if kind is type(None) else kind.__name__ for kind in kinds)
    raise UserError(f"--{name.replace('_', '-')} must be {' or '.join(names)}, got {value!r}")


def _described(config: Any, name: str) -> str:
    """The first sentence about a field in the ``Args`` of its class, and what none means."""
    found = re.search(rf"^\s*{name}(?:, \w+)*: (.+?)(?=^\s*\w+(?:, \w+)*: |^\s*\w+:$|^\s*$|\Z)",
                      config.__doc__ or "", re.MULTILINE | re.DOTALL)  # fmt: skip
    if found is None:
        return ""
    text = re.sub(r"\bNone\b", "none", " ".join(found[1].replace("``", "").split()))
    first = re.split(r"; |\. ", text.rstrip("."))[0]
    nothing = re.search(r"; (none: [^;.]+)", text)
    return f"{first}; {nothing[1]}" if nothing else first
