"""Examples to tokens, and what is done with those that are too long."""

from collections.abc import Sequence
from typing import Any

from fastadapter.training.config import TRUNCATION, UserError
from fastadapter.training.data.chat import encode_conversations
from fastadapter.training.data.example import Encoded, Example
from fastadapter.training.data.tokens import tokenize


def encode_prompt(tokenizer: Any, prompt: str, *, parse_special_tokens: bool = False) -> list[int]:
    """Tokens of a prompt as the model sees it in ``generate``: with what the tokenizer puts in front."""
    ids = tokenize(tokenizer, [prompt], ["prompt"], parse_special_tokens=parse_special_tokens)[0]
    return _without_end(ids, _end(tokenizer))


def encode_examples(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    append_eos: bool = False,
    max_length: int | None = None,
    truncation: str = "error",
    parse_special_tokens: bool = False,
) -> list[Encoded]:
    """Tokens of prompts and completions, or of conversations.

    A prompt's tokens are those it has alone, for that is what ``generate`` continues. A completion's are
    those it has behind the prompt, unless a token would straddle the two; then it is tokenised alone. A
    prompt that is cut keeps its end, and the begin-of-sequence token where the tokenizer puts one.
    Conversations: see :func:`encode_conversations`.

    Args:
        append_eos: supervise an end-of-sequence token after each completion.
        max_length: most tokens of a prompt and its completion, or a conversation; ``None``: no limit.
        truncation: what becomes of an example that is longer. ``"error"``: it is refused; ``"prompt"``: the start of
            its prompt is cut, or of the conversation; ``"end"``: its end is cut.
        parse_special_tokens: special tokens that somebody wrote into a record are tokens; otherwise they are text.
    Raises: UserError: naming the record: it is too long, its prompt or completion has no token; or the
        tokenizer has no end-of-sequence token to append, or no chat template.
    """
    if truncation not in TRUNCATION:
        raise UserError(f"truncation must be one of {', '.join(TRUNCATION)}, got {truncation!r}")
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise UserError("append_eos: the tokenizer has no end-of-sequence token")
    if not examples:
        return []
    talks = [example for example in examples if example.messages is not None]
    if talks and len(talks) < len(examples):
        raise UserError("some examples are conversations and some are not")
    if talks:
        if append_eos:
            raise UserError(
                "append_eos is for completions; the chat template ends the turns of a conversation"
            )
        said = encode_conversations(tokenizer, talks, parse_special_tokens=parse_special_tokens)
        return [
            _fit_conversation(tokenizer, example, ids, trained, max_length, truncation)
            for example, (ids, trained) in zip(talks, said, strict=True)
        ]
    sources = [example.source for example in examples]
    how = {"parse_special_tokens": parse_special_tokens}
    starts = tokenize(tokenizer, [example.prompt for example in examples], sources, **how)
    boths = tokenize(tokenizer, [example.prompt + example.completion for example in examples], sources, **how)
    end = _end(tokenizer)
    starts, boths = ([_without_end(ids, end) for ids in rows] for rows in (starts, boths))
    apart = [
        at for at, (start, both) in enumerate(zip(starts, boths, strict=True)) if both[: len(start)] != start
    ]
    alone = tokenize(
        tokenizer,
        [examples[at].completion for at in apart],
        [sources[at] for at in apart],
        **how,
        add_special_tokens=False,
    )
    rests = [both[len(start) :] for start, both in zip(starts, boths, strict=True)]
    for at, ids in zip(apart, alone, strict=True):
        rests[at] = ids
    encoded = []
    for example, start, rest in zip(examples, starts, rests, strict=True):
        if not start:
            raise UserError(f"{example.source}: the prompt has no tokens")
        if not rest:
            raise UserError(f"{example.source}: the completion {example.completion!r} has no tokens")
        rest = [*rest, eos] if append_eos else rest
        encoded.append(_fit(tokenizer, example, start, rest, max_length, truncation))
    return encoded


def context_length(model: Any) -> int | None:
    """Positions the model has, where its configuration says so."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _fit(
    tokenizer: Any,
    example: Example,
    start: list[int],
    rest: list[int],
    max_length: int | None,
    truncation: str,
) -> Encoded:
    length = len(start) + len(rest)
    excess = length - max_length if max_length is not None else 0
    if excess <= 0:
        return Encoded((*start, *rest), len(start))
    head = 1 if start[0] == tokenizer.bos_token_id else 0
    if truncation == "prompt" and len(start) - excess > head:
        start = start[:head] + start[head + excess :]
    elif truncation == "end" and len(rest) > excess:
        rest = rest[: len(rest) - excess]
    else:
        _refuse(example, "prompt and completion have", length, max_length, truncation)
    return Encoded((*start, *rest), len(start))


def _fit_conversation(
    tokenizer: Any,
    example: Example,
    ids: list[int],
    trained: list[bool],
    max_length: int | None,
    truncation: str,
) -> Encoded:
    length = len(ids)
    excess = length - max_length if max_length is not None else 0
    if excess > 0:
        if truncation == "prompt":
            head = 1 if ids[0] == tokenizer.bos_token_id else 0
            ids, trained = ids[:head] + ids[head + excess :], trained[:head] + trained[head + excess :]
        else:
            ids, trained = ids[:max_length], trained[:max_length]
    trained[0] = False  # nothing stands before it that could predict it
    if not any(trained) or (excess > 0 and truncation == "error"):
        if excess <= 0:
            raise UserError(f"{example.source}: the assistant's turns have no tokens")
        _refuse(example, "the conversation has", length, max_length, truncation)
    last = max(at for at, flag in enumerate(trained) if flag)
    first = trained.index(True)
    given, at = [], first
    while at <= last:
        stop = next((place for place in range(at, last + 1) if trained[place] is not trained[at]), last + 1)
        if not trained[at]:
            given.append((at, stop))
        at = stop
    return Encoded(tuple(ids[: last + 1]), first, tuple(given))


def _refuse(example: Example, what: str, length: int, max_length: int | None, truncation: str) -> None:
    hints = {
        "error": "shorten it or set truncation",
        "prompt": "its completion alone fills that",
        "end": "its prompt alone fills that",
    }
    raise UserError(
        f"{example.source}: {what} {length} tokens, at most {max_length} fit; {hints[truncation]}"
    )


def _end(tokenizer: Any) -> int | None:
    """The end token with which some tokenizers close every text, and behind which there is nothing to continue."""
    eos, ids = tokenizer.eos_token_id, tokenizer("a")["input_ids"]
    return eos if ids and ids[-1] == eos and eos != tokenizer.bos_token_id else None


def _without_end(ids: Sequence[int], end: int | None) -> list[int]:
    ids = list(ids)
    if end is not None and ids and ids[-1] == end:
        ids.pop()
    return ids
