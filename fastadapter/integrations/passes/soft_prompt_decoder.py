"""Soft prompts in a decoder: what the model gives on joined embeddings, ``[prompt; text]``, in one of two ways.

Apart: a decoder's prompt sees nothing behind itself, so where layers mix tokens by attention alone it can be run
through the model by itself: the text then attends to the prompt's keys and values as to a prefix, for ``prompt_len``
positions instead of ``batch * prompt_len``, with caches, masks and logits as they were. :func:`difference` proves at
attach that it is the same.

Joined: the model itself runs the joined embeddings, and its cache holds the prompt. For layers that carry a state from
token to token, windows, rotary factors that depend on the length, and parameters that are sharded. And for training
steps on a GPU in which the prompts of all rows take less time than Python needs for a pass of its own.

With rotary embeddings the prompt stands at the positions before 0; a model with learned positions gets the prompt at 0
and the text behind it.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.attention import PROMPTS
from fastadapter.integrations.passes.choice import State, left_behind
from fastadapter.integrations.passes.dtypes import autocast_dtype
from fastadapter.integrations.passes.packed import PACKED
from fastadapter.integrations.passes.prefix import PromptRun
from fastadapter.integrations.passes.soft_prompt import Joined, PromptHost, cut_off, joined_mask, wants_tuple
from fastadapter.integrations.passes.training import evaluating
from fastadapter.nn import SoftPrompt

_CACHES = ("cache", "past_key_values")
# Arguments that say where a row's tokens stand.
_PLACES = ("attention_mask", "position_ids", "cu_seq_lens_q", PACKED)
# Devices that wait for Python in a pass of a prompt alone, and that pass in operations a block: forward and backward
# cost Python a millisecond and more, in which a current card does so many.
WAITING_DEVICES = {"cuda"}
OPERATIONS_OF_PYTHON = 4e11
# On a cache: the prompts that stand in front of its rows, so that they are not taken for text, or for others.
_MARK = "fa_prompts_in_front"


class SoftPromptHost(PromptHost):
    """The soft prompts of one decoder.

    ``apart``: how a prompt is run where the parameters are not sharded.
    """

    CHILD: ClassVar[str] = "fa_prompt"

    def __init__(self, state: State, learned_positions: bool, context: int | None, apart: bool):
        super().__init__(state, context)
        self.learned_positions = learned_positions
        self.apart = apart
        self._parameters_of_forward: tuple[str, ...] = ()
        self._block_size: float | None = None

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        self._parameters_of_forward = tuple(inspect.signature(module.forward).parameters)
        return [
            module.register_forward_pre_hook(_enter, with_kwargs=True),
            # also after an error, so that no prompt of a failed pass is left to the next one
            module.register_forward_hook(_leave, always_call=True),
        ]

    def enter(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = self._parameters_of_forward[: len(args)]
        arguments = {**dict(zip(given, args, strict=False)), **kwargs}
        inputs = (
            arguments.get("input_ids")
            if arguments.get("inputs_embeds") is None
            else arguments["inputs_embeds"]
        )
        if inputs is None:
            return None  # the model says what is missing
        batch, q_len = inputs.shape[:2]
        lengths = self.lengths(batch)
        cache = next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)
        self._check_lengths(q_len, arguments.get("position_ids"))
        beside = self.apart and not getattr(decoder, "_is_fsdp_managed_module", False)
        if beside and not self._is_quicker_joined(decoder, batch, lengths, cache, inputs.device, arguments):
            return args, self._beside(decoder, batch, q_len, lengths, cache, inputs.device, kwargs)
        start = 0 if cache is None else int(cache.get_seq_length())
        if start == 0:
            self._join(decoder, batch, q_len, lengths, cache, arguments)
        else:
            self._go_on(batch, q_len, start, lengths, cache, inputs.device, arguments)
        arguments[PROMPTS] = PromptRun(joined=True)
        return (), arguments

    def _check_lengths(self, q_len: int, positions: Tensor | None) -> None:
        if positions is None:
            for name in self.acting():
                self.check_length(name, q_len)
            return
        longest = max((len(self.adapter(name).prompt) for name in self.acting()), default=0)
        if self.context is None or torch.compiler.is_compiling():
            return
        # Columns say nothing of a packed row, and looking at positions waits for a GPU: only where there may be
        # too many.
        if q_len + longest <= self.context and not (
            self.learned_positions and positions.device.type == "cpu"
        ):
            return
        last = int(positions.max()) + longest
        if last >= self.context:
            raise ValueError(
                f"position_ids behind a soft prompt of {longest} reach {last}, the model has positions below "
                f"{self.context}"
            )

    def _is_quicker_joined(
        self,
        decoder: Any,
        batch: int,
        lengths: tuple[int, ...],
        cache: Any,
        device: torch.device,
        arguments: dict[str, Any],
    ) -> bool:
        """Whether a step that trains a prompt takes less time with the prompt in front of every row.

        Only where nothing says where the text's tokens stand, and where the cache, which would hold the prompts, is
        not asked for.
        """
        if device.type not in WAITING_DEVICES or not torch.is_grad_enabled() or cache is not None:
            return False
        if torch.compiler.is_compiling():  # a graph does not wait for Python
            return False
        if not any(self.adapter(name).prompt.requires_grad for name in self.acting()):
            return False
        use_cache = arguments.get("use_cache")
        if getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache:
            return False
        if any(arguments.get(name) is not None for name in _PLACES):
            return False
        # four operations a parameter and token: forward, and backward to the input
        operations = 4 * self._parameters_of_block(decoder) * batch * max(lengths)
        return operations < OPERATIONS_OF_PYTHON

    def _parameters_of_block(self, decoder: Any) -> float:
        if self._block_size is None:
            words = decoder.get_input_embeddings().weight.numel()
            every = sum(parameter.numel() for parameter in decoder.parameters())
            self._block_size = (every - words) / max(1, decoder.config.num_hidden_layers)
        return self._block_size

    # apart

    def _beside(
        self,
        decoder: Any,
        batch: int,
        q_len: int,
        lengths: tuple[int, ...],
        cache: Any,
        device: torch.device,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The model's arguments with keys and values of the prompts for its attention."""
        run = PromptRun()
        for name in self.acting():
            run.found |= self._run_of(decoder, name).found
        kwargs = {**kwargs, PROMPTS: run}
        if self.learned_positions:
            positions = kwargs.get("position_ids")
            if positions is None:
                start = 0 if cache is None else cache.get_seq_length()
                positions = torch.arange(q_len, device=device)[None] + start
            kwargs["position_ids"] = positions + self.moved_by(lengths, device)
        return kwargs

    def _run_of(self, decoder: Any, name: str) -> PromptRun:
        """Keys and values of one prompt; kept between calls that cannot need a gradient."""
        key = (name, autocast_dtype(self.adapter(name).prompt.device))
        return self.keep(key, lambda: [self.adapter(name), decoder], lambda: self._run_apart(decoder, name))

    def _run_apart(self, decoder: Any, name: str) -> PromptRun:
        adapter: SoftPrompt = self.adapter(name)
        rows = adapter(decoder.get_input_embeddings().weight.dtype)
        length = rows.shape[1]
        first = 0 if self.learned_positions else -length
        positions = torch.arange(first, first + length, device=rows.device)[None]
        found = PromptRun(collecting=name)
        with self.state.only(None), _without_checkpointing(decoder):
            decoder(inputs_embeds=rows, position_ids=positions, use_cache=False, **{PROMPTS: found})
        return found

    # joined

    def _join(
        self,
        decoder: Any,
        batch: int,
        q_len: int,
        lengths: tuple[int, ...],
        cache: Any,
        arguments: dict[str, Any],
    ) -> None:
        """Put the prompts in front of the text, in ``arguments``."""
        ids, words = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        if words is None:
            words = decoder.get_input_embeddings()(ids)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        _require_plain(mask, positions, arguments)
        prompts = self.rows_of_prompts(lengths, words)
        width = prompts.shape[1]
        room = _room(cache)
        if room is not None and width + q_len > room:
            raise ValueError(
                f"a soft prompt of {width} and {q_len} tokens do not fit into a static cache of {room}: this model's "
                "prompts stand in the cache, make it longer by prompt_len"
            )
        order = _order(mask, width)
        if positions is not None or not self.learned_positions or min(lengths) < width:
            numbers = self._joined_positions(q_len, lengths, positions, words.device)
            arguments["position_ids"] = _ordered(numbers, order)
        arguments["attention_mask"] = _ordered(joined_mask(mask, lengths, batch, q_len, words.device), order)
        if arguments.get("token_type_ids") is not None:
            types = nn.functional.pad(arguments["token_type_ids"], (width, 0))
            arguments["token_type_ids"] = _ordered(types, order)
        arguments.pop("cache_position", None)  # the model counts anew
        arguments["inputs_embeds"] = _ordered(torch.cat([prompts, words], dim=1), order)
        as_tuple = wants_tuple(decoder, arguments)
        if cache is not None:
            setattr(cache, _MARK, (self.key, self.choice, lengths))
        left_behind()[self.key, "run"] = Joined(prompts, as_tuple)

    def _joined_positions(
        self, q_len: int, lengths: tuple[int, ...], positions: Tensor | None, device: torch.device
    ) -> Tensor:
        """``(1 or batch, width + q_len)``."""
        width = max(lengths)
        text = torch.arange(q_len, device=device)[None] if positions is None else torch.atleast_2d(positions)
        prompt = torch.arange(width, device=device)[None] - width
        if self.learned_positions:
            moved_by = self.moved_by(lengths, device)
            text, prompt = text + moved_by, (prompt + moved_by).clamp(min=0)
        count = max(len(text), len(prompt))
        return torch.cat([prompt.expand(count, -1), text.expand(count, -1)], dim=1)

    def _go_on(
        self,
        batch: int,
        q_len: int,
        start: int,
        lengths: tuple[int, ...],
        cache: Any,
        device: torch.device,
        arguments: dict[str, Any],
    ) -> None:
        """Behind a cache that holds the prompts: what counts its tokens counts them too."""
        width = max(lengths)
        if getattr(cache, _MARK, None) != (self.key, self.choice, lengths):
            raise ValueError(
                "cache: it was not begun with these soft prompts, which stand in front of its tokens in this model"
            )
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        _require_plain(mask, None, arguments)
        if mask is not None and mask.shape[1] != start - width + q_len:
            raise ValueError(
                f"attention_mask must have {start - width + q_len} columns behind this cache, got {mask.shape[1]}"
            )
        if positions is None and (not self.learned_positions or min(lengths) < width):
            positions = torch.arange(start - width, start - width + q_len, device=device)[None]
        if positions is not None:
            moved_by = self.moved_by(lengths, device) if self.learned_positions else 0
            arguments["position_ids"] = positions + moved_by
        seen = start - width + q_len
        arguments["attention_mask"] = _ordered(
            joined_mask(mask, lengths, batch, seen, device), _order(mask, width)
        )
        arguments.pop("cache_position", None)


