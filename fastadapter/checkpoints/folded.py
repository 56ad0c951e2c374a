"""A model folder with an adapter in its weights, for plain transformers, and beside it what no weight can hold."""

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.checkpoints.about import annotate
from fastadapter.checkpoints.files import CheckpointError
from fastadapter.checkpoints.native import save
from fastadapter.checkpoints.tensors import adapter_tensors, set_tensors
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.channel_scale import CopyHost, ScaleHost
from fastadapter.integrations.verbs.attach import attach
from fastadapter.integrations.verbs.fold import fold
from fastadapter.integrations.verbs.record import require_attachments, require_name
from fastadapter.integrations.verbs.settle import settle
from fastadapter.methods import LlamaAdapterConfig, LlamaAdapterV2Config, MethodConfig, PrefixTuningConfig

# The switches by which transformers' configurations give linear layers a bias.
_BIAS_SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")
_NEVER = {
    "llama-adapter": "its gated attention depends on the query, so no weight of the model can hold it",
    "soft-prompt": "its rows stand before the text, where no weight of the model is",
    "bottleneck": "there is a nonlinearity between its two layers, so no weight of the model can hold it",
    "prefix-tuning": "its keys and values stand before the text's, and there is no network behind them to fold",
}


def require_something_to_fold(config: MethodConfig) -> None:
    """Raises: ValueError: nothing of such an adapter can be folded, with the reason."""
    is_network = isinstance(config, PrefixTuningConfig) and config.reparam_size is not None
    if not isinstance(config, LlamaAdapterV2Config) and not is_network:
        raise ValueError(f"{config.method}: {_NEVER.get(config.method, 'it has nothing to fold')}")


@torch.no_grad()
def write_folded(model: Any, folder: str | os.PathLike, name: str = "default") -> MethodConfig | None:
    """Fold adapter ``name`` into ``model`` and save it: the model's files, and what remains as ``adapter.safetensors``.

    Of LLaMA-Adapter V2 the gated prompts remain, as a :class:`LlamaAdapterConfig` (nothing, if every gate is zero):
    they depend on the query. Of prefix tuning the keys and values remain, without the network. ``from_pretrained`` on
    the folder gives the model; ``fastadapter.load(model, folder)`` after it what remains. Afterwards ``model`` is what
    the folder holds, with the remaining adapter attached.

    Returns: the configuration of what remains; ``None``: nothing does.
    Raises:
        ValueError: nothing can be folded; or the model's class has no place for biases of the adapter.
        TypeError: a layer cannot be folded into.
        CheckpointError: a file cannot be written.
    """
    inner = unwrap(model)
    record = require_attachments(inner)
    config = record.configs[require_name(record, name)]
    require_something_to_fold(config)
    facts = {**record.about.get(name, {}), "base_name": Path(folder).resolve().name}
    if record.folded is None:
        fold(inner, name)
    rest, values = _rest(inner, name, config)
    settle(inner, name)
    _give_biases_a_place(inner)
    try:
        inner.save_pretrained(folder)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    if rest is None:
        return None
    with torch.random.fork_rng(devices=[]):
        attach(inner, rest, name)
    # A head's copy begins as the model's head, which holds what was trained.
    set_tensors(inner, name, {**_clones(adapter_tensors(inner, name)), **values})
    annotate(inner, name, facts)
    save(inner, folder, name)
    return rest


def _rest(model: nn.Module, name: str, config: MethodConfig) -> tuple[MethodConfig | None, dict[str, Tensor]]:
    """What of a folded adapter is not in the weights: its configuration, and its parameters."""
    record = require_attachments(model)
    folded = {path for path, kind in record.places[name] if kind in (ScaleHost, CopyHost)}
    tensors = _clones(adapter_tensors(model, name))
    if not isinstance(config, LlamaAdapterV2Config):
        return record.configs[name], tensors
    values = {
        key: each for key, each in tensors.items() if not any(key.startswith(f"{path}.") for path in folded)
    }
    gates = [each for key, each in values.items() if key.rpartition(".")[2] == "gate"]
    if not any(bool(gate.any()) for gate in gates):
        return None, {}
    return (
        LlamaAdapterConfig(
            prefix_len=config.prefix_len,
            layers=config.layers,
            gate=config.gate,
            gate_per_head=config.gate_per_head,
        ),
        values,
    )


def _give_biases_a_place(model: Any) -> None:
    """Make the model one that its class would build from its configuration, since from_pretrained does.

    Biases that are zero go; for others the configuration's switch is thrown, and the layers that get a bias with it
    without having one are given zeros.

    Raises: ValueError: the class has no such switch.
    """
    new = _names(model) - _built(model, {})
    for key in sorted(new):
        path, _, name = key.rpartition(".")
        if name == "bias" and not model.get_parameter(key).any():
            model.get_submodule(path).register_parameter(name, None)
            new.discard(key)
    if not new:
        return
    switches = [each for each in _BIAS_SWITCHES if getattr(model.config, each, None) is False]
    for count in range(1, len(switches) + 1):
        for chosen in itertools.combinations(switches, count):
            built = _built(model, dict.fromkeys(chosen, True))
            missing = built - _names(model)
            if new <= built and all(key.endswith(".bias") for key in missing):
                for key in missing:
                    layer = model.get_submodule(key.removesuffix(".bias"))
                    zeros = layer.weight.new_zeros(layer.out_features)
                    layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
                for each in chosen:
                    setattr(model.config, each, True)
                return
    raise ValueError(
        f"{type(model).__name__} has no place for {len(new)} biases of the adapter (the first is {min(new)}): "
        "from_pretrained would leave them out, so that the folder would not hold this model"
    )


def _names(model: nn.Module) -> set[str]:
    return {key for key, _ in model.named_parameters(remove_duplicate=False)}


def _built(model: Any, changes: dict[str, bool]) -> set[str]:
    """Names of the parameters that the model's class gives it, without weights in memory."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return _names(type(model)(config))


def _clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: each.detach().clone() for key, each in tensors.items()}
