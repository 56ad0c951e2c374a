"""The ``fastadapter`` command. Each subcommand is a module with ``add_arguments(parser)`` and ``run(args)``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

# Imported only when chosen, so that `fastadapter doctor` runs with torch alone and help is quick.
_COMMANDS = {
    "demo": "fine-tune a small real model on real reviews, show before and after",
    "finetune": "train an adapter on prompt/completion or text/label pairs",
    "compare": "train a model in every way of the article on the same records: one table, three plots",
    "generate": "answer prompts with a model and an adapter",
    "explain": "show what an adapter adds to a model and which backend runs it",
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


def main(argv: list[str] | None = None) -> int:
    """Run one command; user errors print one line and return 2, Ctrl-C returns 130."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastadapter", description="Adapters for frozen models, fused.")
    parser.add_argument("--version", action=_Version, help="show what is installed, and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if word in _COMMANDS), None)
    for name, description in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=description,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == chosen:
            module = importlib.import_module(f"fastadapter.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    from fastadapter import CheckpointError, VerificationError

    try:
        return args.run(args) or 0
    except (ValueError, TypeError, OSError, CheckpointError, VerificationError) as error:
        print(f"fastadapter: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastadapter: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "fastadapter":
            raise
        extra = "bench" if error.name.partition(".")[0] in ("peft", "pytest") else "hf"
        print(f'fastadapter: error: {error}; pip install "fastadapter[{extra}]" brings it', file=sys.stderr)
        return 2
