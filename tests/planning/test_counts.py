"""What is counted for a step, held against PyTorch's own counts on small models with real adapters.

Operations by ``FlopCounterMode``; bytes that autograd keeps by hooks on saved tensors, each storage once; trained
numbers by the parameters. Right sizes here are right everywhere: the formulas are polynomials in the sizes.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fastadapter as fa
from fastadapter.methods import METHODS
from fastadapter.planning.cost import Job, optimiser_parts, step_parts
from fastadapter.planning.lengths import one_pass
from fastadapter.planning.memory import step_memory
from fastadapter.planning.shapes import ModelShape

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 160}
VOCABULARY, ROWS, LENGTH = 300, 3, 40
DECODER = ModelShape("decoder", **SIZES, num_key_value_heads=2, vocab_size=VOCABULARY)
ENCODER = ModelShape(
    "encoder",
    **SIZES,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    gated=False,
    rms_norm=False,
    causal=False,
    tied=True,
)
CONFIGS = [
    fa.LlamaAdapterConfig(5),
    fa.LlamaAdapterConfig(5, layers=2),
    fa.LlamaAdapterV2Config(5),
    fa.PrefixTuningConfig(5),
    fa.SoftPromptConfig(5),
    fa.BottleneckConfig(bottleneck_size=8),
    fa.BottleneckConfig(bottleneck_size=8, placement="pfeiffer"),
    fa.BottleneckConfig(bottleneck_size=8, placement="parallel", layers=2),
]


def name(config):
    return "-".join(
        str(part)
        for part in (config.method, getattr(config, "placement", ""), getattr(config, "layers", None))
        if part
    )


def build(shape, config):
    torch.manual_seed(0)
    if shape.causal:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=VOCABULARY))
    else:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=VOCABULARY, **quiet))
    model.requires_grad_(False)
    return fa.attach(model, config).train(), torch.randint(VOCABULARY, (ROWS, LENGTH))


def job_of(shape, config):
    return Job(shape, config, dtype="fp32", all_logits=True)


def flops(parts, *words):
    return sum(part.flops for part in parts if part.name.startswith(words))


@pytest.mark.parametrize("shape", [DECODER, ENCODER], ids=lambda shape: shape.name)
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_products_and_kept_bytes(shape, config):
    model, ids = build(shape, config)
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        logits = model(input_ids=ids, use_cache=False).logits if shape.causal else model(input_ids=ids).logits
        logits.sum().backward()
    job, load = job_of(shape, config), one_pass(ROWS, LENGTH)
    expected = flops(step_parts(job, load), "products", "head")
    # a prompt's own projection is counted apart, the last block of a soft prompt needs no gradient of its states
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert step_memory(job, load, cpu=True).activations == pytest.approx(held, rel=0.12)


@pytest.mark.parametrize("shape", [DECODER, ENCODER], ids=lambda shape: shape.name)
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_trained_numbers(shape, config):
    model, _ = build(shape, config)
    head = 0 if shape.causal else 2 * (shape.hidden_size + 1)
    there = sum(parameter.numel() for _, parameter in fa.trainable_parameters(model))
    assert there - head == job_of(shape, config).trained_parameters()


def test_attention_is_counted_over_pairs():
    """PyTorch counts all pairs of a full attention; a causal one needs half of them."""
    query = torch.randn(ROWS, 4, LENGTH, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    full, causal = (
        flops(
            step_parts(job_of(shape, fa.LlamaAdapterConfig(5)), one_pass(ROWS, LENGTH)), "attention, forward"
        )
        for shape in (ENCODER, DECODER)
    )
    assert full == 4 * counter.get_total_flops() and causal == full / 2


def test_every_method_can_be_planned():
    for method, config in METHODS.items():
        for implementation in ("fastadapter", "peft"):
            job = Job(DECODER, config(), implementation)
            assert all(part.flops >= 0 and part.bytes >= 0 for part in step_parts(job, one_pass(2, 8))), (
                method
            )
            assert optimiser_parts(job)[0].bytes > 0 and step_memory(job, one_pass(2, 8)).step > 0
