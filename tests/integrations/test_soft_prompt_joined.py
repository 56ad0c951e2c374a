"""A decoder's soft prompt is the model on joined embeddings: run apart where that is the same, else with the text."""

import copy

import pytest
import torch
import transformers as tf

import fastadapter as fa
from fastadapter.integrations.passes import soft_prompt_decoder
from fastadapter.integrations.passes.soft_prompt_decoder import SoftPromptHost
from tests.support.models import FAMILIES, build, token_ids

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
JOINED = {
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        layer_types=["mamba", "attention"] * 2, num_local_experts=2, num_experts_per_tok=1,
        shared_intermediate_size=32, **MAMBA, **SMALL,
    ),
    "qwen3_5_text": lambda: tf.Qwen3_5TextConfig(**LINEAR, **SMALL),
    "lfm2": lambda: tf.Lfm2Config(layer_types=["conv", "full_attention"] * 2, **SMALL),
    "phi3-longrope": lambda: tf.Phi3Config(
        original_max_position_embeddings=16, rope_parameters=LONGROPE, pad_token_id=0, **SMALL
    ),
    "llama-dynamic": lambda: tf.LlamaConfig(**{**SMALL, "max_position_embeddings": 24}, rope_parameters=DYNAMIC),
    "opt": lambda: tf.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
}  # fmt: skip
# Seen at attach: their layers hand nothing down to their attention.
SEEN = {
    "stablelm": lambda: tf.StableLmConfig(**SMALL),
    "nemotron": lambda: tf.NemotronConfig(**SMALL),
}
WINDOWED = ("mistral", "gemma3")
PROMPT = 5


def made(name):
    configs = JOINED | SEEN
    if name in configs:
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(configs[name]()).eval()
    return build(next(family for family in FAMILIES if family.name == name))


def prompted(name):
    model = made(name)
    fa.attach(model, fa.SoftPromptConfig(prompt_len=PROMPT, init="random"))
    [(_, prompt)] = fa.trainable_parameters(model)
    with torch.no_grad():
        prompt.add_(torch.randn_like(prompt))
    return model, prompt


def host_in(model):
    return next(module for module in model.modules() if isinstance(module, SoftPromptHost))


def joined(model, prompt, ids):
    """The base model on joined embeddings, written out: logits of the text."""
    words = model.get_input_embeddings()(ids)
    arguments = {"inputs_embeds": torch.cat([prompt.to(words.dtype).expand(len(ids), -1, -1), words], 1)}
    if not host_in(model).learned_positions:
        arguments["position_ids"] = torch.arange(-PROMPT, ids.shape[1])[None]
    fa.set_active(model, None)
    try:
        return model(**arguments, use_cache=False).logits[:, PROMPT:]
    finally:
        fa.set_active(model, "default")


DECODERS = [family.name for family in FAMILIES if family.decoder]


@pytest.mark.parametrize("name", [*DECODERS, *JOINED, *SEEN])
def test_logits_and_gradients_are_those_of_joined_embeddings(name):
    model, prompt = prompted(name)
    assert host_in(model).apart == (name not in (*JOINED, *SEEN, *WINDOWED))
    ids = token_ids(length=12)
    logits = model(ids, use_cache=False).logits
    expected = joined(model, prompt, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(logits)
    [gradient] = torch.autograd.grad((logits * weight).sum(), prompt)
    [wanted] = torch.autograd.grad((expected * weight).sum(), prompt)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture
def waiting(monkeypatch):
    """As on a GPU, which waits for Python."""
    monkeypatch.setattr(soft_prompt_decoder, "WAITING_DEVICES", {"cpu", "cuda"})


def passes(model, **arguments):
    """How often the first block runs."""
    block = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    seen = []
    handle = block.register_forward_hook(lambda *_: seen.append(1))
    try:
        return model(**arguments), len(seen)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in WINDOWED])
def test_a_device_that_waits_for_python_trains_a_prompt_in_one_pass(name, waiting):
    model, prompt = prompted(name)
    ids = token_ids(length=12)
    output, count = passes(model, input_ids=ids, use_cache=False)
    expected = joined(model, prompt, ids)
    assert count == 1 and output.logits.shape == expected.shape
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(expected)
    [gradient] = torch.autograd.grad((output.logits * weight).sum(), prompt)
    [wanted] = torch.autograd.grad((expected * weight).sum(), prompt)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_it_runs_a_prompt_apart_where_that_is_less_or_the_only_way(waiting, monkeypatch):
    model, _ = prompted("llama")
    ids = token_ids(length=12)
    positions = torch.arange(12)[None].expand(2, -1)
    for arguments in (
        {"use_cache": True},
        {"position_ids": positions},
        {"attention_mask": torch.ones_like(ids)},
    ):
        _, count = passes(model, input_ids=ids, **{"use_cache": False, **arguments})
        assert count == 2, arguments
    assert passes(model, input_ids=ids)[1] == 2  # the model's own choice is a cache
    model.config.use_cache = False
    assert passes(model, input_ids=ids)[1] == 1
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    monkeypatch.setattr(soft_prompt_decoder, "OPERATIONS_OF_PYTHON", 4 * block * 2 * PROMPT)
    assert passes(model, input_ids=ids)[1] == 2  # the rest of the model counts too
    assert passes(model, input_ids=ids[:1])[1] == 1
    with torch.no_grad():
        assert passes(model, input_ids=ids[:1])[1] == 2


