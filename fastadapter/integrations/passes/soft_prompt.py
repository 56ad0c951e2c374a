"""What soft prompts of encoders and decoders have in common: lengths, rows and masks with prompts in front."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastadapter.integrations.passes.choice import State
from fastadapter.integrations.passes.frozen import say_if_frozen
from fastadapter.integrations.passes.host import Host


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
        names = self.choice.names()
        say_if_frozen(self, names)
        return [name for name in names if name in self.adapters]

    def check_length(self, name: str, q_len: int) -> None:
        length = len(self.adapter(name).prompt)
        if self.context is not None and q_len + length > self.context:
            raise ValueError(
                f"a soft prompt of {length} and an input of {q_len} tokens are more than the model's context of "
                f"{self.context}"
            )

    def lengths(self, batch: int) -> tuple[int, ...]:
        """How long the prompt of each row is; of one entry where one prompt acts on all."""
        choice = self.choice
        rows = choice.row_names(batch) or (choice.active,)
        own = {name: len(self.adapter(name).prompt) for name in self.adapters}
        return tuple(0 if name is None else own.get(name, 0) for name in rows)

    def moved_by(self, lengths: tuple[int, ...], device: torch.device) -> Any:
        """How far the prompt moves each row's positions: a number for all, or ``(batch, 1)``."""
        return lengths[0] if len(lengths) == 1 else self.state.tensor(lengths, torch.int64, device)[:, None]

    def rows_of_prompts(self, lengths: tuple[int, ...], like: Tensor) -> Tensor:
        """The prompt of every row, filled up in front, ``(batch, max(lengths), hidden_size)``.

        Args:
            like: ``(batch, seq, hidden_size)``, for dtype and device.
        """
        batch, _, hidden_size = like.shape
        names = self.choice.row_names(batch)
        if names is None:
            [only] = self.acting()
            return self.adapter(only)(like.dtype).expand(batch, -1, -1)
        width = max(lengths)
        made: dict[str | None, Tensor] = {}
        for name, length in zip(names, lengths, strict=True):
            if name in made:
                continue
            filler = like.new_zeros(width - length, hidden_size)
            own = self.adapters[name] if name is not None and length else None
            made[name] = filler if own is None else torch.cat([filler, own(like.dtype)[0]])
        return torch.stack([made[name] for name in names])


class Joined(NamedTuple):
    """One forward pass under way with prompts in front of its rows.

    ``prompts (batch, width, hidden_size)``; the caller wants a tuple if ``as_tuple``.
    """

    prompts: Tensor
    as_tuple: bool

    @property
    def width(self) -> int:
        return self.prompts.shape[1]


def wants_tuple(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether the caller wants a tuple; ``arguments`` then ask for names, until the prompts are cut off."""
    wanted = arguments.pop("return_dict", None)
    arguments["return_dict"] = True
    return not (getattr(model.config, "return_dict", True) if wanted is None else wanted)


def cut_off(output: Any, run: Joined) -> Any:
    """A model's output without the prompts; ``last_hidden_state`` has lost them already."""
    width, text_len = run.width, output.last_hidden_state.shape[1]
    if getattr(output, "hidden_states", None) is not None:
        # the last one can be last_hidden_state itself
        output.hidden_states = tuple(
            each if each is None or each.shape[1] == text_len else each[:, width:].contiguous()
            for each in output.hidden_states
        )
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(
            each if each is None else each[..., width:, width:].contiguous() for each in output.attentions
        )
    return output.to_tuple() if run.as_tuple else output


def joined_mask(
    mask: Any, lengths: tuple[int, ...], batch: int, text_len: int, device: torch.device
) -> Tensor | None:
    """The attention mask of prompt and text.

    Args:
        mask: the text's: ``None``; ``(batch, text_len)``, true where a key may be seen; or ``(1 or batch, 1 or heads,
            1 or text_len, text_len)``, boolean or additive.
        lengths: of every row's prompt, or one entry for all rows.
    Returns: ``None`` if every key may be seen; else like ``mask``, longer by ``max(lengths)`` in each dimension that is
        ``text_len`` long. Every query sees its own row's prompt, and a prompt sees each key that any query of the text
        sees.
    Raises: TypeError, ValueError: ``mask`` is none of these.
    """
    width = max(lengths)
    slots = torch.arange(width, device=device)[None]
    own: Any = lengths[0] if len(lengths) == 1 else torch.tensor(lengths, device=device)[:, None]
    visible = slots >= width - own  # (1 or batch, width)
    if mask is None:
        if min(lengths) == width:
            return None
        mask = visible.new_ones(batch, text_len)
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor under a soft prompt, got {type(mask).__name__}")
    if mask.dim() not in (2, 4) or mask.shape[-1] != text_len:
        raise ValueError(
            f"attention_mask must be (batch, {text_len}) or (batch, heads, {text_len}, {text_len}) under a soft "
            f"prompt, got {tuple(mask.shape)}"
        )
    if mask.dim() == 2:
        return torch.cat([visible.to(mask.dtype).expand(batch, -1), mask.expand(batch, -1)], dim=1)
    if mask.dtype == torch.bool:
        opened = visible
    elif mask.is_floating_point():
        zero = torch.zeros((), dtype=mask.dtype, device=device)
        opened = torch.where(visible, zero, torch.finfo(mask.dtype).min)
    else:
        raise ValueError(f"attention_mask of 4 dimensions must be boolean or floating, got {mask.dtype}")
    if mask.shape[2] > 1:
        seen = mask.amax(2, keepdim=True)
        mask = torch.cat([seen.expand(-1, -1, width, -1), mask], dim=2)
    rows = max(len(opened), len(mask))
    mask = mask.expand(rows, -1, -1, -1)
    return torch.cat([opened[:, None, None].expand(*mask.shape[:3], -1), mask], dim=3)
