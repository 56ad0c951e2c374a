"""Logits made in pieces: loss, gradients and size, judged by the model's own loss over all its logits."""

import contextlib
import signal
import sys
import types

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto import modeling_auto

import fastadapter as fa
from fastadapter.training import (
    Batch,
    TrainingConfig,
    causal_lm_loss,
    collate,
    encode_examples,
    finetune,
    loss,
    supervised_logit_parts,
    supervised_logits,
    supervised_loss,
)
from fastadapter.training.evaluation import score_candidates
from tests.support.methods import CONFIGS
from tests.support.tiny_models import tiny_model
from tests.training.toy import WORDS, make_examples, make_model, make_tokenizer

VOCABULARY = len(WORDS)
THREE = 3 * 4 * VOCABULARY  # bytes of the logits of three tokens
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
# What stands between the states and the logits of each, besides the head.
FAMILIES = {
    "a soft cap": lambda: tf.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=2.0),
    "a factor": lambda: tf.CohereConfig(**_SIZES, logit_scale=0.3),
    "a divisor": lambda: tf.GraniteConfig(**_SIZES, logits_scaling=4.0),
    "a bias": lambda: tf.PhiConfig(**_SIZES),
    "tied embeddings": lambda: tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "a decoder within": lambda: tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
    ),
    "layers before the head": lambda: tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        is_decoder=True,
    ),
}  # fmt: skip


def make_family(name):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(FAMILIES[name]()).float().eval()


@pytest.fixture(scope="module")
def batch():
    return collate(encode_examples(make_tokenizer(), make_examples(5, labelled=False), append_eos=True))


def inputs_of(batch):
    """What the model takes, and the labels of transformers' own loss."""
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.positions + 1] = batch.targets
    return {**batch.model_inputs(), "labels": labels.view_as(batch.input_ids)}


def full_loss(model, batch, label_smoothing=0.0):
    """Every logit, the labels moved by one, one cross-entropy."""
    inputs = inputs_of(batch)
    labels = inputs.pop("labels")[:, 1:].flatten()
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        logits, labels, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
    )


def gradients(value, model):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    return {name: each for (name, _), each in zip(named, found) if each is not None}


