"""A row of a padded batch is what it is alone where it is in the base model, also without ``position_ids``."""

import pytest
import torch

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, token_ids
from tests.support.tiny_models import tiny_model

NAMED = {family.name: family for family in FAMILIES}
PADDED = 4


def padded(ids):
    """The same rows behind some padding, and the mask."""
    ids = torch.cat([torch.zeros(len(ids), PADDED, dtype=torch.long), ids], 1)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_on_the_left_moves_nothing(family, name):
    model, ids = build(NAMED[family]), token_ids(length=6)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    alone = model(ids).logits
    with_padding = model(**padded(ids)).logits[:, PADDED:]
    torch.testing.assert_close(with_padding, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gptj", "codegen"])
@torch.no_grad()
def test_a_rotation_of_a_part_of_the_head_is_one_too(kind):
    model, _ = tiny_model(kind)
    ids = token_ids(length=6) % model.config.vocab_size
    for parameter in model.eval().parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)  # so that queries are more than noise
    fa.attach(model, fa.PrefixTuningConfig(prefix_len=4, init_std=1.0))
    alone, moved = model(ids)[0], model(**padded(ids))[0]
    torch.testing.assert_close(moved[:, PADDED:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_zero_gate_is_still_the_base_model(grad):
    """Counting positions anew rounds otherwise, so it waits for a prompt that has an effect."""
    model, inputs = build(NAMED["llama"]), padded(token_ids(length=6))
    with torch.set_grad_enabled(grad):
        base = model(**inputs).logits
        fa.attach(model, CONFIGS["llama-adapter"], "gated")
        fa.attach(model, CONFIGS["houlsby"], "other")
        fa.set_active(model, "gated")
        assert same_bits(model(**inputs).logits.detach(), base.detach())
        with fa.rows(model, ["gated", None]):
            assert same_bits(model(**inputs).logits.detach(), base.detach())
        with torch.no_grad():
            for key, parameter in fa.trainable_parameters(model):
                if key.endswith("gate"):
                    parameter.fill_(0.5)
        with fa.rows(model, ["gated", None]):
            logits = model(**inputs).logits.detach()
        assert same_bits(logits[1], base[1].detach()) and not same_bits(logits[0], base[0].detach())


@torch.no_grad()
def test_positions_that_are_given_are_kept():
    model, inputs = build(NAMED["llama"]), padded(token_ids(length=6))
    fa.attach(model, CONFIGS["prefix"])
    train_a_little(model)
    columns = torch.arange(6 + PADDED)[None].expand(2, -1)
    assert not same_bits(model(**inputs, position_ids=columns).logits, model(**inputs).logits)


@torch.no_grad()
def test_behind_a_cache():
    model, ids = build(NAMED["llama"]), token_ids(length=6)
    for name in ("prefix", "llama-adapter", "soft-prompt"):
        fa.attach(model, CONFIGS[name], name)
        train_a_little(model)
        inputs = padded(ids)
        whole = model(**inputs).logits
        begun = model(
            inputs["input_ids"][:, :-1], attention_mask=inputs["attention_mask"][:, :-1], use_cache=True
        )
        last = model(
            inputs["input_ids"][:, -1:],
            attention_mask=inputs["attention_mask"],
            past_key_values=begun.past_key_values,
        )
        torch.testing.assert_close(last.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
