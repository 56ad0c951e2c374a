"""``fastadapter generate --chat``: turns of a conversation, typed or piped in, each answered as it is made."""

import sys
from collections.abc import Iterator
from typing import Any

from fastadapter.cli.answers import Answerer
from fastadapter.cli.records import RecordFile, line, show
from fastadapter.cli.texts import read_stdin, require_text
from fastadapter.training import UserError
from fastadapter.training.data import Message

EXIT, RESET = "/exit", "/reset"


def converse(answerer: Answerer, system_prompt: str | None, output: RecordFile | None, as_json: bool) -> None:
    """Answer turn after turn until the input ends or says ``/exit``; ``/reset`` forgets what was said.

    Raises: UserError: the tokenizer has no chat template; a turn that does not fit, unless somebody types, who is told.
    """
    start = [Message("system", system_prompt)] if system_prompt else []
    # a template that is missing or refuses a system prompt is no matter of any turn
    answerer.encode_chat("--chat", [*start, Message("user", "?")])
    messages = list(start)
    typed = _somebody_types()
    for number, (source, text) in enumerate(_typed() if typed else read_stdin()):
        if text.strip() == EXIT:
            break
        if text.strip() == RESET:
            messages = list(start)
            continue
        try:
            prompt = answerer.encode_chat(source, [*messages, Message("user", text)])
        except UserError as error:
            if not typed:
                raise
            print(f"fastadapter: {error}; {RESET} starts anew", file=sys.stderr)
            continue
        quiet = output is not None or as_json
        tell = show if answerer.streams and not quiet else None
        ((answer, *_),) = answerer.answer([prompt], draw=number, tell=tell)
        if output is not None:
            output.write([answer])
        elif as_json:
            show(line(answer))
        else:
            show("\n" if tell else f"{answer['completion']}\n")
        messages += [Message("user", text), Message("assistant", answer["completion"])]


def _somebody_types() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _typed() -> Iterator[tuple[str, str]]:
    # lets lines be edited and recalled
    try:
        import readline  # noqa: F401
    except ImportError:
        pass
    print(f"{EXIT} ends, {RESET} starts anew", file=sys.stderr)
    number: Any = 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        number += 1
        if text.strip():
            yield f"turn {number}", require_text(f"turn {number}", text)
