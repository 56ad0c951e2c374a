"""Soft prompts in an encoder: one run of prompt and text together.

An encoder's prompt sees the text behind it, so unlike a decoder's it cannot be run apart. The prompts of a batch go in
front of its rows where the blocks begin and are cut off where they end: what reads the encoder's output (a pooler, a
head, the caller) sees the text alone, at its own length.

    texts    h = blocks(norm([prompt; words] + types + positions))[prompt_len:]    the prompt has the first positions
    images   h = blocks([prompt; [CLS]; patches])[prompt_len:]                     behind the embeddings' positions

Rows whose prompts differ in length share a batch: shorter prompts are filled up in front, ``[filler; prompt; text]``,
the filler is masked, and each row counts its positions from its own prompt.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.choice import State, left_behind
from fastadapter.integrations.passes.soft_prompt import Joined, PromptHost, cut_off, joined_mask, wants_tuple


class EncoderPromptHost(PromptHost):
    """The soft prompts of one encoder; a child of the model around its embeddings and blocks.

    Hooks are methods of the host: a copy of the model gets hooks of its own host.
    """

    def __init__(self, state: State, context: int | None):
        super().__init__(state, context)
        self._parameters_of_forward: tuple[str, ...] = ()

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        self._parameters_of_forward = tuple(inspect.signature(module.forward).parameters)
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            *self.inner_hooks(module),
            # also after an error, so that no prompt of a failed pass is left to the next one
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def inner_hooks(self, encoder: Any) -> list[RemovableHandle]:
        """Register what cuts the prompts off behind the blocks, and what puts them in front if ``prepare`` cannot."""
        raise NotImplementedError

    def prepare(self, encoder: Any, arguments: dict[str, Any]) -> Tensor | None:
        """Make the model's ``arguments`` those of the joined run, in place; the prompts of every row.

        ``None``: the arguments are wrong, and the model itself says how.
        """
        raise NotImplementedError

    def _enter(self, encoder: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = self._parameters_of_forward[: len(args)]
        if self.idle() or len(given) < len(args) or any(name in kwargs for name in given):
            return None
        arguments = {**dict(zip(given, args, strict=True)), **kwargs}
        prompts = self.prepare(encoder, arguments)
        if prompts is None:
            return None
        as_tuple = wants_tuple(encoder, arguments)
        left_behind()[self.key, "run"] = Joined(prompts, as_tuple)
        return (), arguments

    @property
    def _run(self) -> Joined | None:
        """The pass under way in this thread."""
        return left_behind().get((self.key, "run"))

    def _leave(self, encoder: nn.Module, args: tuple, output: Any) -> Any:
        run = left_behind().pop((self.key, "run"), None)
        return None if run is None or output is None else cut_off(output, run)


class TextPromptHost(EncoderPromptHost):
    """Prompts among the word embeddings of a model with learned positions.

    Args:
        context: how many positions there are for tokens.
        padding: in a family whose positions start behind the padding token's id, that id.
    """

    def __init__(self, state: State, context: int, padding: int | None):
        super().__init__(state, context)
        self.padding = padding
        self.first = 0 if padding is None else padding + 1

    def inner_hooks(self, encoder: Any) -> list[RemovableHandle]:
        return [FAMILIES[encoder.config.model_type].end(encoder).register_forward_hook(self._cut_off)]

    def _cut_off(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._run is None:
            return None
        output.last_hidden_state = output.last_hidden_state[:, self._run.width :].contiguous()
        return output

    def prepare(self, encoder: Any, arguments: dict[str, Any]) -> Tensor | None:
        ids, words = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        given = ids if words is None else words
        if given is None or (ids is not None and words is not None):
            arguments |= {"input_ids": ids, "inputs_embeds": words}
            return None
        batch, text_len = given.shape[:2]
        lengths = self.lengths(batch)
        for name in self.acting():
            self.check_length(name, text_len)
        mask = joined_mask(arguments.get("attention_mask"), lengths, batch, text_len, given.device)
        positions = self._positions(encoder, ids, words, lengths, arguments.get("position_ids"))
        if words is None:
            words = encoder.get_input_embeddings()(ids)
        prompts = self.rows_of_prompts(lengths, words)
        arguments |= {
            "inputs_embeds": torch.cat([prompts, words], dim=1),
            "attention_mask": mask,
            "position_ids": positions,
        }
        if arguments.get("token_type_ids") is not None:
            types = arguments["token_type_ids"]
            arguments["token_type_ids"] = nn.functional.pad(types, (prompts.shape[1], 0))
        return prompts

    def _positions(
        self,
        encoder: Any,
        ids: Tensor | None,
        words: Tensor | None,
        lengths: tuple[int, ...],
        given: Tensor | None,
    ) -> Tensor:
        """Position numbers of prompt and text, ``(1 or batch, width + text_len)``."""
        device = (ids if words is None else words).device  # type: ignore[union-attr]
        if given is not None:
            own = torch.atleast_2d(given)
        elif self.padding is None:
            length = (ids if words is None else words).shape[1]  # type: ignore[union-attr]
            own = torch.arange(length, device=device)[None]
        elif words is None:
            own = encoder.embeddings.create_position_ids_from_input_ids(ids, self.padding)
        else:
            own = encoder.embeddings.create_position_ids_from_inputs_embeds(words, self.padding)
        width, moved_by = max(lengths), self.moved_by(lengths, device)
        text = own + moved_by
        if self.padding is not None:
            text = torch.where(own == self.padding, own, text)
        if given is not None and not torch.compiler.is_compiling():
            last, end = int(text.max()), self.first + (self.context or 0)
            if last >= end:
                raise ValueError(
                    f"position_ids behind a soft prompt of {width} reach {last}, the model has positions below {end}"
                )
        prompt = self.first + (torch.arange(width, device=device)[None] - width + moved_by).clamp(min=0)
        rows = max(len(text), len(prompt))
        return torch.cat([prompt.expand(rows, -1), text.expand(rows, -1)], dim=1)


class ImagePromptHost(EncoderPromptHost):
    """Prompts among the embedded patches of an image (the shallow form of Visual Prompt Tuning, arXiv:2203.12119)."""

    def inner_hooks(self, encoder: Any) -> list[RemovableHandle]:
        return [
            encoder.embeddings.register_forward_hook(self._join),
            FAMILIES[encoder.config.model_type].end(encoder).register_forward_pre_hook(self._cut_off),
        ]

    def _join(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._run is None else torch.cat([self._run.prompts.to(output.dtype), output], dim=1)

    def _cut_off(self, module: nn.Module, args: tuple) -> tuple | None:
        return None if self._run is None else (args[0][:, self._run.width :].contiguous(), *args[1:])

    def prepare(self, encoder: Any, arguments: dict[str, Any]) -> Tensor | None:
        images = arguments.get("pixel_values")
        if images is None:
            return None
        projection = encoder.embeddings.patch_embeddings.projection
        sides = [size // step for size, step in zip(images.shape[-2:], projection.stride, strict=True)]
        batch, text_len = images.shape[0], 1 + sides[0] * sides[1]  # [CLS] and the patches
        lengths = self.lengths(batch)
        mask = joined_mask(arguments.get("attention_mask"), lengths, batch, text_len, images.device)
        if mask is not None:
            if "attention_mask" not in self._parameters_of_forward:
                raise TypeError(
                    f"{type(encoder).__name__} of this transformers takes no attention_mask, so rows with soft prompts "
                    "of other lengths cannot share a batch"
                )
            arguments["attention_mask"] = mask
        weight = projection.weight
        return self.rows_of_prompts(lengths, weight.new_empty(batch, 0, encoder.config.hidden_size))


class Family(NamedTuple):
    """Where prompts go into the models of a family, by paths within the one around embeddings and blocks.

    Attributes:
        host: how.
        blocks: the list of blocks.
        end_path: the module that the run ends with (texts), or the first behind the blocks (images).
        from_padding: positions start behind the padding token's id.
    """

    host: type[EncoderPromptHost]
    blocks: str
    end_path: str
    from_padding: bool = False

    def end(self, encoder: nn.Module) -> nn.Module:
        return encoder.get_submodule(self.end_path)


# by the model type of the configuration
FAMILIES = {
    "bert": Family(TextPromptHost, "encoder.layer", "encoder"),
    **dict.fromkeys(
        ("roberta", "xlm-roberta"), Family(TextPromptHost, "encoder.layer", "encoder", from_padding=True)
    ),
    "distilbert": Family(TextPromptHost, "transformer.layer", "transformer"),
    "vit": Family(ImagePromptHost, "layers", "layernorm"),
}


class Site(NamedTuple):
    """Where the soft prompts of a model go."""

    path: str
    encoder: Any
    host: type[EncoderPromptHost]
    make: Callable[[State], EncoderPromptHost]
    context: int | None


def encoder_of(model: nn.Module, stack: str) -> Site:
    """The encoder around the list of blocks at ``stack``.

    Raises: TypeError: it is none that is known.
    """
    for kind, family in FAMILIES.items():
        path = stack.removesuffix(family.blocks).rstrip(".")
        if stack != f"{path}.{family.blocks}".lstrip("."):
            continue
        encoder: Any = model.get_submodule(path)
        if getattr(getattr(encoder, "config", None), "model_type", None) != kind:
            continue
        if family.host is ImagePromptHost:
            return Site(path, encoder, family.host, functools.partial(family.host, context=None), None)
        positions = encoder.embeddings.position_embeddings.num_embeddings
        padding = encoder.embeddings.padding_idx if family.from_padding else None
        context = positions - (0 if padding is None else padding + 1)
        make = functools.partial(TextPromptHost, context=context, padding=padding)
        return Site(path, encoder, family.host, make, context)
    raise TypeError(
        f"{type(model).__name__} is an encoder in which no place for a soft prompt is known, only in "
        f"{', '.join(FAMILIES)}"
    )
