"""Where in a transformers model adapters can go: its self-attentions, blocks and decoder."""

import inspect
import re
from typing import Any

import torch
from torch import nn

from fastadapter.integrations.parts.blocks import Block, blocks_of

_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
# What the file of a model calls transformers' attention functions.
LOOKUP = "ALL_ATTENTION_FUNCTIONS"
# Architectures that the tests hold to every promise; any other that uses the attention interface may work.
TESTED = (
    "bert, distilbert, gemma3, gpt2, gpt_neox, llama, mistral, phi3, qwen3, roberta, t5 (encoder), vit, whisper"
).split(", ")


def uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and LOOKUP in code.co_names


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    found = {}
    for path, module in model.named_modules():
        if not uses_interface(module) or getattr(module, "is_cross_attention", False):
            continue
        if _CROSS.search(path.rpartition(".")[2]) or _CROSS.search(type(module).__name__):
            continue
        if text_config is not None and getattr(module, "config", None) is not text_config:
            continue
        found[path] = module
    return found


def attentions(model: nn.Module, layers: int | None) -> list[tuple[str, nn.Module]]:
    """The self-attention modules of the top ``layers`` blocks of each stack, in the model's order.

    A self-attention that is in no block, such as that of a pooling head, is not among them.

    Raises:
        TypeError: the model has none that goes through the attention interface, or no blocks.
        ValueError: ``layers`` is more than a stack has.
    """
    found = self_attentions(model)
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no self-attention that goes through transformers' attention interface, "
            f"so it cannot be hooked; tested architectures: {', '.join(TESTED)}"
        )
    stacks: dict[str, dict[str, list[str]]] = {}
    for path, block in blocks(model).items():
        stacks.setdefault(block.stack, {}).setdefault(block.path, []).append(path)
    chosen = []
    for stack, members in stacks.items():
        if layers is not None and layers > len(members):
            raise ValueError(
                f"layers must be at most {len(members)}, the attention blocks of {stack}, got {layers}"
            )
        top = list(members)[-layers if layers else 0 :]
        chosen += [path for block in top for path in members[block]]
    return [(path, found[path]) for path in chosen]


def blocks(model: nn.Module) -> dict[str, Block]:
    """The block around each self-attention, by the attention's path; one that is in no list of blocks has none.

    Raises: TypeError: no self-attention is in a list of blocks.
    """
    paths = list(self_attentions(model))
    found = blocks_of(model, paths)
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no list of blocks: {', '.join(paths)} in no ModuleList, so the top layers "
            "of the model are not defined"
        )
    return found


def floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a module computes in: of its first floating-point parameter, fp32 where it has none (quantised)."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or for offloaded ones (meta) where accelerate brings them."""
    tensors = (*module.parameters(), *module.buffers())
    if not tensors:
        return torch.device("cpu")
    parameter = tensors[0]
    if parameter.is_meta:
        for each in module.modules():
            device = getattr(getattr(each, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return parameter.device


def single_stack(model: nn.Module, paths: list[str], what: str = "a soft prompt") -> str:
    """The one list of blocks that holds the attentions at ``paths``.

    Raises: TypeError: there are several.
    """
    around = blocks(model)
    stacks = {around[path].stack for path in paths}
    if len(stacks) > 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} has more than one stack of blocks ({', '.join(sorted(stacks))}): {what} is "
            "defined for a single decoder or encoder"
        )
    return stacks.pop()


def is_causal(model: nn.Module, paths: list[str]) -> bool:
    return all(getattr(model.get_submodule(path), "is_causal", True) for path in paths)


def decoder_of(model: nn.Module, stack: str) -> tuple[str, Any]:
    """The decoder around a list of blocks, and its path.

    Raises: TypeError: it does not take a prompt as embeddings.
    """
    path = stack.rpartition(".")[0]
    decoder: Any = model.get_submodule(path)
    parameters = inspect.signature(decoder.forward).parameters
    if not {"inputs_embeds", "position_ids"} <= parameters.keys():
        raise TypeError(
            f"{type(decoder).__name__} takes no inputs_embeds and position_ids, so no soft prompt can be run through it"
        )
    return path, decoder


def require_positions_before(decoder: nn.Module, text_config: Any, what: str) -> None:
    """Raises: TypeError: nothing can stand at the positions before 0 of this model."""
    if "llama_4_scaling_beta" in (getattr(text_config, "rope_parameters", None) or {}):
        raise TypeError(
            f"{type(decoder).__name__} scales queries by their position, which is not defined before the text, where "
            f"{what} stands"
        )


def looks_back_only(model: nn.Module) -> bool:
    """Whether no token sees what stands behind it, as far as can be told: then padding on the right needs no mask."""
    paths = list(self_attentions(model))
    one_stack = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(paths) and one_stack and is_causal(model, paths)


def rotary_dim(model: nn.Module, path: str) -> int | None:
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
