"""``fastadapter classify``: the class of a text, or its number, by what a classification or regression has trained."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch

from fastadapter.checkpoints import load
from fastadapter.cli.loading import add_any_base, add_model_arguments, device_and_dtype
from fastadapter.cli.options import require_number, unescape
from fastadapter.cli.records import RecordFile, add_output_arguments, line, require_output, show
from fastadapter.cli.runs import (
    GENERATION,
    Known,
    complete,
    load_base,
    parses_special_tokens,
    read_known,
    resolve_template,
)
from fastadapter.cli.texts import field, read_file, read_stdin, require_text
from fastadapter.training import Example, UserError
from fastadapter.training.classification import (
    encode_texts,
    pad_token,
    require_head,
    text_limit,
    text_outputs,
)
from fastadapter.training.config import TRUNCATION
from fastadapter.training.data import require_template

Text = tuple[str, str]  # where it stands, and what it says
_SHOWN_CHARACTERS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, known=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--adapter", required=True, metavar="PATH", help="file or folder of an adapter with a head"
    )
    add_any_base(adapter)
    given = parser.add_argument_group("texts")
    source = given.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", help="one text or several; the lines of stdin if none is given")
    source.add_argument("--file", help="one text per line; or .jsonl, .csv and the like with a field text")
    given.add_argument(
        "--template",
        type=unescape,
        help=r"put each text in place of {text}; \n is a new line; if not given, what the adapter was trained with",
    )
    given.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a text; if not given, that of the training",
    )
    given.add_argument(
        "--truncation",
        choices=TRUNCATION,
        help="of longer texts: refuse them, or cut their end, as prompt does too; if not given, as in training",
    )
    given.add_argument(
        "--parse-special-tokens",
        action=argparse.BooleanOptionalAction,
        help="special tokens such as </s> in a text are tokens, otherwise text; if not given, as in training",
    )
    given.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts per forward pass")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    require_number("--batch-size", args.batch_size, 1)
    require_output(args)
    if args.max_length is not None:
        require_number("--max-length", args.max_length, 2)
    if args.template is not None:
        require_template("--template", args.template, "text")
    known = read_known(args.adapter)
    if known.task == GENERATION:
        raise UserError(f"{args.adapter} was trained for {known.task}; `fastadapter generate` uses it")
    complete(args, [known])
    template = resolve_template(args.template, known)
    if args.max_length is None:
        args.max_length = known.of_run("training", "max_length")
    if args.truncation is None:
        args.truncation = known.of_run("training", "truncation") or "error"
    if args.parse_special_tokens is None:
        args.parse_special_tokens = parses_special_tokens([known])
    texts = _texts(args)
    first = next(texts, None)  # before the model is loaded, if nothing is there
    if first is None:
        raise UserError(f"{args.file or 'stdin'}: holds no texts")
    device = device_and_dtype(args)
    output = None
    if args.output is not None:
        keys = "model revision gguf_file dtype max_length truncation parse_special_tokens".split()
        settings = {
            **{key: getattr(args, key) for key in keys},
            "template": template,
            "adapter": known.digest,
        }
        output = RecordFile(args.output, settings, resume=args.resume)
    labels = known.labels or []
    model, tokenizer = load_base(args, known)
    load(model, known.path, strict_base=not args.any_base)
    model.to(device)
    require_head(model, labels)
    scorer = Scorer(
        model,
        tokenizer,
        known,
        max_length=args.max_length,
        truncate=args.truncation != "error",
        parse_special_tokens=args.parse_special_tokens,
    )
    if output is not None:
        output.start()
    _classify_all(args, scorer, chain([first], texts), template, output)
    return 0


class Scorer:
    """A classifier or a regression that answers batches of texts.

    Args:
        max_length: most tokens of a text; ``None``: the model's context.
        truncate: cut the end of a text that is longer; otherwise it is an error.
        parse_special_tokens: special tokens that somebody wrote into a text are tokens; otherwise they are text.
    Raises: UserError: ``max_length`` is more than the model's context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        known: Known,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        parse_special_tokens: bool = False,
    ):
        self.model, self.tokenizer, self.labels = model, tokenizer, known.labels
        self.how = {"truncate": truncate, "parse_special_tokens": parse_special_tokens}
        limit = text_limit(model, tokenizer)
        if max_length is not None and limit is not None and max_length > limit:
            raise UserError(f"--max-length must be at most {limit}, the model's context, got {max_length}")
        self.max_length = max_length or limit
        self.pad_token_id = pad_token(model, tokenizer)

    def __call__(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """What is found in each text: ``label`` and ``probabilities``, or ``value``."""
        examples = [Example(text, "", "", source) for source, text in texts]
        encoded = encode_texts(self.tokenizer, examples, {"": 0}, max_length=self.max_length, **self.how)
        ids = [row.input_ids for row in encoded]
        width = len(self.labels) if self.labels else 1
        outputs = text_outputs(self.model, ids, width, self.pad_token_id, len(ids))
        if not torch.isfinite(outputs).all():
            raise UserError("the model's output is not finite; with --dtype fp32 it may be")
        if self.labels is None:
            return [{"value": value} for value in outputs[:, 0].tolist()]
        return [
            {"label": self.labels[max(range(len(row)), key=row.__getitem__)],
             "probabilities": dict(zip(self.labels, row, strict=True))}
            for row in outputs.softmax(-1).tolist()
        ]  # fmt: skip


def _texts(args: argparse.Namespace) -> Iterator[Text]:
    if args.text is not None:
        for number, text in enumerate(args.text, 1):
            source = "--text" if len(args.text) == 1 else f"--text {number}"
            if not text.strip():
                raise UserError(f"{source}: is empty")
            yield source, require_text(source, text)
        return
    for source, entry in read_file(args.file) if args.file is not None else read_stdin():
        yield source, field(source, entry, ("text",)) if isinstance(entry, dict) else entry


def _classify_all(
    args: argparse.Namespace,
    scorer: Scorer,
    texts: Iterator[Text],
    template: str | None,
    output: RecordFile | None,
) -> None:
    done = len(output.found) if output is not None else 0
    number = 0
    try:
        while batch := list(islice(texts, args.batch_size)):
            number += len(batch)
            if output is not None:
                output.require_same([{"text": text} for _, text in batch], number - len(batch))
            if number <= done:
                continue
            asked = [(source, template.format(text=text) if template else text) for source, text in batch]
            found = scorer(asked)
            records = [{"text": text, **each} for (_, text), each in zip(batch, found, strict=True)]
            if output is not None:
                output.write(records[max(0, done - number + len(batch)) :])
            elif args.json:
                show("".join(map(line, records)))
            else:
                show("".join(f"{readable(record)}\n" for record in records))
        if output is not None:
            output.require_at_most(number)
    except KeyboardInterrupt:
        if output is None:
            raise
        raise KeyboardInterrupt(f"{args.output} holds what is done; --resume goes on") from None
    finally:
        if output is not None:
            output.close()


def readable(record: dict[str, Any]) -> str:
    """A line for a reader: what was found, then the beginning of the text.

    >>> readable({"text": "A delight.", "label": "good", "probabilities": {"bad": 0.25, "good": 0.75}})
    'good 0.750, bad 0.250: A delight.'
    >>> readable({"text": "A delight.", "value": 3.25})
    '3.25: A delight.'
    """
    text = " ".join(record["text"].split())
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS - 1]}…"
    if "value" in record:
        return f"{record['value']:.4g}: {text}"
    likely = sorted(record["probabilities"].items(), key=lambda each: -each[1])
    return f"{', '.join(f'{label} {share:.3f}' for label, share in likely)}: {text}"
