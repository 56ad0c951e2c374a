"""Adapters and PEFT's LoRA on one model, in either order.

Judged against the plain computation: a model whose weights are ``W + BA``, with the same adapter on it.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fastadapter as fa
from tests.support.models import token_ids

peft = pytest.importorskip("peft")

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]
OUR_LAYERS = (fa.BottleneckConfig(bottleneck_size=4), fa.PrefixTuningConfig(3, reparam_size=4))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, pad_token_id=0)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def draw(parameters, keep=()):
    """Other values, the same for the same names; what ``keep`` names starts from where it is."""
    for number, (name, parameter) in enumerate(sorted(parameters.items())):
        noise = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.copy_(parameter + noise if any(each in name for each in keep) else noise)


def with_lora(model, targets=TARGETS, **options):
    """``get_peft_model`` with factors that are not zero."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options)).eval()
    draw({name: each for name, each in model.named_parameters() if ".lora_" in name})
    return model


def own(model):
    """The parameters of our adapters, by their names in the bare model."""
    names = ((name.removeprefix("base_model.model."), each) for name, each in model.named_parameters())
    return {name: each for name, each in names if ".fa_" in name}


def move(model):
    """Give every part of our adapters some effect."""
    draw(own(model), keep=(".scale", ".own."))
    return model


def logits(model):
    """With gradients, so that nothing is kept from the call before."""
    return model(input_ids=token_ids()).logits.detach()


def expected(config, build=llama, targets=TARGETS, lora=True):
    """The model with LoRA in its weights, and the adapter on that."""
    model = with_lora(build(), targets).merge_and_unload() if lora else build()
    return move(fa.attach(model, config))


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


CONVENTIONS = pytest.mark.parametrize("scale", ["input", "output"])
ORDER = pytest.mark.parametrize("first", ["lora", "v2"])


def both(config, first, build=llama, targets=TARGETS):
    """A PEFT model with the adapter on it, attached before or after LoRA."""
    if first == "lora":
        return move(fa.attach(with_lora(build(), targets), config))
    inner = fa.attach(build(), config)
    model = with_lora(inner, targets)
    move(inner)
    return model


@CONVENTIONS
@ORDER
def test_scales_act_on_the_layer_with_lora(first, scale):
    """Not on LoRA's factors and not on the base layer alone: unmerged, merged, off, switched and taken out."""
    config = fa.LlamaAdapterV2Config(3, scale=scale)
    model, truth = both(config, first), logits(expected(config))
    without = logits(expected(config, lora=False))
    assert (truth - without).abs().max() > 1e-2
    assert not [name for name in own(model) if "lora_" in name or "base_layer" in name]
    close(logits(model), truth)
    model.merge_adapter()
    close(logits(model), truth)
    model.unmerge_adapter()
    with model.disable_adapter():
        close(logits(model), without)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=True))
    model.set_adapter("other")
    close(logits(model), without)
    model.set_adapter("default")
    close(logits(model), truth)
    model.delete_adapter("other")
    close(logits(model), truth)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "dropped"])
@CONVENTIONS
@ORDER
def test_scales_stay_when_lora_is_unloaded(first, scale, merged):
    config = fa.LlamaAdapterV2Config(3, scale=scale)
    model = both(config, first)
    bare = model.merge_and_unload() if merged else model.unload()
    close(logits(bare), logits(expected(config, lora=merged)))
    again = with_lora(bare)
    again.unload()
    close(logits(bare), logits(expected(config, lora=merged)))


def test_lora_on_gpt2():
    """Its layers hold the transpose, and their widths under other names."""
    config = fa.LlamaAdapterV2Config(3)
    for first in ("lora", "v2"):
        found = logits(both(config, first, gpt2, ["c_attn", "c_proj"]))
        close(found, logits(expected(config, gpt2, ["c_attn", "c_proj"])))


@ORDER
def test_gradients_are_those_of_the_plain_computation(first):
    config = fa.LlamaAdapterV2Config(3)
    model, plain = both(config, first), expected(config)
    for parameter in own(model).values():
        parameter.requires_grad_(True)
    for each in (model, plain):
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    found = own(model)
    for name, parameter in own(plain).items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@ORDER
def test_detach_leaves_lora_alone(first):
    """No child, no hook: the layer that LoRA is around is what it was, and so is LoRA's."""
    reference = with_lora(llama())
    model = both(fa.LlamaAdapterV2Config(3), first)
    fa.detach(model if first == "lora" else model.get_base_model())
    assert torch.equal(logits(model), logits(reference))
    for path, module in model.named_modules():
        assert "fa_" not in path
        assert not module._forward_hooks and not module._forward_pre_hooks, path


