"""Read training records, split off held-out ones, and turn them into tokens.

A file is JSONL (one object per line) or CSV with a header. Its records are all of one kind:
``{"prompt": ..., "completion": ...}``, or ``{"text": ..., "label": ...}`` that two templates turn into a
prompt and a completion. Other fields are left alone. Every complaint names the file and the line.
"""

import csv
import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapter.training.config import UserError

TEMPLATE = "Review: {text}\nSentiment:"
COMPLETION_TEMPLATE = " {label}"
_KINDS = (("prompt", "completion"), ("text", "label"))


@dataclass(frozen=True)
class Example:
    """One record: what the model is given, what it shall answer, and where it was read."""

    prompt: str
    completion: str
    label: str | None = None
    source: str = "example"


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; those from ``prompt_len`` on are trained on."""

    input_ids: tuple[int, ...]
    prompt_len: int

    @property
    def num_supervised(self) -> int:
        return len(self.input_ids) - self.prompt_len


def read_examples(
    path: str | Path, *, template: str = TEMPLATE, completion_template: str = COMPLETION_TEMPLATE
) -> list[Example]:
    r"""The records of a JSONL or CSV file.

    Args:
        path: a file whose name ends in ``.jsonl``, ``.json`` (one object per line too) or ``.csv``; UTF-8.
        template: makes the prompt of a text/label record; holds ``{text}``.
        completion_template: makes its completion; holds ``{label}``.
    Raises: UserError: naming file and line: no records, malformed JSON, a field that is missing, empty or no
        string, records of two kinds, a template without its field.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
    >>> _ = file.write_text("text,label\nA delight.,positive\n")
    >>> read_examples(file)[0].prompt
    'Review: A delight.\nSentiment:'
    """
    require_template("template", template, "text")
    require_template("completion_template", completion_template, "label")
    examples: list[Example] = []
    kind = None
    for source, record in read_records(path):
        found = [each for each in _KINDS if any(field in record for field in each)]
        if len(found) != 1:
            which = "has fields of both" if found else "has neither"
            raise UserError(
                f"{source}: {which} prompt/completion {'and' if found else 'nor'} text/label; its fields are "
                f"{', '.join(map(repr, record)) or 'none'}"
            )
        if kind is not None and found[0] != kind:
            raise UserError(f"{source}: a {'/'.join(found[0])} record in a file of {'/'.join(kind)} records")
        kind = found[0]
        given, wanted = (_field(record, name, source) for name in kind)
        if kind == ("text", "label"):
            examples.append(
                Example(template.format(text=given), completion_template.format(label=wanted), wanted, source)
            )
        else:
            examples.append(Example(given, wanted, None, source))
    if not examples:
        raise UserError(f"{path}: holds no records")
    return examples


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and line, and fields, of every record of a JSONL or CSV file.

    Raises: UserError: naming file and line, if it is malformed.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a name that ends in .jsonl or .csv")
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    yield from readers[path.suffix.lower()](path)


def split_examples(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: ``count`` of them drawn by ``seed``, both in the order of the file.

    Examples with one prompt stay together, so none is on both sides.

    Raises: UserError: ``count`` leaves no example on one side, or cannot be met without parting equal
        prompts.
    """
    if not 1 <= count < len(examples):
        raise UserError(f"held-out examples must be between 1 and {len(examples) - 1}, got {count}")
    groups: dict[str, int] = {}
    for example in examples:
        groups[example.prompt] = groups.get(example.prompt, 0) + 1
    prompts = list(groups)
    random.Random(f"split-{seed}").shuffle(prompts)
    held: set[str] = set()
    missing = count
    for prompt in prompts:
        if groups[prompt] <= missing:
            held.add(prompt)
            missing -= groups[prompt]
    if missing:
        raise UserError(f"cannot hold out {count} examples without parting examples with equal prompts")
    return [e for e in examples if e.prompt not in held], [e for e in examples if e.prompt in held]


