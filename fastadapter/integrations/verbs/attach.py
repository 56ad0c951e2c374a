"""Attach adapters to transformers models, in place, and take them off again."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastadapter.integrations.parts.sharding import require_open
from fastadapter.integrations.parts.wrappers import RECORD, unwrap
from fastadapter.integrations.passes import attention as hook
from fastadapter.integrations.passes import entry, frozen_parts, rotary
from fastadapter.integrations.passes.bottleneck import Watch
from fastadapter.integrations.passes.choice import Choice
from fastadapter.integrations.passes.host import Place, Placement, host_of
from fastadapter.integrations.passes.prefix import PromptSlot
from fastadapter.integrations.passes.soft_prompt_decoder import SoftPromptHost, difference
from fastadapter.integrations.placing.plans import plan
from fastadapter.integrations.placing.texts import start_from_text
from fastadapter.integrations.verbs import base_parameters
from fastadapter.integrations.verbs.fold import take_out_of_weights
from fastadapter.integrations.verbs.record import (
    Attachments,
    attachments,
    require_attachments,
    require_name,
    require_no_part,
    require_no_rows,
    require_unfolded,
)
from fastadapter.integrations.verbs.save_pretrained import Hold
from fastadapter.integrations.verbs.undo import all_or_nothing
from fastadapter.methods import MethodConfig, SoftPromptConfig

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SERIALS = itertools.count()


def attach(
    model: nn.Module, config: MethodConfig, name: str = "default", *, tokenizer: Any = None
) -> nn.Module:
    """Add an adapter to ``model`` in place, freeze the rest, and make the adapter the active one.

    Works on any transformers model whose attention goes through the attention interface, with any attention
    implementation (prefix tuning and soft prompts: sdpa or eager), before or after ``.to()``, ``torch.compile`` or
    ``set_attn_implementation``. A fresh LLaMA-Adapter (either version) or bottleneck adapter leaves every output of the
    model bit for bit as it was. Only self-attention is adapted; in a multimodal model only that of the text model.

    Heads that are new to the task are copied, and the adapter trains and keeps its own: what stands beside the backbone
    in a model of transformers for a task with labels of the user's own (classes, spans, choices, characters), what a
    user's module has around a backbone, and what ``config.modules_to_save`` names. The head of a language model is
    pretrained and stays frozen. Parameters as new that are in no module of their own are named in a warning.

    Args:
        model: a transformers model (or a module that contains one, or a wrapper around one).
        config: the method and its sizes.
        name: what to call it; letters, digits, ``_`` and ``-``, at most 64.
        tokenizer: the model's; needed where the configuration has an ``init_text``.
    Returns: ``model``.
    Raises:
        ValueError: the name is taken or malformed, a size does not fit the model, or the model's weights hold a folded
            adapter.
        TypeError: ``config`` is not a configuration, or the model cannot be hooked, or the method is not defined for
            it, or it is in DDP or FSDP already, with the reason.
        Nothing is attached then.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from fastadapter.methods import LlamaAdapterConfig
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64))
    >>> model = attach(model, LlamaAdapterConfig(prefix_len=4))
    >>> sum(each.numel() for each in model.parameters() if each.requires_grad)
    264
    """
    install(model, config, name, tokenizer=tokenizer)
    return model


def install(
    model: nn.Module,
    config: MethodConfig,
    name: str,
    *,
    tokenizer: Any = None,
    activate: bool = True,
    fill: Callable[[], None] | None = None,
) -> None:
    """What :func:`attach` does.

    Args:
        activate: whether it becomes the active adapter.
        fill: writes the adapter's weights before anybody can use it; an error from it undoes everything.
    """
    if not isinstance(config, MethodConfig):
        raise TypeError(
            f"config must be a configuration such as LlamaAdapterConfig, got {type(config).__name__}"
        )
    require_adapter_name(name)
    require_open(model)
    model = unwrap(model)
    record = attachments(model) or Attachments()
    if not record.configs:
        require_no_part(model)
    if name in record.configs:
        raise ValueError(
            f"name: an adapter {name!r} is already attached; detach it first or choose another name"
        )
    require_no_rows(record)
    require_unfolded(record)
    reads_text = getattr(config, "init_text", None) is not None
    with all_or_nothing(model, record) as undo:
        hook.install_hook()
        with record.state.only(None):
            # whose weights are known does not read its text again
            planned = config if fill is None or not reads_text else _from_random(config)
            placements = plan(model, planned, tokenizer)
        if not record.configs:
            record.was_trainable = {key: p.requires_grad for key, p in model.named_parameters()}
            model.requires_grad_(False)
        for placement in placements:
            _place(model, record, name, placement)
        frozen_parts.install(model)
        if not record.configs:
            undo.add(functools.partial(rotary.remove, model))
        rotary.install(model)
        record.configs[name] = config
        record.places[name] = [(each.path, each.host) for each in placements]
        record.state.serials[name] = next(_SERIALS)
        if record.hold is None:
            record.hold = hold = Hold()
            undo.add(hold.release)
        setattr(model, RECORD, record)
        _let_passes_begin(model, record)
        _prove_prompts(model, record, name)
        if fill is not None:
            fill()
        elif reads_text and not isinstance(config, SoftPromptConfig):  # that one has read it in its plan
            with record.state.only(None):
                start_from_text(model, config, name, record.places[name], tokenizer)
        if activate and len(record.configs) == 1:
            record.state.default = name
            record.state.choose(None)
        elif activate:  # other threads may be using another one
            record.state.newest = name
            record.state.choose(Choice(name))


def require_adapter_name(name: str, argument: str = "name") -> None:
    """Raise ValueError, calling it ``argument``, unless an adapter can be called ``name``."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{argument} must be 1 to 64 letters, digits, '_' or '-', got {name!r}")


