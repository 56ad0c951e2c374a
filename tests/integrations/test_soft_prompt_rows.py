"""Encoders whose rows have soft prompts of their own, of several lengths: isolation, gradients, checkpointing."""

import random

import pytest
import torch

import fastadapter as fa
from tests.integrations.test_families import enable_checkpointing
from tests.integrations.test_methods import without_dropout
from tests.integrations.test_soft_prompt_encoder import TEXT, prompted
from tests.support.budget import same_bits
from tests.support.models import output_of, token_ids


# Every mix holds the longest prompt and a row without, so that all batches are of one shape and masked.
def mixes(count, names, batch, seed=0):
    generator = random.Random(seed)
    for _ in range(count):
        mix = ["long", None] + [generator.choice([None, *names]) for _ in range(batch - 2)]
        generator.shuffle(mix)
        yield mix


def mixed(family):
    model, prompts = prompted(family)
    others = {
        "prefix": fa.PrefixTuningConfig(prefix_len=5),
        "gated": fa.LlamaAdapterConfig(prefix_len=4),
        "houlsby": fa.BottleneckConfig(bottleneck_size=4),
    }
    for name, config in others.items():
        fa.attach(model, config, name)
    with torch.no_grad():
        for key, parameter in fa.trainable_parameters(model):
            if any(f".{name}." in key for name in others):
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model, [*prompts, *others]


def rows_of(family, batch):
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": token_ids(batch=batch, length=6)}


@pytest.mark.parametrize("family", [*TEXT, "vit"])
@torch.no_grad()
def test_a_row_is_its_own_whatever_stands_beside_it(family):
    """Needle and inverse: the bits of a row follow from its adapter alone; within rounding it is what it is alone."""
    model, names = mixed(family)
    inputs = rows_of(family, 5)
    alone = {}
    for name in [None, *names]:
        fa.set_active(model, name)
        alone[name] = output_of(model, inputs)
    for name in names:
        others = [alone[other] for other in alone if other != name]
        far = [(alone[name][row] - other[row]).abs().max() for other in others for row in range(5)]
        assert min(far) > 2e-3, name  # what rounding does is far below
    seen = {}
    for mix in mixes(60, names, 5):
        with fa.rows(model, mix):
            output = output_of(model, inputs)
        for row, name in enumerate(mix):
            first = seen.setdefault((row, name), output[row])
            assert same_bits(output[row], first), (mix, row)
            torch.testing.assert_close(output[row], alone[name][row], rtol=1e-4, atol=1e-5)
    assert len(seen) > 5 * len(names)
    with fa.rows(model, [None, "prefix", "houlsby", "gated", "houlsby"]):  # no soft prompt: nothing is joined
        output = output_of(model, inputs)
    assert same_bits(output[0], alone[None][0]) and same_bits(output[2], alone["houlsby"][2])


@torch.no_grad()
def test_nan_in_another_prompt_stays_there():
    """Of another row, of shorter and of longer length; and of an adapter that no row has."""
    model, prompts = prompted("bert")
    ids = token_ids(batch=3)
    mix = ["short", "long", None]
    with fa.rows(model, mix):
        clean = model(ids).last_hidden_state
    for broken in prompts:
        kept = prompts[broken].clone()
        prompts[broken].fill_(float("nan"))
        with fa.rows(model, mix):
            output = model(ids).last_hidden_state
        for row, name in enumerate(mix):
            assert output[row].isnan().all() if name == broken else same_bits(output[row], clean[row]), broken
        prompts[broken].copy_(kept)


def test_gradients_are_those_of_the_own_rows():
    """In a mixed step; the frozen model gets none, nor does a prompt that no row has."""
    model, prompts = prompted("bert")
    ids, weight = token_ids(batch=4), torch.randn(4, 9, 32)
    mix = ["short", "long", None, "short"]
    with fa.rows(model, mix):
        (model(ids).last_hidden_state * weight).sum().backward()
    found = {name: prompt.grad for name, prompt in prompts.items()}
    assert found["twin"] is None
    own = {id(prompt) for prompt in prompts.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    for name in ("short", "long"):
        model.zero_grad()
        fa.set_active(model, name)
        rows = [row for row, each in enumerate(mix) if each == name]
        (model(ids).last_hidden_state * weight)[rows].sum().backward()
        torch.testing.assert_close(found[name], prompts[name].grad, rtol=1e-4, atol=1e-6)
        assert prompts[name].grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", [*TEXT, "vit"])
def test_checkpointing_of_mixed_rows_and_inputs_by_place(family, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, prompts = prompted(family)
        model.train()
        without_dropout(model)
        if checkpointing:
            enable_checkpointing(model, reentrant)
        [inputs] = rows_of(family, 3).values()
        with fa.rows(model, ["short", "long", None]):
            output = model(inputs).last_hidden_state
        output.square().sum().backward()
        gradients.append([prompts[name].grad for name in ("short", "long")])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert same_bits(plain, checkpointed) and plain.abs().max() > 0
