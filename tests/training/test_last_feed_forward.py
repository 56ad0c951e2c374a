"""The last feed-forward computes for the tokens that are asked for: the same loss and gradients, and nobody notices."""

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastadapter as fa
from fastadapter.training import behind_head, causal_lm_loss, last_feed_forward
from fastadapter.training.trunk.start import StartPoint, starting_from
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, token_ids

DECODERS = {family.name: family for family in FAMILIES if family.decoder}
LLAMA = DECODERS["llama"]


def inputs(share=4):
    ids = token_ids(3, 12)
    labels = torch.full_like(ids, -100)
    labels.view(-1)[5::share] = ids.view(-1)[5::share]
    return {"input_ids": ids, "labels": labels}


def step(model, given):
    model.zero_grad()
    torch.manual_seed(0)
    loss = causal_lm_loss(model, given)
    loss.backward()
    return loss.detach(), [each.grad for _, each in fa.trainable_parameters(model)]


@contextlib.contextmanager
def whole():
    """Without it."""
    spared, behind_head.sparing = behind_head.sparing, lambda *_, **__: contextlib.nullcontext()
    try:
        yield
    finally:
        behind_head.sparing = spared


def assert_same_step(model, given):
    found = step(model, given)
    with whole():
        expected = step(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def adapted(family=LLAMA, name="llama-adapter"):
    model = fa.attach(build(family), CONFIGS[name])
    train_a_little(model)
    return model


DECODER_PLACES = {
    **{name: {"mlp", "self_attn.q_proj", "self_attn.o_proj"} for name in DECODERS},
    "phi3": {"mlp", "self_attn.o_proj"},  # one projection makes queries and keys
    "gpt_neox": {"mlp"},
    "gpt2": {"mlp.c_fc", "attn.c_proj"},
}


def places(model):
    """Where tokens are left out of its last block."""
    (found,) = [
        last_feed_forward._verdicts[each] for each in model.modules() if each in last_feed_forward._verdicts
    ]
    return {first for first, _ in found[model.training][1]}


@pytest.mark.parametrize("family", DECODERS.values(), ids=str)
def test_every_family_takes_the_same_step(family, tokens):
    model = adapted(family).eval()
    assert_same_step(model, inputs())
    assert tokens == [8] and places(model) == DECODER_PLACES[family.name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_takes_the_same_step(name, tokens):
    model = adapted(name=name)
    for _ in range(2):
        assert_same_step(model, inputs())
    assert tokens == [8, 8]


def test_products_are_of_so_many_rows():
    model, seen = adapted(), []
    part = model.model.layers[-1].mlp.act_fn
    plain, part.forward = part.forward, lambda x: seen.append(x.shape[:-1].numel()) or plain(x)
    step(model, inputs())
    assert seen[-1] == 8
    step(model, inputs(share=1))  # all: nothing to spare
    assert seen[-1] == 36


def test_who_counts_passes_does_not_see_the_proof(tokens):
    model, seen = adapted(), []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    step(model, inputs())
    assert len(seen) == 1 and not tokens
    handle.remove()
    step(model, inputs())
    assert tokens == [8]


@pytest.mark.parametrize("path", ["", ".mlp", ".mlp.down_proj", ".self_attn"])
def test_who_looks_at_the_last_block_sees_all_tokens(path, tokens):
    model, seen = adapted(), []
    step(model, inputs())
    tokens.clear()
    watched = model.get_submodule(f"model.layers.{len(model.model.layers) - 1}{path}")
    handle = watched.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if path == ".self_attn" else out)
    )
    step(model, inputs())
    handle.remove()
    assert seen[-1].shape[:2] == (3, 12) and not tokens


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers(reentrant):
    model = adapted().train()
    step(model, inputs())  # proven while nothing is run again
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(model, inputs())


def test_a_compiled_model_is_left_alone(tokens):
    model = torch.compile(adapted(), backend="eager")
    assert_same_step(model, inputs())
    torch._dynamo.reset()
    assert not tokens


