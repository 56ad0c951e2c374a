"""Conversations: their turns, and their tokens by the tokenizer's chat template, the assistant's trained on."""

import re
from collections.abc import Sequence
from typing import Any

from fastadapter.training.config import UserError
from fastadapter.training.data.example import Example, Message, require_text
from fastadapter.training.data.tokens import Piece, any_of, special_tokens, tokenize_pieces

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SPEAKERS = {
    **_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
# What a turn may say beside its text that would change what is trained on, and the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tool_calls": (None, []),
    "function_call": (None, {}),
    "weight": (None, 1),
    "train": (None, True),
}
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


def conversation(value: Any, field: str, source: str, system: str | None = None) -> tuple[Message, ...]:
    """The turns of a record.

    Args:
        value: the record's field ``field``: a list of objects with ``role`` and ``content``, or ``from`` and
            ``value``.
        system: the first turn, where the record has none of the system.
    """
    if value is None:
        raise UserError(f"{source}: field {field!r} is missing")
    if not isinstance(value, list):
        raise UserError(f"{source}: field {field!r} must be a list of turns, got {type(value).__name__}")
    if not value:
        raise UserError(f"{source}: field {field!r} has no turns")
    messages = []
    for number, turn in enumerate(value, 1):
        what = f"turn {number} of {field!r}"
        if not isinstance(turn, dict):
            raise UserError(f"{source}: {what} must be an object, got {type(turn).__name__}")
        of_role = turn.get("role") is not None
        speaker, said, known = ("role", "content", _ROLES) if of_role else ("from", "value", _SPEAKERS)
        for name in (speaker, said):
            if turn.get(name) is None:
                fields = ", ".join(map(repr, turn)) or "none"
                raise UserError(f"{source}: {what} has no {name!r}; its fields are {fields}")
        if not isinstance(turn[speaker], str) or turn[speaker] not in known:
            raise UserError(
                f"{source}: {what} has the unknown role {turn[speaker]!r}; known are {', '.join(known)}"
            )
        for name, harmless in _UNSUPPORTED.items():
            if turn.get(name) not in harmless:
                raise UserError(f"{source}: {what} has {name!r}, which is not supported")
        text = require_text(turn[said], f"{said!r} of {what}", source)
        messages.append(Message(known[turn[speaker]], text))
    if system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return tuple(messages)


def answered(messages: Sequence[Message], source: str) -> int:
    """The number of turns before the assistant's first.

    Raises: UserError: there is none of the assistant, or nothing before it.
    """
    first = next((at for at, turn in enumerate(messages) if turn.role == "assistant"), None)
    if first is None:
        raise UserError(f"{source}: no turn is the assistant's, so there is nothing to train on")
    if first == 0:
        raise UserError(f"{source}: the first turn is the assistant's, and answers nothing")
    return first


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    source: str = "conversation",
    parse_special_tokens: bool = False,
) -> list[int]:
    """Tokens of the turns so far, up to where the assistant's next one begins: what ``generate`` continues."""
    chat = _Chat(_Template(tokenizer, source, parse_special_tokens), messages, source)
    pieces = chat.pieces(chat.render(chat.messages, more=True))
    return [token for ids in tokenize_pieces(tokenizer, [pieces], [source])[0] for token in ids]


