"""The model that recipes are measured on, and the same adapter put into it by us and by PEFT.

The shape is SmolLM2-135M's, with random weights: what is computed does not depend on their values. All variants of
a model share its weights, so they share what is in the caches too. Prompts and gates are equal in all of them, and
the gate is 0.1 everywhere: a zero gate would let our op skip its work. PEFT has one plain scalar per layer, so the
gate is that in ours as well, and both compute the same function; :func:`require_equal_losses` holds them to it.
"""

import contextlib
import copy
import importlib
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaptionPromptConfig, get_peft_model
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface

import fastadapter as fa
from fastadapter.integrations.passes import rotary

SMOLLM2_135M = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Llama-3.2-1B's
LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = {**SMOLLM2_135M, "num_hidden_layers": 3, "intermediate_size": 192, "vocab_size": 512}
PREFIX_LEN = 10
GATE = 0.1

# The lookup as transformers has it. Attaching replaces it for the whole process, and neither the bare model nor PEFT
# should pay for that.
_PLAIN_LOOKUP = AttentionInterface.get_interface
_op = importlib.import_module("fastadapter.ops.gated_prefix")


@contextlib.contextmanager
def without_hook():
    """transformers' attention and rotary embeddings as they are without us."""
    hooked = AttentionInterface.get_interface
    AttentionInterface.get_interface = _PLAIN_LOOKUP
    try:
        with rotary.left_out():
            yield
    finally:
        AttentionInterface.get_interface = hooked


@contextlib.contextmanager
def on_backend(backend: str):
    """Have the op's automatic choice be ``backend``."""
    choose = _op.choose_backend
    _op.choose_backend = lambda _, *call: choose(backend, *call)
    try:
        yield
    finally:
        _op.choose_backend = choose


def build(
    *,
    small: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shape: Mapping[str, Any] | None = None,
) -> LlamaForCausalLM:
    """The frozen base model; ``shape`` changes fields of its configuration."""
    torch.manual_seed(0)
    config = {**(SMALL if small else SMOLLM2_135M), **(shape or {})}
    with torch.device(device):  # a billion normal numbers take a CPU ten seconds
        model = LlamaForCausalLM(LlamaConfig(**config))
    return model.to(dtype).requires_grad_(False)


def share(model: nn.Module) -> nn.Module:
    """Another model on the same weights."""
    return copy.deepcopy(model, {id(x): x for x in itertools.chain(model.parameters(), model.buffers())})


def with_input_gradient(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """The frozen floor of training the top ``layers``: a gradient flows down to the input of the lowest of them.

    With all layers that is the embedding output.
    """
    model = share(model)
    lowest = model.model.layers[len(model.model.layers) - layers]
    lowest.register_forward_pre_hook(lambda block, args: (args[0].detach().requires_grad_(), *args[1:]))
    return model


def with_fastadapter(model: LlamaForCausalLM, layers: int, prefix_len: int = PREFIX_LEN) -> LlamaForCausalLM:
    config = fa.LlamaAdapterConfig(prefix_len, layers, gate="identity", gate_per_head=False)
    model = fa.attach(share(model), config)
    adapters = [m for m in model.modules() if isinstance(m, fa.nn.GatedPrefix)]
    for adapter, prompt in zip(adapters, prompts(model, layers, prefix_len), strict=True):
        adapter.prompt.data.copy_(prompt)
        adapter.gate.data.fill_(GATE)
    return model


def with_peft(model: LlamaForCausalLM, layers: int, prefix_len: int = PREFIX_LEN) -> nn.Module:
    config = AdaptionPromptConfig(adapter_len=prefix_len, adapter_layers=layers, task_type="CAUSAL_LM")
    model = get_peft_model(share(model), config)
    adapters = [m for m in model.modules() if isinstance(m, AdaptedAttention)]
    for adapter, prompt in zip(adapters, prompts(model, layers, prefix_len), strict=True):
        adapter.adaption_prompt.data.copy_(prompt[None])
        adapter.adaption_gate.data.fill_(GATE)
    return model


def prompts(model: nn.Module, layers: int, prefix_len: int = PREFIX_LEN) -> Tensor:
    """``(layers, prefix_len, hidden_size)``, the same for everyone."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(layers, prefix_len, model.config.hidden_size, generator=generator)


def cache_keyword(model: nn.Module) -> str:
    """What the model calls its cache: transformers renames ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def tokens(model: nn.Module, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def training_step(model: nn.Module, ids: Tensor) -> Tensor:
    """Forward and backward of the model's own loss on every token; no optimizer. The loss comes back detached."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach()


def require_equal_losses(models: dict[str, tuple[nn.Module, bool]], ids: Tensor, tolerance: float) -> None:
    """All adapted models compute one function. ``models``: the model and whether it is ours, by name."""
    losses = {}
    for name, (model, is_ours) in models.items():
        with torch.no_grad(), contextlib.nullcontext() if is_ours else without_hook():
            losses[name] = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    if max(losses.values()) - min(losses.values()) > tolerance:
        raise RuntimeError(f"the variants do not compute the same function, losses: {losses}")
