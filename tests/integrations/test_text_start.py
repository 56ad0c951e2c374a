"""Starts from a text: a fresh prefix is judged by the model itself with the text in front of its input.

The reference is the bare model on joined token ids; a letter is a token here, so no tokenizer takes part in it.
"""

import copy
import json

import pytest
import torch
import transformers as tf
from safetensors import safe_open

import fastadapter as fa
from tests.support.budget import same_bits
from tests.support.models import FAMILIES, build, output_of, token_ids

NAMED = {family.name: family for family in FAMILIES}
TEXT = "is it so"
CLOSE = {"rtol": 0, "atol": 2e-5}


class Letters:
    """One token per letter, and the begin token in front where it is asked for as real tokenizers are."""

    def __init__(self, begins=False):
        self.begins, self.bos_token_id = begins, 1

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + ord(letter) % 57 for letter in text]
        return {"input_ids": [1, *ids] if self.begins and add_special_tokens else ids}


def letters(text):
    return torch.tensor([Letters()(text)["input_ids"]])


def in_front(text, ids):
    return torch.cat([letters(text).expand(len(ids), -1), ids], dim=1)


def attach(model, config, name="default", tokenizer=None):
    return fa.attach(model, config, name, tokenizer=tokenizer or Letters())


def base_inputs(model, paths, ids):
    """What each module of ``paths`` gets as hidden states for ``ids``."""
    found = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: found.update(
                {path: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for path in paths
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "phi3", "gpt_neox"])
@torch.no_grad()
def test_a_prefix_is_its_text_in_context(family):
    """Rotary embeddings of every form, grouped and single heads, norms of keys; padding, caches and generation."""
    model, ids = build(NAMED[family]), token_ids()
    expected = model(in_front(TEXT, ids)).logits[:, len(TEXT) :]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = model.generate(in_front(TEXT, ids), **options)[:, len(TEXT) :]
    attach(model, fa.PrefixTuningConfig(len(TEXT), init="text", init_text=TEXT))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    assert torch.equal(model.generate(ids, **options), written)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], expected, **CLOSE)
    soft = attach(build(NAMED[family]), fa.SoftPromptConfig(len(TEXT), init_text=TEXT))
    torch.testing.assert_close(soft(ids).logits, expected, **CLOSE)


@torch.no_grad()
def test_learned_positions_begin_anew_behind_the_text():
    """A prefix moves no position, so GPT-2 reads text and input at its first ones; a soft prompt is the plain text."""
    model, ids = build(NAMED["gpt2"]), token_ids()
    positions = torch.cat([torch.arange(len(TEXT)), torch.arange(ids.shape[1])])[None]
    joined = in_front(TEXT, ids)
    expected = model(joined, position_ids=positions, attention_mask=torch.ones_like(joined)).logits
    plain = model(joined).logits
    attach(model, fa.PrefixTuningConfig(len(TEXT), init_text=TEXT))
    torch.testing.assert_close(model(ids).logits, expected[:, len(TEXT) :], **CLOSE)
    soft = attach(build(NAMED["gpt2"]), fa.SoftPromptConfig(len(TEXT), init_text=TEXT))
    torch.testing.assert_close(soft(ids).logits, plain[:, len(TEXT) :], **CLOSE)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_window_hides_no_prefix(family):
    """As far as the window reaches text and input are as in context; beyond it the prefix alone is still seen."""
    model, ids = build(NAMED[family]), token_ids()
    expected = model(in_front("be", ids)).logits[:, 2:]
    logits = attach(model, fa.PrefixTuningConfig(2, init_text="be"))(ids).logits
    torch.testing.assert_close(logits[:, :4], expected[:, :4], **CLOSE)
    assert (logits[:, 5:] - expected[:, 5:]).abs().max() > 1e-4


