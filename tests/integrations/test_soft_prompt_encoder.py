"""Soft prompts in encoders, against the definition: one row at a time, prompt and words joined by hand."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import transformers as tf

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.methods import train_a_little
from tests.support.models import FAMILIES, build, output_of, token_ids

NAMED = {family.name: family for family in FAMILIES}
TEXT = ("bert", "roberta", "distilbert")
LENGTHS = {"short": 3, "long": 7, "twin": 3}
PADDING = 1  # RoBERTa's
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
every_text = pytest.mark.parametrize("family", TEXT)


def prompted(family, lengths=LENGTHS):
    """A model with a soft prompt of every length, and the prompts by name."""
    model = build(NAMED[family])
    for seed, (name, length) in enumerate(lengths.items()):
        torch.manual_seed(seed)
        fa.attach(model, fa.SoftPromptConfig(length, init="random"), name)
    with torch.no_grad():
        for _, parameter in fa.trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    prompts = {key.split(".")[-2]: p for key, p in fa.trainable_parameters(model)}
    return model, {name: prompts[name] for name in lengths}


def by_definition(model, prompt, ids, positions):
    """Hidden states ``(seq, hidden)`` of one row's text without padding.

    Args:
        prompt: ``(prompt_len, hidden)`` or ``None``.
        positions: what the base model gives the text's tokens; the prompt moves them up.
    """
    fa.set_active(model, None)
    words = model.get_input_embeddings()(ids)
    first = PADDING + 1 if model.config.model_type == "roberta" else 0
    length = 0 if prompt is None else len(prompt)
    joined = words if prompt is None else torch.cat([prompt, words])
    numbers = torch.cat([torch.arange(first, first + length), positions + length])
    output = model(inputs_embeds=joined[None], position_ids=numbers[None]).last_hidden_state
    return output[0, length:]


def padded(side):
    """Two rows, of 5 and of 9 tokens, the shorter one padded; the mask, and which columns are real."""
    ids = token_ids(length=9)
    ids[0, slice(0, 4) if side == "left" else slice(5, 9)] = PADDING
    mask = (ids != PADDING).long()
    return ids, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["2d", "4d-bool", "4d-float", "4d-broadcast"])
@pytest.mark.parametrize("side", ["left", "right"])
@every_text
@torch.no_grad()
def test_is_the_model_on_prompt_and_words(family, side, kind, attention):
    """Whatever form the padding mask has; RoBERTa numbers no padding, the others do."""
    model, prompts = prompted(family)
    model.set_attn_implementation(attention)
    ids, mask = padded(side)
    given = mask
    if kind != "2d":
        given = mask.bool()[:, None, None, :]
        given = given if kind == "4d-broadcast" else given.expand(-1, -1, 9, -1)
        if kind == "4d-float" or attention == "eager":  # eager adds its mask
            given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    for names in (["long", "long"], ["short", "long"], [None, "short"]):
        if names[0] == names[1]:
            fa.set_active(model, names[0])
            found = model(ids, attention_mask=given).last_hidden_state
        else:
            with fa.rows(model, names):
                found = model(ids, attention_mask=given).last_hidden_state
        for row, name in enumerate(names):
            real = mask[row].bool()
            positions = PADDING + mask[row].cumsum(0) if family == "roberta" else torch.arange(9)
            prompt = None if name is None else prompts[name]
            expected = by_definition(model, prompt, ids[row, real], positions[real])
            torch.testing.assert_close(found[row, real], expected, rtol=1e-4, atol=1e-5)


@every_text
@torch.no_grad()
def test_token_types_positions_and_embeddings_can_be_given(family):
    model, prompts = prompted(family)
    fa.set_active(model, "short")
    ids = token_ids()
    plain = model(ids).last_hidden_state
    words = model.get_input_embeddings()(ids)
    assert same_bits(model(inputs_embeds=words).last_hidden_state, plain)
    first = PADDING + 1 if family == "roberta" else 0
    assert same_bits(model(ids, position_ids=torch.arange(first, first + 9)[None]).last_hidden_state, plain)
    if family != "distilbert":
        types = torch.zeros(2, 9, dtype=torch.int64)
        assert same_bits(model(ids, token_type_ids=types).last_hidden_state, plain)
    if family == "bert":
        types[:, 4:] = 1
        typed = model(ids, None, types).last_hidden_state  # by place
        fa.set_active(model, None)
        joined = torch.cat([prompts["short"].expand(2, -1, -1), words], 1)
        all_types = torch.cat([torch.zeros(2, 3, dtype=torch.int64), types], 1)
        expected = model(inputs_embeds=joined, token_type_ids=all_types).last_hidden_state[:, 3:]
        assert same_bits(typed, expected) and not same_bits(typed, plain)


@torch.no_grad()
def test_padding_keeps_its_number_in_roberta():
    """Where no mask hides it: also among positions that were given as the model makes them."""
    model, prompts = prompted("roberta", {"short": 3})
    ids, mask = padded("left")
    found = model(ids).last_hidden_state
    own = model.embeddings.create_position_ids_from_input_ids(ids, PADDING)
    assert same_bits(model(ids, position_ids=own).last_hidden_state, found)
    fa.set_active(model, None)
    joined = torch.cat([prompts["short"].expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    numbers = torch.cat(
        [torch.tensor([[2, 3, 4]]).expand(2, -1), torch.where(mask == 1, own + 3, PADDING)], 1
    )
    expected = model(inputs_embeds=joined, position_ids=numbers).last_hidden_state[:, 3:]
    assert same_bits(found, expected)


@torch.no_grad()
def test_an_image_prompt_stands_behind_the_embeddings():
    """Visual Prompt Tuning's order, [CLS; prompt; patches], written out; blocks do not know their tokens' order."""
    model, prompts = prompted("vit")
    images = torch.randn(3, 3, 16, 16)
    with fa.rows(model, ["long", None, "short"]):
        output = model(images)
    fa.set_active(model, None)
    for row, name in enumerate(["long", None, "short"]):
        tokens = model.embeddings(images[row : row + 1])
        prompt = tokens[:, :0] if name is None else prompts[name][None]
        hidden = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], 1)
        for layer in model.layers:
            hidden = layer(hidden)
        hidden = model.layernorm(hidden)
        expected = torch.cat([hidden[:, :1], hidden[:, 1 + prompt.shape[1] :]], 1)
        torch.testing.assert_close(output.last_hidden_state[row], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.pooler_output[row], model.pooler(expected)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*TEXT, "vit"])
@torch.no_grad()
def test_what_the_caller_sees_has_the_text_s_shape(family):
    """Every hidden state and attention, tuples too; a prompt's share of an attention is what a row lacks to one."""
    model, _ = prompted(family)
    model.set_attn_implementation("eager")
    inputs = {**NAMED[family].inputs(), "output_hidden_states": True, "output_attentions": True}
    fa.set_active(model, None)
    base = model(**inputs)
    fa.set_active(model, "long")
    output = model(**inputs)
    assert list(output) == list(base)
    for field, value in base.items():
        shapes = [each.shape for each in value] if isinstance(value, tuple) else value.shape
        found = output[field]
        assert ([each.shape for each in found] if isinstance(value, tuple) else found.shape) == shapes, field
    if family != "vit":
        assert same_bits(output.hidden_states[-1], output.last_hidden_state)
        words = base.hidden_states[0]  # the same tokens at other positions
        assert output.hidden_states[0].shape == words.shape and not same_bits(output.hidden_states[0], words)
    else:
        assert same_bits(output.hidden_states[0], base.hidden_states[0])
    for weights in output.attentions:
        shares = weights.sum(-1)
        assert (shares > 0).all() and (shares < 1).all()
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output)
    assert same_bits(as_tuple[0], output.last_hidden_state)


