"""What is kept between passes never outlives what it was made from."""

import copy

import pytest
import torch

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, token_ids

LLAMA = next(family for family in FAMILIES if family.name == "llama")
KEPT = ["llama-adapter", "v2-input", "prefix", "prefix-reparam", "soft-prompt", "houlsby", "parallel"]


def adapted(name):
    model = build(LLAMA)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    return model.eval()


def fresh(model, ids):
    """What a copy, which keeps nothing, gives."""
    return copy.deepcopy(model)(ids).logits


def changed(model):
    """New values for everything, by name."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_parameters_that_are_exchanged(name):
    model, ids = adapted(name), token_ids()
    new = changed(model)
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(new)
    expected, before = wanted(ids).logits, model(ids).logits
    assert same_bits(torch.func.functional_call(model, new, (ids,)).logits, expected)
    assert same_bits(model(ids).logits, before)
    with fa.rows(model, ["default", None]):
        model(ids)
        assert same_bits(torch.func.functional_call(model, new, (ids,)).logits[0], expected[0])
    model.load_state_dict(new, assign=True)
    assert same_bits(model(ids).logits, expected)


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_modules_and_what_runs_in_them(name):
    """Swapped projections, parametrisations, hooks and wrappers of others, also ones without parameters."""
    model, ids = adapted(name), token_ids()
    attention = model.model.layers[1].self_attn
    model(ids)
    attention.v_proj = copy.deepcopy(attention.v_proj)
    attention.v_proj.weight.mul_(1.5)
    assert same_bits(model(ids).logits, fresh(model, ids))
    factor = torch.ones(())
    handle = attention.v_proj.register_forward_hook(lambda module, args, output: output * factor)
    for value in (1.0, 2.0):
        factor.fill_(value)
        found = model(ids).logits
    handle.remove()
    unhooked = model(ids).logits
    assert not same_bits(found, unhooked) and same_bits(unhooked, fresh(model, ids))

    class Wrapper(torch.nn.Module):
        factor = 1.0

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.factor * self.inner(x)

    attention.v_proj = Wrapper(attention.v_proj)
    assert same_bits(model(ids).logits, unhooked)
    attention.v_proj.factor = 3.0
    assert same_bits(model(ids).logits, fresh(model, ids)) and not same_bits(model(ids).logits, unhooked)


@pytest.mark.parametrize("name", ["llama-adapter", "soft-prompt", "prefix"])
@torch.no_grad()
def test_another_adapter_of_peft(name):
    peft = pytest.importorskip("peft")
    model, ids = build(LLAMA), token_ids()
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    wrapped.eval()

    def check():
        assert same_bits(wrapped(ids).logits, fresh(wrapped, ids))

    wrapped.set_adapter("a")
    check()
    wrapped.set_adapter("b")
    check()
    with wrapped.disable_adapter():
        check()
    wrapped.merge_adapter()
    check()
    wrapped.unmerge_adapter()
    wrapped.base_model.model.model.layers[1].self_attn.v_proj.scaling["b"] = 5.0
    check()
    wrapped.delete_adapter("a")
    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_autocast_does_not_leave_its_roundings(name, dtype):
    model, ids = adapted(name), token_ids()
    plain = model(ids).logits
    with torch.autocast("cpu", dtype):
        rounded = model(ids).logits
        assert same_bits(model(ids).logits, rounded)
    assert same_bits(model(ids).logits, plain)


@torch.no_grad()
def test_it_is_kept_at_all(monkeypatch):
    """Projected once for all passes."""
    from fastadapter.integrations.passes.prefix import PrefixHost

    model, ids = adapted("llama-adapter"), token_ids()
    calls, project = [], PrefixHost._project
    monkeypatch.setattr(
        PrefixHost, "_project", lambda self, *args: calls.append(self) or project(self, *args)
    )
    for _ in range(3):
        model(ids)
    assert len(calls) == 2  # its two layers


@torch.no_grad()
def test_a_soft_prompt_is_run_once_for_all_passes(monkeypatch):
    from fastadapter.integrations.passes.soft_prompt_decoder import SoftPromptHost

    model, ids = adapted("soft-prompt"), token_ids()
    calls, run = [], SoftPromptHost._run_apart
    monkeypatch.setattr(
        SoftPromptHost, "_run_apart", lambda self, *args: calls.append(self) or run(self, *args)
    )
    for _ in range(3):
        model(ids)
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name in KEPT if name != "parallel"])
@torch.no_grad()
def test_a_layer_asks_nothing_again(name, monkeypatch):
    """One pass settles what those after it repeat, until another adapter acts or a value changes."""
    from fastadapter.integrations.passes.host import Host

    model, ids = adapted(name), token_ids()
    fa.attach(model, CONFIGS["houlsby"], "other")
    fa.set_active(model, "default")
    expected = model(ids).logits
    asked = []
    groups, idle = Host.groups, Host.idle
    monkeypatch.setattr(Host, "groups", lambda self, *args: asked.append(self) or groups(self, *args))
    monkeypatch.setattr(Host, "idle", lambda self: asked.append(self) or idle(self))
    assert same_bits(model(ids).logits, expected)
    # a soft prompt is looked for where the model begins, once in a pass
    assert len(asked) == (1 if name == "soft-prompt" else 0)
    fa.set_active(model, None)
    bare = model(ids).logits
    assert asked and not same_bits(bare, expected)
    fa.set_active(model, "default")
    assert same_bits(model(ids).logits, expected)
    for _, parameter in fa.trainable_parameters(model):
        parameter.mul_(1.5)
    asked.clear()
    assert same_bits(model(ids).logits, fresh(model, ids))


@torch.no_grad()
def test_sources_that_saw_different_values():
    """Both count, also where the later one is right."""
    from fastadapter.integrations.passes.kept import Store

    store, layer = Store(), torch.nn.Linear(2, 2)
    first = store.make(lambda: 1, [layer])
    layer.weight.mul_(2)
    second = store.make(lambda: 2, [layer])
    stamp = store.stamp("one")
    store.check()
    assert not first.is_valid and second.is_valid
    assert store.stamp("one") is not stamp
    stamp = store.stamp("one")
    store.check()
    assert store.stamp("one") is stamp