def assert_same(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    # Some are nothing but round-off, such as that of a bias of keys, which no softmax sees.
    floor = 1e-3 * max(float(each.abs().max()) for each in expected.values())
    for name in expected:
        bound = rtol * max(float(expected[name].abs().max()), floor)
        assert float((actual[name] - expected[name]).abs().max()) <= bound, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(name, smoothing, batch, recwarn):
    """Of every parameter, the head and what it shares with the embeddings included."""
    model = make_family(name)
    assert batch.num_supervised > 10
    expected = full_loss(model, batch, smoothing)
    actual = supervised_loss(model, batch, smoothing, max_logit_bytes=THREE)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert_same(gradients(actual, model), gradients(expected, model))
    assert not [each for each in recwarn if "in one piece" in str(each.message)]


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_are_the_logits(name, batch):
    model = make_family(name)
    with torch.no_grad():
        whole = supervised_logits(model, batch)
        parts = list(supervised_logit_parts(model, batch, max_logit_bytes=THREE))
    assert [len(logits) for _, logits in parts[:-1]] == [3] * (len(parts) - 1) and len(parts) > 3
    for part, logits in parts:
        torch.testing.assert_close(logits, whole[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_scored_as_they_were(dtype, batch):
    model = fa.attach(make_model(dtype=dtype), fa.PrefixTuningConfig(prefix_len=3))
    whole = supervised_loss(model, batch)
    parts = supervised_loss(model, batch, max_logit_bytes=2 * THREE)
    exact = dtype == torch.float64
    assert whole.dtype == parts.dtype == (torch.float64 if exact else torch.float32)
    torch.testing.assert_close(parts, whole, rtol=1e-12 if exact else 1e-4, atol=0)
    # Rows of another number are multiplied in another order: the last bits of a half precision differ.
    assert_same(gradients(parts, model), gradients(whole, model), 1e-6 if exact else 3e-2)


class Largest(TorchDispatchMode):
    """The most rows of any tensor with a column for each word, weights aside."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.rows = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for each in output if isinstance(output, tuple | list) else [output]:
            if torch.is_tensor(each) and each.dim() > 1 and each.shape[-1] == VOCABULARY:
                if each.untyped_storage().data_ptr() not in self.weights:
                    self.rows = max(self.rows, each.numel() // VOCABULARY)
        return output


@pytest.mark.parametrize("name", ["a soft cap", "a bias"])
def test_no_logits_are_larger_than_asked_for(name, batch):
    model = make_family(name).requires_grad_(False)
    model.base_model.layers[0].requires_grad_(True)
    for size, rows in (
        (None, batch.num_supervised),
        (THREE, 3),
        (1, 2),
    ):  # 2: what the model itself is asked for
        options = {} if size is None else {"max_logit_bytes": size}
        with Largest(model) as largest:
            supervised_loss(model, batch, 0.1, **options).backward()
        assert largest.rows == rows
    with torch.no_grad(), Largest(model) as largest:
        for _ in supervised_logit_parts(model, batch, max_logit_bytes=THREE):
            pass
    assert largest.rows == 3


@pytest.mark.parametrize("method", CONFIGS)
def test_a_hundred_steps_have_the_losses_of_all_logits(method, batch):
    """Supervised positions, in one piece and in several by turns, beside transformers' own loss over every position."""
    example = encode_examples(make_tokenizer(), make_examples(60, labelled=False), append_eos=True)
    batches = [collate(example[start : start + 4]) for start in range(0, 60, 4)]

    def losses(compute):
        torch.manual_seed(0)
        model = fa.attach(make_model(), CONFIGS[method])
        optimizer = torch.optim.AdamW([p for _, p in fa.trainable_parameters(model)], lr=1e-3, eps=1e-4)
        found = []
        for step in range(100):
            each = batches[step % len(batches)]
            value = compute(model, each, step) / each.num_supervised
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    expected = losses(lambda model, each, _: model(**inputs_of(each)).loss * each.num_supervised)
    assert abs(expected[-1] / expected[-1 - 6 * len(batches)] - 1) > 1e-3, "nothing was learnt"
    sizes = (loss.MAX_LOGIT_BYTES, THREE)
    actual = losses(lambda model, each, step: supervised_loss(model, each, max_logit_bytes=sizes[step % 2]))
    assert actual == pytest.approx(expected, rel=1e-5)


def test_a_head_that_is_trained_is_trained_in_pieces(batch):
    """The adapter's own copy, which acts in backward too when nothing is chosen any more."""
    model = fa.attach(make_model(), fa.LlamaAdapterConfig(prefix_len=3, modules_to_save=("lm_head",)))
    model = fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3), name="other")
    fa.set_active(model, "default")
    whole = supervised_loss(model, batch)
    expected = gradients(whole, model)
    assert any("lm_head" in name for name in expected)
    parts = supervised_loss(model, batch, max_logit_bytes=THREE)
    fa.set_active(model, "other")
    assert_same(gradients(parts, model), expected)


def test_the_model_is_left_as_it_was(batch):
    model = make_family("a decoder within")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    supervised_loss(model, batch, max_logit_bytes=THREE).backward()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


class Odd(tf.LlamaForCausalLM):
    """Logits that depend on more than the states."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * input_ids.shape[1]
        return output


def test_a_model_that_cannot_be_taken_apart_says_so_and_is_right(batch):
    torch.manual_seed(0)
    model = Odd(tf.LlamaConfig(**_SIZES, attention_dropout=0.2)).train()
    torch.manual_seed(1)
    whole = supervised_loss(model, batch)
    after = torch.get_rng_state()
    for _ in range(2):  # found out, and known
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="Odd are made in one piece.*gives other logits"):
            assert torch.equal(supervised_loss(model, batch, max_logit_bytes=THREE), whole)
        assert torch.equal(torch.get_rng_state(), after)


def test_dropout_is_drawn_as_without_pieces(batch):
    model = fa.attach(make_model(dropout=0.3), fa.PrefixTuningConfig(prefix_len=3)).train()
    found = []
    for options in ({}, {"max_logit_bytes": THREE}, {"max_logit_bytes": THREE}):
        torch.manual_seed(1)
        found.append((supervised_loss(model, batch, **options), torch.get_rng_state()))
    assert all(torch.equal(state, found[0][1]) for _, state in found)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    assert torch.equal(found[1][0], found[2][0])


@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_bad_sizes_are_refused(value, error, batch):
    with pytest.raises(error, match="max_logit_bytes must be"):
        supervised_loss(make_model(), batch, max_logit_bytes=value)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_run_and_its_evaluations_do_not_depend_on_the_size(tmp_path, monkeypatch, labelled):
    def run(folder):
        examples = make_examples(24, labelled=labelled)
        model = fa.attach(make_model(), fa.BottleneckConfig(bottleneck_size=4))
        config = TrainingConfig(num_train_epochs=1, batch_size=4)
        return finetune(
            model, make_tokenizer(), examples[:16], examples[16:], config, output_dir=folder, progress=False
        )

    whole = run(tmp_path / "whole")
    for function in (loss.supervised_loss, loss.supervised_logit_parts):
        monkeypatch.setitem(function.__kwdefaults__, "max_logit_bytes", THREE)
    parts = run(tmp_path / "parts")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.eval["accuracy_after"] == whole.eval["accuracy_after"]
    assert parts.eval["loss_after"] == pytest.approx(whole.eval["loss_after"], rel=1e-5)


def test_candidates_of_several_tokens_score_the_same_in_pieces(monkeypatch):
    rows = [[each] for each in encode_examples(make_tokenizer(), make_examples(9, labelled=False))]
    whole = score_candidates(make_model(), rows, 4)
    monkeypatch.setitem(supervised_logit_parts.__kwdefaults__, "max_logit_bytes", THREE)
    parts = score_candidates(make_model(), rows, 4)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=0)
    assert torch.equal(parts[1], whole[1])


def test_the_loss_of_labels_is_that_of_transformers(batch):
    model, inputs = fa.attach(make_model(), fa.PrefixTuningConfig(prefix_len=3)), inputs_of(batch)
    expected = model(**inputs).loss
    assert batch.num_supervised > 3
    # with a GPU it would run there
    wrappers = [] if torch.cuda.is_available() else [torch.nn.DataParallel(model)]
    for model_or_wrapper in (model, *wrappers):
        for options in ({}, {"max_logit_bytes": THREE}):
            actual = causal_lm_loss(model_or_wrapper, inputs, **options)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    shared = causal_lm_loss(model, {**inputs, "use_cache": True}, torch.tensor(7))
    torch.testing.assert_close(shared, model(**inputs, num_items_in_batch=7).loss, rtol=1e-6, atol=0)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    torch.testing.assert_close(causal_lm_loss(model, embeds), expected, rtol=1e-6, atol=0)
    assert "labels" in inputs


def test_bad_labels_are_named(batch):
    model, inputs = make_model(), inputs_of(batch)
    with pytest.raises(TypeError, match="must hold labels"):
        causal_lm_loss(model, batch.model_inputs())
    with pytest.raises(TypeError, match="must hold input_ids or inputs_embeds, got nothing"):
        causal_lm_loss(model, {"labels": inputs["labels"]})
    with pytest.raises(ValueError, match=r"labels must be \(5, \d+\) like the tokens"):
        causal_lm_loss(model, {**inputs, "labels": inputs["labels"][:, 1:]})
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    with pytest.raises(ValueError, match="a token to learn from"):
        causal_lm_loss(model, nothing)
    assert causal_lm_loss(model, nothing, 4).item() == 0
    with pytest.raises(TypeError, match="Linear has no output embeddings"):
        causal_lm_loss(torch.nn.Linear(2, 2), inputs)


def test_liger_takes_what_is_a_plain_head(batch, monkeypatch):
    """What it is asked to do, on a stand-in of plain PyTorch: the kernels themselves need a GPU."""
    calls = []

    class Fused:
        def __init__(self, reduction, label_smoothing):
            self.options = {"reduction": reduction, "label_smoothing": label_smoothing}

        def __call__(self, weight, states, targets, bias):
            calls.append(tuple(states.shape))
            return F.cross_entropy(F.linear(states, weight, bias).float(), targets, **self.options)

    module = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Fused)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(loss, "_FUSED_ON", ("cpu",))
    for name, fused in (("a bias", True), ("a soft cap", False), ("a divisor", False)):
        model = make_family(name)
        expected = full_loss(model, batch, 0.1)
        actual = supervised_loss(model, batch, 0.1, max_logit_bytes=THREE)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        assert_same(gradients(actual, model), gradients(expected, model))
        assert calls == ([(batch.num_supervised, 32)] if fused else [])
        calls.clear()
    supervised_loss(make_family("a bias"), batch)  # small enough for the plain way
    supervised_loss(make_model(dtype=torch.float16), batch, max_logit_bytes=THREE)
    assert not calls


@contextlib.contextmanager
def seconds_of_a_processor(count):
    """TimeoutError after so many: some small models are not small."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, count)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.slow
def test_every_family_is_taken_apart(recwarn):
    """Of all causal language models of transformers that can be made small: pieces, and the loss of all logits."""
    tried, wrong = 0, []
    for name in sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
        positions = torch.tensor([2, 3, 4, 5, 8, 9, 13])
        targets = ids.flatten()[positions + 1]
        try:
            with seconds_of_a_processor(5), torch.no_grad():
                model = tiny_model(name)[0].eval()
                logits = model(input_ids=ids).logits.flatten(0, 1)[positions].float()
        except Exception:  # it wants images, or kernels that are not here
            continue
        batch = Batch(ids, None, None, positions, targets, positions // 8, 2, ((0, 0, 8), (1, 0, 8)))
        actual = supervised_loss(model, batch, max_logit_bytes=4 * 3 * logits.shape[1])
        expected = F.cross_entropy(logits, targets, reduction="sum")
        tried += 1
        if not torch.allclose(actual, expected, rtol=1e-4):
            wrong.append(name)
    assert tried > 100 and not wrong
    assert not [str(each.message) for each in recwarn if "in one piece" in str(each.message)]
