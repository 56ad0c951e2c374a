"""Every method on small random models of every family it is defined for."""

import copy
import subprocess
import sys

import pytest
import torch

import fastadapter as fa
from fastadapter.integrations.passes.bottleneck import POINTS
from tests.integrations.test_families import DECODERS, OTHER_ROUNDING, enable_checkpointing
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, WITH_NEUTRAL_START, train_a_little
from tests.support.models import FAMILIES, build, output_of, token_ids

NAMED = {family.name: family for family in FAMILIES}
SOFT_PROMPT_ENCODERS = ("bert", "roberta", "distilbert", "vit")


def defined(name, family):
    if name == "soft-prompt":
        return family.decoder or family.name in SOFT_PROMPT_ENCODERS
    if CONFIGS[name].method == "bottleneck":
        return family.name not in ("whisper",)
    return True


# The whole grid is long: by default every method meets a pre-norm decoder and a post-norm encoder.
BY_DEFAULT = ("gemma3", "distilbert")
PAIRS = [
    pytest.param(
        name,
        family,
        id=f"{name}-{family.name}",
        marks=() if family.name in BY_DEFAULT else pytest.mark.slow,
    )
    for name in CONFIGS
    for family in FAMILIES
    if name != "llama-adapter" and defined(name, family)
]
GENERATIONS = [
    pytest.param(
        name,
        family,
        id=f"{name}-{family.name}",
        marks=() if family.name == BY_DEFAULT[0] else pytest.mark.slow,
    )
    for name in CONFIGS
    for family in DECODERS
]
every_pair = pytest.mark.parametrize("name, family", PAIRS)


@every_pair
@torch.no_grad()
def test_start_training_and_detaching(name, family):
    """No effect at the start where the method has such a state, some when trained, none when off or detached."""
    model, inputs = build(family), family.inputs()
    base = output_of(model, inputs)
    fa.attach(model, CONFIGS[name])
    assert same_bits(output_of(model, inputs), base) == (name in WITH_NEUTRAL_START)
    train_a_little(model)
    assert not same_bits(output_of(model, inputs), base)
    fa.set_active(model, None)
    assert same_bits(output_of(model, inputs), base)
    fa.set_active(model, "default")
    fa.verify(model, inputs if family.name in ("vit", "whisper") else None)
    fa.detach(model)
    assert same_bits(output_of(model, inputs), base)
    assert not any("fa_" in path for path, _ in model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_pair
@torch.no_grad()
def test_what_was_trained_is_what_is_loaded(name, family, tmp_path):
    model, inputs = build(family), family.inputs()
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    fa.save(model, tmp_path)
    other = build(family)
    fa.load(other, tmp_path)
    assert same_bits(output_of(other, inputs), output_of(model, inputs))
    assert same_bits(output_of(copy.deepcopy(model), inputs), output_of(model, inputs))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_pair
def test_gradient_checkpointing_gives_the_same_gradients(name, family, reentrant):
    if name == "soft-prompt" and reentrant and family.decoder:
        pytest.skip("refused, see test_reentrant_checkpointing_of_a_soft_prompt_is_refused")
    gradients = []
    for checkpointing in (False, True):
        model, inputs = build(family), family.inputs()
        torch.manual_seed(1)
        fa.attach(model, CONFIGS[name])
        train_a_little(model)
        model.train()
        without_dropout(model)
        if checkpointing:
            enable_checkpointing(model, reentrant)
        output_of(model, inputs).square().sum().backward()
        gradients.append({key: p.grad for key, p in fa.trainable_parameters(model)})
    plain, checkpointed = gradients
    for key, grad in plain.items():
        assert grad is not None and grad.isfinite().all(), key
        # A mask that autograd sees otherwise takes another sdpa kernel, which rounds otherwise.
        if family.name in OTHER_ROUNDING or (reentrant and name.startswith("prefix")):
            torch.testing.assert_close(checkpointed[key], grad, rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(checkpointed[key], grad), key


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field in ("attention_dropout", "activation_dropout", "dropout", "attn_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)


@pytest.mark.parametrize("name, family", GENERATIONS)
@torch.no_grad()
def test_every_way_to_generate_is_the_full_forward(name, family):
    """Dynamic and static cache, beam search, left padding: the tokens that repeated full forwards choose."""
    model = build(family)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    ids = token_ids()
    expected = ids
    for _ in range(4):
        logits = model(expected).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = float("-inf")  # min_new_tokens rules it out
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), expected)
    if name == "soft-prompt" and family.name in ("gemma3", "mistral"):  # windows: the prompt is in the cache
        with pytest.raises(ValueError, match=r"attention_mask must be|do not fit into a static cache"):
            model.generate(ids, cache_implementation="static", **options)
    else:
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert torch.equal(model.generate(ids, num_beams=1, use_cache=False, **options), expected)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 2).long().expand(2, -1)
    left = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(left[:, 2:], expected)
    cached = model.generate(ids, num_beams=2, **options)
    assert torch.equal(model.generate(ids, num_beams=2, use_cache=False, **options), cached)