@torch.no_grad()
def test_heads_read_the_text():
    """The pooler its first token, a masked language model and a tagger every token, with labels as long as the text."""
    ids = token_ids()
    torch.manual_seed(0)
    classifier = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).eval()
    fa.attach(classifier, fa.SoftPromptConfig(4))
    hidden = classifier.bert(ids).last_hidden_state
    pooled = classifier.bert.pooler(hidden)
    output = classifier(ids, labels=torch.tensor([0, 1]))
    assert same_bits(output.logits, classifier.classifier(pooled)) and output.loss.isfinite()
    for kind in (tf.BertForMaskedLM, tf.BertForTokenClassification):
        model = kind(tf.BertConfig(**SIZES)).eval()
        fa.attach(model, fa.SoftPromptConfig(4))
        output = model(ids, labels=torch.ones_like(ids))
        assert output.logits.shape[:2] == ids.shape and output.loss.isfinite()
    image = tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=16, patch_size=4)).eval()
    fa.attach(image, fa.SoftPromptConfig(4, init="random"))
    pixels = torch.randn(2, 3, 16, 16)
    first = image.vit(pixels).last_hidden_state[:, 0]
    assert same_bits(image(pixels).logits, image.classifier(first))


@torch.no_grad()
def test_xlm_roberta_is_roberta():
    torch.manual_seed(0)
    model = tf.XLMRobertaModel(tf.XLMRobertaConfig(**SIZES)).eval()
    fa.attach(model, fa.SoftPromptConfig(3))
    [(_, prompt)] = fa.trainable_parameters(model)
    ids = token_ids()
    found = model(ids).last_hidden_state
    fa.set_active(model, None)
    joined = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    assert same_bits(model(inputs_embeds=joined).last_hidden_state[:, 3:], found)


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_compiles_fullgraph(family):
    """One graph, equal to eager, forward and gradient, also after a step."""
    model, prompts = prompted(family, {"short": 3})
    inputs = NAMED[family].inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = output_of(run, inputs)
            output.square().sum().backward()
            results.append([output.detach(), prompts["short"].grad.clone()])
        for plain, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)
        train_a_little(model)


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own():
    model, _ = prompted("bert", {"short": 3})
    ids = token_ids()
    expected = model(ids).last_hidden_state
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        for _, parameter in fa.trainable_parameters(other):
            parameter.mul_(2)
        assert same_bits(model(ids).last_hidden_state, expected)
        assert not same_bits(other(ids).last_hidden_state, expected)
        fa.detach(other)
        assert same_bits(model(ids).last_hidden_state, expected)


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_behind():
    model, _ = prompted("bert", {"short": 3})
    ids = token_ids()
    fa.set_active(model, None)
    base = model(ids).last_hidden_state
    fa.set_active(model, "short")

    def fail(*_):
        raise RuntimeError("broken")

    handle = model.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        model(ids)
    handle.remove()
    words = model.embeddings(ids)
    assert model.encoder(words).last_hidden_state.shape == words.shape
    fa.set_active(model, None)
    assert same_bits(model(ids).last_hidden_state, base)


