"""Options of the commands that read records, and the examples that they ask for."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from fastadapter.cli.options import escape, unescape
from fastadapter.training import Example, UserError, read_examples, split_examples, without_prompts_of
from fastadapter.training.classification import TEXT_TEMPLATE
from fastadapter.training.config import TRUNCATION
from fastadapter.training.data import (
    COMPLETION_TEMPLATE,
    FIELDS,
    INSTRUCTION_TEMPLATE,
    MAX_RECORD_BYTES,
    TEMPLATE,
    any_of,
    require_template,
    special_tokens,
)


def add_data_arguments(group: Any, *, held_out: bool) -> None:
    """Options to name records and say what they are.

    Args:
        group: a parser, or a group of one.
        held_out: some of the records, or those of another file, are kept to evaluate. Without it the records are for
            a run that is over: ``truncation`` and ``parse_special_tokens`` are None where they are not given, for the
            command to take what the run was trained with.
    """
    trained = "" if held_out else "; what the run was trained with if not given"
    group.add_argument(
        "--data",
        required=True,
        help=".jsonl, .json, .csv, .tsv (also .gz) or .parquet file, or folder or name of a Hugging Face data set, "
        "NAME:SPLIT for one of its splits",
    )
    if held_out:
        which = group.add_mutually_exclusive_group()
        which.add_argument(
            "--eval-data", help="held-out records; training records with their prompts are left out"
        )
        which.add_argument("--eval-count", type=int, help="hold out this many records, drawn by --seed")
        which.add_argument("--eval-fraction", type=float, help="hold out this share of the records")
    group.add_argument(
        "--columns",
        type=parse_columns,
        metavar="FIELD=COLUMN,...",
        help="the file's names of prompt and completion, text and label, messages, conversations, or instruction, "
        "input and output; for example prompt=question,completion=answer",
    )
    group.add_argument(
        "--template",
        type=unescape,
        help=rf"prompt of text/label records; \n is a new line; if not given '{escape(TEMPLATE)}', "
        "the text alone for classes and numbers",
    )
    group.add_argument(
        "--completion-template",
        type=unescape,
        help=f"completion of text/label records; if not given {COMPLETION_TEMPLATE!r}; not for classes and numbers",
    )
    group.add_argument("--system-prompt", help="first turn of conversations that have none of the system")
    group.add_argument(
        "--max-length", type=int, help="most tokens of a record; the model's context if not given"
    )
    cut = group.add_mutually_exclusive_group()
    cut.add_argument(
        "--truncation",
        choices=TRUNCATION,
        default="error" if held_out else None,
        help="of longer records: refuse them, cut the start of the prompt, or cut the end; a text to classify is "
        f"cut at its end{trained}",
    )
    cut.add_argument(
        "--truncate-prompt",
        dest="truncation",
        action="store_const",
        const="prompt",
        default=argparse.SUPPRESS,
        help="the same as --truncation prompt",
    )
    group.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        help="train on an end token after completions; if not given: after completions, not after labels",
    )
    group.add_argument(
        "--parse-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=False if held_out else None,
        help=f"special tokens such as </s> in a record are tokens; otherwise they are text{trained}",
    )
    group.add_argument(
        "--max-record-bytes", type=int, default=MAX_RECORD_BYTES, help="a larger record is refused"
    )


def read_data(args: argparse.Namespace, tell: bool) -> tuple[list[Example], list[Example] | None]:
    """The examples that the options ask for, and those held out, if any.

    Args:
        tell: say on stderr what is left out.
    Raises: UserError: naming the option, or file and line.
    """
    held_out_file = getattr(args, "eval_data", None)
    how = _how(args)
    train = _read(args, args.data, how)
    if held_out_file is not None:
        held_out = _read(args, held_out_file, how)
        if _kind(held_out[0]) != _kind(train[0]):
            raise UserError(f"{held_out_file} and {args.data} hold records of different kinds")
        kept = without_prompts_of(train, held_out)
        if tell and len(kept) < len(train):
            print(
                f"fastadapter: {len(train) - len(kept)} training records left out, "
                f"because {held_out_file} holds their prompts",
                file=sys.stderr,
            )
        return kept, held_out
    count, fraction = getattr(args, "eval_count", None), getattr(args, "eval_fraction", None)
    if fraction is not None:
        if not 0 < fraction < 1:
            raise UserError(f"--eval-fraction must be between 0 and 1, got {fraction}")
        count = max(1, round(fraction * len(train)))
    return (train, None) if count is None else split_examples(train, count, args.seed)


def mention_special_tokens(args: argparse.Namespace, tokenizer: Any, examples: Sequence[Example]) -> None:
    """Say on stderr if records hold special tokens that are taken as text, as those would that a template has made."""
    if args.parse_special_tokens:
        return
    pattern = any_of([word for word in special_tokens(tokenizer) if len(word) > 1])
    found = [
        match.group()
        for example in examples
        if (match := pattern.search("\n".join((example.prompt, example.completion, *_said(example)))))
    ]
    if found:
        print(
            f"fastadapter: {len(found)} of {len(examples)} records hold special tokens, the first of them "
            f"{found[0]!r}, which are taken as text; --parse-special-tokens makes tokens of them",
            file=sys.stderr,
        )


def _said(example: Example) -> list[str]:
    return [turn.content for turn in example.messages or ()]


def templates(args: argparse.Namespace) -> dict[str, str]:
    """``template`` and ``completion_template`` of text/label records."""
    given = {
        key: getattr(args, key)
        for key in ("template", "completion_template")
        if getattr(args, key) is not None
    }
    if args.task == "generation":
        return {"template": TEMPLATE, "completion_template": COMPLETION_TEMPLATE, **given}
    if "completion_template" in given:
        raise UserError(f"--completion-template: a {args.task} has no completions")
    return {"template": TEXT_TEMPLATE, "completion_template": "{label}", **given}


def prompt_template(args: argparse.Namespace, example: Example) -> str | None:
    """What was put around the texts that became prompts, with ``{text}`` in their place; None: nothing was."""
    if example.label is not None:
        return templates(args)["template"]
    return INSTRUCTION_TEMPLATE if _is_instruction(example) else None


def describe_data(
    args: argparse.Namespace, train: Sequence[Example], held_out: Sequence[Example] | None
) -> dict[str, Any]:
    """What a run's record says of its data: names, digest, counts, and what was made of the records."""
    labelled = train[0].label is not None
    sha = hashlib.sha256()
    for part in (train, held_out or ()):
        sha.update(f"{len(part)}\n".encode())
        for example in part:
            sha.update(repr(astuple(example)[:3] + (example.messages,)).encode())
    files = [args.data, getattr(args, "eval_data", None)]
    return {
        "template": prompt_template(args, train[0]),
        "completion_template": (
            templates(args)["completion_template"] if labelled and args.task == "generation" else None
        ),
        "chat": train[0].messages is not None,
        "columns": dict(args.columns or {}),
        "system_prompt": args.system_prompt,
        "data": {
            "files": [_shown(file) for file in files if file],
            "digest": sha.hexdigest(),
            "train_records": len(train),
            "eval_records": len(held_out or ()),
        },
    }


