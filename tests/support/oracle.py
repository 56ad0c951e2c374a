"""LLaMA-Adapter computed a second time, without our hook, projection or ops.

The model runs in eager mode with its modeling file's own ``eager_attention_forward`` wrapped: keys and values come
from the weights by a recipe written out per family, the term is three lines of PyTorch.
"""

import contextlib
import sys

import torch
from torch.nn.functional import linear

from fastadapter.integrations.passes.attention import CHILD


def _heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(
        -3, -2
    )  # (prefix_len, width) -> (heads, prefix_len, head_dim)


_NAMES = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))


def _separate(attention, prompt, head_dim):
    """By the names that the family has in the installed transformers."""
    names = next(names for names in _NAMES if names[0] in attention._modules)
    key, value = (
        linear(prompt, module.weight, module.bias) for module in map(attention.get_submodule, names)
    )
    key = _heads(key, head_dim)
    if "k_norm" in attention._modules:
        key = attention.k_norm(key)
    return key, _heads(value, head_dim)


def _phi3(attention, prompt, head_dim):
    kv = attention.num_key_value_heads * head_dim
    rows = attention.qkv_proj.weight[-2 * kv :]
    key, value = linear(prompt, rows).split(kv, dim=-1)
    return _heads(key, head_dim), _heads(value, head_dim)


def _gpt2(attention, prompt, head_dim):
    _, key, value = (prompt @ attention.c_attn.weight + attention.c_attn.bias).chunk(3, dim=-1)
    return _heads(key, head_dim), _heads(value, head_dim)


def _gpt_neox(attention, prompt, head_dim):
    fused = linear(prompt, attention.query_key_value.weight, attention.query_key_value.bias)
    heads = fused.unflatten(-1, (-1, 3, head_dim))  # per head: query, key, value
    return heads[:, :, 1].transpose(0, 1), heads[:, :, 2].transpose(0, 1)


RECIPES = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "phi3": _phi3,
}


@contextlib.contextmanager
def plain_llama_adapter(model, family_name, prompts, gates):
    """Run ``model`` with the adapters ``prompts`` and ``gates``, both by dotted path of the attention module."""
    modules = {model.get_submodule(path): path for path in prompts}
    recipe = RECIPES.get(family_name, _separate)
    file = sys.modules[type(next(iter(modules))).__module__]
    original = file.eager_attention_forward

    def adapted(module, query, key, value, attention_mask, *args, **kwargs):
        out, weights = original(module, query, key, value, attention_mask, *args, **kwargs)
        assert CHILD not in module._modules
        if module in modules:
            path = modules[module]
            prefix_key, prefix_value = recipe(module, prompts[path], query.shape[-1])
            groups = query.shape[1] // prefix_key.shape[0]
            prefix_key, prefix_value = (x.repeat_interleave(groups, 0) for x in (prefix_key, prefix_value))
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            probs = torch.softmax(scale * query @ prefix_key.mT, dim=-1)
            term = gates[path].tanh()[:, None, None] * (probs @ prefix_value)
            out = out + term.transpose(1, 2)
        return out, weights

    file.eager_attention_forward = adapted
    try:
        yield
    finally:
        file.eager_attention_forward = original
