"""The options of every command: explained, with their defaults, and alike where they are called alike."""

import argparse
import re

import pytest

from fastadapter.cli import COMMANDS, make_parser
from fastadapter.cli.options import Parser, shown_default

# Options of one name that differ from command to command, and why they may.
DIFFERENT = {
    "--adapter": "a method where one is trained, a folder where one is used",
    "--batch-size": "a step of training, an answer and a forward pass have sizes of their own",
    "--dtype": "what the adapter's run had, where there is one",
    "--head-learning-rate": "one of each method in a comparison",
    "--init": "a comparison knows two starts for all methods, a method its own",
    "--init-text": "read as a value of a configuration where one method is chosen",
    "--json": "a file where the command's product is files, else stdout",
    "--learning-rate": "one of each method in a comparison",
    "--model": "what the adapter's run had, where there is one",
    "--num-train-epochs": "the demo is short, the comparison has a quick form",
    "--output-dir": "the demo has a folder of its own",
    "--layers": "the demo adapts ten",
    "--parse-special-tokens": "what the adapter was trained with, where records are measured",
    "--reparam-size": "read as a value of a configuration where one method is chosen",
    "--save-steps": "a comparison's runs are shorter than the time it takes",
    "--template": "what the adapter's run had, where there is one",
    "--truncation": "what the adapter's run had, where there is one",
}
# Values that need not be given and have no default, because without them nothing of the kind happens.
OPTIONAL = {
    "--adapters", "--class-weights", "--columns", "--early-stopping-patience", "--eval-count",
    "--eval-data", "--eval-fraction", "--file", "--gguf-file", "--json",
    "--learning-rate", "--report-to", "--stop", "--system-prompt",
}  # fmt: skip


@pytest.fixture(scope="module")
def parsers():
    actions = make_parser(COMMANDS)._actions
    return next(each for each in actions if isinstance(each, argparse._SubParsersAction)).choices


@pytest.fixture(scope="module")
def options(parsers):
    """Command, name and action of every option and argument."""
    return [
        (command, action.option_strings[0] if action.option_strings else action.dest, action)
        for command, parser in parsers.items()
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def shown(parser, action):
    """What help prints about an option, in one line."""
    formatter = parser._get_formatter()
    return " ".join(formatter._expand_help(action).split())


def test_every_option_is_explained(parsers, options):
    silent = [f"{command} {name}" for command, name, action in options if not action.help]
    assert not silent


def test_help_names_no_none(parsers):
    found = {
        command: re.findall(r".*\bNone\b.*", parser.format_help())
        for command, parser in parsers.items()
        if re.search(r"\bNone\b", parser.format_help())
    }
    assert not found


def test_defaults_are_shown(parsers, options):
    """Every value has a default in its help, or words for what happens without one."""
    missing = []
    for command, name, action in options:
        text = shown(parsers[command], action)
        default = shown_default(action)
        if default is not None and f"(default: {default})" not in text:
            missing.append(f"{command} {name}: {text}")
        takes_one = action.nargs != 0 or isinstance(action, argparse.BooleanOptionalAction)
        free = action.required or action.default not in (None, argparse.SUPPRESS) or name in OPTIONAL
        if (
            takes_one
            and not free
            and not re.search(r"default|if not given|if none is given|in place of", text)
        ):
            missing.append(f"{command} {name}: {text}")
    assert not missing


def test_options_of_one_name_are_one_option(options):
    """Same type, choices, default and number of values, unless the list above says why not."""
    by_name = {}
    for command, name, action in options:
        kind = getattr(action.type, "__name__", None)
        if kind == "Path":
            kind = None
        choices = tuple(action.choices) if action.choices is not None else None
        traits = (type(action).__name__, kind, choices, action.nargs, str(action.default), action.required)
        by_name.setdefault(name, {}).setdefault(traits, []).append(command)
    differing = {name for name, found in by_name.items() if len(found) > 1}
    assert differing <= DIFFERENT.keys(), {name: by_name[name] for name in differing - DIFFERENT.keys()}


def test_options_are_grouped_and_spelt_alike(parsers):
    for command, parser in parsers.items():
        for action in parser._actions:
            for option in action.option_strings:
                assert re.fullmatch(r"-h|--[a-z][a-z0-9]*(-[a-z0-9]+)*", option), f"{command} {option}"
        loose = [each for each in parser._optionals._group_actions if each.dest != "help"]
        assert len(loose) <= 8, f"{command}: put {[each.dest for each in loose]} into groups"


def test_complaints_are_one_line_with_a_hint(capsys):
    for words, message in (
        (["generate", "--promt", "w1"], "unrecognized arguments: --promt w1 (did you mean --prompt?)"),
        (["generate", "--temp", "2"], "unrecognized arguments: --temp 2"),
        (["explain", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "--prompt", "a", "--chat"], "argument --chat: not allowed with argument --prompt"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["classify"], "the following arguments are required: --adapter"),
    ):
        with pytest.raises(SystemExit) as stop:
            from fastadapter.cli import main

            main(words)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and len(printed.err.splitlines()) == 1 and not printed.out
        assert printed.err.startswith("fastadapter: error: ") and message in printed.err, printed.err


def test_how_defaults_are_shown():
    parser = Parser(prog="toy")
    parser.add_argument("--rate", type=float, default=0.5, help="how fast")
    parser.add_argument("--words", nargs="+", default=["a", "b"], help="which")
    parser.add_argument("--shape", default="100%\n", help="how it looks")
    parser.add_argument("--name", help="its name")
    parser.add_argument("--quick", action="store_true", help="do less")
    parser.add_argument("--end", action=argparse.BooleanOptionalAction, default=True, help="end it")
    parser.add_argument("--file", required=True, default="x", help="where")
    texts = [shown(parser, action) for action in parser._actions[1:]]
    assert texts == [
        "how fast (default: 0.5)", "which (default: a b)", r"how it looks (default: 100%\n)", "its name", "do less",
        "end it (default: --end)", "where",
    ]  # fmt: skip
    assert "--rate X" in parser.format_help()