@pytest.mark.parametrize("family", [*TEXT, "vit"])
@torch.no_grad()
def test_half_precision_and_autocast(family):
    """The prompt stays fp32; activations are the model's."""
    model, prompts = prompted(family, {"short": 3})
    inputs = NAMED[family].inputs()
    exact = output_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert (output_of(model, inputs).float() - exact).abs().max() < 0.2
    model.to(torch.bfloat16)
    [prompt] = [p for _, p in fa.trainable_parameters(model)]
    assert prompt.dtype == torch.float32
    output = output_of(model, inputs)
    assert output.dtype == torch.bfloat16 and (output.float() - exact).abs().max() < 0.2


def test_a_fresh_process_loads_what_was_trained(tmp_path):
    script = """
import sys, torch, fastadapter as fa
from tests.support.models import FAMILIES, build, output_of
for family in FAMILIES:
    if family.name in sys.argv[2:]:
        model = build(family)
        fa.load(model, f"{sys.argv[1]}/{family.name}")
        inputs = torch.load(f"{sys.argv[1]}/{family.name}-in.pt", weights_only=True)
        with torch.no_grad():
            torch.save(output_of(model, inputs), f"{sys.argv[1]}/{family.name}.pt")
"""
    outputs = {}
    for name in (*TEXT, "vit"):
        model, inputs = build(NAMED[name]), NAMED[name].inputs()
        fa.attach(model, fa.SoftPromptConfig(4, init="random"))
        train_a_little(model)
        fa.save(model, tmp_path / name)
        torch.save(inputs, tmp_path / f"{name}-in.pt")
        with torch.no_grad():
            outputs[name] = output_of(model, inputs)
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *outputs], check=True)
    for name, output in outputs.items():
        assert same_bits(torch.load(tmp_path / f"{name}.pt", weights_only=True), output), name


