"""Batches whose rows have adapters of their own: isolation, gradients, generation, errors."""

import random

import pytest
import torch

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS
from tests.support.models import FAMILIES, build, token_ids

NAMED = {family.name: family for family in FAMILIES}
# Other sizes of the methods in CONFIGS, so that banks hold prefixes and ranks of different lengths.
OTHERS = {
    "prefix-long": fa.PrefixTuningConfig(prefix_len=17),
    "llama-adapter-long": fa.LlamaAdapterConfig(prefix_len=9, gate="identity"),
    "prompt-long": fa.SoftPromptConfig(prompt_len=7),
    "houlsby-wide": fa.BottleneckConfig(bottleneck_size=8, activation="silu"),
    "prefix-twin": fa.PrefixTuningConfig(prefix_len=5),
    "llama-adapter-twin": fa.LlamaAdapterConfig(prefix_len=4),
    "houlsby-twin": fa.BottleneckConfig(bottleneck_size=4),
}


def adapted(family="llama", configs=CONFIGS | OTHERS):
    model = build(NAMED[family])
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        fa.attach(model, config, name)
        with torch.no_grad():
            for key, parameter in fa.trainable_parameters(model):
                if f".{name}." in key:
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def alone(model, name, ids):
    """All rows with one adapter."""
    fa.set_active(model, name)
    return model(ids).logits


def mixes(count, names, batch, seed=0):
    generator = random.Random(seed)
    return [[generator.choice([None, *names]) for _ in range(batch)] for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_row_is_what_it_is_alone(family):
    """Needle and inverse: in 500 random mixes each row has the bits of its own adapter, and of no other one."""
    model, ids = adapted(family), token_ids(batch=4, length=6)
    names = [*CONFIGS, *OTHERS]
    expected = {name: alone(model, name, ids) for name in [None, *names]}
    for name in names:  # otherwise a swapped id could not be seen
        others = [expected[other] for other in expected if other != name]
        assert not any(same_bits(expected[name][row], other[row]) for other in others for row in range(4))
    for mix in mixes(250, names, 4):
        with fa.rows(model, mix):
            logits = model(ids).logits
        for row, name in enumerate(mix):
            assert same_bits(logits[row], expected[name][row]), (mix, row)


@torch.no_grad()
def test_an_encoder_mixes_too():
    configs = {name: config for name, config in (CONFIGS | OTHERS).items() if config.method != "soft-prompt"}
    model, ids = adapted("bert", configs), token_ids(batch=4, length=6)
    run = lambda: model(ids).last_hidden_state  # noqa: E731
    expected = {}
    for name in [None, *configs]:
        fa.set_active(model, name)
        expected[name] = run()
    for mix in mixes(60, list(configs), 4):
        with fa.rows(model, mix):
            output = run()
        for row, name in enumerate(mix):
            assert same_bits(output[row], expected[name][row]), (mix, row)


@torch.no_grad()
def test_a_neighbour_that_holds_nan_stays_there():
    model, ids = adapted(), token_ids(batch=3, length=6)
    clean = alone(model, "houlsby", ids)
    for key, parameter in fa.trainable_parameters(model):
        if any(
            f".{name}." in key for name in ("prefix", "llama-adapter", "v2-input", "soft-prompt", "parallel")
        ):
            parameter.fill_(float("nan"))
    for broken in ("prefix", "llama-adapter", "v2-input", "soft-prompt", "parallel"):
        with fa.rows(model, [broken, "houlsby", broken]):
            logits = model(ids).logits
        assert same_bits(logits[1], clean[1]), broken
        assert logits[0].isnan().any(), broken


def test_gradients_are_those_of_the_own_rows():
    """Each adapter's gradient in a mixed step is that of its rows alone; others' rows add nothing to it."""
    model, ids = adapted(), token_ids(batch=4, length=6)
    mix = ["prefix", "houlsby", "prefix", "v2-input"]
    weight = torch.randn(4, 6, 64)

    def gradients(rows):
        model.zero_grad()
        with fa.rows(model, mix):
            (model(ids).logits * weight)[rows].sum().backward()
        return {key: p.grad for key, p in fa.trainable_parameters(model) if p.grad is not None}

    together = gradients([0, 1, 2, 3])
    for name, rows in (("prefix", [0, 2]), ("houlsby", [1]), ("v2-input", [3])):
        own = gradients(rows)
        keys = [key for key in together if f".{name}." in key]
        assert keys
        for key in keys:
            torch.testing.assert_close(together[key], own[key], rtol=1e-5, atol=1e-6)
            assert own[key].abs().max() > 0
    unused = [key for key, grad in together.items() if ".pfeiffer." in key and grad.abs().max() > 0]
    assert not unused


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_generation_keeps_every_row_its_adapter(options):
    """Greedy, beam search and static cache: each row's tokens are those of its adapter for the whole batch."""
    model, ids = adapted(), token_ids(batch=4, length=6)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    mix = ["prefix", None, "soft-prompt", "houlsby"]
    with fa.rows(model, mix):
        mixed = model.generate(ids, **options)
        assert model(ids).logits.shape[0] == 4  # a plain forward after beam search counts rows again
    for row, name in enumerate(mix):
        fa.set_active(model, name)
        assert torch.equal(model.generate(ids, **options)[row], mixed[row]), name


@torch.no_grad()
def test_sampling_draws_the_same_tokens():
    model, ids = adapted(), token_ids(batch=2, length=6)
    options = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0, "num_return_sequences": 2}
    with fa.rows(model, ["prefix", "prefix"]):
        torch.manual_seed(0)
        mixed = model.generate(ids, **options)
    fa.set_active(model, "prefix")
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **options), mixed)


