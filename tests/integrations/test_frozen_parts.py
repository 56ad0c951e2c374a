"""The model's own norms and feed-forwards through our kernels: the same model, in every bit that can be the same."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import fastadapter as fa
from fastadapter.integrations.passes import frozen_parts
from fastadapter.nn.classes import class_of
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import needs_extension
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, token_ids

pytestmark = needs_extension
LLAMA = next(family for family in FAMILIES if family.name == "llama")


def parts(model, mixin):
    return [path for path, module in model.named_modules() if isinstance(module, mixin)]


def test_norms_and_feed_forwards_are_found_and_given_back():
    model = build(LLAMA)
    before = {path: type(module) for path, module in model.named_modules()}
    fa.attach(model, CONFIGS["llama-adapter"])
    assert len(parts(model, frozen_parts._Norm)) == 7 and len(parts(model, frozen_parts._FeedForward)) == 3
    assert str(fa.explain(model)).endswith(
        "with the same bits: 7 norms, 3 feed-forwards, 3 rotary embeddings"
    )
    fa.attach(model, CONFIGS["houlsby"], "second")
    fa.detach(model)
    assert {path: type(module) for path, module in model.named_modules()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_has_the_same_bits_and_close_gradients(dtype):
    model, ids = build(LLAMA).to(dtype), token_ids()
    plain = copy.deepcopy(model)
    fa.attach(model, CONFIGS["llama-adapter"])
    inputs = [each.get_input_embeddings()(ids).detach().requires_grad_() for each in (model, plain)]
    outputs = [each(inputs_embeds=x).logits for each, x in zip((model, plain), inputs, strict=True)]
    assert same_bits(*outputs)
    exact = copy.deepcopy(plain).double()
    right = exact.get_input_embeddings()(ids).detach().requires_grad_()
    for output in (*outputs, exact(inputs_embeds=right).logits):
        output.double().square().sum().backward()
    assert_within_budget(inputs[0].grad, inputs[1].grad, right.grad)


def test_a_norm_that_is_trained_gets_its_gradient():
    model = build(LLAMA)
    fa.attach(model, CONFIGS["llama-adapter"])
    model.model.norm.weight.requires_grad_(True)
    model(token_ids()).logits.square().sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_what_computes_something_else_is_left_alone():
    """Found by their parts, some are not what they look like."""
    gemma = tf.GemmaForCausalLM(tf.GemmaConfig(**{**tiny(), "head_dim": 8}))
    fa.attach(gemma, CONFIGS["llama-adapter"])
    assert not parts(gemma, frozen_parts._Norm)  # 1 + weight
    assert len(parts(gemma, frozen_parts._FeedForward)) == 2

    class Halved(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            for name, child in wrapped.named_children():
                self.add_module(name, child)

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)

    llama = build(LLAMA)
    llama.model.layers[0].mlp = Halved(llama.model.layers[0].mlp)
    llama.model.layers[1].input_layernorm.forward = lambda x: x
    expected = llama(token_ids()).logits
    fa.attach(llama, CONFIGS["llama-adapter"])
    assert len(parts(llama, frozen_parts._FeedForward)) == 2 and len(parts(llama, frozen_parts._Norm)) == 6
    assert same_bits(llama(token_ids()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("quick_gelu", None),
    ],
)
def test_activations_are_told_apart_in_every_dtype(act, name, dtype):
    """By their gradients, which are close to each other where they are rounded to bf16."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny(), hidden_act=act)).to(dtype)
    fa.attach(model, CONFIGS["llama-adapter"])
    assert [getattr(layer.mlp, "FA_ACTIVATION", None) for layer in model.model.layers] == [name] * 2


def test_modules_of_one_class_are_proven_one_by_one():
    """Gemma 3n's feed-forwards cut small gates off in the layers that say so."""

    class Sparse(type(build(LLAMA).model.layers[0].mlp)):
        sparsity = 0.0

        def forward(self, x):
            gate = self.gate_proj(x)
            if self.sparsity:
                gate = torch.relu(gate - gate.std(-1, keepdim=True))
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    model = build(LLAMA)
    for layer in model.model.layers:
        layer.mlp.__class__ = Sparse
    model.model.layers[1].mlp.sparsity = 0.5
    fa.attach(model, CONFIGS["llama-adapter"])
    assert parts(model, frozen_parts._FeedForward) == ["model.layers.0.mlp", "model.layers.2.mlp"]


def test_a_norm_that_rounds_otherwise_is_left_alone():
    class Divided(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.eps = nn.Parameter(weight), 1e-6

        def forward(self, x):
            return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt())

    llama = build(LLAMA)
    llama.model.norm = Divided(torch.ones(32))
    fa.attach(llama, CONFIGS["llama-adapter"])
    assert type(llama.model.norm) is Divided and len(parts(llama, frozen_parts._Norm)) == 6


def tiny():
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }


def test_copies_and_pickles_have_the_classes_and_go_on():
    model = build(LLAMA)
    fa.attach(model, CONFIGS["v2-input"])
    train_a_little(model)
    expected = model.eval()(token_ids()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(other(token_ids()).logits, expected)
        found = {path: type(module) for path, module in other.named_modules()}
        assert found == {path: type(module) for path, module in model.named_modules()}
        fa.detach(other)
        assert {type(module) for module in other.modules()} == {
            type(module) for module in build(LLAMA).modules()
        }
    assert repr(model.model.norm).startswith("LlamaRMSNorm(")


def test_an_attach_that_fails_leaves_no_class(monkeypatch):
    model = build(LLAMA)
    before = {path: type(module) for path, module in model.named_modules()}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastadapter.integrations.verbs.attach._let_passes_begin", fail)
    with pytest.raises(KeyboardInterrupt):
        fa.attach(model, CONFIGS["v2-input"])
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_transforms_of_functions_see_pytorch():
    model = build(LLAMA)
    fa.attach(model, CONFIGS["llama-adapter"])
    fa.set_active(model, None)
    norm, x = model.model.norm, torch.randn(4, 32)
    one = torch.func.grad(lambda each: norm(each).square().sum())
    expected = torch.stack([one(each) for each in x])
    assert torch.allclose(torch.func.vmap(one)(x), expected, atol=1e-5)
    assert class_of(norm) is type(build(LLAMA).model.norm)


def test_compiled_models_have_one_graph():
    model = build(LLAMA)
    fa.attach(model, CONFIGS["llama-adapter"])
    explained = torch._dynamo.explain(model)(token_ids())
    assert explained.graph_break_count == 0
