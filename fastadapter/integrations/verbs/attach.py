"""Attach adapters to transformers models, in place."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.parts import discovery
from fastadapter.integrations.parts.sharding import require_open, reshard
from fastadapter.integrations.parts.wrappers import RECORD, unwrap
from fastadapter.integrations.passes import attention as hook
from fastadapter.integrations.passes.bottleneck import BottleneckHost, watch_input
from fastadapter.integrations.passes.host import Host, Place, ReparamHost, State, host_of
from fastadapter.integrations.placing.plans import plan
from fastadapter.integrations.verbs import base_parameters
from fastadapter.integrations.verbs.folding import (
    Folded,
    fold_weights,
    foldable,
    require_foldable,
    restore_weights,
)
from fastadapter.integrations.verbs.save_pretrained import Hold
from fastadapter.methods import LlamaAdapterV2Config, MethodConfig, PrefixTuningConfig

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Attachments:
    """What is attached to one model: configurations by name, and what was trainable before the first."""

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    was_trainable: dict[str, bool] = field(default_factory=dict)
    handles: dict[Place, list[RemovableHandle]] = field(default_factory=dict)
    watches: dict[tuple[str, Place], list[RemovableHandle]] = field(default_factory=dict)
    state: State = field(default_factory=State)
    folded: Folded | None = None
    # The model's own parameters that loading an adapter wrote to, as they were, in main memory.
    base_originals: dict[str, Tensor] = field(default_factory=dict)
    hold: Hold | None = None

    @property
    def active(self) -> str | None:
        return self.state.active


def attach(
    model: nn.Module, config: MethodConfig, name: str = "default", *, tokenizer: Any = None
) -> nn.Module:
    """Add an adapter to ``model`` in place, freeze the rest, and make the adapter the active one.

    Works on any transformers model whose attention goes through the attention interface, with any attention
    implementation (prefix tuning and soft prompts: sdpa or eager), before or after ``.to()``, ``torch.compile`` or
    ``set_attn_implementation``. A fresh LLaMA-Adapter (either version) or bottleneck adapter leaves every output of the
    model bit for bit as it was. Only self-attention is adapted; in a multimodal model only that of the text model. A
    classification model's head is copied: the adapter trains and keeps its own.

    Args:
        model: a transformers model (or a module that contains one, or a wrapper around one).
        config: the method and its sizes.
        name: what to call it; letters, digits, ``_`` and ``-``, at most 64.
        tokenizer: the model's, for ``SoftPromptConfig(init_text=...)`` alone.
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
    >>> sum(parameter.numel() for _, parameter in trainable_parameters(model))
    264
    """
    if not isinstance(config, MethodConfig):
        raise TypeError(
            f"config must be a configuration such as LlamaAdapterConfig, got {type(config).__name__}"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 64 letters, digits, '_' or '-', got {name!r}")
    require_open(model)
    outer, model = model, unwrap(model)
    record = attachments(model) or Attachments()
    if not record.configs:
        _require_no_part(model)
    if name in record.configs:
        raise ValueError(
            f"name: an adapter {name!r} is already attached; detach it first or choose another name"
        )
    _require_no_rows(record)
    require_unfolded(record)
    hook.install_hook()
    try:
        with record.state.only(None):
            placements = plan(model, config, tokenizer)
    except Exception:
        hook.remove_hook_if_unused()
        raise
    if not record.configs:
        record.was_trainable = {key: p.requires_grad for key, p in model.named_parameters()}
        model.requires_grad_(False)
    for path, kind, adapter, make, options, watch in placements:
        module = model.get_submodule(path)
        host = host_of(module, kind)
        if host is None:
            host = make(record.state)
            module.add_module(kind.CHILD, host)
            record.handles[path, kind] = _hooks(model, path, host)
        host.add(name, adapter, **(options or {}))
        host.train(module.training)
        if watch is not None:
            assert isinstance(host, BottleneckHost)
            handles = record.watches.setdefault((name, (path, kind)), [])
            handles.append(watch_input(model.get_submodule(watch), host, options["source"]))
    record.configs[name] = config
    record.places[name] = [(path, kind) for path, kind, *_ in placements]
    record.hold = record.hold or Hold()
    setattr(model, RECORD, record)
    set_active(model, name)
    return outer


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all of them; after the last the model is what it was before, bit for bit.

    ``requires_grad`` of the model's own parameters is restored too, and weights that the adapter was folded into or
    that came with it from a file. What was unfrozen and trained in the model itself stays trained.

    Raises: ValueError: no adapter of that name.
    """
    outer, model = model, unwrap(model)
    record = _require_attachments(model)
    _require_no_rows(record)
    leaving = list(record.configs) if name is None else [_require_name(record, name)]
    if record.folded is not None and record.folded.name in leaving:
        unfold(model, record.folded.name)
    for each in leaving:
        for place in record.places[each]:
            path, kind = place
            module = model.get_submodule(path)
            host = host_of(module, kind)
            if host is None:
                raise RuntimeError(
                    f"{path} lost its child {kind.CHILD!r}: it was removed by other means than detach"
                )
            host.remove(each)
            for handle in record.watches.pop((each, place), []):
                handle.remove()
            if not host.adapters:
                hook.release_hook_for(host)
                del module._modules[kind.CHILD]
                for handle in record.handles.pop(place):
                    handle.remove()
        del record.configs[each], record.places[each]
        if record.active == each:
            record.state.active = None
    if not record.configs:
        base_parameters.restore(model, record.base_originals)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(record.was_trainable.get(key, parameter.requires_grad))
        delattr(model, RECORD)
        if record.hold is not None:
            record.hold.release()
        hook.remove_hook_if_unused()
    return outer


