"""The hook into transformers' attention, and the projection of a prompt through a layer's own weights.

transformers looks every attention function up with ``AttentionInterface.get_interface``. While an adapter is
attached anywhere, that lookup returns the same function wrapped in :func:`_dispatch`, which runs it and adds the
term of the adapter found in the calling module. Masks, caches and the configuration stay the model's own. (An
attention name of our own would drop masks in silence, see docs/design.md.)
"""

import functools
import inspect
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastadapter.nn import GatedPrefix
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.gated_prefix import run_forward

# Name of our child module in an attention module.
CHILD = "fa_prefix"
# Keyword by which `project_by_forward` asks the dispatcher for keys and values instead of attention.
CAPTURE = "fa_capture"

_hosts: "weakref.WeakSet[PrefixHost]" = weakref.WeakSet()
_original_lookup: Any = None


def _dispatch(attention, module, query, key, value, attention_mask, *args, **kwargs):
    """Run ``attention`` as the model would and add the term of the adapter in ``module``, if it has one."""
    captured = kwargs.pop(CAPTURE, None)
    if captured is not None:
        captured.append((query, key, value))
        return query.transpose(1, 2), None
    result = attention(module, query, key, value, attention_mask, *args, **kwargs)
    host = module._modules.get(CHILD)
    if host is None or host.active is None:
        return result
    output, weights = result
    return host.adapt(host.active, module, output, query, kwargs.get("scaling")), weights


def _patched_lookup(self, attn_implementation, default):
    return functools.partial(_dispatch, _original_lookup(self, attn_implementation, default))


def install_hook() -> None:
    """Wrap the lookup, once however often it is called."""
    from transformers.modeling_utils import AttentionInterface

    global _original_lookup
    if AttentionInterface.get_interface is not _patched_lookup:
        _original_lookup = AttentionInterface.get_interface
        AttentionInterface.get_interface = _patched_lookup


def remove_hook_if_unused() -> None:
    """Restore the lookup when no adapted module is left in the process, copies of models included."""
    from transformers.modeling_utils import AttentionInterface

    # Somebody who patched after us keeps our wrapper inside theirs; without hosts it only passes calls on.
    if not _hosts and AttentionInterface.get_interface is _patched_lookup:
        AttentionInterface.get_interface = _original_lookup


