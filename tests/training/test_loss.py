"""Batches and the supervised-token loss, judged by the plain computation: full logits, a mask, one cross-entropy."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import fastadapter as fa
from fastadapter.integrations.parts.discovery import looks_back_only
from fastadapter.training import (
    Encoded,
    collate,
    encode_examples,
    epoch_batches,
    supervised_logits,
    supervised_loss,
)
from fastadapter.training.batching import share
from tests.training.toy import make_examples, make_model, make_tokenizer


def gemma3():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=70, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, final_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=32, n_layer=2, n_head=4, n_positions=64))


MODELS = {"llama": make_model, "gemma3": gemma3, "gpt2": gpt2}


def adapted(name):
    model = fa.attach(MODELS[name](), fa.LlamaAdapterConfig(prefix_len=3)).eval()
    for key, parameter in fa.trainable_parameters(model):
        if key.endswith("gate"):
            torch.nn.init.normal_(parameter)  # at a closed gate most gradients are zero
    return model


@pytest.fixture
def batch():
    return collate(encode_examples(make_tokenizer(), make_examples(5, labelled=False), append_eos=True))


def full_loss(model, batch):
    """The loss as transformers computes it from labels, but summed."""
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.positions + 1] = batch.targets
    logits = model(**batch.model_inputs()).logits[:, :-1]
    labels = labels.view_as(batch.input_ids)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_those_of_full_logits(name, batch):
    model = adapted(name)
    parameters = [parameter for _, parameter in fa.trainable_parameters(model)]
    expected = full_loss(model, batch)
    actual = supervised_loss(model, batch)
    assert batch.num_supervised < batch.input_ids.numel() / 2
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    for got, want in zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_and_only_those(name, batch):
    model = adapted(name)
    sizes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(out.shape))
    with torch.no_grad():
        logits = supervised_logits(model, batch)
        handle.remove()
        full = model(**batch.model_inputs()).logits
    assert sizes == [(1, batch.num_supervised, full.shape[-1])]
    assert full.shape[:2] == batch.input_ids.shape  # the hook is gone
    torch.testing.assert_close(logits, full.flatten(0, 1)[batch.positions], rtol=1e-5, atol=1e-5)


def test_the_hook_is_removed_after_an_error(batch):
    model = adapted("llama")
    head = model.get_output_embeddings()
    failing = head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        supervised_loss(model, batch)
    failing.remove()
    assert not head._forward_pre_hooks


def test_models_without_one_head_over_all_states_are_refused(batch):
    model = adapted("llama")
    head = model.lm_head
    model.get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match="no output embeddings"):
        supervised_loss(model, batch)
    model.get_output_embeddings = lambda: head
    model.lm_head = torch.nn.Identity()
    with pytest.raises(TypeError, match="called 0 times"):
        supervised_loss(model, batch)
    model.lm_head = torch.nn.Sequential(torch.nn.Flatten(0, 1), head)
    with pytest.raises(TypeError, match="cannot be told apart"):
        supervised_loss(model, batch)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_change_the_loss_of_a_row(causal):
    """With a mask, and without where nothing sees what stands behind it."""
    model = adapted("llama")
    assert looks_back_only(model)
    examples = encode_examples(make_tokenizer(), make_examples(4, labelled=False))
    batch = collate(examples, causal=causal)
    assert (batch.attention_mask is None) == causal
    together = supervised_loss(model, batch)
    alone = sum(supervised_loss(model, collate([example])) for example in examples)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_models_that_look_ahead_keep_their_mask():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    assert not looks_back_only(BertForSequenceClassification(BertConfig(vocab_size=8, **sizes)))
    assert not looks_back_only(torch.nn.Linear(2, 2))


def test_half_precision_logits_are_scored_in_fp32(batch):
    model = make_model(dtype=torch.bfloat16)
    assert supervised_logits(model, batch).dtype == torch.float32
    assert supervised_logits(make_model(dtype=torch.float64), batch).dtype == torch.float64


def test_a_batch_without_padding_needs_no_mask():
    even = collate([Encoded((1, 2, 3), 1), Encoded((4, 5, 6), 2)])
    assert even.attention_mask is None and set(even.model_inputs()) == {"input_ids"}
    assert even.positions.tolist() == [0, 1, 4] and even.rows.tolist() == [0, 0, 1]


def test_epochs_hold_every_row_once_and_depend_on_seed_and_epoch_alone():
    lengths = [len(e.prompt) for e in make_examples(1000)]
    batches = epoch_batches(lengths, 8, seed=3, epoch=0)
    assert sorted(row for rows in batches for row in rows) == list(range(1000))
    assert {len(rows) for rows in batches} == {8}
    assert batches == epoch_batches(lengths, 8, 3, 0)
    assert batches != epoch_batches(lengths, 8, 3, 1) and batches != epoch_batches(lengths, 8, 4, 0)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    assert padded < 1.05 * sum(lengths)
    assert sorted(map(len, epoch_batches(lengths[:10], 8, 0, 0))) == [2, 8]


def test_shares_are_even_and_lose_nothing():
    assert share(range(10), 4) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert share([7], 3) == [[], [], [7]]