def set_active(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that acts from now on; ``None`` is the base model.

    Raises: ValueError: no adapter of that name, or the weights hold another, folded.
    """
    record = _require_attachments(unwrap(model))
    _require_no_rows(record)
    if name is not None:
        _require_name(record, name)
    require_unfolded(record, unless=name)
    record.state.active = name


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Give every row of a batch an adapter of its own while the context lasts: forward, training step, ``generate``.

    Adapters of different methods and sizes go together. Under beam search and ``num_return_sequences`` a row's copies
    keep its adapter. In fp32, a row is bit for bit what it is in any other batch of the same shape where it has the
    same adapter; a batch of another shape may round the model's own matrix products differently. An encoder's soft
    prompts are part of the shape: all rows are longer by the longest prompt of the batch, those without one too.

    Args:
        names: an adapter, or ``None`` for the base model, for every row.
    Raises: ValueError: no adapter of that name, no names, a context in a context, rows without an adapter that is
        folded into the weights; and in the forward pass a batch of another number of rows.

    >>> with rows(model, ["reviews", None, "legal"]):  # doctest: +SKIP
    ...     model.generate(**batch)
    """
    inner = unwrap(model)
    record = _require_attachments(inner)
    _require_no_rows(record)
    if isinstance(names, str) or not names:
        raise ValueError(f"rows must be a list of names, one per row of the batch, got {names!r}")
    state = record.state
    chosen = tuple(None if each is None else _require_name(record, each) for each in names)
    for each in chosen:
        require_unfolded(record, unless=each)
    expand: Any = getattr(inner, "_expand_inputs_for_generation", None)

    def expanding(expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        state.factor = expand_size
        return expand(expand_size, *args, **kwargs)

    state.rows, state.factor = chosen, 1
    if expand is not None:
        inner._expand_inputs_for_generation = expanding  # type: ignore[assignment]
    try:
        for module in inner.modules():
            if isinstance(module, Host):
                module.prepare_rows()
        yield model
    finally:
        state.rows, state.factor = None, 1
        if expand is not None:
            del inner._expand_inputs_for_generation


def fold(model: nn.Module, name: str = "default") -> nn.Module:
    """Put what an adapter needs for training alone into what it is at inference.

    Prefix tuning with ``reparam_size``: the network behind the prefix is replaced by the keys and values that it gives
    now. The outputs stay the same, bit for bit; training cannot be resumed as it was.

    LLaMA-Adapter V2: scales and biases go into the weights and biases of the linear layers, which no longer cost
    anything then; the adapter's norms and head into the model's. The gated prompts stay an adapter: they depend on the
    query. Products are formed in fp32 and rounded once to the weights' dtype (:meth:`ChannelScale.folded`), so outputs
    differ by rounding, and by no more than scaled activations do in that dtype. While the weights hold an adapter, the
    model's own weights wait in main memory, no other can be attached, chosen or loaded, and :func:`save` still writes
    the adapter itself; :func:`unfold` and :func:`detach` put the weights back, bit for bit.

    Returns: ``model``.
    Raises:
        ValueError: no adapter of that name, one without anything to fold, or (V2) one that is folded already, not
            active or not alone on the model; or a weight is tied, hooked by others, or would overflow.
        TypeError: (V2) a layer is quantised, derived, wrapped or sharded.
        Nothing is changed then.

    >>> fold(model)  # doctest: +SKIP
    """
    inner = unwrap(model)
    record = _require_attachments(inner)
    config = record.configs[_require_name(record, name)]
    if isinstance(config, LlamaAdapterV2Config):
        _require_no_rows(record)
        require_unfolded(record)
        if list(record.configs) != [name]:
            others = ", ".join(each for each in record.configs if each != name)
            raise ValueError(
                f"name: beside adapter {name!r} there is {others}, made for weights without it; detach the others "
                "before folding"
            )
        if record.active != name:
            raise ValueError(f"name: adapter {name!r} is not the active one; call set_active before folding")
        require_foldable(inner, name, foldable(record.places[name]), record.handles)
        _fold_into_weights(inner, record, name)
        return model
    if not isinstance(config, PrefixTuningConfig) or config.reparam_size is None:
        raise ValueError(
            f"name: adapter {name!r} has no network to fold and no scales, its configuration is {config}"
        )
    kept = []
    for path, kind in record.places[name]:
        host = host_of(inner.get_submodule(path), kind)
        if kind is ReparamHost:
            host.remove(name)
            if not host.adapters:
                del inner.get_submodule(path)._modules[kind.CHILD]
                record.handles.pop((path, kind))
        else:
            host.adapter(name).fold()
            kept.append((path, kind))
    record.places[name] = kept
    record.configs[name] = replace(config, reparam_size=None)
    return model


def unfold(model: nn.Module, name: str = "default") -> nn.Module:
    """Take an adapter out of the weights that :func:`fold` put it into: they are what they were, bit for bit.

    The adapter acts on, as before folding, and can be trained again. In a model that was cast since, the weights are
    what casting them gives; values that were written into them since are lost.

    Returns: ``model``.
    Raises: ValueError: no adapter of that name, or its weights are not folded (the network behind a prefix is gone).

    >>> unfold(model)  # doctest: +SKIP
    """
    inner = unwrap(model)
    record = _require_attachments(inner)
    _require_no_rows(record)
    _require_name(record, name)
    if record.folded is None or record.folded.name != name:
        raise ValueError(
            f"name: the model's weights do not hold adapter {name!r}; there is nothing to unfold"
        )
    restore_weights(inner, record.folded)
    record.folded = None
    for path, kind in foldable(record.places[name]):
        record.handles[path, kind] = _hooks(inner, path, host_of(inner.get_submodule(path), kind))
    return model


@contextlib.contextmanager
def unfolded(model: nn.Module, name: str) -> Iterator[None]:
    """The folded adapter ``name`` out of the weights while the context lasts."""
    unfold(model, name)
    try:
        yield
    finally:
        _fold_into_weights(model, _require_attachments(model), name)


def _fold_into_weights(model: nn.Module, record: Attachments, name: str) -> None:
    places = foldable(record.places[name])
    record.folded = fold_weights(model, name, places)
    for place in places:
        for handle in record.handles.pop(place):
            handle.remove()


def _hooks(model: nn.Module, path: str, host: Host) -> list[RemovableHandle]:
    """Let a host act in its module, the one at ``path``."""
    block = discovery.checkpointed_block(model, path)
    gradients = block.register_forward_pre_hook(discovery.let_gradients_in)
    return [*host.hooks(model.get_submodule(path)), gradients]


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require gradients, in the model's order; hand the second to an optimiser.

    Names are those in the adapted model, whatever is wrapped around it. What a module around it adds of its own (a
    head over a backbone) comes last.
    """
    inner = unwrap(model)
    reshard(inner)
    inside = list(inner.named_parameters())
    own = {id(parameter) for _, parameter in inside}
    around = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in own]
    return [(name, parameter) for name, parameter in inside + around if parameter.requires_grad]


def attachments(model: nn.Module) -> Attachments | None:
    """The record of what is attached to ``model``, if anything is."""
    return getattr(unwrap(model), RECORD, None)


def hosts(model: nn.Module) -> dict[str, list[Host]]:
    """What carries adapters in ``model``, by the dotted path of the adapted module."""
    found = {
        path: [child for child in module.children() if isinstance(child, Host)]
        for path, module in unwrap(model).named_modules()
    }
    return {path: each for path, each in found.items() if each}


def adapter_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of adapter ``name`` that hold parameters, by the dotted path of the module they are in.

    Raises: ValueError: no adapter of that name.
    """
    model = unwrap(model)
    record = _require_attachments(model)
    _require_name(record, name)
    found = {
        path: host_of(model.get_submodule(path), kind).adapter(name) for path, kind in record.places[name]
    }
    return {path: module for path, module in found.items() if any(True for _ in module.parameters())}


def _require_attachments(model: nn.Module) -> Attachments:
    record = attachments(model)
    if record is None:
        _require_no_part(model)
        raise ValueError("model: no adapter is attached to it")
    return record


def _require_no_part(model: nn.Module) -> None:
    """Raises: ValueError: adapters act in ``model`` that are attached to a module around it."""
    if any(isinstance(module, Host) for module in model.modules()):
        raise ValueError(
            f"model: this {type(model).__name__} is a part of a model that adapters are attached to; pass that model"
        )


def _require_name(record: Attachments, name: str) -> str:
    if name not in record.configs:
        raise ValueError(
            f"name: no adapter {name!r} is attached; there is {', '.join(record.configs) or 'none'}"
        )
    return name


def require_unfolded(record: Attachments | None, unless: str | None = None) -> None:
    """Refuse what would act on weights that hold an adapter as if they were the base model's.

    Raises: ValueError: the weights hold an adapter other than ``unless``.
    """
    if record is not None and record.folded is not None and record.folded.name != unless:
        raise ValueError(
            f"model: its weights hold adapter {record.folded.name!r}, folded; unfold or detach it first"
        )


def _require_no_rows(record: Attachments) -> None:
    if record.state.rows is not None:
        raise ValueError(
            "model: inside rows(...) its adapters cannot be attached, detached, folded, chosen or named again"
        )