@torch.no_grad()
def test_an_encoder_reads_the_text_by_itself():
    """Tokens of BERT see each other, a prefix sees itself alone: the text in a segment that cannot see the input."""
    model, ids = build(NAMED["bert"]), token_ids()
    width, length = len(TEXT), len(TEXT) + ids.shape[1]
    mask = torch.ones(len(ids), 1, length, length, dtype=torch.bool)
    mask[:, :, :width, width:] = False
    positions = torch.cat([torch.arange(width), torch.arange(ids.shape[1])])[None]
    expected = model(in_front(TEXT, ids), attention_mask=mask, position_ids=positions).last_hidden_state
    attach(model, fa.PrefixTuningConfig(width, init_text=TEXT))
    torch.testing.assert_close(model(ids).last_hidden_state, expected[:, width:], **CLOSE)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "t5-encoder", "gemma3", "bert"])
@pytest.mark.parametrize("config", [fa.PrefixTuningConfig, fa.LlamaAdapterConfig])
def test_every_single_stack_can_start_from_a_text(family, config):
    if family not in NAMED:
        pytest.skip("not in the attention interface of this release")
    fresh = {}
    for text in ("one text", "another"):
        model = attach(build(NAMED[family]), config(5, init_text=text))
        fa.verify(model)
        fresh[text] = [p for key, p in fa.trainable_parameters(model) if "gate" not in key]
    assert all(not torch.equal(*pair) for pair in zip(*fresh.values(), strict=True))


@pytest.mark.parametrize(
    "text, length, tokens",
    [("abc", 7, "abcabca"), ("abcdef", 4, "abcd"), (("ab", "cd"), 6, "abcdab"), (["a", "bcd"], 3, "abc")],
)
@torch.no_grad()
def test_texts_are_put_one_after_another_and_repeated_or_cut(text, length, tokens):
    model, ids = build(NAMED["llama"]), token_ids()
    expected = model(in_front(tokens, ids)).logits[:, length:]
    attach(model, fa.PrefixTuningConfig(length, init_text=text), "prefix")
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    attach(model, fa.SoftPromptConfig(length, init_text=text), "soft")
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@torch.no_grad()
def test_a_begin_token_stays_in_front_of_prefixes_and_is_no_row_of_a_prompt():
    model, ids = build(NAMED["llama"]), token_ids()
    whole = torch.tensor([[1, *Letters()("abc")["input_ids"]]])
    expected = model(torch.cat([whole.expand(2, -1), ids], dim=1)).logits[:, 4:]
    rows = base_inputs(model, ["model.layers.2.self_attn"], whole)["model.layers.2.self_attn"][0, 1:]
    for config in (fa.PrefixTuningConfig(4, init_text="abc"), fa.SoftPromptConfig(4, init_text="abc")):
        attach(model, config, config.method, Letters(begins=True))
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    attach(model, fa.LlamaAdapterConfig(3, init_text="abc", layers=1), "rows", Letters(begins=True))
    prompt = model.get_submodule("model.layers.2.self_attn.fa_prefix").adapter("rows").prompt
    torch.testing.assert_close(prompt, rows, **CLOSE)
    encoder = attach(
        build(NAMED["bert"]), fa.SoftPromptConfig(3, init_text="abc"), tokenizer=Letters(begins=True)
    )
    [(_, prompt)] = fa.trainable_parameters(encoder)
    assert torch.equal(prompt, encoder.get_input_embeddings()(letters("abc"))[0])


@pytest.mark.parametrize("config", [fa.LlamaAdapterConfig, fa.LlamaAdapterV2Config])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "distilbert"])
@torch.no_grad()
def test_gated_prompts_are_what_the_layer_gets(family, config):
    """And a zero gate stays the base, bit for bit."""
    model, inputs = build(NAMED[family]), NAMED[family].inputs()
    base = output_of(model, inputs)
    attach(model, config(len(TEXT), init_text=TEXT, layers=2))
    assert same_bits(output_of(model, inputs), base)
    hosts = {path: each for path, each in model.named_modules() if path.endswith(".fa_prefix")}
    assert len(hosts) == 2
    fa.set_active(model, None)
    expected = base_inputs(model, [path.removesuffix(".fa_prefix") for path in hosts], letters(TEXT))
    for path, host in hosts.items():
        rows = expected[path.removesuffix(".fa_prefix")][0]
        torch.testing.assert_close(host.adapter("default").prompt, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [8, 9, 40])
