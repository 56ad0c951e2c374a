"""Models without weights in memory: offloaded by accelerate, or made on the meta device."""

import copy

import pytest
import torch
import transformers as tf

import fastadapter as fa
from fastadapter.integrations.passes import frozen_parts
from tests.support.methods import train_a_little
from tests.support.models import token_ids

accelerate = pytest.importorskip("accelerate")
CONFIGS = {
    "llama-adapter": fa.LlamaAdapterConfig(prefix_len=3),
    "prefix": fa.PrefixTuningConfig(prefix_len=3),
    "prefix-reparam": fa.PrefixTuningConfig(prefix_len=3, reparam_size=4),
    "bottleneck": fa.BottleneckConfig(bottleneck_size=4),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)).eval()


@every_config
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_models_attach_and_run(config, where, tmp_path):
    """The adapter is where accelerate brings the weights to: with them in reach the bits are the same."""
    model = llama()
    plain = copy.deepcopy(model)
    if where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    outputs = []
    for each in (plain, model):
        torch.manual_seed(0)
        fa.attach(each, config)
        frozen_parts.remove(each)  # gradients of offloaded norms are PyTorch's
        train_a_little(each)
        assert not any(parameter.is_meta for _, parameter in fa.trainable_parameters(each))
        output = each(token_ids()).logits
        output.square().sum().backward()
        outputs.append([output, *(parameter.grad for _, parameter in fa.trainable_parameters(each))])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@every_config
@torch.no_grad()
def test_adapters_of_a_model_made_on_meta_are_initialised(config, poisoned_memory):
    """``to_empty`` left the gates with whatever was in the memory."""
    with torch.device("meta"):
        model = llama()
    fa.attach(model, config)
    model.to_empty(device="cpu")
    missing, _ = model.load_state_dict(llama().state_dict(), strict=False)
    assert all(".fa_" in name for name in missing)
    for name, parameter in fa.trainable_parameters(model):
        assert parameter.isfinite().all(), name
    model.model.rotary_emb = llama().model.rotary_emb
    if not isinstance(config, fa.PrefixTuningConfig):
        assert torch.equal(model(token_ids()).logits, llama()(token_ids()).logits)


@pytest.mark.parametrize("family", ["gptj", "gpt_oss"])
def test_rotary_forms_are_found_on_meta(family):
    """Tables without values are made anew: sine before cosine and half widths cannot be told from shapes."""
    from tests.support.tiny_models import model_classes, small_config

    config = small_config(tf.CONFIG_MAPPING[family], {})
    with torch.device("meta"):
        model = model_classes(family)[0](config)
    fa.attach(model, CONFIGS["llama-adapter"])


def test_copies_of_values_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(TypeError, match="ModuleCopy starts from the model's own values"):
        fa.attach(model, fa.LlamaAdapterV2Config(prefix_len=3))
    with pytest.raises(TypeError, match="SoftPrompt starts from the model's own values"):
        fa.attach(model, fa.SoftPromptConfig(prompt_len=3))
    assert not any(".fa_" in name for name, _ in model.named_modules())