@ORDER
def test_verify_save_and_load_find_moved_scales(first, tmp_path):
    config = fa.LlamaAdapterV2Config(3)
    model = both(config, first)
    holder = model if first == "lora" else model.get_base_model()
    fa.verify(holder)
    truth = logits(model)
    fa.save(holder, tmp_path)
    fa.detach(holder)
    fa.load(holder, tmp_path)
    assert torch.equal(logits(model), truth)


def test_copies_follow_too():
    """A model that was copied or pickled moves its own scales, not those of the first."""
    config = fa.LlamaAdapterV2Config(3)
    model, truth = both(config, "v2"), logits(expected(config, lora=False))
    before = logits(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(clone.unload()), truth)
        assert torch.equal(logits(model), before)


def test_copies_made_by_modules_to_save_do_not_scale_twice():
    config = fa.LlamaAdapterV2Config(3)
    model = move(fa.attach(llama(), config))
    truth = logits(model)
    wrapped = with_lora(model, ["q_proj"], modules_to_save=["up_proj"])
    with wrapped.disable_adapter():
        close(logits(wrapped), truth)
    fa.set_active(model, None)
    close(logits(wrapped), logits(with_lora(llama(), ["q_proj"])))


@pytest.mark.parametrize(
    "config", [fa.LlamaAdapterV2Config(3), fa.BottleneckConfig(bottleneck_size=4)], ids=["v2", "bottleneck"]
)
def test_copies_of_adapters_are_refused(config):
    """They acted in place of the first, whatever was chosen."""
    model = move(fa.attach(llama(), config))
    truth = logits(model)
    with pytest.raises(
        TypeError, match=r"mlp: ModulesToSaveWrapper holds a copy of its adapters default.*modules_to_save"
    ):
        with_lora(model, ["q_proj"], modules_to_save=["mlp"])
    assert torch.equal(logits(model), truth)


@pytest.mark.parametrize("targets", ["all-linear", TARGETS, r".*\.(up|down)_proj"], ids=str)
@pytest.mark.parametrize("config", OUR_LAYERS, ids=["bottleneck", "reparam"])
def test_lora_stays_out_of_adapters(config, targets):
    """Their weights go into an op: a layer around them would never act."""
    inner = fa.attach(llama(), config)
    with pytest.warns(UserWarning, match="other adapters go on the model's own layers only"):
        model = with_lora(inner, targets)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "lora_" in name and ".fa_" in name]
    assert [name for name in names if "lora_" in name]
    move(inner)
    assert fa.verify(inner)
    close(logits(model), logits(expected(config, targets=targets)))
    model.unload()
    assert fa.verify(inner)


def test_a_scaled_layer_is_exchanged():
    """By one of the same sizes the scale goes on; another cannot take its place."""
    config = fa.LlamaAdapterV2Config(3)
    model = move(fa.attach(llama(), config))
    attention, truth = model.model.layers[0].self_attn, logits(model)
    old = attention.q_proj
    attention.q_proj = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        attention.q_proj.weight.copy_(old.weight)
    assert torch.equal(logits(model), truth)
    assert not old._forward_hooks and "fa_scale" not in old._modules
    with pytest.raises(TypeError, match=r"q_proj: .*default.*\(32, 32\).*Identity.*detach"):
        attention.q_proj = nn.Identity()
    assert torch.equal(logits(model), truth)


def test_folding_and_lora():
    """Not around LoRA, nor out from under it; where LoRA is in the weights, as everywhere."""
    config = fa.LlamaAdapterV2Config(3)
    model = both(config, "v2")
    inner = model.get_base_model()
    with pytest.raises(TypeError, match=r"q_proj.*unload"):
        fa.fold(inner)
    bare = model.merge_and_unload()
    truth = logits(bare)
    fa.fold(bare)
    close(logits(bare), truth)
    again = with_lora(bare)
    with pytest.raises(TypeError, match=r"q_proj.*unload"):
        fa.unfold(bare)
    again.unload()
    fa.unfold(bare)
    assert torch.equal(logits(bare), truth)


def test_nothing_is_said_about_models_without_adapters():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with_lora(llama(), "all-linear").merge_and_unload()


@pytest.mark.parametrize(
    "config",
    [fa.LlamaAdapterV2Config(3), fa.SoftPromptConfig(3), *OUR_LAYERS],
    ids=lambda config: config.method,
)
def test_a_frozen_adapter_is_told_of_once(config):
    """get_peft_model freezes everything but its own; nothing is said in eval mode or where the adapter learns."""
    inner = fa.attach(llama(), config)
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.eval()(**batch)
    model.train()
    with pytest.warns(
        UserWarning, match=r"adapter 'default' .*frozen.*get_peft_model.*requires_grad_\(True\)"
    ) as said:
        model(**batch)
        model(**batch)
    assert len([each for each in said if "frozen" in str(each.message)]) == 1
    for name, parameter in model.named_parameters():
        if ".fa_" in name:
            parameter.requires_grad_(True)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".lora_" in name)