@torch.no_grad()
def test_a_network_is_fitted_to_the_text(width):
    """As many inner values as slots suffice; folded, it is what it was."""
    model, ids = build(NAMED["qwen3"]), token_ids()
    expected = model(in_front(TEXT, ids)).logits[:, len(TEXT) :]
    torch.manual_seed(1)
    attach(model, fa.PrefixTuningConfig(len(TEXT), init_text=TEXT, reparam_size=width))
    assert any("up_proj" in key for key, _ in fa.trainable_parameters(model))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    fa.fold(model)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("text", [{"init_text": TEXT}, {}], ids=["text", "random"])
def test_frozen_slots_stay_as_they_start(text, tmp_path):
    """With weight decay, in files and copies, and beside an adapter of the same shape in one batch."""
    config = fa.PrefixTuningConfig(len(TEXT), freeze_slots=3, **text)
    model, ids = build(NAMED["llama"]), token_ids()
    with torch.no_grad():
        expected = model(in_front(TEXT, ids)).logits[:, len(TEXT) :]
    attach(model, config)
    if text:
        torch.testing.assert_close(model(ids).logits.detach(), expected, **CLOSE)
    modules = [each for each in model.modules() if isinstance(each, fa.nn.PrefixTuning)]
    before = [[part.detach().clone() for part in module()] for module in modules]
    parameters = [parameter for _, parameter in fa.trainable_parameters(model)]
    assert sum(map(torch.numel, parameters)) == 3 * 2 * 2 * 8 * (len(TEXT) - 3)
    optimiser = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(ids).logits.square().sum().backward()
        optimiser.step()
    for module, old in zip(modules, before, strict=True):
        for part, start in zip(module(), old, strict=True):
            assert torch.equal(part[:, :, :3], start[:, :, :3])
            assert (part[:, :, 3:] != start[:, :, 3:]).all()
    with torch.no_grad():
        trained = model(ids).logits
    fa.save(model, tmp_path)
    other = fa.load(build(NAMED["llama"]), tmp_path)
    attach(other, fa.PrefixTuningConfig(len(TEXT)), "plain")
    with torch.no_grad(), fa.rows(other, ["default", "plain"]):
        mixed = other(ids).logits
    fa.set_active(other, "default")
    with torch.no_grad():
        torch.testing.assert_close(mixed[:1], other(ids[:1]).logits, rtol=0, atol=1e-6)
        assert same_bits(other(ids).logits, trained)
        assert same_bits(copy.deepcopy(other)(ids).logits, trained)
    model.bfloat16()
    assert all(part.dtype == torch.float32 for module in modules for part in module())