@pytest.mark.parametrize("family", [f for f in DECODERS if f.name not in ("gemma3", "mistral")], ids=str)
@torch.no_grad()
def test_a_soft_prompt_is_the_model_on_joined_embeddings(family):
    """The prompt is run once and apart; the definition is one run of prompt and text together."""
    model, ids = build(family), token_ids()
    fa.attach(model, CONFIGS["soft-prompt"])
    train_a_little(model)
    logits = model(ids).logits
    prompt = next(p for key, p in fa.trainable_parameters(model) if key.endswith("prompt")).clone()
    fa.detach(model)
    text = model.get_input_embeddings()(ids)
    joined = torch.cat([prompt.expand(2, -1, -1), text], dim=1)
    torch.testing.assert_close(model(inputs_embeds=joined).logits[:, 3:], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("whisper",)], ids=str)
@torch.no_grad()
def test_a_prefix_is_keys_and_values_in_one_softmax(family, attention, monkeypatch):
    """Against softmax over joined keys, written out, with the mask that the model gives its attention."""
    model, inputs = build(family), family.inputs()
    model.set_attn_implementation(attention)
    fa.attach(model, CONFIGS["prefix"])
    train_a_little(model)
    result = output_of(model, inputs)
    from fastadapter.integrations.passes import prefix

    def written_out(module, query, key, value, mask, prefix_key, prefix_value, row_ids, options):
        groups = query.shape[1] // key.shape[1]
        joined = [
            torch.cat([p.expand(len(query), -1, -1, -1), x], 2)
            for p, x in ((prefix_key, key), (prefix_value, value))
        ]
        key_, value_ = (each.repeat_interleave(groups, 1) for each in joined)
        scores = query @ key_.mT * (options["scaling"] or query.shape[-1] ** -0.5)
        real = scores[..., prefix_key.shape[2] :]
        if options.get("position_bias") is not None:
            real += options["position_bias"]
        if mask is None and attention == "sdpa" and getattr(module, "is_causal", True) and query.shape[2] > 1:
            mask = torch.ones(real.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            real += mask if mask.dtype != torch.bool else torch.where(mask, 0.0, float("-inf"))
        return (scores.softmax(-1) @ value_).transpose(1, 2)

    monkeypatch.setattr(prefix, "attend_shared", written_out)
    torch.testing.assert_close(result, output_of(model, inputs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel", "parallel-residual"])
@torch.no_grad()
def test_bottlenecks_in_a_llama_block_are_their_formulas(name):
    """A block of llama written out, pre-norm, with the adapters where the papers have them."""
    config, model = CONFIGS[name], build(NAMED["llama"])
    fa.attach(model, config)
    train_a_little(model)
    x = torch.randn(2, 5, 32)
    block = model.model.layers[1]
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    result = block(x, position_embeddings=positions)
    adapters = {name: m for name, m in block.named_modules() if isinstance(m, fa.nn.Bottleneck)}
    attention_adapter = adapters.get("self_attn.fa_bottleneck.adapters.default")
    ffn_adapter = adapters["mlp.fa_bottleneck.adapters.default"]

    def term(adapter, x):
        if adapter.norm is not None:
            x = adapter.norm(x)
        hidden = adapter.down_proj(x)
        hidden = hidden.relu() if config.activation == "relu" else torch.nn.functional.gelu(hidden)
        return adapter.scale * adapter.up_proj(hidden)

    fa.set_active(model, None)
    part = block.self_attn(block.input_layernorm(x), positions, None)[0]
    x = x + part + (term(attention_adapter, part) if attention_adapter is not None else 0)
    normed = block.post_attention_layernorm(x)
    part = block.mlp(normed)
    given = {"parallel": normed, "parallel-residual": x}.get(name, part)
    assert (attention_adapter is not None) == (name == "houlsby")
    torch.testing.assert_close(result, x + part + term(ffn_adapter, given), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bottleneck_in_a_bert_block_comes_before_the_sum():
    """DistilBERT's block norms after the sum: LN(f(h) + h + x)."""
    model = build(NAMED["distilbert"])
    fa.attach(model, fa.BottleneckConfig(placement="pfeiffer", bottleneck_size=4))
    train_a_little(model)
    block = next(m for m in model.modules() if type(m).__name__ == "TransformerBlock")
    x = torch.randn(2, 5, 32)
    result = block(x)
    adapter = block.ffn.fa_bottleneck.adapters["default"]
    fa.set_active(model, None)
    x = block.sa_layer_norm(block.attention(x)[0] + x)
    part = block.ffn(x)
    torch.testing.assert_close(result, block.output_layer_norm(adapter(part, residual=part) + x))


@pytest.mark.parametrize("scale", ["input", "output"])
@torch.no_grad()
def test_v2_scales_are_the_published_ones(scale):
    model = build(NAMED["llama"])
    fa.attach(model, fa.LlamaAdapterV2Config(prefix_len=4, scale=scale))
    train_a_little(model)
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(2, 5, 48)
    own = layer.fa_scale.adapters["default"]
    weight = layer.weight
    expected = (
        (x * own.scale) @ weight.T + own.bias if scale == "input" else own.scale * (x @ weight.T + own.bias)
    )
    torch.testing.assert_close(layer(x), expected)
    norm = model.model.norm
    copied = norm.fa_copy.adapters["default"].own.weight
    fa.set_active(model, None)
    torch.testing.assert_close(norm(x[..., :32]) / norm.weight * copied, _with(model, norm, x[..., :32]))


def _with(model, module, x):
    fa.set_active(model, "default")
    return module(x)


def test_folding_keeps_the_bits_and_drops_the_network(tmp_path):
    model, ids = build(NAMED["llama"]), token_ids()
    fa.attach(model, CONFIGS["prefix-reparam"])
    train_a_little(model)
    fa.save(model, tmp_path / "resumable")
    with torch.no_grad():
        before = model(ids).logits
        fa.fold(model)
        assert same_bits(model(ids).logits, before)
    names = [key for key, _ in fa.trainable_parameters(model)]
    assert len(names) == 6 and not any("reparam" in key or "up_proj" in key for key in names)
    fa.save(model, tmp_path / "folded")
    other = build(NAMED["llama"])
    fa.load(other, tmp_path / "folded")
    with torch.no_grad():
        assert same_bits(other(ids).logits, before)
        fa.load(other, tmp_path / "resumable", name="resumable")
        assert same_bits(other(ids).logits, before)
    assert any("fa_reparam" in key for key, _ in fa.trainable_parameters(other))
    with pytest.raises(ValueError, match="no network to fold"):
        fa.fold(model)
    fa.detach(other)
    assert not any("fa_" in path for path, _ in other.named_modules())


def test_a_head_is_part_of_the_adapter(tmp_path):
    """The classifier is trained, saved and loaded with the adapter; the model's own stays as it was."""
    import transformers as tf

    def classifier(seed):
        torch.manual_seed(seed)
        config = tf.BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            num_labels=3,
        )
        return tf.BertForSequenceClassification(config).eval()

    model, ids = classifier(0), token_ids()
    own = model.classifier.weight.clone()
    base = model(ids).logits
    fa.attach(model, CONFIGS["houlsby"])
    assert same_bits(model(ids).logits, base)
    assert any("classifier" in key for key, _ in fa.trainable_parameters(model))
    train_a_little(model)
    assert same_bits(model.classifier.weight, own)
    trained = model(ids).logits
    fa.save(model, tmp_path)
    other = classifier(0)
    with torch.no_grad():
        other.classifier.weight.normal_()  # another fresh head
    fa.load(other, tmp_path)
    assert same_bits(other(ids).logits, trained)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, id=each.name, marks=() if each.name == "qwen3" else pytest.mark.slow)
        for each in FAMILIES
    ],
)
def test_a_fresh_process_loads_what_was_trained(family, tmp_path):
    script = """
import sys, torch, fastadapter as fa
from tests.support.models import FAMILIES, build, output_of
folder, wanted, *names = sys.argv[1:]
family = next(each for each in FAMILIES if each.name == wanted)
for name in names:
    model = build(family)
    fa.load(model, f"{folder}/{name}")
    with torch.no_grad():
        torch.save(output_of(model, family.inputs()), f"{folder}/{name}.pt")
"""
    outputs = {}
    for name in (each for each in CONFIGS if defined(each, family)):
        model = build(family)
        fa.attach(model, CONFIGS[name])
        train_a_little(model)
        fa.save(model, tmp_path / name)
        with torch.no_grad():
            outputs[name] = output_of(model, family.inputs())
    subprocess.run([sys.executable, "-c", script, str(tmp_path), family.name, *outputs], check=True)
    for name, output in outputs.items():
        assert same_bits(torch.load(tmp_path / f"{name}.pt", weights_only=True), output), name


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda: fa.BottleneckConfig(placement="between"), ValueError, "placement must be one of houlsby"),
        (lambda: fa.BottleneckConfig(reduction_factor=64), ValueError, "at most the hidden size 32"),
        (
            lambda: fa.BottleneckConfig(reduction_factor=4, bottleneck_size=4),
            ValueError,
            "exclude each other",
        ),
        (lambda: fa.BottleneckConfig(scale="big"), ValueError, "scale must be one of learned"),
        (lambda: fa.BottleneckConfig(modules=("mpl",)), ValueError, "no part named mpl"),
        (lambda: fa.PrefixTuningConfig(prefix_len=0), ValueError, "prefix_len must be between 1 and 1024"),
        (lambda: fa.PrefixTuningConfig(layers=9), ValueError, "layers must be at most 3"),
        (lambda: fa.SoftPromptConfig(init_text="Review"), ValueError, "tokenizer: init_text needs"),
        (lambda: fa.SoftPromptConfig(prompt_len=True), TypeError, "prompt_len must be an int"),
        (lambda: fa.LlamaAdapterV2Config(scale="both"), ValueError, "scale must be one of input, output"),
    ],
)
def test_bad_configurations_leave_the_model_alone(change, error, message):
    model = build(NAMED["llama"])
    with pytest.raises(error, match=message):
        fa.attach(model, change())
    assert not any("fa_" in path for path, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_prompt_beyond_the_context_is_an_error():
    import transformers as tf

    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=12)
    model = tf.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="prompt_len must be less than the model's context 12"):
        fa.attach(model, fa.SoftPromptConfig(prompt_len=12))
    fa.attach(model, fa.SoftPromptConfig(prompt_len=4))
    model(token_ids(length=8))
    with pytest.raises(ValueError, match="soft prompt of 4 and an input of 9 tokens are more than"):
        model(token_ids(length=9))


