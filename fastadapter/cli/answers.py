"""Prompts to tokens, tokens to answers: a prompt word by word, or a batch whose rows may have adapters of their own."""

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastadapter.integrations.verbs.choose import rows
from fastadapter.training import UserError
from fastadapter.training.data import Message, context_length, encode_conversation, encode_prompt


@dataclass(frozen=True)
class Prompt:
    """What the model is given: the text, its tokens, the adapter by name (``None``: the bare model), and its origin."""

    source: str
    text: str
    ids: tuple[int, ...]
    adapter: str | None = None


class Answerer:
    """A model that answers prompts.

    Args:
        model, tokenizer: on their device, adapters loaded.
        options: arguments for ``generate``.
        stop: texts before which an answer ends.
        mixed: whether every prompt says which adapter it is for; otherwise the active one acts.
        seed: of the drawing.
        parse_special_tokens: special tokens that somebody wrote into a prompt are tokens; otherwise they are text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: dict[str, Any],
        *,
        stop: Sequence[str] = (),
        mixed: bool = False,
        seed: int = 0,
        parse_special_tokens: bool = False,
    ):
        self.model, self.tokenizer, self.stop, self.mixed, self.seed = (
            model,
            tokenizer,
            tuple(stop),
            mixed,
            seed,
        )
        self.parse_special_tokens = parse_special_tokens
        self.ends = _end_tokens(model, tokenizer)
        pad = next((each for each in (tokenizer.pad_token_id, *self.ends) if each is not None), 0)
        self.options = {**options, "pad_token_id": pad, "eos_token_id": self.ends or None}
        self.context = context_length(model)

    def encode(self, source: str, text: str, adapter: str | None = None) -> Prompt:
        """A prompt of plain text. Raises: UserError: it has no tokens, or too many."""
        how = {"parse_special_tokens": self.parse_special_tokens}
        ids = encode_prompt(self.tokenizer, text, **how)
        return self._fitting(Prompt(source, text, tuple(ids), adapter))

    def encode_chat(self, source: str, messages: Sequence[Message], adapter: str | None = None) -> Prompt:
        """A conversation, in the form that the tokenizer's chat template gives it, at the assistant's turn.

        Raises: UserError: the tokenizer has no template, or that refuses the messages; too many tokens.
        """
        if not self.tokenizer.chat_template:
            raise UserError(f"{source}: the model's tokenizer has no chat template")
        how = {"parse_special_tokens": self.parse_special_tokens}
        ids = encode_conversation(self.tokenizer, messages, source=source, **how)
        turns = [turn._asdict() for turn in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._fitting(Prompt(source, text, tuple(ids), adapter))

    def _fitting(self, prompt: Prompt) -> Prompt:
        if not prompt.ids:
            raise UserError(f"{prompt.source}: the prompt has no tokens")
        new = self.options["max_new_tokens"]
        if self.context is not None and len(prompt.ids) + new > self.context:
            raise UserError(
                f"{prompt.source}: the prompt has {len(prompt.ids)} tokens; with {new} new ones "
                f"(--max-new-tokens) that is more than the model's context of {self.context}"
            )
        return prompt

    def answer(
        self, batch: Sequence[Prompt], *, draw: int = 0, tell: Callable[[str], None] | None = None
    ) -> list[list[dict[str, Any]]]:
        """Records of the answers to each prompt of a batch.

        Args:
            draw: number of the draw: with one seed, batches of other numbers get other random numbers, so that a batch
                draws the same whether those before it were made now or earlier.
            tell: called with each piece of text as it is made; for one prompt with one answer, without beams.
        """
        width = max(len(prompt.ids) for prompt in batch)
        # Filled up with a token that each row has anyway: a penalty on tokens that occurred counts those of the
        # padding too.
        ids = [[prompt.ids[0]] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in batch]
        mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch]
        device = self.model.device
        options = dict(self.options)
        if tell is not None:
            options["streamer"] = _streamer(self.tokenizer, self.stop, tell)
        if self.stop:
            options["stopping_criteria"] = [_stopping(self.tokenizer, self.stop, width)]
        torch.manual_seed(random.Random(f"{self.seed}-{draw}").getrandbits(63))
        started = time.perf_counter()
        chosen = (
            rows(self.model, [each.adapter for each in batch]) if self.mixed else contextlib.nullcontext()
        )
        with chosen, torch.no_grad():
            output = self.model.generate(
                torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), **options
            )
        seconds = (time.perf_counter() - started) / len(output)
        new, each = output[:, width:].tolist(), len(output) // len(batch)
        return [
            [self._record(prompt, row, seconds) for row in new[number * each : (number + 1) * each]]
            for number, prompt in enumerate(batch)
        ]

    def _record(self, prompt: Prompt, new: list[int], seconds: float) -> dict[str, Any]:
        while len(new) > 1 and new[-1] == new[-2] == self.options["pad_token_id"]:
            new = new[:-1]  # a row that a stop text ended is filled up
        end = next((number for number, token in enumerate(new) if token in self.ends), None)
        count = len(new) if end is None else end + 1
        text, stopped = _before(self.tokenizer.decode(new[:count], skip_special_tokens=True), self.stop)
        reason = "stop" if stopped else "eos" if end is not None else "length"
        return {
            "prompt": prompt.text,
            **({"adapter": prompt.adapter} if self.mixed else {}),
            "completion": text,
            "finish_reason": reason,
            "prompt_tokens": len(prompt.ids),
            "new_tokens": count,
            "seconds": seconds,
        }

    @property
    def streams(self) -> bool:
        """Whether the text of a single prompt can be shown as it is made."""
        return self.options["num_beams"] == self.options["num_return_sequences"] == 1


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model's own (of a chat model there may be several) and the tokenizer's."""
    own = model.generation_config.eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(each for each in found if each is not None))


def _before(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop texts, and whether there is one."""
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _stopping(tokenizer: Any, stop: Sequence[str], start: int) -> Any:
    """Ends a row whose tokens from ``start`` on hold a stop text.

    By decoding: transformers' own criterion fails on vocabularies without plain letters.
    """
    from transformers import StoppingCriteria

    # a character may take four tokens, one of which at least is new
    window = 4 * max(map(len, stop)) + 8

    class StopTexts(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
            ends = input_ids[:, max(start, input_ids.shape[1] - window) :]
            texts = tokenizer.batch_decode(ends, skip_special_tokens=True)
            return torch.tensor([_before(text, stop)[1] for text in texts], device=input_ids.device)

    return StopTexts()


def _streamer(tokenizer: Any, stop: Sequence[str], tell: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Holds back what may turn out to be the beginning of a stop text."""

        held, over = "", False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text, stopped = _before(self.held + text, stop)
            if self.over:
                return
            keep = 0 if stopped or stream_end else _possible_start(text, stop)
            self.held, self.over = text[len(text) - keep :], stopped
            tell(text[: len(text) - keep])

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _possible_start(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a stop text begins with."""
    lengths = [n for each in stop for n in range(1, min(len(each), len(text) + 1)) if text.endswith(each[:n])]
    return max(lengths, default=0)
