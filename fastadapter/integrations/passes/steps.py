"""What one attention does again in every pass like the one that settled it (:meth:`Host.step`).

Decoding asks the same at every layer of every token. Who acts, and whether what is kept is still right, is settled when
a pass begins; what can differ between passes of one choice is looked at here, and ``None`` then sends the call the long
way round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapter.integrations.passes.options import is_plain
from fastadapter.integrations.passes.shared_softmax import BASES, causality
from fastadapter.ops import prepared
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.gated_prefix import run_forward as run_gated
from fastadapter.ops.prefix_attention import run_forward as run_shared

Act = Callable[..., "tuple[Tensor, Any] | None"]


class Bank(NamedTuple):
    """Projected prompts and gates of some adapters in one layer; ``backend`` if they are kept between passes."""

    key: Tensor
    value: Tensor
    gate: Tensor
    gate_fn: str
    backend: str | None


def softmax_scale(query: Tensor, options: dict[str, Any]) -> float:
    """What a base attention multiplies ``query (..., head_dim)`` with."""
    scale = options.get("scaling")
    return query.shape[3] ** -0.5 if scale is None else scale


def gated_step(bank: Bank, row_ids: Tensor | None, scale: float) -> Act:
    """The base attention and the term of one group of gated prompts.

    Args:
        row_ids: int32 ``(batch,)`` as in :class:`~.host.Group`.
        scale: of the softmax.
    """
    bank_key, bank_value, gate, gate_fn, backend = bank
    repeated = None
    if backend == "cpp" and prepared.ERROR is None:
        prepare = prepared.prepare_gated_prefix
        repeated = prepared.Repeated(
            lambda output, query: prepare(output, query, bank_key, bank_value, gate, row_ids, scale, gate_fn)
        )

    def act(
        base: Callable[[], tuple[Tensor, Any]],
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        prompts: Any,
    ) -> tuple[Tensor, Any] | None:
        dtype = bank_key.dtype
        batch, num_heads, q_len, head_dim = query.shape
        if not (query.dtype is dtype is value.dtype) or head_dim != value.shape[3]:
            return None
        if row_ids is not None and len(row_ids) != batch:
            return None
        if softmax_scale(query, options) != scale:
            return None
        output, weights = base()
        if output.dtype is not dtype or output.shape != (batch, q_len, num_heads, head_dim):
            return None
        if repeated is not None:
            added = repeated(batch * q_len, output, query)
            if added is not None:
                return added, weights
        before = output.transpose(1, 2)
        after = run_gated(backend, before, query, bank_key, bank_value, gate, row_ids, scale, gate_fn)
        return after.transpose(1, 2), weights

    return act


def shared_step(
    bank_key: Tensor,
    bank_value: Tensor,
    row_ids: Tensor | None,
    of_run: tuple[tuple[str, nn.Module], Any] | None = None,
) -> Act | None:
    """Attention over a bank of prefixes and the keys in one softmax; ``None`` where no kernel does that in one pass.

    Args:
        of_run: of a soft prompt, where its keys and values are in a pass and what they were in this one.
    """
    backend = choose_backend(
        "auto", bank_key.device.type, bank_key.dtype, "prefix_attention", bank_key.shape[3]
    )
    if backend != "cpp":
        return None

    def act(
        base: Callable[[], tuple[Tensor, Any]],
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        prompts: Any,
    ) -> tuple[Tensor, Any] | None:
        dtype = bank_key.dtype
        if not (query.dtype is key.dtype is value.dtype is dtype) or torch.is_autocast_enabled("cpu"):
            return None
        if key.shape[3] != value.shape[3] or mask is not None or not is_plain(options):
            return None
        if row_ids is not None and len(row_ids) != len(query):
            return None
        if of_run is not None and (prompts is None or prompts.found.get(of_run[0]) is not of_run[1]):
            return None
        implementation = attention.config._attn_implementation
        if implementation not in BASES:
            return None
        scale = softmax_scale(query, options)
        is_causal = causality(attention, query, mask, options)
        out, _, _ = run_shared(
            backend,
            query,
            key,
            value,
            bank_key,
            bank_value,
            None,
            None,
            row_ids,
            scale,
            is_causal,
            0,
            0.0,
            False,
        )
        return out.transpose(1, 2), None

    return act
