"""Settled calls without hooks: the same bits, and everybody who looks at a module still sees it."""

import copy

import pytest
import torch
from torch import nn

import fastadapter as fa
from fastadapter.integrations.passes import channel_scale
from fastadapter.integrations.passes.shortcut import Shortened
from fastadapter.ops import prepared
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, token_ids

LLAMA = next(family for family in FAMILIES if family.name == "llama")
every_scale = pytest.mark.parametrize("name", ["v2-input", "v2-output"])


# more rows than one operation takes, and fewer
sizes = pytest.mark.parametrize("size", [(2, 9), (2, 3), (1, 1)], ids=str)


def adapted(name="v2-input"):
    model = build(LLAMA)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    return model.eval()


@every_scale
@torch.no_grad()
def test_settled_passes_have_the_same_bits_and_call_no_hook(name, monkeypatch):
    model, ids = adapted(name), token_ids()
    expected = [model(ids).logits for _ in range(2)]
    calls = []
    original = channel_scale.ScaleHost.after
    monkeypatch.setattr(channel_scale.ScaleHost, "after", lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(channel_scale.CopyHost, "instead", lambda *a: calls.append(a))
    assert same_bits(model(ids).logits, expected[0]) and same_bits(expected[1], expected[0])
    assert not calls
    with torch.enable_grad():
        model(ids)
    assert calls


@every_scale
@torch.no_grad()
def test_one_row_has_the_bits_of_the_long_way(name):
    """Its bias is added by the product, where that is the same."""
    model, ids = adapted(name), token_ids(batch=1, length=1)
    expected = copy.deepcopy(model)(ids).logits
    for _ in range(4):
        assert same_bits(model(ids).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(model(ids).logits, copy.deepcopy(model)(ids).logits)


@sizes
@torch.no_grad()
def test_hooks_of_others_run(size):
    model, ids = adapted(), token_ids(*size)
    model(ids), model(ids)
    layer, norm = model.model.layers[2].mlp.up_proj, model.model.norm
    seen = []
    handles = [each.register_forward_hook(lambda *a: seen.append(a[2])) for each in (layer, norm)]
    model(ids)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    every = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        seen.clear()
        model(ids)
        assert layer in seen and norm in seen
    finally:
        every.remove()


@sizes
@torch.no_grad()
def test_a_forward_that_is_replaced_acts(size):
    model, ids = adapted(), token_ids(*size)
    before, *_ = (model(ids).logits for _ in range(3))
    layer = model.model.layers[2].mlp.up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2
    assert not same_bits(model(ids).logits, before)
    del layer.forward
    assert same_bits(model(ids).logits, before)


@sizes
@every_scale
@torch.no_grad()
def test_a_weight_that_is_exchanged_acts(name, size):
    model, ids = adapted(name), token_ids(*size)
    before, *_ = (model(ids).logits for _ in range(3))
    layer = model.model.layers[2].mlp.up_proj
    own = layer.weight
    for exchange in (
        lambda: setattr(layer, "weight", nn.Parameter(2 * own)),
        lambda: setattr(layer.weight, "data", 3 * own),
        lambda: setattr(layer, "bias", nn.Parameter(torch.ones(len(own)))),
    ):
        exchange()
        expected = copy.deepcopy(model)(ids).logits
        for _ in range(3):
            assert same_bits(model(ids).logits, expected)
    layer.weight, layer.bias = own, None
    for _ in range(3):
        assert same_bits(model(ids).logits, before)


@torch.no_grad()
def test_one_operation_is_taken_for_its_bits_alone(monkeypatch):
    model, ids, calls = adapted(), token_ids(2, 3), []
    expected = copy.deepcopy(model)(ids).logits
    repeat = prepared.repeat
    monkeypatch.setattr(
        prepared, "repeat", lambda x, number: calls.append(1) or repeat(x, number) * (1 + 1e-6)
    )
    for _ in range(4):
        assert same_bits(model(ids).logits, expected)
    assert len(calls) == 21  # each layer was tried once


@every_scale
@torch.no_grad()
def test_another_dtype_goes_the_long_way(name):
    model, ids = adapted(name), token_ids()
    expected = copy.deepcopy(model)
    model(ids), model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(model(ids).logits, expected(ids).logits)


@torch.no_grad()
def test_rows_are_what_they_are_alone():
    model, ids = adapted(), token_ids()
    fa.attach(model, CONFIGS["v2-input"], "other")
    train_a_little(model, seed=2)
    alone = []
    for name in ("default", "other"):
        fa.set_active(model, name)
        alone = [*alone, *[model(ids).logits for _ in range(2)][1:]]
    with fa.rows(model, ["default", "other"]):
        mixed = model(ids).logits
    assert same_bits(mixed[0], alone[0][0]) and same_bits(mixed[1], alone[1][1])


@pytest.mark.filterwarnings("ignore")  # a trace is of one shape
@torch.no_grad()
def test_a_trace_holds_no_step():
    """It is used when what was kept is gone."""
    model, ids = adapted(), token_ids()
    expected = [model(ids).logits for _ in range(2)][1]
    model.requires_grad_(False)
    traced = torch.jit.trace(lambda x: model(input_ids=x, use_cache=False).logits, (ids,), check_trace=False)
    assert "fastadapter::repeat" not in str(traced.graph)
    fa.detach(model)
    assert torch.allclose(traced(ids), expected, atol=1e-5)


@torch.no_grad()
def test_detach_gives_the_classes_back():
    model = adapted()
    assert any(isinstance(module, Shortened) for module in model.modules())
    fa.fold(model)
    assert not any(isinstance(module, Shortened) for module in model.modules())
    fa.unfold(model)
    fa.detach(model)
    assert type(model.model.layers[2].mlp.up_proj) is nn.Linear