def test_first_values():
    """Of an encoder's vocabulary or of a text as in decoders; images have neither."""

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(letter) % 60 for letter in text]}

    model = build(NAMED["bert"])
    table = model.get_input_embeddings().weight.detach().clone()
    fa.attach(model, fa.SoftPromptConfig(5), "drawn")
    fa.attach(model, fa.SoftPromptConfig(5, init_text="abc"), "told", tokenizer=Tokenizer())
    prompts = {key.split(".")[-2]: p.detach() for key, p in fa.trainable_parameters(model)}
    assert all((table == row).all(1).any() for row in prompts["drawn"])
    assert torch.equal(prompts["told"], table[[ord(letter) % 60 for letter in "abcab"]])
    image = build(NAMED["vit"])
    for config in (fa.SoftPromptConfig(5), fa.SoftPromptConfig(5, init_text="a cat")):
        with pytest.raises(ValueError, match="init must be 'random' for ViTModel"):
            fa.attach(image, config, tokenizer=Tokenizer())
    fa.attach(image, fa.SoftPromptConfig(50, init="random"))
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    [(_, prompt)] = fa.trainable_parameters(image)
    assert 0.9 * bound < prompt.abs().max() <= bound


@pytest.mark.parametrize("family, context", [("bert", 16), ("roberta", 14), ("distilbert", 16)])
def test_beyond_the_context(family, context):
    """RoBERTa loses the positions up to its padding token."""
    sizes = {**SIZES, "max_position_embeddings": 16}
    build_model = {
        "bert": lambda: tf.BertModel(tf.BertConfig(**sizes)),
        "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**sizes)),
        "distilbert": lambda: tf.DistilBertModel(
            tf.DistilBertConfig(
                dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64, max_position_embeddings=16
            )
        ),
    }[family]
    model = build_model().eval()
    with pytest.raises(ValueError, match=f"prompt_len must be less than the model's context {context}"):
        fa.attach(model, fa.SoftPromptConfig(context))
    fa.attach(model, fa.SoftPromptConfig(4), "four")
    fa.attach(model, fa.SoftPromptConfig(2), "two")
    with pytest.raises(
        ValueError, match=f"soft prompt of 2 and an input of {context - 1} tokens are more than"
    ):
        model(token_ids(length=context - 1))
    model(token_ids(length=context - 2))
    with fa.rows(model, ["two", "four"]):
        with pytest.raises(ValueError, match=f"soft prompt of 4 and an input of {context - 2} tokens"):
            model(token_ids(length=context - 2))
        model(token_ids(length=context - 4))
    given = torch.arange(10, 15)[None]
    with pytest.raises(ValueError, match="position_ids behind a soft prompt of 2 reach 16"):
        model(token_ids(length=5), position_ids=given)
    fa.set_active(model, None)
    model(token_ids(length=5), position_ids=given)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(2, 8), ValueError, r"attention_mask must be \(batch, 9\).*got \(2, 8\)"),
        (torch.ones(2, 9, 9), ValueError, r"got \(2, 9, 9\)"),
        (torch.ones(2, 1, 9, 9, dtype=torch.int64), ValueError, "must be boolean or floating"),
        ([[1] * 9] * 2, TypeError, "must be a tensor under a soft prompt, got list"),
    ],
)
def test_other_masks_are_refused(mask, error, message):
    model, _ = prompted("bert", {"short": 3})
    with pytest.raises(error, match=message):
        model(token_ids(), attention_mask=mask)


def test_wrong_inputs_get_the_model_s_own_answer():
    model, _ = prompted("bert", {"short": 3})
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="multiple values"):
        model(token_ids(), input_ids=token_ids())
    with fa.rows(model, ["short", None, "short"]):
        with pytest.raises(ValueError, match="3 adapters were named for a batch of 2 rows"):
            model(token_ids())


def electra():
    return tf.ElectraModel(tf.ElectraConfig(**SIZES))


def bert_decoder():
    return tf.BertLMHeadModel(tf.BertConfig(**SIZES, is_decoder=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            NAMED["t5-encoder"].build,
            "T5EncoderModel is an encoder in which no place for a soft prompt is known",
        ),
        (electra, "ElectraModel is an encoder in which no place .* only in bert, roberta"),
        (NAMED["whisper"].build, "more than one stack of blocks"),
        (bert_decoder, "takes no inputs_embeds and position_ids"),
    ],
)
def test_other_models_are_refused_whole(make, message):
    model = make()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(TypeError, match=message):
        fa.attach(model, fa.SoftPromptConfig(3))
    assert not any("fa_" in path for path, _ in model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