def parse_columns(text: str) -> dict[str, str]:
    """``FIELD=COLUMN,FIELD=COLUMN`` as a mapping."""
    columns: dict[str, str] = {}
    for each in text.split(","):
        field, equals, column = (part.strip() for part in each.partition("="))
        if not (field and equals and column):
            raise argparse.ArgumentTypeError(f"expected FIELD=COLUMN,FIELD=COLUMN, got {text!r}")
        if field not in FIELDS:
            raise argparse.ArgumentTypeError(f"a field is one of {', '.join(FIELDS)}, got {field!r}")
        if field in columns:
            raise argparse.ArgumentTypeError(f"names {field!r} twice")
        columns[field] = column
    return columns


def _how(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_record_bytes < 1:
        raise UserError(f"--max-record-bytes must be at least 1, got {args.max_record_bytes}")
    if args.system_prompt is not None and not args.system_prompt.strip():
        raise UserError("--system-prompt is empty")
    chosen = templates(args)
    require_template("--template", chosen["template"], "text")
    require_template("--completion-template", chosen["completion_template"], "label")
    return {
        **chosen,
        "columns": args.columns,
        "system_prompt": args.system_prompt,
        "numbers": args.task == "regression",
        "max_record_bytes": args.max_record_bytes,
    }


def _read(args: argparse.Namespace, path: str, how: dict[str, Any]) -> list[Example]:
    examples = read_examples(path, **how)
    kind = _kind(examples[0])
    for option, wanted in (
        ("template", "text/label"),
        ("completion_template", "text/label"),
        ("system_prompt", "conversation"),
    ):
        given = getattr(args, option)
        # A run on instructions says that its template is Alpaca's, which its records have by themselves.
        if given == INSTRUCTION_TEMPLATE and _is_instruction(examples[0]):
            continue
        if given is not None and kind != wanted:
            raise UserError(
                f"--{option.replace('_', '-')} is for {wanted} records, but {path} has {kind} records"
            )
    if args.append_eos is not None and kind == "conversation":
        raise UserError("--append-eos is for completions; the chat template ends the turns of a conversation")
    return examples


def _is_instruction(example: Example) -> bool:
    before = INSTRUCTION_TEMPLATE.partition(".")[0]  # the form with an input begins in the same way
    return example.messages is None and example.label is None and example.prompt.startswith(before)


def _kind(example: Example) -> str:
    if example.messages is not None:
        return "conversation"
    return "prompt/completion" if example.label is None else "text/label"


def _shown(file: str) -> str:
    """A file or folder by its last name alone: where it lies on this machine is of no use to a reader."""
    here = Path(file).exists() or Path(file.rpartition(":")[0] or file).exists()
    return Path(file).name if here else file
