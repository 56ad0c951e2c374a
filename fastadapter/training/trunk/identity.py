"""What a trunk's states are made of, so that those of anything else are never taken for them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.checkpoints.about import versions
from fastadapter.checkpoints.fingerprint import configuration, facts_of
from fastadapter.integrations.parts.wrappers import plain, unwrap

Sequence_ = tuple[int, ...]


def backbone(model: nn.Module) -> nn.Module:
    """The model without what stands behind its hidden states; itself where that is not told apart."""
    return getattr(unwrap(model), "base_model", unwrap(model))


def describe_trunk(
    model: nn.Module, weights: Mapping[str, Tensor], stack: str, size: int, dtype: torch.dtype, **more: Any
) -> dict[str, Any]:
    """What decides the states behind ``size`` blocks, as JSON; the same for every task's model around one base.

    Args:
        weights: those that the states are made of, by name; every one of their bits counts.
        dtype: in which the states are stored.
        more: how passes are made: the inputs, the precision.
    """
    inner, base = unwrap(model), backbone(model)
    start = next((f"{path}." for path, module in inner.named_modules() if path and module is base), "")
    device = next(iter(inner.parameters())).device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    known = versions()
    known.pop("python")
    return {
        "class": type(base).__name__,
        "attention": str(getattr(getattr(inner, "config", None), "_attn_implementation", None)),
        "config": json.loads(json.dumps(facts_of(configuration(base)), default=str, sort_keys=True)),
        "weights": digest_tensors({plain(name.removeprefix(start)): each for name, each in weights.items()}),
        "stack": stack.removeprefix(start),
        "blocks": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": f"{device.type} {kind}",
        "versions": known,
        **more,
    }


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, all of their bits, and their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        # one at a time: a copy of all of a large model's weights would not fit
        sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_sequences(trunk: str, sequences: Sequence[Sequence_]) -> str:
    """SHA-256 of some sequences of tokens behind the digest of their trunk."""
    sha = hashlib.sha256(trunk.encode())
    for ids in sequences:
        sha.update(repr(ids).encode())
    return sha.hexdigest()
