"""Records to examples: which fields make one, what templates make of them, and what no field may hold."""

import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadapter.training.config import UserError
from fastadapter.training.data.chat import answered, conversation
from fastadapter.training.data.example import Example, require_text
from fastadapter.training.data.readers import MAX_RECORD_BYTES, read_records

TEMPLATE = "Review: {text}\nSentiment:"
COMPLETION_TEMPLATE = " {label}"
# Of Stanford Alpaca, which LLaMA-Adapter was trained with, too.
INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{text}\n\n### Response:"
)
_INSTRUCTION_INPUT_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# Fields that a record of the kind must have, and others that it may have.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prompt/completion": (("prompt", "completion"), ()),
    "text/label": (("text", "label"), ()),
    "messages": (("messages",), ("system",)),
    "conversations": (("conversations",), ("system",)),
    "instruction/output": (("instruction", "output"), ("input",)),
}
FIELDS = tuple(dict.fromkeys(field for kind in _KINDS.values() for part in kind for field in part))


def read_examples(
    path: str | Path,
    *,
    template: str = TEMPLATE,
    completion_template: str = COMPLETION_TEMPLATE,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    numbers: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> list[Example]:
    r"""The records of a file or data set, all of one kind.

    ======================= =====================================================================
    fields                  example
    ======================= =====================================================================
    prompt, completion      as they are
    text, label             two templates make prompt and completion; the label is a string, an integer or a boolean
    messages                turns ``{"role": ..., "content": ...}`` of system, user and assistant
    conversations           the same as ``{"from": ..., "value": ...}`` of system, human and gpt
    instruction, output     Alpaca's template makes the prompt, with ``input`` where it is not empty
    ======================= =====================================================================

    A conversation may have a field ``system``, its first turn. Other fields are left alone.

    Args:
        path: a file or data set that :func:`read_records` reads.
        template: makes the prompt of a text/label record; holds ``{text}``.
        completion_template: makes its completion; holds ``{label}``.
        columns: the file's own name of a field, for those that are not called as above. They also decide the kind
            of records that could be of several.
        system_prompt: first turn of conversations that have none of the system.
        numbers: labels are numbers, also where they are written as text.
        max_record_bytes: a larger record is refused.
    Raises: UserError: naming file and line: no records, malformed data, a field that is missing, empty, of the wrong
        type or with characters that no text has, records of two kinds, a conversation without an answer, a template
        without its field.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
    >>> _ = file.write_text("text,label\nA delight.,positive\n")
    >>> read_examples(file)[0].prompt
    'Review: A delight.\nSentiment:'
    """
    require_template("template", template, "text")
    require_template("completion_template", completion_template, "label")
    columns = dict(columns or {})
    wanted = _kind_of_columns(columns)
    examples: list[Example] = []
    kind: str | None = None
    for source, record in read_records(path, max_record_bytes=max_record_bytes):
        record = _rename(record, columns, source)
        found = wanted or _kind(record, kind, source)
        if kind is not None and found != kind:
            raise UserError(f"{source}: a {found} record in a file of {kind} records")
        kind = found
        if kind in ("messages", "conversations"):
            examples.append(_conversation(record, kind, system_prompt, source))
        elif kind == "text/label":
            label = _number(record, source) if numbers else _label(record, source)
            prompt = template.format(text=_text(record, "text", source))
            examples.append(Example(prompt, completion_template.format(label=label), label, source))
        elif kind == "instruction/output":
            examples.append(
                Example(_instruction(record, source), _text(record, "output", source), None, source)
            )
        else:
            examples.append(
                Example(_text(record, "prompt", source), _text(record, "completion", source), None, source)
            )
    if not examples:
        raise UserError(f"{path}: holds no records")
    return examples


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


def _kind_of_columns(columns: Mapping[str, str]) -> str | None:
    for field, column in columns.items():
        if field not in FIELDS:
            raise UserError(f"columns: a field is one of {', '.join(FIELDS)}, got {field!r}")
        if not isinstance(column, str) or not column:
            raise UserError(f"columns: the column of {field} must be a name, got {column!r}")
    kinds = [name for name, (must, may) in _KINDS.items() if set(columns) <= {*must, *may}]
    if not kinds:
        raise UserError(f"columns: no kind of record has the fields {', '.join(columns)}")
    return kinds[0] if len(kinds) == 1 else None


def _rename(record: dict[str, Any], columns: Mapping[str, str], source: str) -> dict[str, Any]:
    for field, column in columns.items():
        if column not in record:
            raise UserError(
                f"{source}: has no field {column!r} (columns: {field}={column}); {_fields_of(record)}"
            )
    taken = {field: record[column] for field, column in columns.items()}
    rest = {name: value for name, value in record.items() if name not in columns.values()}
    return {**rest, **taken}


def _kind(record: dict[str, Any], known: str | None, source: str) -> str:
    """The kind of which the record has every field; that which is known already, where it is one of several."""
    complete = [
        kind for kind, (must, _) in _KINDS.items() if all(record.get(field) is not None for field in must)
    ]
    if known is not None and (known in complete or not complete):
        return known  # a field that it lacks is named when it is read
    if len(complete) > 1:
        raise UserError(f"{source}: is a record of {' and '.join(complete)} at once; columns can say which")
    if complete:
        return complete[0]
    begun = [kind for kind, (must, _) in _KINDS.items() if any(field in record for field in must)]
    if len(begun) == 1:
        return begun[0]
    raise UserError(
        f"{source}: is no record of {', '.join(_KINDS)}; {_fields_of(record)}; columns can rename them"
    )


def _fields_of(record: dict[str, Any]) -> str:
    return f"its fields are {', '.join(map(repr, record)) or 'none'}"


def _text(record: dict[str, Any], name: str, source: str) -> str:
    if record.get(name) is None:
        raise UserError(f"{source}: field {name!r} is missing")
    return require_text(record[name], f"field {name!r}", source)


def _label(record: dict[str, Any], source: str) -> str:
    value = record.get("label")
    if isinstance(value, bool):
        return str(value).lower()  # as JSON and CSV files write it
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        raise UserError(f"{source}: field 'label' must be a string, an integer or a boolean, got float")
    return _text(record, "label", source)


def _number(record: dict[str, Any], source: str) -> str:
    value = record.get("label")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = _text(record, "label", source)
    try:
        finite = math.isfinite(float(value))
    except (ValueError, OverflowError):
        finite = False
    if not finite:
        raise UserError(f"{source}: field 'label' must be a finite number, got {value!r}")
    return str(value).strip()


def _instruction(record: dict[str, Any], source: str) -> str:
    instruction, given = _text(record, "instruction", source), record.get("input")
    if given is None or given == "":
        return INSTRUCTION_TEMPLATE.format(text=instruction)
    return _INSTRUCTION_INPUT_TEMPLATE.format(
        instruction=instruction, input=require_text(given, "field 'input'", source)
    )


def _conversation(record: dict[str, Any], kind: str, system_prompt: str | None, source: str) -> Example:
    given = record.get("system")
    system = system_prompt if given is None or given == "" else require_text(given, "field 'system'", source)
    messages = conversation(record.get(kind), kind, source, system)
    first = answered(messages, source)
    opening = "\n".join(f"{turn.role}: {turn.content}" for turn in messages[:first])
    last = next(turn.content for turn in reversed(messages) if turn.role == "assistant")
    return Example(opening, last, None, source, messages)