def _from_random(config: Any) -> MethodConfig:
    return dataclasses.replace(config, init=None, init_text=None)


def _place(model: nn.Module, record: Attachments, name: str, placement: Placement) -> None:
    path, kind, adapter, make, options, watch = placement
    module = model.get_submodule(path)
    host = host_of(module, kind)
    if host is None:
        host = make(record.state)
        module.add_module(kind.CHILD, host)
        record.handles[path, kind] = host.hooks(module)
    host.add(name, adapter, **(options or {}))
    host.train(module.training)
    if watch is not None:
        handles = record.watches.setdefault((name, (path, kind)), [])
        handles.append(Watch(model.get_submodule(watch), host, options["source"]))


def _let_passes_begin(model: nn.Module, record: Attachments) -> None:
    """Hooks at every model that holds an adapter now."""
    record.state.known = {}
    names = {id(module): path for path, module in model.named_modules()}
    for module in entry.entries(model):
        path = names[id(module)]
        if path not in record.entries:
            record.entries[path] = entry.install(module, record.state)


def _prove_prompts(model: nn.Module, record: Attachments, name: str) -> None:
    """Run a decoder's soft prompt as the model runs joined embeddings: apart where that is seen to be the same.

    Raises: TypeError: the model does not run it either way.
    """
    for path, kind in record.places[name]:
        if kind is not SoftPromptHost:
            continue
        decoder = model.get_submodule(path)
        if any(each.is_meta for each in decoder.parameters()):
            continue  # nothing to compute with: what the kinds of layers tell has to do
        host = host_of(decoder, kind)
        if host.apart and _is_joined(decoder, name)[0]:
            continue
        host.apart = False
        if getattr(getattr(model, "config", None), "text_config", None) is not None:
            raise TypeError(
                f"{type(model).__name__} makes the masks of its {type(decoder).__name__} itself, in which a soft "
                "prompt that has to run with its text has no place"
            )
        slots = [place for place in record.places[name] if _is_slot(model, place, name)]
        _remove_from(model, record, name, slots)
        record.places[name] = [place for place in record.places[name] if place not in slots]
        same, why = _is_joined(decoder, name)
        if not same:
            raise TypeError(f"{type(decoder).__name__} does not run a soft prompt with its text: {why}")


def _is_slot(model: nn.Module, place: Place, name: str) -> bool:
    path, kind = place
    return isinstance(host_of(model.get_submodule(path), kind).adapter(name), PromptSlot)


def _is_joined(decoder: nn.Module, name: str) -> tuple[bool, str]:
    try:
        found, allowed = difference(decoder, name)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as error:
        return False, f"{type(error).__name__}: {error}"
    return (
        found <= allowed,
        f"outputs {found:.3g} from those of joined embeddings, expected at most {allowed:.3g}",
    )


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all of them; after the last the model is what it was before, bit for bit.

    ``requires_grad`` of the model's own parameters is restored too, and weights that the adapter was folded into or
    that came with it from a file. What was unfrozen and trained in the model itself stays trained. Waits for forward
    passes of other threads, so none loses an adapter half way.

    Raises:
        ValueError: no adapter of that name.
        RuntimeError: called inside a forward pass of the model.
        Nothing is detached then.
    """
    inner = unwrap(model)
    record = require_attachments(inner)
    require_no_rows(record)
    leaving = list(record.configs) if name is None else [require_name(record, name)]
    with all_or_nothing(inner, record) as undo:
        if record.folded is not None and record.folded.name in leaving:
            take_out_of_weights(inner, record, undo)
        for each in leaving:
            _remove(inner, record, each)
        if not record.configs:
            base_parameters.restore(inner, record.base_originals, undo.add)
            for key, parameter in inner.named_parameters():
                parameter.requires_grad_(record.was_trainable.get(key, parameter.requires_grad))
            for path, handles in record.entries.items():
                entry.remove(inner.get_submodule(path), handles)
            entry.forget_recomputation(inner)
            frozen_parts.remove(inner)
            undo.add(functools.partial(rotary.install, inner))
            rotary.remove(inner)
            delattr(inner, RECORD)
            record.state.choose(None)
            hook.remove_hook_if_unused()
            if record.hold is not None:
                record.hold.release()
    return model


def _remove(model: nn.Module, record: Attachments, name: str) -> None:
    _remove_from(model, record, name, record.places[name])
    del record.configs[name], record.places[name], record.state.serials[name]
    record.about.pop(name, None)
    record.state.known = {}
    if record.state.default == name:
        record.state.default = None
    if record.state.newest == name:
        record.state.newest = None
    chosen = record.state.chosen()
    if chosen is not None and name in chosen.names():
        record.state.choose(Choice(None))


def _remove_from(model: nn.Module, record: Attachments, name: str, places: list[Place]) -> None:
    for place in places:
        path, kind = place
        module = model.get_submodule(path)
        host = host_of(module, kind)
        if host is None:
            raise RuntimeError(
                f"{path} lost its child {kind.CHILD!r}: it was removed by other means than detach"
            )
        host.remove(name)
        for watch in record.watches.pop((name, place), []):
            watch.remove()
        if not len(host.adapters):
            hook.release_hook_for(host)
            del module._modules[kind.CHILD]
            for handle in record.handles.pop(place):
                handle.remove()
