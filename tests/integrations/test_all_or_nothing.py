"""Verbs change a model as a whole or not at all: an error at every step in turn, and the model is what it was."""

import gc
import sys

import pytest
import torch

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of

NAMED = {family.name: family for family in FAMILIES}
ROOM = "fastadapter/integrations/"


class Stop(Exception):
    pass


def stopped_at(step, verb):
    """Run ``verb``, raising when its ``step``-th call of a function of ours begins; whether it got that far."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        name = frame.f_code.co_filename
        # what puts things back and lets others go on is not what is tried
        if event == "call" and ROOM in name and not name.endswith(("undo.py", "traffic.py")):
            count += 1
            if count == step:
                sys.settrace(None)
                raise Stop
        return None

    sys.settrace(trace)
    try:
        verb()
    except Stop:
        return True
    finally:
        sys.settrace(None)
    return False


def picture(model, inputs):
    """Everything about a model that a verb could leave changed."""
    structure = {
        path: (
            type(module),
            sorted(key for key in module.__dict__ if not key.startswith("_")),
            list(module._modules),
            list(module._parameters),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks_always_called),
        )
        for path, module in model.named_modules()
    }
    turn = vars(sys.modules[type(model).__module__]).get("apply_rotary_pos_emb")
    structure["rotary"] = hasattr(turn, "fa_own"), getattr(turn, "fa_own", turn)
    parameters = {key: (p.requires_grad, p.detach().clone()) for key, p in model.named_parameters()}
    with torch.no_grad():
        return structure, parameters, output_of(model, inputs)


def assert_same(found, before):
    assert found[0] == before[0]
    assert found[1].keys() == before[1].keys()
    for key, (requires_grad, value) in found[1].items():
        assert requires_grad == before[1][key][0], key
        assert same_bits(value, before[1][key][1]), key
    assert same_bits(found[2], before[2])


def at_every_step(model, inputs, verb, undo, stride=1):
    """The verb fails at every step in turn and leaves nothing; then it works, and ``undo`` takes it back."""
    before = picture(model, inputs)
    step = 1
    while stopped_at(step, verb):
        assert_same(picture(model, inputs), before)
        step += stride
    assert step > 5
    undo()


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", CONFIGS)
def test_attach_and_detach(family, name):
    from transformers.modeling_utils import AttentionInterface

    from fastadapter.integrations.passes import attention

    gc.collect()  # adapted models of other tests keep the hook
    others = set(attention._hosts)

    model, inputs = build(NAMED[family]), NAMED[family].inputs()

    def is_as_it_was():
        hooked = AttentionInterface.get_interface is attention._patched_lookup
        return set(attention._hosts) == others and hooked == bool(others)

    at_every_step(
        model, inputs, lambda: fa.attach(model, CONFIGS[name], "first"), lambda: fa.detach(model), stride=7
    )
    assert is_as_it_was()
    fa.attach(model, CONFIGS["houlsby"], "first")
    train_a_little(model)
    at_every_step(model, inputs, lambda: fa.attach(model, CONFIGS[name], "second"), lambda: None, stride=11)
    train_a_little(model, seed=2)
    at_every_step(model, inputs, lambda: fa.detach(model), lambda: None, stride=5)
    assert is_as_it_was()


@pytest.mark.parametrize("name", ["llama-adapter", "soft-prompt", "parallel"])
def test_load(name, tmp_path):
    model, inputs = build(NAMED["llama"]), NAMED["llama"].inputs()
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    fa.save(model, tmp_path)
    fa.detach(model)
    at_every_step(model, inputs, lambda: fa.load(model, tmp_path), lambda: fa.detach(model), stride=7)


@pytest.mark.parametrize("name", ["v2-input", "prefix-reparam"])
def test_fold_and_unfold(name):
    model, inputs = build(NAMED["llama"]), NAMED["llama"].inputs()
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    at_every_step(model, inputs, lambda: fa.fold(model), lambda: None, stride=5)
    if name == "v2-input":
        at_every_step(model, inputs, lambda: fa.unfold(model), lambda: None, stride=5)
        fa.fold(model)
        at_every_step(model, inputs, lambda: fa.detach(model), lambda: None, stride=5)


@pytest.mark.parametrize(
    "name", ["train", "eval", "keys", "type", "items", "forward", "pop", "_modules", "to", "-"]
)
def test_a_name_is_data(name, tmp_path):
    """Names that are attributes of modules too."""
    model, inputs = build(NAMED["llama"]), NAMED["llama"].inputs()
    for config in (CONFIGS["v2-input"], CONFIGS["prefix-reparam"], CONFIGS["parallel"]):
        fa.attach(model, config, name)
        train_a_little(model)
        expected = output_of(model, inputs)
        fa.save(model, tmp_path, name)
        state = model.state_dict()
        for key, _ in fa.trainable_parameters(model):
            assert model.get_parameter(key) is not None and key in state
        fa.detach(model)
        fa.load(model, tmp_path, name)
        assert same_bits(output_of(model, inputs), expected)
        with fa.rows(model, [name, None]):
            assert same_bits(output_of(model, inputs)[0], expected[0])
        model.load_state_dict(state)
        assert fa.explain(model).rows[0]["adapter"].startswith(name)
        fa.detach(model)
