"""Put adapters into what they are at inference, and take them out again."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.host import Place, ReparamHost, host_of
from fastadapter.integrations.verbs.folding import (
    Folded,
    fold_weights,
    foldable,
    require_foldable,
    require_restorable,
    restore_weights,
)
from fastadapter.integrations.verbs.record import (
    Attachments,
    require_attachments,
    require_name,
    require_no_rows,
    require_unfolded,
)
from fastadapter.integrations.verbs.undo import Undo, all_or_nothing
from fastadapter.methods import LlamaAdapterV2Config, PrefixTuningConfig
from fastadapter.nn import PrefixTuning


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
    record = require_attachments(inner)
    config = record.configs[require_name(record, name)]
    require_no_rows(record)
    if isinstance(config, LlamaAdapterV2Config):
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
        with all_or_nothing(inner, record) as undo:
            put_into_weights(inner, record, name, undo)
        return model
    if not isinstance(config, PrefixTuningConfig) or config.reparam_size is None:
        raise ValueError(
            f"name: adapter {name!r} has no network to fold and no scales, its configuration is {config}"
        )
    with all_or_nothing(inner, record):
        kept = []
        for path, kind in record.places[name]:
            host = host_of(inner.get_submodule(path), kind)
            if kind is ReparamHost:
                host.remove(name)
                if not len(host.adapters):
                    del inner.get_submodule(path)._modules[kind.CHILD]
                    record.handles.pop((path, kind))
                continue
            kept.append((path, kind))
            if isinstance(adapter := host.adapter(name), PrefixTuning):
                adapter.fold()
                host.forget()
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
    record = require_attachments(inner)
    require_no_rows(record)
    require_name(record, name)
    if record.folded is None or record.folded.name != name:
        raise ValueError(
            f"name: the model's weights do not hold adapter {name!r}; there is nothing to unfold"
        )
    with all_or_nothing(inner, record) as undo:
        take_out_of_weights(inner, record, undo)
    return model


@contextlib.contextmanager
def unfolded(model: nn.Module, name: str) -> Iterator[None]:
    """The folded adapter ``name`` out of the weights while the context lasts."""
    unfold(model, name)
    try:
        yield
    finally:
        record = require_attachments(model)
        with all_or_nothing(model, record) as undo:
            put_into_weights(model, record, name, undo)


def put_into_weights(model: nn.Module, record: Attachments, name: str, undo: Undo) -> None:
    places = foldable(record.places[name])
    folded = Folded(name)
    undo.add(lambda: restore_weights(model, folded))
    fold_weights(model, folded, places)
    record.folded = folded
    for place in places:
        for handle in record.handles.pop(place):
            handle.remove()


def take_out_of_weights(model: nn.Module, record: Attachments, undo: Undo) -> None:
    assert record.folded is not None
    require_restorable(model, record.folded)
    folded, record.folded = record.folded, None
    places = foldable(record.places[folded.name])
    undo.add(lambda: _put_back(model, folded, places))
    restore_weights(model, folded)
    for path, kind in places:
        module = model.get_submodule(path)
        record.handles[path, kind] = host_of(module, kind).hooks(module)


def _put_back(model: nn.Module, folded: Folded, places: list[Place]) -> None:
    """Fold again what was half taken out of the weights: the same bits, they are computed from the same numbers."""
    restore_weights(model, folded)
    fold_weights(model, Folded(folded.name), places)