def encode_conversations(
    tokenizer: Any, examples: Sequence[Example], *, parse_special_tokens: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each conversation up to its last answer, and which of them are trained on.

    A template that marks the assistant's text by ``{% generation %}`` is taken at its word. Otherwise an answer is
    what the template adds for it to the turns before it and the opening of the assistant's turn, less the white space
    behind an end token. An answer's tokens are those it has behind that opening, for that is what ``generate``
    continues.

    Raises: UserError: naming the record: there is no chat template, it refuses the turns, or it renders turns
        differently when others follow.
    """
    if not examples:
        return []
    template = _Template(tokenizer, examples[0].source, parse_special_tokens)
    rows: list[list[Piece]] = []
    trained: list[list[bool]] = []
    for example in examples:
        messages = example.messages or ()
        answered(messages, example.source)
        chat = _Chat(template, messages, example.source)
        pieces: list[Piece] = []
        flags: list[bool] = []
        for text, flag in chat.segments():
            parts = chat.pieces(text)
            pieces += parts
            flags += [flag] * len(parts)
        rows.append(pieces)
        trained.append(flags)
    encoded = []
    sources = [example.source for example in examples]
    for tokens, flags in zip(tokenize_pieces(tokenizer, rows, sources), trained, strict=True):
        ids = [token for part in tokens for token in part]
        mask = [flag for part, flag in zip(tokens, flags, strict=True) for _ in part]
        encoded.append((ids, mask))
    return encoded


class _Template:
    """The tokenizer's chat template, and which special tokens are text in what was said."""

    def __init__(self, tokenizer: Any, source: str, parse_special_tokens: bool):
        try:
            self.text: str = tokenizer.get_chat_template()
        except (AttributeError, ValueError) as error:
            raise UserError(
                f"{source}: a conversation needs a chat template, and the tokenizer has none: "
                "use the tokenizer of a chat model, or records of prompt and completion"
            ) from error
        self.tokenizer = tokenizer
        special = sorted(special_tokens(tokenizer))
        self.hidden = [] if parse_special_tokens else special
        self.pattern = any_of(self.hidden)
        self.number = {word: at for at, word in enumerate(self.hidden)}
        self.end = re.compile(f"({any_of(special).pattern})\\s+$")


class _Chat:
    """One conversation; special tokens in what was said are numbered marks while the template renders it."""

    def __init__(self, template: _Template, messages: Sequence[Message], source: str):
        self.template, self.tokenizer, self.source = template, template.tokenizer, source
        said = "".join(turn.content for turn in messages)
        # Two characters that nobody has said.
        unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
        self.open, self.close = next(unused), next(unused)
        self.mark = re.compile(f"{self.open}([0-9]+){self.close}")
        self.messages = [
            Message(turn.role, template.pattern.sub(self._mark_of, turn.content)) for turn in messages
        ]

    def _mark_of(self, found: re.Match[str]) -> str:
        return f"{self.open}{self.template.number[found.group()]}{self.close}"

    def render(self, messages: Sequence[Message], *, more: bool = False) -> str:
        """The template's text of some turns; ``more``: with the opening of the assistant's next one."""
        return self._ask(lambda turns: self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=more), messages)  # fmt: skip

    def _ask(self, render: Any, messages: Sequence[Message]) -> Any:
        from jinja2 import TemplateError

        try:
            return render([turn._asdict() for turn in messages])
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.source}: the chat template refuses the turns: {error}") from error

    def segments(self) -> list[tuple[str, bool]]:
        """Text up to the last answer in parts, and whether each is trained on."""
        last = max(at for at, turn in enumerate(self.messages) if turn.role == "assistant")
        text, spans = (self._marked if _MARKS.search(self.template.text) else self._by_prefixes)(last)
        segments, done = [], 0
        for start, end in spans:
            segments += [(text[done:start], False), (text[start:end], True)]
            done = end
        return [segment for segment in segments if segment[0]]

    def _marked(self, last: int) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = self._ask(lambda turns: render_jinja_template(
            conversations=[turns], chat_template=self.template.text, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map), self.messages[: last + 1])  # fmt: skip
        found = [(start, end) for start, end in spans[0] if start < end]
        if not found:
            raise UserError(f"{self.source}: the chat template marks no text as the assistant's")
        return texts[0], found

    def _by_prefixes(self, last: int) -> tuple[str, list[tuple[int, int]]]:
        text = self.render(self.messages[: last + 1])
        spans = []
        for at, turn in enumerate(self.messages[: last + 1]):
            if turn.role != "assistant":
                continue
            opening = self.render(self.messages[:at], more=True)
            through = text if at == last else self.render(self.messages[: at + 1])
            if not (text.startswith(through) and through.startswith(opening) and len(opening) < len(through)):
                raise UserError(
                    f"{self.source}: the chat template renders turn {at + 1} differently when it is asked for or when "
                    "other turns follow, so the tokens of the answer cannot be told; a template with "
                    "{% generation %} around what the assistant says tells them"
                )
            ended = self.template.end.search(through, len(opening))
            spans.append((len(opening), ended.end(1) if ended else len(through)))
        return text, spans

    def pieces(self, text: str) -> list[Piece]:
        """The text in parts: the template's, and special tokens that were said."""
        parts = self.mark.split(text)
        if any(self.open in part or self.close in part for part in parts):
            raise UserError(
                f"{self.source}: the chat template takes apart what was said, which holds special tokens; "
                "leave them out, or allow them by parse_special_tokens"
            )
        pieces = [
            Piece(self.template.hidden[int(part)] if at % 2 else part, at % 2 == 0)
            for at, part in enumerate(parts)
        ]
        return [piece for piece in pieces if piece.text]
