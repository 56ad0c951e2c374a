"""Attach adapters to transformers models, in place."""

import inspect
import re
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations import attention as hook
from fastadapter.integrations.attention import CHILD, PrefixHost
from fastadapter.methods import LlamaAdapterConfig
from fastadapter.nn import GatedPrefix

_ATTRIBUTE = "_fastadapter"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
_LOOKUP = "ALL_ATTENTION_FUNCTIONS"
# Architectures that the tests hold to every promise; any other that uses the attention interface may work.
TESTED = (
    "bert, distilbert, gemma3, gpt2, gpt_neox, llama, mistral, phi3, qwen3, t5 (encoder), vit, whisper"
).split(", ")


@dataclass
class Attachments:
    """What is attached to one model: configurations by name, and what was trainable before the first."""

    configs: dict[str, LlamaAdapterConfig] = field(default_factory=dict)
    layers: dict[str, list[str]] = field(default_factory=dict)
    was_trainable: dict[str, bool] = field(default_factory=dict)
    handles: dict[str, RemovableHandle] = field(default_factory=dict)
    active: str | None = None


def attach(model: nn.Module, config: LlamaAdapterConfig, name: str = "default") -> nn.Module:
    """Add an adapter to ``model`` in place, freeze the rest, and make the adapter the active one.

    Works on any transformers model whose attention goes through the attention interface, with any attention
    implementation, before or after ``.to()``, ``torch.compile`` or ``set_attn_implementation``. A fresh adapter
    leaves every output of the model bit for bit as it was. Only self-attention is adapted; in a multimodal model
    only that of the text model.

    Args:
        model: a transformers model (or a module that contains one).
        config: the method and its sizes.
        name: what to call it; letters, digits, ``_`` and ``-``, at most 64.
    Returns: ``model``.
    Raises:
        ValueError: the name is taken or malformed, or the model has fewer blocks than ``config.layers``.
        TypeError: ``config`` is not a configuration, or the model cannot be hooked, with the reason.
        Nothing is attached then.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64))
    >>> model = attach(model, LlamaAdapterConfig(prefix_len=4))
    >>> sum(parameter.numel() for _, parameter in trainable_parameters(model))
    264
    """
    if not isinstance(config, LlamaAdapterConfig):
        raise TypeError(f"config must be a LlamaAdapterConfig, got {type(config).__name__}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 64 letters, digits, '_' or '-', got {name!r}")
    model = unwrap(model)
    record = attachments(model) or Attachments()
    if name in record.configs:
        raise ValueError(
            f"name: an adapter {name!r} is already attached; detach it first or choose another name"
        )
    hook.install_hook()
    try:
        targets = _targets(model, config.layers)
        prepared = [(path, module, *_prepare(model, path, module, config)) for path, module in targets]
    except Exception:
        hook.remove_hook_if_unused()
        raise
    if not record.configs:
        record.was_trainable = {key: p.requires_grad for key, p in model.named_parameters()}
        model.requires_grad_(False)
    for path, module, host, adapter in prepared:
        if CHILD not in module._modules:
            module.add_module(CHILD, host)
            record.handles[path] = _block(model, path).register_forward_pre_hook(_let_gradients_in)
        host.add(name, adapter)
        host.train(module.training)
    record.configs[name] = config
    record.layers[name] = [path for path, *_ in prepared]
    setattr(model, _ATTRIBUTE, record)
    set_active(model, name)
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all of them; after the last the model is what it was before, bit for bit.

    ``requires_grad`` of the model's own parameters is restored too.

    Raises: ValueError: no adapter of that name.
    """
    model = unwrap(model)
    record = _require_attachments(model)
    for each in list(record.configs) if name is None else [_require_name(record, name)]:
        for path in record.layers[each]:
            module = model.get_submodule(path)
            host = hook.host_of(module)
            if host is None:
                raise RuntimeError(
                    f"{path} lost its child {CHILD!r}: it was removed by other means than detach"
                )
            host.remove(each)
            if not host.adapters:
                hook.take_out(module)
                record.handles.pop(path).remove()
        del record.configs[each], record.layers[each]
        if record.active == each:
            record.active = None
    if not record.configs:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(record.was_trainable.get(key, parameter.requires_grad))
        delattr(model, _ATTRIBUTE)
        hook.remove_hook_if_unused()
    return model


def set_active(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that acts from now on; ``None`` is the base model.

    Raises: ValueError: no adapter of that name.
    """
    model = unwrap(model)
    record = _require_attachments(model)
    if name is not None:
        _require_name(record, name)
    for host in hosts(model).values():
        host.active = name if name in host.adapters else None
    record.active = name


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require gradients, in the model's order; hand the second to an optimiser."""
    return [
        (name, parameter) for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself behind ``torch.compile``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def attachments(model: nn.Module) -> Attachments | None:
    """The record of what is attached to ``model``, if anything is."""
    return getattr(unwrap(model), _ATTRIBUTE, None)


def hosts(model: nn.Module) -> dict[str, PrefixHost]:
    """The adapted attention modules of ``model`` by dotted path."""
    found = ((path, hook.host_of(module)) for path, module in unwrap(model).named_modules())
    return {path: host for path, host in found if host is not None}


def adapter_modules(model: nn.Module, name: str) -> dict[str, GatedPrefix]:
    """The modules of adapter ``name`` by the dotted path of the attention they are in.

    Raises: ValueError: no adapter of that name.
    """
    record = _require_attachments(unwrap(model))
    _require_name(record, name)
    found = hosts(model)
    return {path: found[path].adapter(name) for path in record.layers[name]}


def _require_attachments(model: nn.Module) -> Attachments:
    record = attachments(model)
    if record is None:
        raise ValueError("model: no adapter is attached to it")
    return record


def _require_name(record: Attachments, name: str) -> str:
    if name not in record.configs:
        raise ValueError(
            f"name: no adapter {name!r} is attached; there is {', '.join(record.configs) or 'none'}"
        )
    return name


def _block(model: nn.Module, path: str) -> nn.Module:
    """The layer around the attention at ``path`` that activation checkpointing acts on, or the attention itself."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        if hasattr(type(ancestor), "gradient_checkpointing"):
            return ancestor
    return model.get_submodule(path)


def _let_gradients_in(block: nn.Module, args: tuple):
    """Re-entrant checkpointing drops every gradient of a block none of whose inputs needs one.

    In a frozen model that is the lowest adapted block, so its input is made to need one.
    """
    checkpointing = getattr(block, "gradient_checkpointing", False) and block.training
    if not (checkpointing and torch.is_grad_enabled()) or torch.compiler.is_compiling() or not args:
        return None
    hidden_states = args[0]
    if not torch.is_tensor(hidden_states) or hidden_states.requires_grad:
        return None
    return (hidden_states.detach().requires_grad_(), *args[1:])


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and _LOOKUP in code.co_names


def _self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    found = {}
    for path, module in model.named_modules():
        if not _uses_interface(module) or getattr(module, "is_cross_attention", False):
            continue
        if _CROSS.search(path.rpartition(".")[2]) or _CROSS.search(type(module).__name__):
            continue
        if text_config is not None and getattr(module, "config", None) is not text_config:
            continue
        found[path] = module
    return found


def _targets(model: nn.Module, layers: int | None) -> list[tuple[str, nn.Module]]:
    """The self-attention modules of the top ``layers`` blocks of each stack, in the model's order."""
    found = _self_attentions(model)
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no self-attention that goes through transformers' attention interface, "
            f"so it cannot be hooked; tested architectures: {', '.join(TESTED)}"
        )
    stacks: dict[str, dict[int, list[str]]] = {}
    for path in found:
        match = re.match(r"(.*?)\.?(\d+)(?:\.|$)", path)
        if match is None:
            raise TypeError(
                f"{path} is not in a numbered block, so the top layers of the model are not defined"
            )
        stacks.setdefault(match[1], {}).setdefault(int(match[2]), []).append(path)
    chosen = []
    for stack, blocks in stacks.items():
        if layers is not None and layers > len(blocks):
            raise ValueError(
                f"layers must be at most {len(blocks)}, the attention blocks of {stack}, got {layers}"
            )
        top = sorted(blocks)[-layers if layers else 0 :]
        chosen += [path for index in top for path in blocks[index]]
    return [(path, found[path]) for path in chosen]


