"""The model's own rotary embedding through our kernel: the same model, as long as one of its family has an adapter."""

import pytest
import torch
import transformers as tf
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

import fastadapter as fa
from fastadapter.integrations.passes import rotary
from tests.support.budget import same_bits
from tests.support.gated_prefix import needs_extension
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, token_ids

pytestmark = needs_extension
LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Llama's function, in place before and behind every test, whatever adapted models other tests left."""
    found = modeling_llama.apply_rotary_pos_emb
    found = getattr(found, "fa_own", found)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", found)
    monkeypatch.setattr(rotary, "_users", {})
    monkeypatch.setattr(rotary, "_spaces", {})
    return found


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of the kernel."""
    seen = []
    for name in ("rotary", "run_rotary"):
        original = getattr(rotary, name)
        monkeypatch.setattr(rotary, name, lambda *a, original=original: seen.append(a) or original(*a))
    return seen


def test_it_acts_as_long_as_there_is_an_adapter(own, calls):
    model, ids = build(LLAMA), token_ids()
    expected = model(ids).logits
    fa.attach(model, CONFIGS["llama-adapter"])
    del calls[:]  # of the proof
    assert modeling_llama.apply_rotary_pos_emb is not own
    assert same_bits(model(ids).logits, expected) and len(calls) == 3
    with torch.no_grad():
        assert same_bits(model(ids).logits, expected) and len(calls) == 6
    fa.set_active(model, None)
    model(ids)
    assert len(calls) == 9
    with rotary.left_out():
        assert modeling_llama.apply_rotary_pos_emb is own and same_bits(model(ids).logits, expected)
    assert len(calls) == 9
    fa.detach(model)
    assert modeling_llama.apply_rotary_pos_emb is own


def test_layers_that_somebody_runs_again_in_backward():
    """Regression: it acted in passes of adapted models alone, which a layer is not in when a wrapper runs it again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = []
    for wrapped in (False, True):
        model = build(LLAMA)
        if wrapped:
            for number, block in enumerate(model.model.layers):
                model.model.layers[number] = checkpoint_wrapper(block)
        fa.attach(model, CONFIGS["llama-adapter"])
        train_a_little(model)
        model.zero_grad()
        model(token_ids()).logits.square().mean().backward()
        found.append([each.grad for _, each in fa.trainable_parameters(model)])
    torch.testing.assert_close(*found)


def test_the_function_stays_as_long_as_a_model_needs_it(own):
    models = [build(LLAMA) for _ in range(2)]
    for model in models:
        fa.attach(model, CONFIGS["houlsby"])
        fa.attach(model, CONFIGS["llama-adapter"], "second")
    fa.detach(models[0])
    fa.detach(models[1], "second")
    assert rotary.count(models[1]) == 3 and modeling_llama.apply_rotary_pos_emb.fa_own is own
    fa.detach(models[1])
    assert modeling_llama.apply_rotary_pos_emb is own


def test_whoever_replaced_it_keeps_theirs(own):
    model = fa.attach(build(LLAMA), CONFIGS["houlsby"])
    ours = modeling_llama.apply_rotary_pos_emb
    theirs = lambda *arguments: ours(*arguments)  # noqa: E731
    modeling_llama.apply_rotary_pos_emb = theirs
    fa.detach(model)
    assert modeling_llama.apply_rotary_pos_emb is theirs
    model(token_ids())


def test_another_embedding_is_left_alone(own):
    """A function that somebody put there, and those that turn a part of a head or neighbours."""
    modeling_llama.apply_rotary_pos_emb = doubled = lambda q, k, cos, sin: own(2 * q, k, cos, sin)
    model, ids = build(LLAMA), token_ids()
    expected = model(ids).logits
    fa.attach(model, CONFIGS["llama-adapter"])
    assert modeling_llama.apply_rotary_pos_emb is doubled and same_bits(model(ids).logits, expected)
    before = modeling_phi3.apply_rotary_pos_emb
    config = tf.Phi3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=64, pad_token_id=0)  # fmt: skip
    fa.attach(tf.Phi3ForCausalLM(config), CONFIGS["llama-adapter"])
    assert modeling_phi3.apply_rotary_pos_emb is before


def test_what_the_kernel_is_not_for_is_the_models_own(calls):
    model, ids = build(LLAMA).eval(), token_ids()
    expected = model(ids).logits
    fa.attach(model, CONFIGS["llama-adapter"])
    turn, x, angles = modeling_llama.apply_rotary_pos_emb, torch.randn(2, 3, 4, 8), torch.randn(1, 4, 8)
    del calls[:]
    heads, fixed = x.transpose(1, 2), angles.detach()
    for arguments, options in (
        ((x, x, angles.double(), angles.double()), {}),
        ((x, x, angles.clone().requires_grad_(), angles), {}),
        ((heads, heads, fixed, fixed), {"unsqueeze_dim": 2}),
        ((x, x[:1], fixed, fixed), {}),
    ):
        turn(*arguments, **options)
    assert not calls
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(ids).logits, expected, atol=1e-6) and not calls
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_models(dtype, monkeypatch):
    model, ids = build(LLAMA).to(dtype), token_ids()
    fa.attach(model, CONFIGS["llama-adapter"])
    train_a_little(model)

    def gradients():
        model.zero_grad()
        model(ids).logits.float().square().mean().backward()
        return [each.grad for _, each in fa.trainable_parameters(model)]

    ours = gradients()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb.fa_own)
    assert all(map(same_bits, ours, gradients()))