def _enter(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    host = decoder._modules.get(SoftPromptHost.CHILD)
    if not isinstance(host, SoftPromptHost) or PROMPTS in kwargs or host.idle():
        return None
    return host.enter(decoder, args, kwargs)


def _leave(decoder: nn.Module, args: tuple, output: Any) -> Any:
    host = decoder._modules.get(SoftPromptHost.CHILD)
    run = left_behind().pop((host.key, "run"), None) if isinstance(host, SoftPromptHost) else None
    if run is None or output is None:
        return None
    output.last_hidden_state = output.last_hidden_state[:, run.width :].contiguous()
    return cut_off(output, run)


def _require_plain(mask: Any, positions: Tensor | None, arguments: dict[str, Any]) -> None:
    """Raises: ValueError: what was given says where prompts would have to go, which is not known here."""
    if mask is not None and (not torch.is_tensor(mask) or mask.dim() != 2):
        found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(
            "attention_mask must be (batch, tokens) under a soft prompt that this model runs with the text, got "
            f"{found}"
        )
    packed = arguments.get("cu_seq_lens_q") is not None
    if positions is not None and positions.shape[-1] > 1 and not torch.compiler.is_compiling():
        back = torch.atleast_2d(positions)[:, 1:] < torch.atleast_2d(positions)[:, :-1]
        if mask is not None:  # padding has positions too
            back = back & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        packed = packed or bool(back.any())
    if packed:
        raise ValueError(
            "position_ids: a row of several packed texts has no place for a soft prompt in front of each in a model "
            "that runs prompts with the text"
        )


def _order(mask: Tensor | None, width: int) -> Tensor | None:
    """Which column of ``[prompt; padding; text]`` stands where in ``[padding; prompt; text]``, ``(batch, columns)``.

    Behind the padding, so that a row is what it is alone: windows and layers with a state count columns. What is cut
    off in front afterwards is as long, and the text stays where it is.
    """
    if mask is None:
        return None
    padding = (mask != 0).long().cumsum(1).eq(0).sum(1, keepdim=True)
    columns = torch.arange(width + mask.shape[1], device=mask.device)[None]
    moved = torch.where(columns < padding, columns + width, columns - padding)
    return torch.where(columns < padding + width, moved, columns)


def _ordered(tensor: Tensor | None, order: Tensor | None) -> Tensor | None:
    if tensor is None or order is None:
        return tensor
    rows = tensor.expand(len(order), *tensor.shape[1:])
    index = order.view(*order.shape, *[1] * (tensor.dim() - 2))
    return rows.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def _room(cache: Any) -> int | None:
    """How many tokens a static cache has places for; ``None``: any number."""
    layers = getattr(cache, "layers", None) or []
    sizes = [
        layer.max_cache_len
        for layer in layers
        if hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False)
    ]
    return min(sizes) if sizes else None