class PrefixHost(nn.Module):
    """The adapters of one attention module, by name; lives in it as the child ``fa_prefix``.

    As a child module it moves, saves, shards and synchronises with the model.
    """

    def __init__(self, rotary_dim: int | None, fast_projection: bool):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.rotary_dim = rotary_dim
        self.fast_projection = fast_projection
        self._ready: dict[str, _Ready] = {}
        _hosts.add(self)

    def __setstate__(self, state):
        """A copied or unpickled model keeps its adapter working, so it keeps the hook too."""
        super().__setstate__(state)
        self._ready = {}
        _hosts.add(self)
        install_hook()

    def adapt(
        self, name: str, attention: nn.Module, output: Tensor, query: Tensor, softmax_scale: float | None
    ) -> Tensor:
        """Add the term of adapter ``name`` to ``output``.

        Args:
            attention: the attention module this host is a child of.
            output: what the base attention returned, ``(batch, q_len, num_heads, head_dim)``.
            query: ``(batch, num_heads, q_len, head_dim)``.
            softmax_scale: the scale the base attention used.
        """
        batch, num_heads, q_len, head_dim = query.shape
        if output.shape != (batch, q_len, num_heads, head_dim):
            raise ValueError(
                f"the base attention {attention.config._attn_implementation!r} returned shape "
                f"{tuple(output.shape)} for a query of shape {tuple(query.shape)}; expected "
                "(batch, q_len, num_heads, head_dim): it is not supported under an adapter"
            )
        base = output.transpose(1, 2)
        if query.dtype != output.dtype:  # under autocast
            query = query.to(output.dtype)
        # Inside a compiled graph a version could not be checked again at run time.
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            ready = self._prepare(name, attention, output.dtype)
            if ready is not None:
                scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
                operands = (ready.key, ready.value, ready.gate, None, scale, ready.gate_fn)
                return run_forward(ready.backend, base, query, *operands).transpose(1, 2)
        adapter = self.adapter(name)
        key, value = self._project(attention, adapter.prompt, output.dtype)
        return adapter(base, query, key, value, softmax_scale=softmax_scale).transpose(1, 2)

    def _prepare(self, name: str, attention: nn.Module, dtype: torch.dtype) -> "_Ready | None":
        """Operands of adapter ``name``, kept between calls that cannot need a gradient through them.

        Valid while every tensor they came from is the same version of the same storage, and the projections are
        the same modules. ``None`` where versions are not counted, in tensors made under inference mode.
        """
        ready = self._ready.get(name)
        if ready is not None and ready.is_current(attention, dtype):
            return ready
        adapter = self.adapter(name)
        modules = _projection_modules(attention)
        sources: tuple[Tensor, ...] = (adapter.prompt, adapter.gate, *_tensors_of(modules.values()))
        if any(tensor.is_inference() for tensor in sources):
            return None
        # Made outside inference mode, the tensors stay usable wherever the model is called from next.
        with torch.inference_mode(False), torch.no_grad():
            key, value = self._project(attention, adapter.prompt, dtype)
            gate = adapter.gate.expand(1, adapter.num_heads)
            gate = gate.double() if dtype == torch.float64 else gate
        backend = choose_backend("auto", key.device.type, dtype, "gated_prefix")
        ready = _Ready(key, value, gate, adapter.gate_fn, backend, dtype, modules, sources, _stamp(sources))
        self._ready[name] = ready
        return ready

    def _project(self, attention: nn.Module, prompt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = prompt.to(dtype)[None]
        if self.fast_projection:
            return project_by_modules(attention, rows)
        _, key, value = project_by_forward(attention, rows, self.rotary_dim)
        return key, value

    def train(self, mode: bool = True):
        self._ready.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._ready.clear()
        return super()._apply(fn, recurse)

    def adapter(self, name: str) -> GatedPrefix:
        return cast(GatedPrefix, self.adapters[name])

    def add(self, name: str, adapter: GatedPrefix) -> None:
        self.adapters[name] = adapter

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._ready.pop(name, None)
        if self.active == name:
            self.active = None


def host_of(module: nn.Module) -> PrefixHost | None:
    """The host in an attention module, if it has one."""
    return cast("PrefixHost | None", module._modules.get(CHILD))


def take_out(module: nn.Module) -> None:
    """Remove the host from an attention module."""
    host = host_of(module)
    if host is not None:
        _hosts.discard(host)
        del module._modules[CHILD]


def project_by_forward(
    attention: nn.Module, rows: Tensor, rotary_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of prompt ``rows (1, prefix_len, hidden_size)`` as the layer itself computes them.

    Runs the layer's own forward with the rotary embedding switched off (cos 1, sin 0, so a scaling such as YaRN's
    does not apply either: LLaMA-Adapter's prompt has no position) and takes what reaches the attention function.
    Right for any projection, norm or head layout; costs an output projection of ``prefix_len`` rows.
    """
    captured: list[tuple[Tensor, Tensor, Tensor]] = []
    arguments: dict[str, Any] = {CAPTURE: captured}
    for name, parameter in list(inspect.signature(attention.forward).parameters.items())[1:]:
        if name == "position_embeddings" and rotary_dim is not None:
            ones = rows.new_ones(1, rows.shape[1], rotary_dim)
            arguments[name] = (ones, torch.zeros_like(ones))
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[name] = None
    attention.forward(rows, **arguments)
    if len(captured) != 1:
        raise TypeError(
            f"{type(attention).__name__} did not call its attention function when it was given a prompt"
        )
    return captured[0]


_SEPARATE = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))


def _projection_modules(attention: nn.Module) -> dict[str, nn.Module]:
    """The modules a prompt goes through, by name: key and value projections and key norm, or all children."""
    for names in _SEPARATE:
        if all(attention._modules.get(name) is not None for name in names):
            found = ((name, attention._modules.get(name)) for name in (*names, "k_norm"))
            return {name: module for name, module in found if module is not None}
    return {name: child for name, child in attention._modules.items() if name != CHILD and child is not None}


def _tensors_of(modules) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _stamp(sources: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in sources]


@dataclass(slots=True)
class _Ready:
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

    def is_current(self, attention: nn.Module, dtype: torch.dtype) -> bool:
        children = attention._modules
        return (
            self.dtype == dtype
            and self.stamp == _stamp(self.sources)
            and all(children.get(name) is module for name, module in self.modules.items())
        )


def project_by_modules(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same keys and values from the key and value projections alone; only used where bit-equal at attach."""
    key_module, value_module, *norms = _projection_modules(attention).values()
    shape = (
        *rows.shape[:-1],
        -1,
        attention.head_dim if hasattr(attention, "head_dim") else _head_size(attention),
    )
    key, value = key_module(rows).view(shape), value_module(rows).view(shape)
    for norm in norms:
        key = norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def _head_size(attention: nn.Module) -> int:
    for name in ("attention_head_size", "key_value_proj_dim"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise AttributeError(f"{type(attention).__name__} names no head size")


def can_project_by_modules(attention: nn.Module, rows: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`project_by_modules` gives the bits of ``key`` and ``value`` for this layer."""
    if len(_projection_modules(attention)) not in (2, 3) or rows.is_meta:
        return False
    try:
        fast_key, fast_value = project_by_modules(attention, rows)
    except (
        AttributeError,
        RuntimeError,
        ValueError,
        TypeError,
    ):  # another layout: the layer's forward knows it
        return False
    return torch.equal(fast_key, key) and torch.equal(fast_value, value)
