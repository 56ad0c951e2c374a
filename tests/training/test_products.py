"""Products of a frozen model by the faster library: round-off apart the same, and only in the context."""

import copy

import pytest
import torch
from torch import nn

import fastadapter as fa
from fastadapter.integrations.passes import products
from fastadapter.training import fast_products
from tests.support.budget import assert_within_budget, same_bits
from tests.support.gated_prefix import needs_extension
from tests.support.methods import CONFIGS
from tests.support.models import FAMILIES, build, token_ids

pytestmark = [
    needs_extension,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN"),
]
LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    monkeypatch.setattr(products, "why_not", lambda: None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (3, 7, 48), (40, 48)], ids=str)
def test_a_layer_and_its_gradient_are_within_budget(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(48, 96, bias=bias).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 96)

    def run(of, dtype):
        given = x.to(dtype).clone().requires_grad_()
        out = of(given)
        out.backward(grad.to(dtype))
        return out.detach(), given.grad

    plain, right = run(layer, torch.float32), run(exact, torch.float64)
    with fast_products(layer):
        assert isinstance(layer, products._Linear)
        found = run(layer, torch.float32)
        again = run(layer, torch.float32)
    assert type(layer) is nn.Linear
    for name, ours, eager, best in zip(("output", "gradient"), found, plain, right, strict=True):
        assert_within_budget(ours, eager, best, name)
    assert all(map(same_bits, found, again))


def test_what_is_trained_or_not_fp32_is_pytorchs():
    torch.manual_seed(0)
    trained, half, double = nn.Linear(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).double()
    for layer in (trained, half, double):
        x = torch.randn(3, 8, dtype=layer.weight.dtype)
        expected = layer(x)
        with fast_products(layer):
            assert same_bits(layer(x), expected)
    frozen = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = frozen(x)
        with fast_products(frozen):
            assert same_bits(frozen(x), expected)
    with fast_products(frozen):
        assert frozen(torch.empty(0, 8)).shape == (0, 8)


def test_an_adapted_model_learns_the_same():
    model = build(LLAMA)
    fa.attach(model, CONFIGS["v2-input"])
    gradients = []
    for products_of in (None, model):
        model.zero_grad()
        if products_of is None:
            model(token_ids()).logits.square().sum().backward()
        else:
            with fast_products(model):
                model(token_ids()).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for _, parameter in fa.trainable_parameters(model)])
    for plain, fast in zip(*gradients, strict=True):
        assert torch.allclose(plain, fast, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_a_context_within_another_leaves_that_one_as_it_is():
    layer = nn.Linear(4, 4)
    with fast_products(layer):
        with fast_products(layer):
            pass
        assert isinstance(layer, products._Linear)
    assert type(layer) is nn.Linear


def test_an_error_in_the_context_gives_the_classes_back():
    model = build(LLAMA)
    with pytest.raises(KeyError), fast_products(model):
        raise KeyError
    assert not any(isinstance(module, products._Linear) for module in model.modules())


def test_machines_for_which_pytorchs_own_library_was_made_use_that(monkeypatch):
    monkeypatch.undo()
    vendor = torch.ops.fastadapter.cpu_vendor()
    assert vendor in ("amd", "intel", "")
    assert (products.why_not() is None) == (vendor == "amd" and torch.backends.mkl.is_available())
    layer = nn.Linear(4, 4)
    monkeypatch.setattr(products, "why_not", lambda: "a reason")
    with fast_products(layer):
        assert type(layer) is nn.Linear