def test_reentrant_checkpointing_of_a_soft_prompt_is_refused():
    model = build(NAMED["llama"]).train()
    fa.attach(model, CONFIGS["soft-prompt"])
    enable_checkpointing(model, True)
    with pytest.raises(ValueError, match="use_reentrant"):
        model(token_ids()).logits.sum().backward()


def test_points_of_a_family_can_be_named_by_the_user():
    """Any module of the blocks, here both projections that end a part: equal to a hook of one's own."""
    model = build(NAMED["llama"])
    fa.attach(model, fa.BottleneckConfig(bottleneck_size=4, modules=("o_proj", "mlp.down_proj")))
    paths = [path for path, _ in model.named_modules() if path.endswith("fa_bottleneck")]
    assert len(paths) == 6 and all("o_proj" in path or "down_proj" in path for path in paths)
    train_a_little(model)
    fa.verify(model)


def test_unknown_families_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.delitem(POINTS, "llama")
    model = build(NAMED["llama"])
    with pytest.raises(TypeError, match=r"no bottleneck points are known for 'llama'.*modules="):
        fa.attach(model, CONFIGS["houlsby"])


def test_other_attention_under_a_prefix_is_refused():
    from transformers import AttentionInterface

    AttentionInterface.register("mine", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    model = build(NAMED["llama"])
    fa.attach(model, CONFIGS["prefix"])
    model.config._attn_implementation = "mine"
    with pytest.raises(ValueError, match="attn_implementation must be sdpa or eager"):
        model(token_ids())


def test_attention_dropout_goes_on_under_a_prefix():
    """In training, BERT's attention drops weights; without dropout the same route gives the op's result."""
    model, ids = build(NAMED["bert"]), token_ids()
    fa.attach(model, CONFIGS["prefix"])
    train_a_little(model)
    without_dropout(model)
    quiet = output_of(model, {"input_ids": ids})
    model.train()
    attention = next(m for m in model.modules() if hasattr(m, "fa_prefix"))
    drop = attention.dropout
    drop.p = 1e-9  # drops nothing, but takes the route of dropout
    torch.testing.assert_close(output_of(model, {"input_ids": ids}), quiet, rtol=1e-5, atol=1e-5)
    drop.p = 0.5
    torch.manual_seed(0)
    one = output_of(model, {"input_ids": ids})
    assert not torch.equal(one, quiet)


def test_a_trained_position_bias_has_its_gradient_under_a_prefix():
    """T5's bias, unfrozen beside a prefix: against a difference of outputs. Frozen, it is only passed on."""
    model, inputs = build(NAMED["t5-encoder"]).double().eval(), NAMED["t5-encoder"].inputs()
    fa.attach(model, CONFIGS["prefix"])
    train_a_little(model)
    [bias] = [p for key, p in model.named_parameters() if "relative_attention_bias" in key]

    def loss():
        return output_of(model, inputs).square().sum()

    fused = loss().detach()
    bias.requires_grad_(True)
    value = loss()
    torch.testing.assert_close(value.detach(), fused)
    value.backward()
    with torch.no_grad():
        step = torch.zeros_like(bias)
        step[0] = 1e-2  # of the distance 0, for every head; T5 rounds its norms to fp32
        difference = []
        for sign in (1, -1):
            bias += sign * step
            difference.append(loss())
            bias -= sign * step
    torch.testing.assert_close(
        bias.grad[0].sum(), (difference[0] - difference[1]) / 2e-2, rtol=1e-3, atol=1e-5
    )