CONFIGS = {
    "prefix": fa.PrefixTuningConfig(4, init_text=("ab", "cd")),
    "reparam": fa.PrefixTuningConfig(4, init_text="abcd", reparam_size=6),
    "frozen": fa.PrefixTuningConfig(4, init_text="abcd", freeze_slots=1),
    "soft": fa.SoftPromptConfig(4, init_text="abcd"),
    "gated": fa.LlamaAdapterConfig(4, init_text="abcd"),
    "v2": fa.LlamaAdapterV2Config(4, init_text="abcd"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_config
@torch.no_grad()
def test_loading_keeps_the_text_in_mind_and_does_not_read_it(config, tmp_path, monkeypatch):
    model, ids = attach(build(NAMED["llama"]), config), token_ids()
    for _, parameter in fa.trainable_parameters(model):
        parameter.add_(0.1)
    fa.save(model, tmp_path / "adapter.safetensors")
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        saved = json.loads(file.metadata()["config"])
    assert saved["init"] == "text" and "".join(saved["init_text"]) == "abcd"
    monkeypatch.setattr("fastadapter.integrations.placing.texts._read", None)
    monkeypatch.setattr("fastadapter.integrations.placing.texts.text_tokens", None)
    other = fa.load(build(NAMED["llama"]), tmp_path)
    assert same_bits(other(ids).logits, model(ids).logits)
    fa.load(other, tmp_path)  # into the same adapter
    assert same_bits(copy.deepcopy(other)(ids).logits, model(ids).logits)


@every_config
def test_the_start_is_the_base_models_whatever_acts_and_leaves_no_trace(config):
    """Another adapter is active, the model is in training with dropout, under autocast: the values are the same."""
    plain, model = build(NAMED["llama"]), build(NAMED["llama"])
    torch.manual_seed(3)
    attach(plain, config)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    attach(model, fa.PrefixTuningConfig(3), "first")
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        attach(model, config, "second")
    assert not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training and model.training
    assert all("attend" not in module.__dict__ for module in model.modules())
    ours = {key: p for key, p in model.named_parameters() if ".second." in key or key.endswith(".second")}
    expected = {key.replace(".default", ".second"): p for key, p in fa.trainable_parameters(plain)}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(p, ours[key]) for key, p in expected.items())
    assert not any(block.self_attn._forward_pre_hooks for block in model.model.layers)


@pytest.mark.parametrize("config", [CONFIGS["prefix"], CONFIGS["gated"]], ids=["prefix", "gated"])
def test_compiled_blocks_are_read_as_they_were_written(config):
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    plain, model = attach(build(NAMED["llama"]), config), build(NAMED["llama"])
    for block in model.model.layers:
        block.compile(backend=refuse)
    attach(model, config)
    found, expected = (dict(fa.trainable_parameters(each)) for each in (model, plain))
    assert all(torch.equal(found[key], p) for key, p in expected.items())


def test_half_precision_starts_from_what_the_model_computes():
    model, ids = build(NAMED["llama"]).bfloat16(), token_ids()
    with torch.no_grad():
        expected = model(in_front(TEXT, ids)).logits[:, len(TEXT) :]
        attach(model, fa.PrefixTuningConfig(len(TEXT), init_text=TEXT))
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0.02)
    assert all(p.dtype == torch.float32 for _, p in fa.trainable_parameters(model))


@pytest.mark.parametrize("config", [CONFIGS["prefix"], CONFIGS["gated"]], ids=["prefix", "gated"])
def test_offloaded_weights_are_read_where_they_are_brought_to(config):
    accelerate = pytest.importorskip("accelerate")
    model = build(NAMED["llama"])
    plain = attach(copy.deepcopy(model), config)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    attach(model, config)
    found, expected = (dict(fa.trainable_parameters(each)) for each in (model, plain))
    assert all(torch.equal(found[key], p) for key, p in expected.items())


class PacksInInference(torch.nn.Linear):
    """As bitsandbytes' 4-bit layers on a CPU: a pass in eval mode without gradients takes their backward away."""

    packed = False

    def forward(self, x):
        self.packed |= not self.training and not torch.is_grad_enabled()
        return super().forward(x)


