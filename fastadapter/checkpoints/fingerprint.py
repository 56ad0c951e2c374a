"""What tells one base model from another of the same shape: facts of its configuration and a few of its weights.

An adapter on another base computes something else without an error. Values are compared, not a digest of them, so that
the same base in another dtype is still the same; the digest is for people and scripts. What cannot be compared
(quantised, sharded, offloaded or resized weights) is left out, and so is what an adapter brings itself (a head's copy).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.wrappers import plain
from fastadapter.integrations.passes.channel_scale import CopyHost
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.verbs.record import attachments

_PARAMETERS, _VALUES = 32, 4
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Names as they are without PEFT around the model and its layers.
_PEFT = re.compile(r"^base_model\.(model\.)?|\.base_layer(?=\.)")
# Fields of a configuration that leave the function of a model in eval mode as it is, or that a cast, a resized or a
# quantised copy of a model may change, or whose effect is in the weights that are compared; and every name that begins
# with an underscore or speaks of dropout.
_IRRELEVANT = {
    "apply_spec_augment",
    "architectures",
    "auto_map",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "ctc_loss_reduction",
    "ctc_zero_infinity",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "forced_decoder_ids",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "layerdrop",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "reorder_and_upcast_attn",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "suppress_tokens",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


def configuration(model: Any) -> dict[str, Any]:
    """The configuration of a model without where it came from; empty where it has none."""
    config = getattr(model, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else {}
    return {k: v for k, v in found.items() if k not in ("_name_or_path", "transformers_version")}


def sample(parameter: Tensor, count: int) -> Tensor:
    """About ``count`` values of a parameter from all over it: enough to tell it from its fine-tuned sibling."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // count)]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What :func:`unlike` needs to know of the frozen model behind adapters, and its names and digests, as JSON."""
    parameters = {
        name: parameter for name, parameter in _comparable(model).items() if not parameter.requires_grad
    }
    step = max(1, -(-len(parameters) // _PARAMETERS))
    chosen = list(parameters)[::-1][::step]  # the last one is always among them: siblings differ there first
    facts = facts_of(configuration(model))
    return {
        "name": _name(model),
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "fingerprint": hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_digest": _weights_digest({name: parameters[name] for name in chosen}),
        "config": facts,
        "weights": {name: [list(parameters[name].shape), _hex(parameters[name])] for name in chosen},
    }


def _name(model: nn.Module) -> str | None:
    """What ``from_pretrained`` was given, as :func:`portable_name`."""
    given = getattr(getattr(model, "config", None), "_name_or_path", None)
    return portable_name(given) if isinstance(given, str) and given else None


def portable_name(given: str) -> str:
    """The name of a model; of a folder its last part: a file travels, and its readers have no such path.

    >>> portable_name("/models/little-llama"), portable_name("some/base")
    ('little-llama', 'some/base')
    """
    is_path = os.path.isabs(given) or given.startswith((".", "~")) or os.path.isdir(given)
    return os.path.basename(os.path.realpath(os.path.expanduser(given))) if is_path else given


def _weights_digest(chosen: dict[str, Tensor]) -> str | None:
    """SHA-256 of some values, rounded to bf16: the same for a base that was loaded in fp32 or in bf16 (not in fp16,
    which rounds twice, so that some values come out one step apart). ``None``: there is nothing to look at.
    """
    if not chosen:
        return None
    digest = hashlib.sha256()
    for name in sorted(chosen):
        digest.update(f"{name} {tuple(chosen[name].shape)} ".encode())
        digest.update(_few(chosen[name]).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def unlike(saved: dict[str, Any], model: nn.Module, brought: Iterable[str] = ()) -> list[str]:
    """In what ``model`` differs from the one that ``saved`` is the fingerprint of; empty for an older file.

    Args:
        brought: names of what the adapter has in place of the model's own, which are not compared.
    Raises: ValueError: it is no fingerprint.
    """
    own = _comparable(model)
    for name in brought:
        own.pop(name, None)
    different, absent = [], []
    try:
        old, new = (
            saved.get("config", {}),
            json.loads(json.dumps(facts_of(configuration(model)), default=str)),
        )
        found = differences(shared(old, new), shared(new, old))
        for name, (shape, values) in saved.get("weights", {}).items():
            before = torch.frombuffer(bytearray(bytes.fromhex(values)), dtype=torch.float32)
            if name in own and list(own[name].shape) == shape and not _same(before, _few(own[name])):
                different.append(name)
            elif name not in own and ".lora_" in name:
                absent.append(name)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"its record of the base model is malformed: {error}") from None
    for what, names in (("other weights in", different), ("no", absent)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{what} {', '.join(names[:3])}{more}")
    return found


def differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Each value that is not what it was, in words."""
    found = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_digest else repr(value)


def facts_of(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that decide what a model computes, dropout apart."""
    return {
        key: facts_of(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if isinstance(key, str) and not key.startswith("_") and "drop" not in key and key not in _IRRELEVANT
    }


def shared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The fields that both have: releases of transformers add and remove some."""
    return {
        key: shared(value, other[key]) if isinstance(value, dict) and isinstance(other[key], dict) else value
        for key, value in one.items()
        if key in other
    }


def _comparable(model: nn.Module) -> dict[str, Tensor]:
    """The model's own matrices whose values are at hand, as they are without a folded adapter; tied ones by each name.

    Without those that an adapter has a copy of: a head is drawn anew in every model that is made for a task.
    """
    hosts: Iterable[nn.Module] = (module for module in model.modules() if isinstance(module, Host))
    left_out = {id(parameter) for host in hosts for parameter in host.parameters()}
    for module in model.modules():
        if CopyHost.CHILD in module._modules:
            left_out.update(map(id, module.parameters()))
    record = attachments(model)
    folded = {} if record is None or record.folded is None else record.folded.originals
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = folded.get(name)
        value: Tensor = parameter if original is None else original
        whole = type(value.data) is Tensor and value.dtype in _DTYPES and value.device.type != "meta"
        if whole and value.dim() > 1 and value.numel() and id(parameter) not in left_out:
            found[_PEFT.sub("", plain(name))] = value
    return found


def _few(parameter: Tensor) -> Tensor:
    return sample(parameter, _VALUES)[:_VALUES].float().cpu()


def _hex(parameter: Tensor) -> str:
    return _few(parameter).numpy().astype("<f4").tobytes().hex()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two samples are of the same weights, perhaps rounded to different dtypes."""
    grains = _grain(one), _grain(other)
    if grains[0] == grains[1]:
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return torch.allclose(one, other, rtol=max(grains), atol=1e-7, equal_nan=True)


def _grain(values: Tensor) -> float:
    """The relative distance of the values that a sample can be made of: of a half type, where it would fit in one."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float().nan_to_num(), values.nan_to_num()):
            return torch.finfo(dtype).eps
    return 0.0