@pytest.mark.parametrize("name", ["llama", *WINDOWED, *JOINED])
@torch.no_grad()
def test_padding_on_the_left_moves_nothing(name):
    """A prompt stands in front of its text, not in front of the padding: windows and states count columns."""
    model, prompt = prompted(name)
    ids = token_ids(length=9)
    padded = torch.nn.functional.pad(ids, (4, 0))
    found = model(padded, attention_mask=(padded != 0).long()).logits[:, 4:]
    torch.testing.assert_close(found, joined(model, prompt, ids), rtol=1e-4, atol=1e-5)


# factors of rotary embeddings that change while a text grows are not those of its cached keys
@pytest.mark.parametrize("name", [name for name in (*JOINED, *WINDOWED) if name != "llama-dynamic"])
@torch.no_grad()
def test_generate_goes_on_behind_the_prompt(name):
    """Greedy, with a cache and beams, is what full forward passes give; a fresh copy and hidden states too."""
    model, _ = prompted(name)
    ids = token_ids(length=7)
    ids[1, :2] = 0
    mask = (ids != 0).long()
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, num_beams=beams, **options)
        assert out.shape == (2, 12)
        if beams == 1:
            full = torch.cat([mask, mask.new_ones(2, 4)], 1)
            logits = model(out[:, :-1], attention_mask=full).logits[:, -5:]
            chosen = logits.gather(2, out[:, -5:, None])[..., 0]
            torch.testing.assert_close(chosen, logits.amax(2), rtol=1e-3, atol=1e-4)
    output = copy.deepcopy(model)(ids, attention_mask=mask, output_hidden_states=True, return_dict=False)
    assert all(each.shape[1] == 7 for each in (output[0], *output[-1]))


@torch.no_grad()
def test_longer_than_the_original_context():
    """Rotary factors are chosen by the length of the whole, prompt and text."""
    model, prompt = prompted("phi3-longrope")
    for length in (9, 40):
        ids = token_ids(batch=1, length=length)
        torch.testing.assert_close(model(ids).logits, joined(model, prompt, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_other_lengths_share_a_batch():
    model, _ = prompted("qwen3_5_text")
    fa.attach(model, fa.SoftPromptConfig(prompt_len=2, init="random"), "short")
    ids = token_ids(length=6)
    expected = {}
    for name in ("default", "short", None):
        fa.set_active(model, name)
        expected[name] = model(ids).logits
    for names in (["default", "short"], [None, "default"], ["short", None]):
        with fa.rows(model, names):
            logits = model(ids).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(logits[row], expected[name][row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_has_no_place_for_the_prompt_is_refused():
    model, _ = prompted("lfm2")
    ids = token_ids(length=8)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    with pytest.raises(ValueError, match="a row of several packed texts"):
        model(ids, position_ids=packed)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, tokens\)"):
        model.model(ids, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
    fa.set_active(model, None)
    begun = model(ids, use_cache=True)
    fa.set_active(model, "default")
    with pytest.raises(ValueError, match="cache: it was not begun with these soft prompts"):
        model(ids[:, :1], past_key_values=begun.past_key_values)
    long, _ = prompted("phi3-longrope")
    cache = tf.StaticCache(config=long.config, max_cache_len=10)
    with pytest.raises(ValueError, match="do not fit into a static cache of 10"):
        long(ids, past_key_values=cache)


@torch.no_grad()
def test_a_packed_row_is_not_one_long_text():
    """Each text of a packed row sees the prompt; the row may be longer than the model's context."""
    model = made("llama")
    model.config.max_position_embeddings = 12
    fa.attach(model, fa.SoftPromptConfig(prompt_len=PROMPT, init="random"))
    ids = token_ids(batch=1, length=14)
    positions = torch.cat([torch.arange(7), torch.arange(7)])[None]
    together = model(ids, position_ids=positions, use_cache=False).logits
    apart = [model(part).logits for part in ids.split(7, dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="more than the model's context of 12"):
        model(ids)
    with pytest.raises(ValueError, match="reach 18, the model has positions below 12"):  # as generate asks
        model(ids, position_ids=torch.arange(14)[None])


def test_a_way_that_is_wrong_is_not_taken(monkeypatch):
    """What the kinds of layers do not tell is seen on a few tokens at attach."""
    from fastadapter.integrations.passes import soft_prompt_decoder as way

    monkeypatch.setattr(
        way.SoftPromptHost, "_run_apart", lambda self, decoder, name: way.PromptRun(joined=True)
    )
    model, prompt = prompted("llama")
    assert not host_in(model).apart
    assert fa.explain(model).rows[0]["projection"] == "with the text"
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, joined(model, prompt, ids), rtol=1e-4, atol=1e-5)
    for wrong in (
        lambda *_: (float("nan"), 1.0),
        lambda *_: (2.0, 1.0),
    ):  # and neither is one that nothing proves
        monkeypatch.setattr("fastadapter.integrations.verbs.attach.difference", wrong)
        refused = made("mistral")
        with pytest.raises(TypeError, match="does not run a soft prompt with its text"):
            fa.attach(refused, fa.SoftPromptConfig(prompt_len=PROMPT))
        assert not any("fa_" in name for name, _ in refused.named_modules())
