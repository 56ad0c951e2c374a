"""The ``fastadapter`` command. Each subcommand is a module with ``add_arguments(parser)`` and ``run(args)``."""

import argparse
import importlib
import sys
from collections.abc import Collection, Sequence
from typing import Any

from fastadapter.cli.options import Parser

# Imported only when chosen, so that `fastadapter doctor` runs with torch alone and help is quick.
COMMANDS = {
    "demo": "fine-tune a small real model on real reviews, show before and after",
    "finetune": "train an adapter on prompt/completion or text/label pairs",
    "compare": "train a model in every way of the article on the same records: one table, three plots",
    "generate": "answer prompts with a model and adapters: one, a file of them, or a conversation",
    "classify": "name the classes of texts with what a classification or regression has trained",
    "evaluate": "measure a finished adapter on records that were held out",
    "inspect": "show what is in an adapter's file or folder, without its model",
    "fold": "put an adapter into a model's own files, as far as that is possible",
    "explain": "show what an adapter adds to a model and which backend runs it",
    "cache": "list what training has kept of frozen models for later runs, or remove it",
    "bench": "measure, compare with peers, and audit what the GPU kernels compile to",
    "doctor": "show versions, extension, devices and the backend of every op",
}


class _Version(argparse.Action):
    """Imports torch to see what is there, so only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fastadapter.cli.doctor import version_line

        print(version_line())
        parser.exit()


def make_parser(chosen: Collection[str]) -> Parser:
    """The parser of the command line, with the options of the chosen commands."""
    parser = Parser(prog="fastadapter", description="Adapters for frozen models, fused.")
    parser.add_argument("--version", action=_Version, help="show what is installed, and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        subparser = commands.add_parser(name, help=description, description=f"{description}.")
        if name in chosen:
            module = importlib.import_module(f"fastadapter.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: 0; 2 after an expected fault, told in one line; 130 after Ctrl-C; 141 where nobody reads the output any
        more; 1 after an unexpected exception, whose traceback is printed.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = make_parser([word for word in argv if word in COMMANDS][:1])
        args, rest = parser.parse_known_args(argv, argparse.Namespace(argv=list(argv)))
        args.parser.require_known(rest)
        from fastadapter.cli import faults

        with faults.plain_warnings():
            status = args.run(args) or 0
        sys.stdout.flush()  # a pipe that nobody reads must be noticed here, not at the end of the process
        return status
    except (Exception, KeyboardInterrupt) as error:
        from fastadapter.cli import faults

        return faults.tell(error)
