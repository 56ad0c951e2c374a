"""Families whose rotary embeddings, keys or heads have a form of their own: each must be adapted as it is."""

import sys

import pytest
import torch
import transformers as tf

import fastadapter as fa
from fastadapter.integrations.parts.projection import Projection
from fastadapter.integrations.verbs.record import adapter_modules, hosts
from tests.support.family_checks import check_method, forget_scalings, keys_at_zero
from tests.support.methods import train_a_little
from tests.support.tiny_models import output_of, tiny_model

# half-width cosines and sinks, complex rotary, sine before cosine, positions asked for, layers with heads of their own
# and keys of others, latent keys and values, three axes of positions, a mask asked for, no keywords handed down
NAMES = (
    "gpt_oss llama4_text gptj codegen ministral3 gemma3n_text gemma4_text deepseek_v2 deepseek_v3 qwen2_vl_text "
    "deepseek_v32 idefics3_vision"
).split()
FAMILIES = [name for name in NAMES if name in tf.CONFIG_MAPPING]
CONFIG = fa.LlamaAdapterConfig(prefix_len=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [CONFIG, fa.LlamaAdapterV2Config(prefix_len=3)], ids=["v1", "v2"])
def test_attaches_runs_trains_and_detaches(family, config):
    """A prompt's keys are those of a token at position 0; ``fa.verify`` passes."""
    check_method(*tiny_model(family), config)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text", "gptj"])
@torch.no_grad()
def test_equals_a_plain_computation(family):
    """With values narrower than keys, heads of several sizes and keys of another layer too."""
    model, inputs = tiny_model(family)
    model.set_attn_implementation("eager")
    fa.attach(model, CONFIG)
    forget_scalings(model)
    train_a_little(model)
    adapted = output_of(model, inputs)
    adapters = adapter_modules(model, "default")
    fa.set_active(model, None)
    known = {}
    for path, adapter in adapters.items():
        attention = model.get_submodule(path)
        [host] = hosts(model)[path]
        own = host.projection.owner(attention)
        rows = [keys_at_zero(model, inputs, own, row) for row in adapter.prompt]
        key, value = (torch.stack(each, dim=1) for each in zip(*rows, strict=True))
        known[attention] = key, value, adapter.gate.tanh()
    file = sys.modules[type(next(iter(known))).__module__]
    original = file.eager_attention_forward

    def plain(module, query, key, value, attention_mask, *args, **kwargs):
        out, weights = original(module, query, key, value, attention_mask, *args, **kwargs)
        if module in known:
            prefix_key, prefix_value, gate = known[module]
            groups = query.shape[1] // prefix_key.shape[0]
            prefix_key, prefix_value = (x.repeat_interleave(groups, 0) for x in (prefix_key, prefix_value))
            probs = torch.softmax(kwargs["scaling"] * query @ prefix_key.mT, dim=-1)
            out = out + (gate[:, None, None] * (probs @ prefix_value)).transpose(1, 2)
        return out, weights

    file.eager_attention_forward = plain
    try:
        expected = output_of(model, inputs)
    finally:
        file.eager_attention_forward = original
    torch.testing.assert_close(adapted, expected, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_prefix_of_narrow_values_is_a_prefix():
    """In latent attention too, keys and values behind a prefix are those of joined ones, with and without a network."""
    for reparam_size in (None, 4):
        model, inputs = tiny_model("deepseek_v3")
        fa.attach(model, fa.PrefixTuningConfig(prefix_len=3, reparam_size=reparam_size))
        train_a_little(model)
        adapted = output_of(model, inputs)
        pairs = {
            model.get_submodule(path): module for path, module in adapter_modules(model, "default").items()
        }
        prefixes = {
            attention: module() for attention, module in pairs.items() if hasattr(module, "value_dim")
        }
        assert all(key.shape[3] == 16 and value.shape[3] == 8 for key, value in prefixes.values())
        fa.set_active(model, None)
        model.set_attn_implementation("eager")
        file = sys.modules[type(next(iter(prefixes))).__module__]
        original = file.eager_attention_forward

        def joined(module, query, key, value, mask, *args, original=original, prefixes=prefixes, **kwargs):
            prefix_key, prefix_value = (x.expand(query.shape[0], -1, -1, -1) for x in prefixes[module])
            key, value = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
            mask = torch.nn.functional.pad(mask, (3, 0))
            return original(module, query, key, value, mask, *args, **kwargs)

        file.eager_attention_forward = joined
        try:
            expected = output_of(model, inputs)
        finally:
            file.eager_attention_forward = original
        torch.testing.assert_close(adapted, expected, rtol=2e-5, atol=2e-5)


def test_sinks_are_refused_at_attach_for_a_shared_softmax():
    """They were refused in the first forward, with the adapter attached. A soft prompt runs with its text there."""
    model, _ = tiny_model("gpt_oss")
    with pytest.raises(TypeError, match=r"attention sinks \(s_aux\)"):
        fa.attach(model, fa.PrefixTuningConfig(prefix_len=3))
    assert not any("fa_" in name for name, _ in model.named_modules())
    fa.verify(fa.attach(model, fa.SoftPromptConfig(prompt_len=3)))


def test_a_layer_that_needs_more_than_rows_is_refused_with_what_it_needs():
    """The reason names the argument, not the error that ``None`` in its place led to."""

    class Asking(torch.nn.Module):
        def forward(self, hidden_states, spans, attention_mask=None, **kwargs):
            return hidden_states[spans]

    from fastadapter.integrations.parts.projection import find_projection

    with pytest.raises(TypeError, match="its forward asks for spans, which rows of a prompt do not have"):
        find_projection(torch.nn.Sequential(Asking()), "0", torch.randn(1, 3, 4))


def test_positions_of_an_unknown_form_are_named():
    """Distances between tokens, say: the error of the last try alone said nothing about them."""
    from fastadapter.integrations.parts.projection import find_projection

    class Distant(torch.nn.Module):
        def forward(self, hidden_states, position_embeddings, **kwargs):
            return hidden_states @ position_embeddings.distances

    with pytest.raises(TypeError, match="none of the known forms of position_embeddings goes with it"):
        find_projection(torch.nn.Sequential(Distant()), "0", torch.randn(1, 3, 4))


def test_keys_that_mix_rows_are_refused():
    """A convolution over keys: a prompt's rows have no keys of their own then."""
    from fastadapter.integrations.parts.projection import Projected, _require_rows_apart

    def mixing(self, attention, rows):
        heads = rows.cumsum(1)[:, None]
        return Projected(heads, heads, heads, {})

    class Mixing(Projection):
        by_forward = mixing

    rows = torch.randn(1, 3, 4)
    projection = Mixing()
    with pytest.raises(TypeError, match="depend on the rows around it"):
        _require_rows_apart(projection, torch.nn.Identity(), rows, projection.by_forward(None, rows))