class Mean(nn.Module):
    """Lets every token see all others, behind or inside what is wrapped."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean(1, keepdim=True)


class Rarely(Mean):
    """The same where something is large, which nothing is in a proof."""

    def forward(self, x):
        return self.inner(x) + torch.relu(x.amax(1, keepdim=True) - 1e6)


@pytest.mark.parametrize(("where", "kind"), [("norm", Mean), ("norm", Rarely), ("mlp", Mean)])
def test_a_model_that_mixes_tokens_there_is_found_out(where, kind, tokens):
    model = build(LLAMA)
    holder = model.model if where == "norm" else model.model.layers[-1]
    setattr(holder, where, kind(getattr(holder, where)))
    fa.attach(model, CONFIGS["llama-adapter"])
    train_a_little(model)
    assert_same_step(model, inputs())
    assert not tokens


@pytest.mark.parametrize(("where", "found"), [("mlp", []), ("mlp.down_proj", []), ("self_attn.o_proj", [8])])
def test_dropout_inside_is_left_alone(where, found, tokens):
    """Fewer tokens would draw other numbers; before or behind it does not matter, as in GPT-2's, which is behind."""
    model = build(LLAMA)
    block = model.model.layers[-1]
    parent, _, name = where.rpartition(".")
    holder = block.get_submodule(parent)
    setattr(holder, name, nn.Sequential(getattr(holder, name), nn.Dropout(0.5)))
    fa.attach(model, CONFIGS["llama-adapter"])
    assert_same_step(model.train(), inputs())
    assert tokens == found
    step(model.eval(), inputs())
    assert tokens == [*found, 8]


@pytest.mark.parametrize(("where", "found"), [("mlp.down_proj", [8]), ("self_attn.o_proj", [8, 8])])
def test_dropout_that_is_switched_on_later(where, found, tokens):
    model = build(LLAMA)
    block = model.model.layers[-1]
    parent, _, name = where.rpartition(".")
    part = nn.Sequential(block.get_submodule(where), nn.Dropout(0.0))
    setattr(block.get_submodule(parent), name, part)
    fa.attach(model, CONFIGS["llama-adapter"])
    assert_same_step(model.train(), inputs())
    part[1].p = 0.5
    assert_same_step(model, inputs())
    assert tokens == found


def test_queries_that_see_other_tokens_are_left_alone(tokens):
    model = build(LLAMA)
    model.model.layers[-1].self_attn.q_proj = Mean(model.model.layers[-1].self_attn.q_proj)
    fa.attach(model, CONFIGS["pfeiffer"])
    train_a_little(model)
    assert_same_step(model, inputs())
    assert tokens == [8] and places(model) == {"mlp"}


def test_dropout_behind_it_draws_the_same_numbers(tokens):
    model = adapted(DECODERS["gpt2"]).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    assert_same_step(model, inputs())
    assert tokens == [8]


