"""Text to tokens, in which a special token that somebody wrote is text and not a token.

``</s>`` in a review would otherwise end it, and ``<|im_start|>`` in a question begin a turn of somebody else.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastadapter.training.config import UserError


class Piece(NamedTuple):
    """Part of a text; ``parse``: special tokens in it are tokens."""

    text: str
    parse: bool


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokenizer's special tokens and their ids. Added tokens that it does not call special are not among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {str(token.content): int(index) for index, token in added.items() if token.special}
    for content in tokenizer.all_special_tokens:
        found.setdefault(str(content), int(tokenizer.convert_tokens_to_ids(content)))
    return found


def any_of(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds one of ``words``, the longest where one begins another."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    sources: Sequence[str],
    *,
    parse_special_tokens: bool = False,
    **options: Any,
) -> list[list[int]]:
    """Tokens of each text.

    Args:
        sources: where each text is from, for complaints.
        parse_special_tokens: special tokens that the texts hold are tokens.
        options: for the tokenizer.
    Raises: UserError: naming the source: the tokenizer makes a special token of text that it was asked to split.
    """
    if not texts:
        return []
    if parse_special_tokens:
        return tokenizer(list(texts), **options)["input_ids"]
    asked = _split_option(tokenizer)
    rows = tokenizer(list(texts), **options, **asked)["input_ids"]
    _require_split(tokenizer, texts, sources, asked)
    return rows


def tokenize_pieces(
    tokenizer: Any, rows: Sequence[Sequence[Piece]], sources: Sequence[str]
) -> list[list[list[int]]]:
    """Tokens of each piece of each row; the pieces of a row stand one behind the other in one text."""
    asked = _split_option(tokenizer)
    flat = [(row, at) for row, pieces in enumerate(rows) for at in range(len(pieces))]
    found: dict[tuple[int, int], list[int]] = {}
    # Some tokenizers put a space in front of every text, which the middle of one must not get: they are shown a line
    # break there, whose own tokens are taken away again.
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for parse in (True, False):
        keys = [(row, at) for row, at in flat if rows[row][at].parse is parse]
        if not keys:
            continue
        options = {"add_special_tokens": False, **({} if parse else asked)}
        texts = [rows[row][at].text for row, at in keys]
        shown = [text if at == 0 else f"\n{text}" for text, (_, at) in zip(texts, keys, strict=True)]
        found.update(zip(keys, tokenizer(shown, **options)["input_ids"], strict=True))
        joined = []  # pieces that begin with white space, which shares a token with the line break
        for key, text in zip(keys, texts, strict=True):
            if key[1] and found[key][: len(newline)] == newline:
                found[key] = found[key][len(newline) :]
            elif key[1]:
                joined.append((key, text))
        if joined:
            alone = tokenizer([text for _, text in joined], **options)["input_ids"]
            found.update(zip((key for key, _ in joined), alone, strict=True))
        if not parse:
            _require_split(tokenizer, texts, [sources[row] for row, _ in keys], asked)
    return [[found[row, at] for at in range(len(pieces))] for row, pieces in enumerate(rows)]


def _split_option(tokenizer: Any) -> dict[str, bool]:
    try:
        tokenizer("a", split_special_tokens=True)
    except (TypeError, ValueError, NotImplementedError):
        return {}  # mistral-common's, which never makes special tokens of text
    return {"split_special_tokens": True}


def _require_split(
    tokenizer: Any, texts: Sequence[str], sources: Sequence[str], asked: dict[str, bool]
) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    # A special token of one character, such as CLIP's "!", is a word of its own right as well.
    special = {
        word: index for word, index in special_tokens(tokenizer).items() if index != unknown and len(word) > 1
    }
    pattern = any_of(list(special))
    for text, source in zip(texts, sources, strict=True):
        written = set(pattern.findall(text))
        if not written:
            continue
        ids = set(tokenizer(text, add_special_tokens=False, **asked)["input_ids"])
        kept = sorted(word for word in written if special[word] in ids)
        if kept:
            raise UserError(
                f"{source}: holds {', '.join(map(repr, kept))}, of which this tokenizer makes its special token even "
                "where it is text; leave it out, or allow it by parse_special_tokens"
            )
