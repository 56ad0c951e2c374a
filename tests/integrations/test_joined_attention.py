"""Attention and gated prompt as one function, which models on a GPU take in training; here on a CPU, by leave."""

import pytest
import torch

import fastadapter as fa
from fastadapter.integrations.passes import prefix
from tests.support.budget import same_bits
from tests.support.gated_prefix import needs_extension
from tests.support.models import FAMILIES

pytestmark = needs_extension
LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture
def taken(monkeypatch):
    """The device is one of those, and how often attention and term were computed as one."""
    calls, one = [], prefix.gated_over_base
    monkeypatch.setattr(prefix, "JOINED_DEVICES", {"cpu"})
    monkeypatch.setattr(prefix, "gated_over_base", lambda *args: calls.append(args[0]) or one(*args))
    return calls


def build(attention="sdpa", gate="random", **options):
    torch.manual_seed(0)
    model = LLAMA.build()
    model.set_attn_implementation(attention)
    for name, value in options.items():
        setattr(model.config, name, value)
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, value)
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=4, layers=3))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("gate"):
            torch.nn.init.normal_(parameter) if gate == "random" else torch.nn.init.zeros_(parameter)
    return model


def step(model, **inputs):
    """Logits and every gradient."""
    batch = LLAMA.inputs() | inputs
    logits = model(**batch).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten()).backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits.detach()} | grads


def test_results_are_those_of_two_functions(taken, monkeypatch):
    """Layers whose query needs a gradient take it: all but the first with an adapter."""
    joined = step(build())
    assert taken == ["flash_cpu"] * 2
    monkeypatch.setattr(prefix, "JOINED_DEVICES", set())
    separate = step(build())
    assert len(taken) == 2 and joined.keys() == separate.keys() and len(joined) > 6
    for name, expected in separate.items():
        torch.testing.assert_close(joined[name], expected, msg=lambda m, n=name: f"{n}: {m}")


def test_a_zero_gate_keeps_the_bits_of_the_model(taken):
    torch.manual_seed(0)
    plain = LLAMA.build()
    plain.set_attn_implementation("sdpa")
    expected = plain(**LLAMA.inputs()).logits.detach()
    model = build(gate="zero")
    model.get_input_embeddings().weight.requires_grad_()
    assert same_bits(step(model)["logits"], expected) and len(taken) == 3


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])}),
        ({"attention_dropout": 0.1}, {}),
        ({"attention": "eager"}, {}),
    ],
    ids=["mask", "dropout", "eager"],
)
def test_what_it_cannot_do_stays_with_the_model(taken, options, inputs):
    model = build(**options).train()
    step(model, **inputs)
    assert not taken


def test_dropout_counts_in_training_only(taken):
    step(build(attention_dropout=0.1).eval())
    assert taken


def test_nothing_to_train_or_autocast_stays_with_the_model(taken):
    model = build()
    with torch.no_grad():
        model(**LLAMA.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**LLAMA.inputs())
    assert not taken
