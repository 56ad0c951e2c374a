"""The model's own linear layers, found by what they are."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import fastadapter as fa
from fastadapter.integrations.parts.linear import linear_layers

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


class Packed(nn.Module):
    """A linear layer as libraries for quantised models write them: no ``nn.Linear``, no parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.packed)


def test_layers_of_other_libraries_are_scaled():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = torch.randint(3, 60, (1, 6))
    plain = [name for name, _ in fa.trainable_parameters(fa.attach(model, fa.LlamaAdapterV2Config(2)))]
    fa.detach(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    truth = model(ids).logits
    fa.attach(model, fa.LlamaAdapterV2Config(2))
    assert [name for name, _ in fa.trainable_parameters(model)] == plain
    assert torch.equal(model(ids).logits, truth)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.fa_scale.adapters["default"].scale.fill_(2.0)
    assert not torch.equal(model(ids).logits, truth)


def test_what_is_not_scaled_is_said():
    """Experts fused into one tensor, and a router that multiplies by itself; every part is named once."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)).eval()
    with pytest.warns(
        UserWarning, match=r"gate_up_proj, down_proj of MixtralExperts; weight of .*Router are no"
    ) as said:
        fa.attach(model, fa.LlamaAdapterV2Config(2))
    assert len([each for each in said if "scale" in str(each.message)]) == 1
    assert not [name for name in linear_layers(model) if "experts" in name]
