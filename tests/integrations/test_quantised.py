"""Quantised bases: layers without a backward say so, the others train every parameter, in transformers' Trainer too.

Stand-ins first, which need no library: a linear layer whose forward has no gradient, and a model that says of itself
what quantised ones do. Then torchao and bitsandbytes, where they are installed.
"""

import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastadapter as fa
from tests.support.models import set_gates, token_ids

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    config.method: config
    for config in (
        fa.LlamaAdapterConfig(3),
        fa.LlamaAdapterV2Config(3),
        fa.PrefixTuningConfig(3),
        fa.SoftPromptConfig(3),
        fa.BottleneckConfig(bottleneck_size=4, init="houlsby"),
    )
}
every_method = pytest.mark.parametrize("method", CONFIGS)
NO_BACKWARD = "has no backward, so adapters would get gradients that lack its part"


class WithoutBackward(nn.Linear):
    """As libraries compute whose kernels have no gradient."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def llama(layer=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if layer is not None:
        for block in model.model.layers:
            block.mlp.up_proj = layer(64, 96, bias=False)
    return model


def train(model):
    ids = token_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return model


@every_method
def test_a_base_without_backward_says_so(method):
    """Not at attach and not in a forward pass, with gradients or without: it can be run, and its outputs are right."""
    model = fa.attach(llama(WithoutBackward), CONFIGS[method])
    set_gates(model)
    plain = llama()
    for path, module in model.named_modules():
        if isinstance(module, WithoutBackward):
            plain.get_submodule(path).load_state_dict({"weight": module.weight})
    fa.attach(plain, CONFIGS[method])
    with torch.no_grad():
        for (_, parameter), (_, other) in zip(*map(fa.trainable_parameters, (plain, model)), strict=True):
            parameter.copy_(other)
    assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)
    fa.verify(model)
    with pytest.raises(RuntimeError, match=f"WithoutBackward .*{NO_BACKWARD}"):
        train(model)
    fa.detach(model)
    assert not [path for path, module in model.named_modules() if "fa_" in path or module._forward_hooks]


def test_a_layer_without_backward_that_came_later():
    """Scales look at what their layer gives in every pass."""
    model = fa.attach(llama(), CONFIGS["llama-adapter-v2"])
    model.model.layers[1].mlp.up_proj = WithoutBackward(64, 96, bias=False)
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        train(model)


def test_nothing_watches_layers_with_a_backward():
    class Derived(nn.Linear):
        pass

    for layer in (nn.Linear, Derived):
        model = fa.attach(llama(layer), CONFIGS["bottleneck"])
        assert not [path for path, _ in model.named_modules() if path.endswith("fa_watch")]


def arguments(folder):
    return TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


DATA = [{"input_ids": token_ids(1, seed=seed)[0], "labels": token_ids(1, seed=seed)[0]} for seed in range(4)]


def fit(model, folder):
    trainer = Trainer(model, arguments(folder), train_dataset=DATA)
    trainer.train()
    return trainer


def moved(model, run):
    before = {name: parameter.detach().clone() for name, parameter in fa.trainable_parameters(model)}
    run()
    return [name for name, each in fa.trainable_parameters(model) if torch.equal(each, before[name])]


def said_to_be_quantised(trainable=True):
    model = llama()
    model.is_quantized = True
    config = types.SimpleNamespace(quant_method="stand-in")
    model.hf_quantizer = types.SimpleNamespace(
        is_trainable=trainable, is_qat_trainable=False, quantization_config=config
    )
    return model


def test_trainer_takes_adapters_on_a_quantised_base(tmp_path):
    """As long as there are some that train; a base whose quantisation cannot be trained on stays refused."""
    model = said_to_be_quantised()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=DATA)
    fa.attach(model, CONFIGS["llama-adapter-v2"])
    assert not moved(model, lambda: fit(model, tmp_path))
    assert not getattr(model, "_hf_peft_config_loaded", False)
    other = fa.attach(said_to_be_quantised(trainable=False), CONFIGS["llama-adapter"])
    with pytest.raises(ValueError, match="stand-in but that quantization method do not support training"):
        Trainer(other, arguments(tmp_path), train_dataset=DATA)
    fa.detach(model)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=DATA)


@every_method
def test_torchao_dynamic_has_no_backward_and_weight_only_has(method):
    quantization = pytest.importorskip("torchao.quantization")
    for config, trains in (
        (quantization.Int8DynamicActivationInt8WeightConfig(), False),
        (quantization.Int8WeightOnlyConfig(), True),
    ):
        model = llama().to(torch.bfloat16)
        quantization.quantize_(model.model, config)
        set_gates(fa.attach(model, CONFIGS[method]))
        if trains:
            train(model)
            assert all(parameter.grad.isfinite().all() for _, parameter in fa.trainable_parameters(model))
        else:
            with pytest.raises(RuntimeError, match=f"Int8Tensor .*{NO_BACKWARD}"):
                train(model)


def test_torchao_leaves_adapters_alone():
    """Their layers are masters, which ops read; quantised after attach, the base changes and they do not."""
    quantization = pytest.importorskip("torchao.quantization")
    model = fa.attach(llama().to(torch.bfloat16), CONFIGS["bottleneck"])
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    assert {type(parameter) for _, parameter in fa.trainable_parameters(model)} == {nn.Parameter}
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    fa.verify(model)


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["int8", "int4"])
def test_bitsandbytes_trains_every_parameter(options, tmp_path):
    """In four bits on a CPU, attach used to pack the attention's weights, and the layers below them learnt nothing."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    fa.attach(model, CONFIGS["llama-adapter-v2"])
    set_gates(model)
    assert not moved(model, lambda: fit(model, tmp_path))
