"""Soft prompts in a decoder: their keys and values of every layer, computed once for a whole batch.

A decoder's prompt sees nothing behind itself, so what stands before a text can be run through the model apart from it:
the text then attends to the prompt's keys and values as to a prefix. That is the model on the joined embeddings, up to
rounding, for ``prompt_len`` positions instead of ``batch * prompt_len``, with caches, masks, labels and logits as they
were. With rotary embeddings the prompt stands at the positions before 0; a model with learned positions gets the
prompt at 0 and the text behind it. A sliding window never cuts the prompt off.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.attention import PROMPTS
from fastadapter.integrations.passes.frozen import say_if_frozen
from fastadapter.integrations.passes.host import Host, State
from fastadapter.integrations.passes.prefix import PromptRun
from fastadapter.nn import SoftPrompt


class PromptHost(Host):
    """The soft prompts of one model.

    ``context``: how many tokens the model has positions for; ``None``: any number.
    """

    CHILD: ClassVar[str] = "fa_prompt"
    GROUPED: ClassVar[bool] = False

    def __init__(self, state: State, context: int | None):
        super().__init__(state)
        self.context = context

    def kind(self, adapter: nn.Module) -> Any:
        return id(adapter)

    def acting(self) -> list[str]:
        rows = self.state.rows
        names = (self.state.active,) if rows is None else dict.fromkeys(rows)
        say_if_frozen(self, names)
        return [name for name in names if name is not None and name in self.adapters]

    def check_length(self, name: str, q_len: int) -> None:
        length = len(self.adapter(name).prompt)
        if self.context is not None and q_len + length > self.context:
            raise ValueError(
                f"a soft prompt of {length} and an input of {q_len} tokens are more than the model's context of "
                f"{self.context}"
            )

    def lengths(self, batch: int) -> tuple[int, ...]:
        """How long the prompt of each row is; of one entry where one prompt acts on all."""
        rows = self.state.row_names(batch) or (self.active,)
        own = {name: len(self.adapter(name).prompt) for name in self.adapters}
        return tuple(0 if name is None else own.get(name, 0) for name in rows)

    def moved_by(self, lengths: tuple[int, ...], device: torch.device) -> Any:
        """How far the prompt moves each row's positions: a number for all, or ``(batch, 1)``."""
        return lengths[0] if len(lengths) == 1 else self.state.tensor(lengths, torch.int64, device)[:, None]


class SoftPromptHost(PromptHost):
    """The soft prompts of one decoder."""

    def __init__(self, state: State, learned_positions: bool, context: int | None):
        super().__init__(state, context)
        self.learned_positions = learned_positions
        self._sources: list[Tensor] = []

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_pre_hook(_provide, with_kwargs=True)]

    def run(self, decoder: nn.Module, name: str) -> PromptRun:
        """Keys and values of one prompt; kept between calls that cannot need a gradient."""
        if not self._sources:
            own = {id(parameter) for parameter in self.parameters()}
            self._sources = [each for each in decoder.parameters() if id(each) not in own]
        sources = [self.adapter(name).prompt, *self._sources]
        return self.keep(name, sources, lambda: self._run(decoder, name))

    def _run(self, decoder: nn.Module, name: str) -> PromptRun:
        adapter: SoftPrompt = self.adapter(name)
        dtype = decoder.get_input_embeddings().weight.dtype
        rows = adapter(dtype)
        length = rows.shape[1]
        first = 0 if self.learned_positions else -length
        positions = torch.arange(first, first + length, device=rows.device)[None]
        found = PromptRun(collecting=name)
        with self.state.only(None), _without_checkpointing(decoder):
            decoder(inputs_embeds=rows, position_ids=positions, use_cache=False, **{PROMPTS: found})
        return found

    def forget(self) -> None:
        super().forget()
        self._sources = []


def _provide(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Hand the acting prompts' keys and values down to the decoder's attention."""
    host = decoder._modules.get(SoftPromptHost.CHILD)
    if host is None or PROMPTS in kwargs or host.idle():
        return None
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, q_len = inputs.shape[:2]
    run = PromptRun()
    for name in host.acting():
        host.check_length(name, q_len)
        run.found |= host.run(decoder, name).found
    kwargs = {**kwargs, PROMPTS: run}
    if host.learned_positions:
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            start = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(q_len, device=inputs.device)[None] + start
        kwargs["position_ids"] = positions + host.moved_by(host.lengths(batch), inputs.device)
    return args, kwargs


@contextlib.contextmanager
def _without_checkpointing(decoder: nn.Module) -> Iterator[None]:
    """The pass of a prompt is short, and what it leaves in passing would be lost with its layers' activations."""
    changed: list[Any] = [
        module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    for module in changed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in changed:
            module.gradient_checkpointing = True
