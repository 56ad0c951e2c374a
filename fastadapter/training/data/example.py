"""What training is given: an example as text, and the same in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastadapter.training.config import UserError


class Message(NamedTuple):
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One record: what the model is given, what it shall answer, and where it was read.

    A conversation has all its turns in ``messages``, which the tokenizer's chat template makes tokens of; its
    ``prompt`` is what precedes the first answer, its ``completion`` the last answer.
    """

    prompt: str
    completion: str
    label: str | None = None
    source: str = "example"
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; those from ``prompt_len`` on are trained on, save those of ``given``.

    Attributes:
        input_ids: all tokens, the last of them one that is trained on.
        prompt_len: how many tokens precede the first that is trained on; at least 1.
        given: start and end of the spans behind ``prompt_len`` that are not trained on: in a conversation
            what others say after the first answer.
    """

    input_ids: tuple[int, ...]
    prompt_len: int
    given: tuple[tuple[int, int], ...] = ()

    @property
    def supervised(self) -> Sequence[int]:
        """Positions of the tokens that are trained on."""
        if not self.given:
            return range(self.prompt_len, len(self.input_ids))
        skipped = {at for start, end in self.given for at in range(start, end)}
        return [at for at in range(self.prompt_len, len(self.input_ids)) if at not in skipped]

    @property
    def num_supervised(self) -> int:
        return len(self.input_ids) - self.prompt_len - sum(end - start for start, end in self.given)


def require_text(text: Any, what: str, source: str) -> str:
    """``text``, if it is a string that a tokenizer can be given.

    Raises: UserError: it is no string, has nothing but white space, or a NUL.
    """
    if not isinstance(text, str):
        raise UserError(f"{source}: {what} must be a string, got {type(text).__name__}")
    if not text.strip():
        raise UserError(f"{source}: {what} is empty")
    if "\0" in text:
        raise UserError(f"{source}: {what} holds a NUL character")
    return text
