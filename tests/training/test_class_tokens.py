"""A classifier's last feed-forward computes for what the head reads: the same loss, gradients and scores."""

import contextlib

import pytest
import torch
import transformers as tf
from torch import nn

import fastadapter as fa
from fastadapter.training import TrainingConfig, class_tokens, classification
from fastadapter.training.class_tokens import last_token
from tests.support.methods import CONFIGS, train_a_little
from tests.training.test_last_feed_forward import places
from tests.training.toy import CONTEXT, WORDS, make_classifier, make_texts, make_tokenizer

CPU = torch.device("cpu")
TEXTS = make_texts(12)
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "bert": lambda: make_classifier("bert"),
    "llama": lambda: make_classifier("llama"),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**SIZES, intermediate_size=48, max_position_embeddings=CONTEXT + 2)
    ),
    "electra": lambda: tf.ElectraForSequenceClassification(
        tf.ElectraConfig(**SIZES, intermediate_size=48, embedding_size=32)
    ),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=len(WORDS))
    ),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**SIZES, intermediate_size=48, pad_token_id=0, classifier_pooling="cls")
    ),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=len(WORDS), n_positions=CONTEXT)
    ),
}
WITHOUT_METHODS = ("modernbert",)  # its attention is not one that prompts can be put in
BERT = {"intermediate", "attention.self.query", "attention.output.dense"}
PLACES = {
    "distilbert": {"ffn.lin1", "attention.q_lin", "attention.out_lin"},
    "llama": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "gpt2": {"mlp.c_fc", "attn.c_proj"},
    "modernbert": {"mlp"},
}


def classifier(kind="bert", dropout=0.0):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def adapted(kind="bert", name="llama-adapter", dropout=0.0):
    model = fa.attach(classifier(kind, dropout), CONFIGS[name])
    train_a_little(model)
    return model


def task_of(model, **options):
    return classification.ClassificationTask(model, make_tokenizer(), TEXTS, TEXTS, TrainingConfig(**options))


def step(model, rows=range(5), **options):
    task = task_of(model, **options)
    model.zero_grad()
    torch.manual_seed(0)
    loss = task.loss(model, rows, CPU)
    loss.backward()
    return loss.detach(), [each.grad for _, each in fa.trainable_parameters(model)]


@contextlib.contextmanager
def whole(monkeypatch):
    """Without it."""
    with monkeypatch.context() as patch:
        patch.setattr(class_tokens, "sparing", lambda *_, **__: contextlib.nullcontext())
        yield


def assert_same_step(model, monkeypatch, **options):
    found = step(model, **options)
    with whole(monkeypatch):
        expected = step(model, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_takes_the_same_step(kind, tokens, monkeypatch):
    model = adapted(kind)
    assert_same_step(model, monkeypatch)
    assert tokens == [5] and places(model) == PLACES.get(kind, BERT)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_takes_the_same_step(name, kind, tokens, monkeypatch):
    model = adapted(kind, name)
    assert_same_step(model, monkeypatch)
    assert_same_step(model, monkeypatch)
    assert tokens == [5, 5]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize("name", ["prefix", "soft-prompt", "pfeiffer"])
def test_dropout_draws_the_same_numbers(kind, name, tokens, monkeypatch):
    assert_same_step(adapted(kind, name, dropout=0.3).train(), monkeypatch)
    assert tokens == [5]


def test_packed_decoders(tokens, monkeypatch):
    model, texts = adapted("llama"), [(5, 6, 7, 8, 9), (10, 11, 0), (12, 13, 14, 15)]
    model.config.pad_token_id = 0
    found = classification.packed_class_logits(model, texts, 2, 0, CPU)
    with whole(monkeypatch):
        expected = classification.packed_class_logits(model, texts, 2, 0, CPU)
    assert tokens == [3]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_passes_that_only_answer_are_left_alone(tokens):
    """Several threads may ask one model, whose hooks are then not to come and go."""
    model = adapted()
    texts = task_of(model).sequences()
    classification.class_scores(model, texts, 2, 0, 5)
    with torch.no_grad():
        step_logits = classification.class_logits(model, texts[:5], 2, 0, CPU)
    assert not tokens and step_logits.shape == (5, 2)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_in_eval_mode(name, kind, tokens, monkeypatch):
    model = adapted(kind, name)
    texts = task_of(model).sequences()
    found = classification.class_logits(model, texts, 2, 0, CPU)
    with whole(monkeypatch):
        expected = classification.class_logits(model, texts, 2, 0, CPU)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert tokens == [12]


def test_models_that_train_everything(tokens, monkeypatch):
    model = classifier()
    gradients = []
    for spared in (True, False):
        with contextlib.nullcontext() if spared else whole(monkeypatch):
            model.zero_grad()
            task_of(model).loss(model, range(5), CPU).backward()
            gradients.append([each.grad.clone() for each in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert tokens == [5]


class Mean(nn.Module):
    """A pooler of all tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states.mean(1, keepdim=True))


class Largest(Mean):
    """The same where something is large."""

    def forward(self, states):
        return self.inner(states) + torch.relu(states.amax(1) - 1e6)


@pytest.mark.parametrize("kind", [Mean, Largest])
def test_a_head_that_reads_other_tokens_is_found_out(kind, tokens, monkeypatch):
    model = classifier()
    model.bert.pooler = kind(model.bert.pooler)
    fa.attach(model, CONFIGS["llama-adapter"])
    assert_same_step(model, monkeypatch)
    assert not tokens


def test_a_decoder_that_pads_with_a_word_reads_the_last_other_one(tokens, monkeypatch):
    model = adapted("llama")
    model.config.pad_token_id = 9
    texts = [(5, 6, 9), (9, 9), (7, 8, 9, 11), (10,)]
    found = classification.class_logits(model, texts, 2, 9, CPU)
    with whole(monkeypatch):
        expected = classification.class_logits(model, texts, 2, 9, CPU)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert tokens == [4] and [last_token(ids, 9) for ids in texts] == [1, 0, 3, 0]