@torch.no_grad()
def test_compiled_rows():
    model, ids = (
        adapted(configs={name: CONFIGS[name] for name in ("llama-adapter", "prefix", "houlsby")}),
        token_ids(3, 6),
    )
    mix = ["llama-adapter", "houlsby", "prefix"]
    with fa.rows(model, mix):
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected)


@torch.no_grad()
def test_adapters_come_and_go_while_others_stay():
    """Load, replace and unload between batches; a cached bank never outlives its adapters."""
    model, ids = adapted(), token_ids(batch=2, length=6)
    kept = alone(model, "prefix", ids)

    def both():
        with fa.rows(model, ["prefix", "llama-adapter-twin"]):
            return model(ids).logits

    first = both()
    fa.detach(model, "llama-adapter-twin")
    torch.manual_seed(9)
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=4), "llama-adapter-twin")
    second = both()
    assert same_bits(first[0], kept[0]) and same_bits(second[0], kept[0])
    assert same_bits(second[1], alone(model, None, ids)[1])  # a fresh one has no effect
    assert not same_bits(first[1], second[1])


@pytest.mark.parametrize("name", ["llama-adapter", "prefix", "prefix-reparam", "soft-prompt", "houlsby"])
@torch.no_grad()
def test_weights_written_in_place_are_seen(name):
    """What is kept of an adapter between forward passes is made anew when its weights change, alone and in a mix."""
    model, ids = adapted(), token_ids(batch=2, length=6)

    def outputs():
        with fa.rows(model, [name, "houlsby-twin"]):
            mixed = model(ids).logits
        return mixed[0], mixed[1], alone(model, name, ids)[0]

    before = outputs()
    assert all(map(same_bits, outputs(), before))
    for key, parameter in fa.trainable_parameters(model):
        if f".{name}." in key:
            parameter.mul_(2)
    after = outputs()
    assert same_bits(after[1], before[1])
    assert not same_bits(after[0], before[0]) and not same_bits(after[2], before[2])
    assert same_bits(after[0], after[2])


@pytest.mark.parametrize(
    "names, message",
    [
        (["prefix", "nobody"], "no adapter 'nobody' is attached"),
        ([], "one per row of the batch"),
        ("prefix", "one per row of the batch"),
    ],
)
def test_bad_names(names, message):
    model = adapted(configs={"prefix": CONFIGS["prefix"]})
    with pytest.raises(ValueError, match=message), fa.rows(model, names):
        raise AssertionError("not reached")
    model(token_ids())


def test_a_list_of_the_wrong_length():
    model = adapted(configs={"prefix": CONFIGS["prefix"]})
    with fa.rows(model, ["prefix", None, "prefix"]):
        with pytest.raises(ValueError, match="3 adapters were named for a batch of 2 rows"):
            model(token_ids(batch=2))
        with pytest.raises(ValueError, match="3 adapters were named for a batch of 6 rows"):
            model(token_ids(batch=6))
        with pytest.raises(ValueError, match="inside rows"):
            fa.set_active(model, None)
        with pytest.raises(ValueError, match="inside rows"):
            fa.detach(model)
    fa.set_active(model, None)
    model(token_ids(batch=6))
