"""LLaMA-Adapter on small random models of every supported family: the promises of attaching, one test each."""

import copy

import pytest
import torch

import fastadapter as fa
from fastadapter.integrations.verbs.record import adapter_modules, hosts
from tests.support.budget import same_bits
from tests.support.models import FAMILIES, UNSUPPORTED, build, output_of, set_gates, token_ids
from tests.support.oracle import plain_llama_adapter

CONFIG = fa.LlamaAdapterConfig(prefix_len=4, layers=2)
DECODERS = [family for family in FAMILIES if family.decoder]
# Under checkpointing T5's position bias needs a gradient, which takes another sdpa kernel, and the gradients that
# whisper's decoder blocks send to its encoder are added in another order.
OTHER_ROUNDING = ("t5-encoder", "whisper")
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)


@every_family
@torch.no_grad()
def test_zero_gate_and_detach_are_the_base_model(family):
    """Bit for bit, with every gate at zero, with the adapter switched off, and after detach."""
    model, inputs = build(family), family.inputs()
    was_trainable = [p.requires_grad for p in model.parameters()]
    base = output_of(model, inputs)
    fa.attach(model, CONFIG)
    assert same_bits(output_of(model, inputs), base)
    set_gates(model)
    assert not same_bits(output_of(model, inputs), base)
    fa.set_active(model, None)
    assert same_bits(output_of(model, inputs), base)
    fa.detach(model)
    assert same_bits(output_of(model, inputs), base)
    assert [p.requires_grad for p in model.parameters()] == was_trainable
    assert not any("fa_prefix" in name for name, _ in model.named_modules())


@every_family
@torch.no_grad()
def test_equals_a_plain_computation(family):
    """With non-zero gates, eager and sdpa give what the formula written out gives."""
    model, inputs = build(family), family.inputs()
    fa.attach(model, CONFIG)
    set_gates(model)
    sdpa = output_of(model, inputs)
    model.set_attn_implementation("eager")
    eager = output_of(model, inputs)
    adapters = adapter_modules(model, "default")
    prompts = {path: adapter.prompt.clone() for path, adapter in adapters.items()}
    gates = {path: adapter.gate.clone() for path, adapter in adapters.items()}
    fa.detach(model)
    with plain_llama_adapter(model, family.name, prompts, gates):
        expected = output_of(model, inputs)
    torch.testing.assert_close(eager, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sdpa, expected, rtol=2e-5, atol=2e-5)


@every_family
@torch.no_grad()
def test_no_projection_is_repeated(family):
    """The adapter adds no matrix product over the tokens: only ones over its own prompt rows."""
    model, inputs = build(family), family.inputs()
    calls = []

    def count(module, args, output):
        if args and torch.is_tensor(args[0]) and args[0].dim() >= 2:
            calls.append(args[0].shape[:-1].numel())

    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear"):
            module.register_forward_hook(count)
    output_of(model, inputs)
    base = sorted(n for n in calls if n != CONFIG.prefix_len)
    fa.attach(model, CONFIG)
    set_gates(model)
    calls.clear()
    output_of(model, inputs)
    assert sorted(n for n in calls if n != CONFIG.prefix_len) == base


@every_family
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    """Bit for bit, and every prompt and gate has a gradient although the base is frozen."""
    gradients = []
    for checkpointing in (False, True):
        model, inputs = build(family), family.inputs()
        torch.manual_seed(1)
        fa.attach(model, CONFIG)
        set_gates(model)
        model.train()
        for module in model.modules():  # dropout would draw other masks
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "activation_dropout", "dropout", "attn_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing:
            enable_checkpointing(model, reentrant)
        output_of(model, inputs).square().sum().backward()
        gradients.append({name: p.grad for name, p in fa.trainable_parameters(model)})
    plain, checkpointed = gradients
    for name, grad in plain.items():
        assert grad is not None and grad.abs().max() > 0, name
        if family.name in OTHER_ROUNDING:
            torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-7)
        else:
            assert same_bits(checkpointed[name], grad), name


def enable_checkpointing(model, reentrant):
    """By the name of the installed transformers."""
    options = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@every_family
@torch.no_grad()
def test_save_and_load(family, tmp_path):
    """Another copy of the base model with the loaded adapter gives the same bits."""
    model, inputs = build(family), family.inputs()
    fresh = copy.deepcopy(model)
    fa.attach(model, CONFIG)
    set_gates(model)
    fa.save(model, tmp_path)
    fa.load(fresh, tmp_path)
    assert same_bits(output_of(fresh, inputs), output_of(model, inputs))


@every_decoder
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_is_the_full_forward(family, cache):
    """Greedy tokens and their logits come out of one full forward too, whatever the cache."""
    model = build(family)
    fa.attach(model, CONFIG)
    set_gates(model)
    prompt = token_ids(length=6)
    generated = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        cache_implementation="static" if cache == "static" else None,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    full = model(input_ids=generated.sequences[:, :-1]).logits[:, -5:]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), full, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_whisper_generates():
    """An encoder-decoder with both self-attentions adapted: cached decoding is the full forward."""
    family = next(family for family in FAMILIES if family.name == "whisper")
    model, inputs = build(family), family.inputs()
    fa.attach(model, CONFIG)
    set_gates(model)
    features, tokens = inputs["input_features"], inputs["decoder_input_ids"]
    full = model(input_features=features, decoder_input_ids=tokens).logits
    encoded = model.model.encoder(features)
    step = model(encoder_outputs=encoded, decoder_input_ids=tokens[:, :-1], use_cache=True)
    cache = step["cache"] if "cache" in step else step["past_key_values"]
    keyword = "cache" if "cache" in step else "past_key_values"
    last = model(encoder_outputs=encoded, decoder_input_ids=tokens[:, -1:], **{keyword: cache}).logits
    torch.testing.assert_close(last[:, -1], full[:, -1], rtol=1e-4, atol=2e-5)


@every_decoder
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(family, side):
    """A padded row's real tokens get the logits of the row alone."""
    model = build(family)
    fa.attach(model, CONFIG)
    set_gates(model)
    row, long = token_ids(batch=1, length=5), token_ids(batch=1, length=9, seed=1)
    padding = torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([torch.cat([padding, row] if side == "left" else [row, padding], 1), long])
    real = slice(4, 9) if side == "left" else slice(0, 5)
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[0, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, real]
    torch.testing.assert_close(padded, model(input_ids=row).logits[0], rtol=1e-4, atol=2e-5)


@every_family
@torch.no_grad()
def test_verify_and_explain(family):
    """The self-check passes on every family, and the explanation names every adapted module."""
    model, inputs = build(family), family.inputs()
    fa.attach(model, CONFIG)
    before = output_of(model, inputs)
    checks = fa.verify(model, None if "input_ids" in inputs else inputs)
    assert len(checks) == (3 if family.decoder else 2) and all(check.passed for check in checks)
    assert same_bits(output_of(model, inputs), before)
    explanation = fa.explain(model)
    assert [row["module"] for row in explanation.rows] == list(hosts(model))
    assert all(row["backend"] in str(explanation) for row in explanation.rows)


@pytest.mark.parametrize("family", UNSUPPORTED, ids=str)
def test_other_attention_is_refused(family):
    """An architecture outside the attention interface is named and left alone."""
    model = family.build()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match="attention interface"):
        fa.attach(model, CONFIG)
    assert [p.requires_grad for p in model.parameters()] == trainable
