"""The adapters of one attention module: gated prompts beside it, prefixes and soft prompts within its softmax."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.projection import Projection, projection_modules
from fastadapter.integrations.passes import attention as hook
from fastadapter.integrations.passes.host import Group, Host, State, may_keep, stamp
from fastadapter.integrations.passes.shared_softmax import attend_shared
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

    ``collecting`` names the prompt whose pass is under way: attention then adds to ``found`` and does nothing else.
    """

    def __init__(self, collecting: str | None = None):
        self.collecting = collecting
        self.found: dict[tuple[str, nn.Module], KeyValue] = {}


class PrefixHost(Host):
    """The adapters of one attention module."""

    CHILD: ClassVar[str] = hook.CHILD

    def __init__(self, state: State, projection: Projection):
        super().__init__(state)
        self.projection = projection
        self._ready: dict[str, _Ready] = {}
        self._banks: dict[tuple[str, ...], tuple[Any, ...]] = {}
        hook.keep_hook_for(self)

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
        if prompts is not None and prompts.collecting is not None:
            prompts.found[prompts.collecting, self] = (key, value)
            return base()
        if self.idle():
            return base()
        groups = self.groups(query.shape[0], query.device)
        gated = [group for group in groups if isinstance(self.adapters[group.names[0]], GatedPrefix)]
        shared = [group for group in groups if group not in gated]
        if len(shared) == 1 and (
            shared[0].members is None or len(shared[0].members) == query.shape[0]
        ):  # the model's own attention is not needed for any row
            bank = self._shared_bank(shared[0], attention, query.dtype, prompts)
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
        return output, weights

    def _shared_bank(
        self, group: Group, attention: nn.Module, dtype: torch.dtype, prompts: PromptRun | None
    ) -> KeyValue:
        adapters = [self.adapters[name] for name in group.names]
        if isinstance(adapters[0], PrefixTuning):
            found = None
            sources = [tensor for adapter in adapters for tensor in adapter.sources()]
        else:
            found = [self._prompted(name, attention, prompts) for name in group.names]
            sources = [tensor for pair in found for tensor in pair]

        def join() -> KeyValue:
            pairs = [adapter() for adapter in adapters] if found is None else found
            key, value = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*pairs, strict=True))
            return (key.double(), value.double()) if dtype == torch.float64 else (key, value)

        return self.keep((group.names, dtype), sources, join)

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
        if not (self.training or torch.is_grad_enabled()) and may_keep(query.device):
            ready = self._ready_bank(group.names, attention, output.dtype)
            if ready is not None:
                operands = (ready.key, ready.value, ready.gate, group.row_ids, scale, ready.gate_fn)
                return run_forward(ready.backend, base, query, *operands).transpose(1, 2)
        bank = [self._operands(name, attention, output.dtype) for name in group.names]
        key, value, gate = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*bank, strict=True))
        gate_fn = self.adapter(group.names[0]).gate_fn
        return gated_prefix(
            base, query, key, value, gate, softmax_scale=scale, gate_fn=gate_fn, row_ids=group.row_ids
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
        bank = [self._operands(name, attention, query.dtype) for name in group.names]
        prefix_key, prefix_value, gate = (
            torch.cat(each) if len(each) > 1 else each[0] for each in zip(*bank, strict=True)
        )
        gate_fn = self.adapter(group.names[0]).gate_fn
        constants = Options(None, None, group.row_ids, scale, is_causal, 0, 0.0)
        out = gated_over_base(
            base, backend, query, key, value, prefix_key, prefix_value, gate, gate_fn, constants
        )
        return out.transpose(1, 2).contiguous()

    def _operands(self, name: str, attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        adapter = self.adapter(name)
        key, value = self._project(name, attention, dtype)
        gate = adapter.gate.expand(1, adapter.num_heads)
        return key, value, gate.double() if dtype == torch.float64 else gate

    def _ready_bank(
        self, names: tuple[str, ...], attention: nn.Module, dtype: torch.dtype
    ) -> "_Ready | None":
        """Operands of some adapters, kept between calls that cannot need a gradient through them."""
        found = [self._prepare(name, attention, dtype) for name in names]
        ready = [each for each in found if each is not None]
        if len(ready) < len(found):
            return None
        if len(ready) == 1:
            return ready[0]
        kept = self._banks.get(names)
        if kept is None or any(old is not new for old, new in zip(kept[0], ready, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                fields = ("key", "value", "gate")
                joined: dict[str, Any] = {
                    field: torch.cat([getattr(each, field) for each in ready]) for field in fields
                }
            kept = (tuple(ready), ready[0]._replace(**joined))
            self._banks = {names: kept}
        return kept[1]

    def _prepare(self, name: str, attention: nn.Module, dtype: torch.dtype) -> "_Ready | None":
        """Operands of adapter ``name``.

        Valid while every tensor they came from is the same version of the same storage, and the projections are
        the same modules. ``None`` where versions are not counted, in tensors made under inference mode.
        """
        ready = self._ready.get(name)
        owner = self.projection.owner(attention)
        if ready is not None and ready.is_current(owner, dtype):
            return ready
        adapter = self.adapter(name)
        modules = projection_modules(owner)
        sources: tuple[Tensor, ...] = (adapter.prompt, adapter.gate, *_tensors_of(modules.values()))
        if any(tensor.is_inference() for tensor in sources):
            return None
        # Made outside inference mode, the tensors stay usable wherever the model is called from next.
        with torch.inference_mode(False), torch.no_grad():
            key, value, gate = self._operands(name, attention, dtype)
        backend = choose_backend("auto", key.device.type, dtype, "gated_prefix", key.shape[-1])
        ready = _Ready(key, value, gate, adapter.gate_fn, backend, dtype, modules, sources, stamp(sources))
        self._ready[name] = ready
        return ready

    def _project(self, name: str, attention: nn.Module, dtype: torch.dtype) -> KeyValue:
        rows = self.adapter(name).prompt.to(dtype)[None]
        # whatever acts on the rows of the batch, in the projections its own adapter acts on a prompt
        with self.state.only(name):
            key, value = self.projection(attention, rows)
        width = max(key.shape[3], value.shape[3])
        return widened(key, width), widened(value, width)

    def forget(self) -> None:
        super().forget()
        self._ready, self._banks = {}, {}


def _tensors_of(modules) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


class _Ready(NamedTuple):
    """Projected operands of one adapter in one layer, and what they were made from."""

    key: Tensor
    value: Tensor
    gate: Tensor
    gate_fn: str
    backend: str
    dtype: torch.dtype
    modules: dict[str, nn.Module]
    sources: tuple[Tensor, ...]
    stamp: list[tuple[int, int]]

    def is_current(self, owner: nn.Module, dtype: torch.dtype) -> bool:
        children = owner._modules
        return (
            self.dtype == dtype
            and self.stamp == stamp(self.sources)
            and all(children.get(name) is module for name, module in self.modules.items())
        )
