"""The adapters of one attention module: gated prompts beside it, prefixes and soft prompts within its softmax."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.parts.projection import Projection, projection_modules
from fastadapter.integrations.passes import attention as hook
from fastadapter.integrations.passes.choice import State
from fastadapter.integrations.passes.host import Group, Host
from fastadapter.integrations.passes.kept import Part
from fastadapter.integrations.passes.shared_softmax import attend_shared
from fastadapter.integrations.passes.steps import Bank, gated_step, shared_step, softmax_scale
from fastadapter.integrations.passes.widths import widened
from fastadapter.nn import GatedPrefix, PrefixTuning
from fastadapter.ops import gated_prefix
from fastadapter.ops.attention import Options
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.base_attention import base_of_sdpa
from fastadapter.ops.composed import gated_over_base
from fastadapter.ops.gated_prefix import run_forward

KeyValue = tuple[Tensor, Tensor]
# Where the base's part of a gradient is added in the kernel that computes ours; elsewhere it takes the same time.
JOINED_DEVICES = {"cuda"}


class PromptSlot(nn.Module):
    """Stands in one attention for a soft prompt, whose keys and values there come from a pass of the whole model."""

    def __init__(self, prefix_len: int):
        super().__init__()
        self.prefix_len = prefix_len


class PromptRun:
    """Keys and values of soft prompts in every attention, by adapter: of one forward pass, or being collected.

    Attributes:
        collecting: the prompt whose own pass is under way: attention then adds to ``found`` and does nothing else.
        joined: the prompts stand among the keys already, in front of the text's.
    """

    def __init__(self, collecting: str | None = None, joined: bool = False):
        self.collecting = collecting
        self.joined = joined
        self.found: dict[tuple[str, nn.Module], KeyValue] = {}


class PrefixHost(Host):
    """The adapters of one attention module."""

    CHILD: ClassVar[str] = hook.CHILD

    def __init__(self, state: State, projection: Projection):
        super().__init__(state)
        self.projection = projection

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        hook.keep_hook_for(self)
        return []

    @contextlib.contextmanager
    def taking(self) -> Iterator[list[KeyValue]]:
        """Keys and values that come to the attention while the context lasts, each call's; no adapter acts."""
        found: list[KeyValue] = []

        def take(
            base: Callable[[], Any], attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any
        ):
            found.append((key, value))
            return base()

        self.attend = take  # type: ignore[method-assign, assignment]
        try:
            yield found
        finally:
            del self.attend

    def __setstate__(self, state):
        """A copied or unpickled model keeps its adapter working, so it keeps the hook too."""
        super().__setstate__(state)
        hook.keep_hook_for(self)
        hook.install_hook()

    def kind(self, adapter: nn.Module) -> Any:
        if isinstance(adapter, GatedPrefix):
            return GatedPrefix, len(adapter.prompt), adapter.gate_fn
        return type(adapter), adapter.prefix_len

    def attend(
        self,
        base: Callable[[], tuple[Tensor, Any]],
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        prompts: PromptRun | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """What the attention function returns: output ``(batch, q_len, num_heads, head_dim)`` and weights.

        Args:
            base: the model's own attention, ready to be called.
            attention: the module this host is a child of.
            query: ``(batch, num_heads, q_len, head_dim)``.
            key, value: ``(batch, num_kv_heads, kv_len, head_dim)``, the cache's included.
            mask: what the base attention was given.
            prompts: of this forward pass.
            options: the keyword arguments of the base attention.
        """
        step = self.step() if prompts is None or not (prompts.joined or prompts.collecting) else None
        if step is not None:
            if step.act is None:
                return base()
            repeated = step.act(base, attention, query, key, value, mask, options, prompts)
            if repeated is not None:
                return repeated
        if prompts is not None and prompts.collecting is not None:
            prompts.found[prompts.collecting, self] = (key, value)
            return base()
        if self.idle():
            self.settle_idle()
            return base()
        groups = self.groups(query.shape[0], query.device)
        if prompts is not None and prompts.joined:
            groups = [group for group in groups if not isinstance(self.adapters[group.names[0]], PromptSlot)]
            if not groups:
                return base()
        gated = [group for group in groups if isinstance(self.adapters[group.names[0]], GatedPrefix)]
        shared = [group for group in groups if group not in gated]
        if len(shared) == 1 and (
            shared[0].members is None or len(shared[0].members) == query.shape[0]
        ):  # the model's own attention is not needed for any row
            bank = self._shared_bank(shared[0], attention, query.dtype, prompts)
            self._settle_shared(shared[0], bank, query.dtype, prompts)
            return attend_shared(attention, query, key, value, mask, *bank, shared[0].row_ids, options), None
        if len(gated) == 1 and not shared:
            joined = self._gated_attention(gated[0], attention, query, key, value, mask, options)
            if joined is not None:
                return joined, None
        output, weights = base()
        for group in shared:
            bank = self._shared_bank(group, attention, query.dtype, prompts)
            rows: Any = group.members
            row_mask = mask[rows] if mask is not None and mask.shape[0] > 1 else mask
            row_ids = group.row_ids
            row_ids = row_ids[rows] if row_ids is not None and len(group.names) > 1 else None
            part = attend_shared(
                attention, query[rows], key[rows], value[rows], row_mask, *bank, row_ids, options
            )
            output, weights = output.index_copy(0, rows, part.to(output.dtype)), None
        for group in gated:
            output = self._add_gated(group, attention, output, query, options.get("scaling"))
        alone = len(gated) == 1 and not shared and prompts is None
        if alone and output.dtype == query.dtype and self.keeps():
            kept = self._gated_bank(gated[0].names, attention, query.dtype)
            if kept.backend is not None:
                act = gated_step(kept, gated[0].row_ids, softmax_scale(query, options))
                self.settle(act, (gated[0].names, query.dtype))
        return output, weights

    def _settle_shared(
        self, group: Group, bank: KeyValue, dtype: torch.dtype, prompts: PromptRun | None
    ) -> None:
        """Also for a soft prompt, as long as a pass finds the same keys and values of it."""
        if not self.keeps():
            return
        of_run, keys = None, [(group.names, dtype)]
        if not isinstance(self.adapters[group.names[0]], PrefixTuning):
            at = (group.names[0], self)
            if len(group.names) > 1 or prompts is None:
                return
            of_run, keys = (at, prompts.found[at]), []
        act = shared_step(*bank, group.row_ids, of_run)
        if act is not None:
            self.settle(act, *keys)

    def _shared_bank(
        self, group: Group, attention: nn.Module, dtype: torch.dtype, prompts: PromptRun | None
    ) -> KeyValue:
        adapters = [self.adapters[name] for name in group.names]
        if isinstance(adapters[0], PrefixTuning):

            def join() -> KeyValue:
                return _joined([adapter() for adapter in adapters], dtype)

            parts = lambda: [part for adapter in adapters for part in adapter.sources()]  # noqa: E731
            return self.keep((group.names, dtype), parts, join)
        found = [self._prompted(name, attention, prompts) for name in group.names]
        return _joined(found, dtype)

    def _prompted(self, name: str, attention: nn.Module, prompts: PromptRun | None) -> KeyValue:
        if prompts is None or (name, self) not in prompts.found:
            raise RuntimeError(
                f"{type(attention).__name__} was called outside its decoder, so soft prompt {name!r} has no keys here"
            )
        key, value = prompts.found[name, self]
        if key.requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                "re-entrant gradient checkpointing drops the gradient of a soft prompt; "
                "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return key, value

    def _add_gated(
        self,
        group: Group,
        attention: nn.Module,
        output: Tensor,
        query: Tensor,
        softmax_scale: float | None,
    ) -> Tensor:
        """Add the terms of gated prompts to ``output (batch, q_len, num_heads, head_dim)``."""
        batch, num_heads, q_len, head_dim = query.shape
        if output.dim() != 4 or output.shape[:3] != (batch, q_len, num_heads):
            raise ValueError(
                f"the base attention {attention.config._attn_implementation!r} returned shape "
                f"{tuple(output.shape)} for a query of shape {tuple(query.shape)}; expected "
                "(batch, q_len, num_heads, head_dim): it is not supported under an adapter"
            )
        value_dim = output.shape[3]
        if value_dim != head_dim:
            width = max(value_dim, head_dim)
            wide = self._add_gated(
                group,
                attention,
                widened(output, width),
                widened(query, width),
                softmax_scale or head_dim**-0.5,
            )
            return wide[..., :value_dim]
        base = output.transpose(1, 2)
        if query.dtype != output.dtype:  # under autocast
            query = query.to(output.dtype)
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        bank = self._gated_bank(group.names, attention, output.dtype)
        operands = bank.key, bank.value, bank.gate
        if bank.backend is not None:  # kept: nothing is left to check but the shapes above
            return run_forward(
                bank.backend, base, query, *operands, group.row_ids, scale, bank.gate_fn
            ).transpose(1, 2)
        return gated_prefix(
            base, query, *operands, softmax_scale=scale, gate_fn=bank.gate_fn, row_ids=group.row_ids
        ).transpose(1, 2)

    def _gated_attention(
        self,
        group: Group,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor | None:
        """Attention and term as one function, ``(batch, q_len, num_heads, head_dim)``; ``None`` where they stay two.

        Taken where a gradient of query is needed and the model's attention is torch's own without a mask: with the same
        kernel and so the same bits, but the two gradients of query meet in ours.
        """
        asked = torch.is_grad_enabled() and query.requires_grad and not torch.compiler.is_compiling()
        if not asked or query.device.type not in JOINED_DEVICES:
            return None
        dropout = (options.get("dropout") or 0.0) if attention.training else 0.0
        altered = mask is not None or dropout or options.get("position_bias") is not None
        if altered or attention.config._attn_implementation != "sdpa" or options.get("softcap") is not None:
            return None
        if key.shape[3] != value.shape[3]:
            return None
        if {key.dtype, value.dtype} != {query.dtype} or torch.is_autocast_enabled(query.device.type):
            return None
        scale = float(options.get("scaling") or query.shape[3] ** -0.5)
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(attention, "is_causal", True)
        is_causal = query.shape[2] > 1 and bool(is_causal)
        base = base_of_sdpa(query, key, value, is_causal, scale)
        backend = choose_backend("auto", query.device.type, query.dtype, "gated_prefix")
        if base is None or backend == "reference":
            return None
        bank = self._gated_bank(group.names, attention, query.dtype)
        constants = Options(None, None, group.row_ids, scale, is_causal, 0, 0.0)
        out = gated_over_base(
            base, backend, query, key, value, bank.key, bank.value, bank.gate, bank.gate_fn, constants
        )
        return out.transpose(1, 2).contiguous()

    def _gated_bank(self, names: tuple[str, ...], attention: nn.Module, dtype: torch.dtype) -> Bank:
        """Projected keys and values and the gates of some adapters."""

        def join() -> Bank:
            found = [self._operands(name, attention, dtype) for name in names]
            key, value, gate = (
                torch.cat(each) if len(each) > 1 else each[0] for each in zip(*found, strict=True)
            )
            backend = None
            if self.keeps():
                backend = choose_backend("auto", key.device.type, dtype, "gated_prefix", key.shape[-1])
            return Bank(key, value, gate, self.adapter(names[0]).gate_fn, backend)

        def parts() -> list[Part]:
            owner = self.projection.owner(attention)
            through = projection_modules(owner)
            return [*(self.adapters[name] for name in names), *((owner, name) for name in through)]

        return self.keep((names, dtype), parts, join)

    def _operands(self, name: str, attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        adapter = self.adapter(name)
        # under autocast a norm or a rotary embedding leaves keys in another dtype than values
        key, value = (each.to(dtype) for each in self._project(name, attention, dtype))
        gate = adapter.gate.expand(1, adapter.num_heads)
        return key, value, gate.double() if dtype == torch.float64 else gate

    def _project(self, name: str, attention: nn.Module, dtype: torch.dtype) -> KeyValue:
        rows = self.adapter(name).prompt.to(dtype)[None]
        # whatever acts on the rows of the batch, in the projections its own adapter acts on a prompt
        with self.state.only(name):
            key, value = self.projection(attention, rows)
        width = max(key.shape[3], value.shape[3])
        return widened(key, width), widened(value, width)


def _joined(pairs: list[KeyValue], dtype: torch.dtype) -> KeyValue:
    key, value = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*pairs, strict=True))
    return (key.double(), value.double()) if dtype == torch.float64 else (key, value)