def without_prompts_of(examples: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
    """The examples whose prompt is not among those held out.

    Raises: UserError: none is left.
    """
    prompts = {example.prompt for example in held_out}
    left = [example for example in examples if example.prompt not in prompts]
    if not left:
        raise UserError("every training prompt is also in the evaluation data")
    return left


def require_template(name: str, template: str, field: str) -> None:
    """Raise UserError unless ``template`` holds ``{field}`` and no other field."""
    try:
        fields = {found for _, found, _, _ in string.Formatter().parse(template) if found is not None}
    except ValueError as error:
        raise UserError(f"{name} {template!r}: {error}") from None
    if fields != {field}:
        raise UserError(
            f"{name} must hold {{{field}}} and no other field ({{{{ is a plain brace), got {template!r}"
        )


def label_completions(examples: Sequence[Example]) -> dict[str, str]:
    """Completion of each label that occurs, in the order of their names; empty for prompt/completion records.

    Raises: UserError: one label has two completions, or two labels have one.
    """
    completions: dict[str, str] = {}
    for example in examples:
        if (
            example.label is not None
            and completions.setdefault(example.label, example.completion) != example.completion
        ):
            raise UserError(f"{example.source}: label {example.label!r} has two different completions")
    if len(set(completions.values())) < len(completions):
        raise UserError(f"the labels {', '.join(map(repr, sorted(completions)))} share a completion")
    return dict(sorted(completions.items()))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt as the model sees it in ``generate``: with what the tokenizer puts in front."""
    return _without_end(tokenizer, tokenizer(prompt)["input_ids"])


def encode_examples(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    append_eos: bool = False,
    max_length: int | None = None,
    truncate_prompt: bool = False,
) -> list[Encoded]:
    """Tokens of prompts and completions.

    A prompt's tokens are those it has alone, for that is what ``generate`` continues. A completion's are
    those it has behind the prompt, unless a token would straddle the two; then it is tokenised alone. A
    prompt that is cut keeps its end, and the begin-of-sequence token where the tokenizer puts one.

    Args:
        append_eos: supervise an end-of-sequence token after each completion.
        max_length: most tokens of a prompt and its completion; ``None``: no limit.
        truncate_prompt: cut the start of a prompt that is too long.
    Raises: UserError: naming the record: it is too long, its prompt or completion has no token; or the
        tokenizer has no end-of-sequence token to append.
    """
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise UserError("append_eos: the tokenizer has no end-of-sequence token")
    if not examples:
        return []
    starts = tokenizer([example.prompt for example in examples])["input_ids"]
    boths = tokenizer([example.prompt + example.completion for example in examples])["input_ids"]
    encoded = []
    for example, start, both in zip(examples, starts, boths, strict=True):
        start, both = _without_end(tokenizer, start), _without_end(tokenizer, both)
        if both[: len(start)] == start:
            rest = both[len(start) :]
        else:
            rest = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        if not start:
            raise UserError(f"{example.source}: the prompt has no tokens")
        if not rest:
            raise UserError(f"{example.source}: the completion {example.completion!r} has no tokens")
        rest = [*rest, eos] if append_eos else rest
        encoded.append(_fit(tokenizer, example, start, rest, max_length, truncate_prompt))
    return encoded


def _fit(
    tokenizer: Any,
    example: Example,
    start: list[int],
    rest: list[int],
    max_length: int | None,
    truncate_prompt: bool,
) -> Encoded:
    excess = len(start) + len(rest) - max_length if max_length is not None else 0
    if excess > 0:
        head = 1 if start[0] == tokenizer.bos_token_id else 0
        if not truncate_prompt or len(start) - excess <= head:
            hint = (
                "its completion alone fills that" if truncate_prompt else "shorten it or set truncate_prompt"
            )
            raise UserError(
                f"{example.source}: prompt and completion have {len(start) + len(rest)} tokens, "
                f"at most {max_length} fit; {hint}"
            )
        start = start[:head] + start[head + excess :]
    return Encoded((*start, *rest), len(start))


def context_length(model: Any) -> int | None:
    """Positions the model has, where its configuration says so."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _without_end(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    # Some tokenizers close every text with an end token, behind which there is nothing to continue.
    ids = list(ids)
    if ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id:
        ids.pop()
    return ids


def _field(record: dict[str, Any], name: str, source: str) -> str:
    if record.get(name) is None:
        raise UserError(f"{source}: field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{source}: field {name!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{source}: field {name!r} is empty")
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not UTF-8: {error.reason}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        source = f"{path} line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_unique)
        except RecursionError:
            raise UserError(f"{source}: JSON is nested too deeply") from None
        except ValueError as error:
            raise UserError(f"{source}: malformed JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{source}: expected a JSON object, got {type(record).__name__}")
        yield source, record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a field occurs twice")
    return record


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    first = 1  # line on which the record starts; a quoted field may span several
    while True:
        source = f"{path} line {first}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{source}: malformed CSV: {error}") from None
        if row is None:
            return
        first = reader.line_num + 1
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                raise UserError(f"{source}: a column name occurs twice")
            continue
        if len(row) != len(header):
            raise UserError(f"{source}: has {len(row)} fields, the header {len(header)}")
        yield source, dict(zip(header, row, strict=True))