class Dropping(nn.Module):
    """Dropout that no module shows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return nn.functional.dropout(self.inner(x), 0.5, self.training)


def test_dropout_by_a_function_is_found_out(tokens):
    model = build(LLAMA)
    model.model.layers[-1].mlp.down_proj = Dropping(model.model.layers[-1].mlp.down_proj)
    fa.attach(model, CONFIGS["llama-adapter"])
    step(model.eval(), inputs())
    assert tokens == [8]
    assert_same_step(model.train(), inputs())
    assert tokens == [8]


def test_another_thread_sees_all_tokens():
    """Regression: a pass of the same shape in another thread computed for the tokens of the one that trains."""
    model, ids = adapted(), inputs()["input_ids"]
    step(model, inputs())
    wanted = last_feed_forward._Wanted(tuple(ids.shape), torch.tensor([3, 20]), False, float("nan"))
    block = model.model.layers[-1]
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        expected = model(input_ids=ids).logits
        with last_feed_forward._at(block, last_feed_forward._places(block), wanted):
            found = pool.submit(torch.no_grad()(model), input_ids=ids).result().logits
            assert model(input_ids=ids).logits.isnan().any()
    torch.testing.assert_close(found, expected)


def patched(module):
    plain = module.forward
    module.forward = lambda x: plain(x) + x.mean(1, keepdim=True)


@pytest.mark.parametrize("how", ["another norm", "another feed-forward", "another forward"])
def test_a_model_that_is_changed_later_is_tried_again(how, tokens):
    """Regression: what was found of the block before was believed of other parts."""
    model = adapted()
    step(model, inputs())
    block = model.model.layers[-1]
    if how == "another norm":
        model.model.norm = Mean(model.model.norm)
    elif how == "another feed-forward":
        block.mlp = Mean(block.mlp)
    else:
        patched(block.mlp)
    assert_same_step(model, inputs())
    assert tokens == [8]


class MeanInTraining(Mean):
    """The same in training mode."""

    def forward(self, x):
        return super().forward(x) if self.training else self.inner(x)


def test_a_part_that_changes_its_mode_is_tried_again(tokens):
    model = build(LLAMA)
    part = model.model.layers[-1].mlp = MeanInTraining(model.model.layers[-1].mlp)
    fa.attach(model, CONFIGS["llama-adapter"])
    part.eval()
    step(model, inputs())
    part.train()
    assert_same_step(model, inputs())
    assert tokens == [8]


def test_a_model_that_is_not_changed_is_not_tried_again(tokens, monkeypatch):
    model = adapted()
    model.model.norm.forward = model.model.norm.forward  # as accelerate and others do
    step(model, inputs())
    monkeypatch.setattr(last_feed_forward, "_proves", lambda *_: pytest.fail("again"))
    step(model, inputs())
    assert tokens == [8, 8]


def test_a_model_is_not_held():
    model = adapted()
    model.model.norm.forward = model.model.norm.forward
    step(model, inputs())
    block = weakref.ref(model.model.layers[-1])
    del model
    gc.collect()
    assert block() is None


def test_nothing_is_proven_by_a_pass_that_spared_nothing(tokens, monkeypatch):
    """Regression: a prompt before the text, or layers that are run again, made the three passes of a proof equal."""
    model = adapted()
    with monkeypatch.context() as patch:
        patch.setattr(last_feed_forward, "_is_recomputed", lambda: True)
        step(model, inputs())
    step(model, inputs())
    assert not tokens


def test_autocast_is_no_reason(tokens):
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        step(model, inputs())
    assert tokens == [8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, tokens):
    model = adapted().to(dtype)
    loss, _ = step(model, inputs())
    with whole():
        expected, _ = step(model, inputs())
    assert tokens == [8]
    torch.testing.assert_close(loss, expected, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=0)


def test_the_proof_draws_no_numbers():
    model = build(DECODERS["gpt2"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1 if module is model.transformer.drop else 0.0
    fa.attach(model.train(), CONFIGS["llama-adapter"])
    losses = []
    for _ in range(2):  # the first one proves
        torch.manual_seed(0)
        losses.append((causal_lm_loss(model, inputs()), torch.rand(1)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["llama-adapter", "v2-input", "houlsby"])
def test_rows_with_adapters_of_their_own(name, tokens):
    """Linear layers inside have to know whose row they are given."""
    model = adapted(name=name)
    step(model, inputs())
    fa.attach(model, CONFIGS[name], "second")
    with fa.rows(model, ["default", None, "second"]):
        assert_same_step(model, inputs())
    assert tokens == [8]


def test_a_wrapped_model(tokens):
    assert_same_step(nn.parallel.DataParallel(adapted()), inputs())
    assert tokens == [8]


def test_a_pass_that_begins_behind_some_blocks(tokens):
    """The proof is a pass of its own, from the first block on."""
    model, given = adapted(), inputs()
    with StartPoint(model.model.layers, 1, [None] * 3) as point:
        states = point.states(lambda: model(input_ids=given["input_ids"]))
        with starting_from(states):
            loss = causal_lm_loss(model, given)
    assert tokens == [8]
    torch.testing.assert_close(loss, causal_lm_loss(model, given))
