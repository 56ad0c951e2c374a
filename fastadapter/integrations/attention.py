"""The hook into transformers' attention, and the projection of a prompt through a layer's own weights.

transformers looks every attention function up with ``AttentionInterface.get_interface``. While an adapter is
attached anywhere, that lookup returns the same function wrapped in :func:`_dispatch`, which runs it and adds the
term of the adapter found in the calling module. Masks, caches and the configuration stay the model's own. (An
attention name of our own would drop masks in silence, see docs/design.md.)
"""

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.nn import GatedPrefix

# Name of our child module in an attention module.
CHILD = "fa_prefix"
# Keyword by which `project_by_forward` asks the dispatcher for keys and values instead of attention.
CAPTURE = "fa_capture"

_hosts: "weakref.WeakSet[PrefixHost]" = weakref.WeakSet()
_original_lookup = None


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
    return host(module, output, query, kwargs.get("scaling")), weights


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
        self._cache: dict[str, tuple[tuple, tuple[Tensor, Tensor]]] = {}
        _hosts.add(self)

    def __setstate__(self, state):
        """A copied or unpickled model keeps its adapter working, so it keeps the hook too."""
        super().__setstate__(state)
        self._cache = {}
        _hosts.add(self)
        install_hook()

    def forward(self, attention: nn.Module, output: Tensor, query: Tensor, softmax_scale: float | None) -> Tensor:
        """Add the active adapter's term to ``output``.

        Args:
            attention: the attention module this host is a child of.
            output: what the base attention returned, ``(batch, q_len, num_heads, head_dim)``.
            query: ``(batch, num_heads, q_len, head_dim)``.
            softmax_scale: the scale the base attention used.
        """
        if output.dim() != 4 or output.transpose(1, 2).shape != query.shape:
            raise ValueError(
                f"the base attention {attention.config._attn_implementation!r} returned shape "
                f"{tuple(output.shape)} for a query of shape {tuple(query.shape)}; expected "
                "(batch, q_len, num_heads, head_dim): it is not supported under an adapter"
            )
        adapter = self.adapters[self.active]
        key, value = self.project(attention, self.active, output.dtype)
        base = output.transpose(1, 2)
        adapted = adapter(base, query.to(output.dtype), key, value, softmax_scale=softmax_scale)
        return adapted.transpose(1, 2)

    def project(self, attention: nn.Module, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, ``(1, num_kv_heads, prefix_len, head_dim)``, in ``dtype``.

        Kept between calls only in eval mode without gradients, where nothing can need to flow back through them,
        and only while every tensor they came from is the same version of the same storage.
        """
        prompt = self.adapters[name].prompt
        # Inside a compiled graph a version could not be checked again at run time.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._project(attention, prompt, dtype)
        sources = (prompt, *_projection_tensors(attention))
        if any(tensor.is_inference() for tensor in sources):  # these carry no version
            return self._project(attention, prompt, dtype)
        stamp = (dtype, *((tensor.data_ptr(), tensor._version) for tensor in sources))
        cached = self._cache.get(name)
        if cached is None or cached[0] != stamp:
            # Made outside inference mode, the tensors stay usable wherever the model is called from next.
            with torch.inference_mode(False), torch.no_grad():
                cached = (stamp, self._project(attention, prompt, dtype))
            self._cache[name] = cached
        return cached[1]

    def _project(self, attention: nn.Module, prompt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = prompt.to(dtype)[None]
        if self.fast_projection:
            return project_by_modules(attention, rows)
        _, key, value = project_by_forward(attention, rows, self.rotary_dim)
        return key, value

    def train(self, mode: bool = True):
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        return super()._apply(fn, recurse)

    def add(self, name: str, adapter: GatedPrefix) -> None:
        self.adapters[name] = adapter

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._cache.pop(name, None)
        if self.active == name:
            self.active = None


def release(host: PrefixHost) -> None:
    """Forget a host that was taken out of its attention module."""
    _hosts.discard(host)


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


def _projection_modules(attention: nn.Module) -> tuple[nn.Module, ...]:
    for key_name, value_name in _SEPARATE:
        if key_name in attention._modules and value_name in attention._modules:
            names = (key_name, value_name, "k_norm")
            return tuple(attention._modules[name] for name in names if attention._modules.get(name) is not None)
    return tuple(child for name, child in attention._modules.items() if name != CHILD and child is not None)


def _projection_tensors(attention: nn.Module) -> tuple[Tensor, ...]:
    return tuple(
        tensor
        for module in _projection_modules(attention)
        for part in module.modules()
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    )


def project_by_modules(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same keys and values from the key and value projections alone; only used where bit-equal at attach."""
    key_module, value_module, *norms = _projection_modules(attention)
    shape = (*rows.shape[:-1], -1, attention.head_dim if hasattr(attention, "head_dim") else _head_size(attention))
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
    except (AttributeError, RuntimeError, ValueError, TypeError):  # another layout: the layer's forward knows it
        return False
    return torch.equal(fast_key, key) and torch.equal(fast_value, value)