def _prepare(model: nn.Module, path: str, module: nn.Module, config: LlamaAdapterConfig):
    """The host and a fresh adapter for one attention module, tried out before anything is attached."""
    if getattr(module, "reorder_and_upcast_attn", False):
        raise TypeError(
            f"{path}: reorder_and_upcast_attn=True makes GPT-2 bypass the attention interface; set it to False"
        )
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = weight.dtype if weight is not None else torch.float32
    device = next(module.parameters()).device
    host = hook.host_of(module)
    rotary_dim = host.rotary_dim if host is not None else _rotary_dim(model, path)
    hidden_size = getattr(module.config, "hidden_size", None)
    if hidden_size is None:
        raise TypeError(f"{path}: its config names no hidden_size")
    # Drawn, not zeros: with equal rows a wrong projection could pass for the right one.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, config.prefix_len, hidden_size, generator=generator).to(device, dtype)
    try:
        with torch.no_grad():
            query, key, value = hook.project_by_forward(module, rows, rotary_dim)
            if host is None:
                fast = hook.can_project_by_modules(module, rows, key, value)
                host = PrefixHost(rotary_dim, fast)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise TypeError(
            f"{path} ({type(module).__name__}) cannot project a prompt: {error}; tested architectures: "
            f"{', '.join(TESTED)}"
        ) from error
    if key.shape != value.shape or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        raise TypeError(
            f"{path} ({type(module).__name__}): query {tuple(query.shape)}, key {tuple(key.shape)} and value "
            f"{tuple(value.shape)} of its heads do not fit gated prefix attention"
        )
    return host, config.build(hidden_size, query.shape[1], device)


def _rotary_dim(model: nn.Module, path: str) -> int | None:
    """Width of the rotary embedding the module at ``path`` gets, ``None`` without one."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):  # the nearest ancestor that owns one
        ancestor = model.get_submodule(".".join(parts[:depth]))
        for child in ancestor.children():
            if "RotaryEmbedding" in type(child).__name__:
                frequencies = [b for name, b in child.named_buffers() if name.endswith("inv_freq")]
                if frequencies:
                    return 2 * frequencies[0].numel()
    return None