@torch.no_grad()
def difference(decoder: Any, name: str) -> tuple[float, float]:
    """How far the prompt of ``name`` is from the model on joined embeddings, on two short texts, and how far it may be.

    The reference is written out here: embeddings and positions by hand. Also behind padding, where that changes nothing
    in the model itself.
    """
    host: SoftPromptHost = decoder._modules[SoftPromptHost.CHILD]
    embeddings = decoder.get_input_embeddings()
    device = embeddings.weight.device
    prompt = host.adapter(name)(embeddings.weight.dtype)
    width = prompt.shape[1]
    length = max(1, min(6, (host.context or 64) - width - 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.weight.shape[0], (2, length), generator=generator, device="cpu").to(device)
    padded = {
        "input_ids": nn.functional.pad(ids, (2, 0)),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (2, 0)),
    }
    words = embeddings(ids)
    joined = {"inputs_embeds": torch.cat([prompt.to(words.dtype).expand(2, -1, -1), words], dim=1)}
    if not host.learned_positions:
        joined["position_ids"] = torch.arange(-width, length, device=device).expand(2, -1)

    def run(**arguments: Any) -> Tensor:
        return decoder(**arguments, use_cache=False).last_hidden_state[:, -length:].float()

    with evaluating(decoder), torch.autocast(device.type, enabled=False):
        with host.state.only(None):
            expected, base, base_padded = run(**joined), run(input_ids=ids), run(**padded)
        # half types resolve so little that 64 roundings would let anything pass
        roundings = 64 if words.dtype in (torch.float32, torch.float64) else 16
        allowed = roundings * torch.finfo(words.dtype).eps * expected.abs().max().item()
        with host.state.only(name):
            found = [run(input_ids=ids)]
            if (base_padded - base).abs().max().item() <= allowed:
                found.append(run(**padded))
    return (torch.stack(found) - expected).abs().max().item(), allowed  # NaN stays NaN


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