@pytest.mark.parametrize("config", [CONFIGS["prefix"], CONFIGS["gated"]], ids=["prefix", "gated"])
def test_reading_a_text_packs_no_quantised_weights(config):
    model = build(NAMED["llama"])
    for block in model.model.layers:
        block.mlp.up_proj = PacksInInference(32, 48, bias=False).eval()
    attach(model, config)
    assert not any(block.mlp.up_proj.packed for block in model.model.layers)
    assert not any(block.mlp.up_proj.training for block in model.model.layers)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: fa.PrefixTuningConfig(init="text"), ValueError, "init_text must hold the text .* got None"),
        (lambda: fa.LlamaAdapterConfig(init="text"), ValueError, "init_text must hold the text .* got None"),
        (lambda: fa.SoftPromptConfig(init="text"), ValueError, "init_text must hold the text .* got None"),
        (lambda: fa.PrefixTuningConfig(init="random", init_text="a"), ValueError, "init must be 'text' where"),
        (lambda: fa.PrefixTuningConfig(init="zero", init_text="a"), ValueError, "init must be 'text' where"),
        (lambda: fa.SoftPromptConfig(init="random", init_text="a"), ValueError, "init must be 'text' where"),
        (lambda: fa.LlamaAdapterV2Config(init="random", init_text="a"), ValueError, "init must be 'text' where"),
        (lambda: fa.PrefixTuningConfig(init="words"), ValueError, "init must be one of random, zero, text, got"),
        (lambda: fa.LlamaAdapterConfig(init="zero"), ValueError, "init must be one of random, text, got 'zero'"),
        (lambda: fa.SoftPromptConfig(init="zero"), ValueError, "init must be one of vocabulary, random, text"),
        (lambda: fa.PrefixTuningConfig(init_text=""), ValueError, "init_text must hold a word, got ''"),
        (lambda: fa.SoftPromptConfig(init_text=" \n"), ValueError, "init_text must hold a word, got"),
        (lambda: fa.LlamaAdapterConfig(init_text=[]), ValueError, "init_text must hold a word in each text"),
        (lambda: fa.PrefixTuningConfig(init_text=["a", " "]), ValueError, "must hold a word in each text"),
        (lambda: fa.PrefixTuningConfig(init_text=5), TypeError, "init_text must be a text, a sequence of texts"),
        (lambda: fa.PrefixTuningConfig(init_text=["a", 5]), TypeError, "init_text must be a text, a sequence"),
        (lambda: fa.PrefixTuningConfig(init_text=b"a"), TypeError, "init_text must be a text, a sequence of texts"),
        (lambda: fa.PrefixTuningConfig(init_text="a\ud800"), ValueError, "init_text must be valid Unicode"),
        (lambda: fa.PrefixTuningConfig(4, freeze_slots=4), ValueError, "freeze_slots must be between 0 and 3"),
        (lambda: fa.PrefixTuningConfig(4, freeze_slots=-1), ValueError, "freeze_slots must be between 0 and 3"),
        (lambda: fa.PrefixTuningConfig(4, freeze_slots=True), TypeError, "freeze_slots must be an int, got True"),
        (lambda: fa.PrefixTuningConfig(4, freeze_slots=1, reparam_size=8), ValueError, "must be 0 with reparam_size"),
        (lambda: fa.PrefixTuningConfig(9, init_text="a", reparam_size=8), ValueError, "at least prefix_len 9"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_the_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Mute(Letters):
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": []}


class Foreign(Letters):
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5, 64]}


def albert():
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return tf.AlbertModel(tf.AlbertConfig(**sizes, num_attention_heads=4, vocab_size=64)).eval()


def on_meta():
    with torch.device("meta"):
        return NAMED["llama"].build()


def broken():
    model = build(NAMED["llama"])
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    return model


@pytest.mark.parametrize("config", [fa.PrefixTuningConfig, fa.LlamaAdapterConfig])
@pytest.mark.parametrize(
    "model, tokenizer, length, error, message",
    [
        ("llama", None, 4, ValueError, "tokenizer: init_text needs the model's tokenizer, got None"),
        ("llama", Mute(), 4, ValueError, "init_text 'abc' has no tokens"),
        ("llama", Foreign(), 4, ValueError, "it gives token 64 for init_text, the model knows those below 64"),
        ("gpt2", Letters(), 64, ValueError, "prefix_len must be less than the model's context 64"),
        ("vit", Letters(), 4, TypeError, "ViTModel takes no token ids, so nothing can start from a text"),
        ("whisper", Letters(), 4, TypeError, "more than one stack of blocks .* a start from a text is defined"),
        (albert, Letters(), 4, TypeError, "ran 2 times for one text, expected once"),
        (on_meta, Letters(), 4, TypeError, "starts from what the model makes of a text, .* on the meta device"),
        (broken, Letters(), 4, ValueError, "the model makes NaN or Inf of init_text"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_read_the_text_is_left_alone(config, model, tokenizer, length, error, message):
    model = build(NAMED[model]) if isinstance(model, str) else model()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        fa.attach(model, config(length, init_text="abc"), tokenizer=tokenizer)
    assert not any("fa_" in path for path, _ in model.named_modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_names_of_before_are_read_and_kept_as_todays():
    assert (
        fa.PrefixTuningConfig(init="normal")
        == fa.PrefixTuningConfig(init="random")
        == fa.PrefixTuningConfig()
    )
    old = fa.SoftPromptConfig(4, init="vocabulary", init_text="abc")
    assert old == fa.SoftPromptConfig(4, init_text="abc") and old.init == "text"
