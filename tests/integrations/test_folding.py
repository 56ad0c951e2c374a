"""LLaMA-Adapter V2 folded into a model's weights, and out of them again.

Judged by the budget: the model with the adapter beside its weights is the eager result, the same model in fp64 the
exact one. What is put back is compared bit for bit.
"""

import copy

import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors
from fastadapter.training.config import UserError
from fastadapter.training.targets import AdapterTarget
from tests.support.budget import assert_within_budget, same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of, token_ids

NAMED = {family.name: family for family in FAMILIES}
# Grouped queries with norms on heads, and a post-norm encoder with biases; the others are -m slow.
BY_DEFAULT = ("qwen3", "distilbert")
V2 = ("v2-input", "v2-output")


def grid(families):
    return pytest.mark.parametrize(
        "name, family",
        [
            pytest.param(
                name,
                family,
                id=f"{name}-{family}",
                marks=() if family.name in BY_DEFAULT else pytest.mark.slow,
            )
            for family in families
            for name in V2
        ],
    )


def adapted(family, name="v2-input", dtype=torch.float32):
    model = build(family)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    return model.to(dtype)


def in_dtype(inputs, dtype):
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def state(model):
    return {
        key: (tensor.clone(), tensor.requires_grad)
        for key, tensor in model.state_dict(keep_vars=True).items()
    }


def same_state(model, before):
    now = state(model)
    return now.keys() == before.keys() and all(
        same_bits(tensor, before[key][0]) and grad == before[key][1] for key, (tensor, grad) in now.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@grid(FAMILIES)
@torch.no_grad()
def test_outputs_stay_and_weights_come_back(name, family, dtype):
    model = adapted(family, name, dtype)
    inputs = in_dtype(family.inputs(), dtype)
    eager, before = output_of(model, inputs), state(model)
    exact = output_of(copy.deepcopy(model).double(), in_dtype(inputs, torch.float64))
    hooks = sum(len(module._forward_hooks) for module in model.modules())

    assert fa.fold(model) is model
    assert_within_budget(output_of(model, inputs), eager, exact)
    # nothing of it runs beside the weights: hooks are left only where passes begin
    assert not any(module._forward_hooks for module in model.modules() if "fa_state" not in module.__dict__)
    trained = [key for key, _ in fa.trainable_parameters(model)]
    assert trained and all("fa_prefix" in key for key in trained)

    fa.unfold(model)
    assert same_state(model, before)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert same_bits(output_of(model, inputs), eager)


@grid(FAMILIES)
@torch.no_grad()
def test_detaching_a_folded_adapter_gives_the_model_back(name, family):
    model, inputs = build(family), family.inputs()
    base, before = output_of(model, inputs), state(model)
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    fa.fold(model)
    assert not same_bits(output_of(model, inputs), base)
    fa.detach(model)
    assert same_state(model, before)
    assert same_bits(output_of(model, inputs), base)
    assert not any("fa_" in path for path, _ in model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@grid([family for family in FAMILIES if family.decoder])
@torch.no_grad()
def test_generation_is_token_for_token_the_same(name, family):
    model, ids = adapted(family, name), token_ids()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    fa.fold(model)
    assert torch.equal(model.generate(ids, **options), expected)
    with fa.rows(model, ["default"] * 2):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("convention", ["input", "output"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@torch.no_grad()
def test_the_folded_layer_is_the_formula(convention, with_bias, dtype):
    layer = torch.nn.Linear(33, 17, bias=with_bias, dtype=dtype)
    scale = fa.nn.ChannelScale(33, 17, convention)
    scale.scale.add_(0.3 * torch.randn_like(scale.scale))
    scale.bias.add_(0.3 * torch.randn_like(scale.bias))
    x = torch.randn(64, 33, dtype=dtype)
    weight, bias = scale.folded(layer.weight, layer.bias)
    assert weight.dtype == bias.dtype == dtype
    exact = scale.after(copy.deepcopy(layer).double()(scale.before(x.double())))
    eager = scale.after(layer(scale.before(x)))
    assert_within_budget(torch.nn.functional.linear(x, weight, bias), eager, exact)


@torch.no_grad()
def test_a_fresh_adapter_folds_to_the_weights_themselves():
    model = build(NAMED["gpt2"])
    before = {key: p.clone() for key, p in model.named_parameters()}
    fa.attach(model, CONFIGS["v2-output"])
    fa.fold(model)
    now = dict(model.named_parameters())
    assert all(same_bits(now[key].detach(), value) for key, value in before.items())


@torch.no_grad()
def test_the_saved_adapter_is_the_same_folded_or_not(tmp_path):
    model, ids = adapted(NAMED["qwen3"]), token_ids()
    expected = model(ids).logits
    one = fa.save(model, tmp_path / "one")
    fa.fold(model)
    other = fa.save(model, tmp_path / "other")
    (tensors, metadata), (others, other_metadata) = read_tensors(one), read_tensors(other)
    assert metadata == other_metadata and tensors.keys() == others.keys()
    assert all(same_bits(tensor, others[key]) for key, tensor in tensors.items())
    with pytest.raises(
        ValueError, match=r"weights hold adapter 'default', folded; unfold or detach it first"
    ):
        fa.load(model, one)
    with pytest.raises(ValueError, match="unfold or detach it first"):
        fa.load(model, one, name="again")
    fresh = fa.load(build(NAMED["qwen3"]), other)
    assert same_bits(fresh(ids).logits, expected)


@torch.no_grad()
def test_copies_and_casts_of_a_folded_model_unfold():
    model, ids = adapted(NAMED["qwen3"]), token_ids()
    cast = copy.deepcopy(model).bfloat16()
    fa.fold(model)
    twin = copy.deepcopy(model).bfloat16()
    folded = twin(ids).logits
    fa.unfold(twin)
    assert same_bits(twin(ids).logits, cast(ids).logits)
    assert not same_bits(twin(ids).logits, folded)


@torch.no_grad()
def test_a_kept_prompt_follows_the_weights():
    """The prompt is projected through the layer's weights and kept in eval; folding and unfolding write to them.

    In place: an address can come back with other values when tensors are exchanged, a version cannot.
    """
    model, ids = adapted(NAMED["llama"]), token_ids()
    weight = model.model.layers[2].self_attn.k_proj.weight
    address, version = weight.data_ptr(), weight._version
    for _ in range(2):
        unfolded = model(ids).logits
        fa.fold(model)
        kept = model(ids).logits
        assert same_bits(copy.deepcopy(model)(ids).logits, kept)  # a copy keeps no projections
        fa.unfold(model)
        assert same_bits(model(ids).logits, unfolded)
    assert model.model.layers[2].self_attn.k_proj.weight is weight
    assert weight.data_ptr() == address and weight._version == version + 4


def test_prompts_of_a_folded_adapter_train_and_scales_wait():
    model, ids = adapted(NAMED["llama"]), token_ids()
    fa.fold(model)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for _, parameter in fa.trainable_parameters(model))
    assert all(p.grad is None for key, p in model.named_parameters() if "fa_prefix" not in key)
    with pytest.raises(UserError, match="folded into the model's weights; unfold it to train it"):
        AdapterTarget(model, "default")


def test_a_head_folds_too():
    import transformers as tf

    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model, ids = tf.BertForSequenceClassification(config).eval(), token_ids()
    fa.attach(model, CONFIGS["v2-output"])
    train_a_little(model)
    own = model.classifier.weight.detach().clone()
    with torch.no_grad():
        expected = model(ids).logits
        exact = copy.deepcopy(model).double()(ids).logits
        fa.fold(model)
        assert_within_budget(model(ids).logits, expected, exact)
    assert not same_bits(model.classifier.weight.detach(), own)
    fa.detach(model)
    assert same_bits(model.classifier.weight.detach(), own)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_verify_and_explain_know_folded_weights(family):
    model = adapted(NAMED[family]).train()
    fa.fold(model)
    before = state(model)
    names = [check.name for check in fa.verify(model)]
    assert names[0] == "without its effect it is the base model"
    assert names[-1] == "folded weights give its outputs"
    assert same_state(model, before) and all(module.training for module in model.modules())
    rows = fa.explain(model).rows
    kinds = {row["backend"] for row in rows if row["reason"].startswith("folded")}
    assert kinds == {"weights"}
    assert {row["backend"] for row in rows} - kinds  # the gated prompts still run
    with torch.no_grad():
        model.get_submodule(
            "model.layers.0.mlp.up_proj" if family == "qwen3" else "transformer.h.0.mlp.c_fc"
        ).weight.add_(1)
    with pytest.raises(fa.VerificationError, match="folded weights give its outputs"):
        fa.verify(model)


def test_nothing_else_acts_on_folded_weights():
    model = adapted(NAMED["llama"])
    fa.fold(model)
    refused = pytest.raises(
        ValueError, match="weights hold adapter 'default', folded; unfold or detach it first"
    )
    before = state(model)
    for call in (
        lambda: fa.attach(model, CONFIGS["prefix"], "other"),
        lambda: fa.set_active(model, None),
        lambda: fa.fold(model),
        lambda: fa.rows(model, ["default", None]).__enter__(),
    ):
        with refused:
            call()
    with pytest.raises(ValueError, match="no adapter 'other' is attached"):
        fa.rows(model, ["other", "default"]).__enter__()
    with fa.rows(model, ["default"]), pytest.raises(ValueError, match=r"inside rows\(\.\.\.\)"):
        fa.unfold(model)
    fa.set_active(model, "default")
    assert same_state(model, before)


def _quantised(layer):
    layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {})


def _tie(model):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


def _overflow(model):
    model.half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.fa_scale.adapters["default"].scale.fill_(1e9)


DOWN = "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda m: _quantised(m.get_submodule(DOWN)),
            TypeError,
            rf"{DOWN} is a .*Linear4bit: scales fold only",
        ),
        (lambda m: setattr(m.get_submodule(DOWN), "forward", lambda x: x), TypeError, f"{DOWN} is wrapped"),
        (
            lambda m: m.get_submodule(DOWN).register_forward_hook(lambda *_: None),
            ValueError,
            f"{DOWN} has 1 forward hooks besides the adapter's",
        ),
        (_tie, ValueError, r"layers.0.mlp.up_proj.weight is tied to model.layers.1.mlp.up_proj.weight"),
        (
            _overflow,
            ValueError,
            r"layers.1.mlp.up_proj.weight would hold NaN or Inf when folded, in torch.float16",
        ),
        (
            lambda m: torch.nn.utils.parametrizations.weight_norm(m.get_submodule(DOWN)),
            TypeError,
            f"{DOWN} is a .*ParametrizedLinear",
        ),
        (lambda m: m.to("meta"), TypeError, "is on the meta device: it cannot be written to"),
        (
            lambda m: fa.attach(m, CONFIGS["prefix"], "other"),
            ValueError,
            "beside adapter 'default' there is other",
        ),
        (lambda m: fa.set_active(m, None), ValueError, "'default' is not the active one; call set_active"),
    ],
    ids=["quantised", "wrapped", "hooked", "tied", "overflow", "computed", "meta", "others", "inactive"],
)
def test_what_cannot_be_folded_is_refused_untouched(change, error, message):
    model = adapted(NAMED["llama"])
    change(model)
    before = {} if "meta" in message else state(model)
    with pytest.raises(error, match=message):
        fa.fold(model)
    if before:
        assert same_state(model, before)
    with pytest.raises(ValueError, match="there is nothing to unfold"):
        fa.unfold(model)


@pytest.mark.parametrize("name", ["llama-adapter", "houlsby", "prefix"])
def test_methods_without_anything_to_fold(name):
    model = adapted(NAMED["llama"], name)
    with pytest.raises(ValueError, match="no network to fold and no scales"):
        fa.fold(model)
    with pytest.raises(ValueError, match="there is nothing to unfold"):
        fa.unfold(model)


def test_an_interrupt_while_folding_leaves_the_model_whole(monkeypatch):
    from fastadapter.integrations.verbs import folding

    model, puts = adapted(NAMED["llama"]), []
    before = state(model)
    real = folding._put

    def interrupted(*arguments):
        puts.append(arguments)
        if len(puts) == 9:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(folding, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fa.fold(model)
    assert len(puts) > 9 and same_state(model, before)
    fa.fold(model)


def test_a_shared_layer_folds_once():
    """One layer reached by two paths is scaled on either, so folding it is exact; only shared parameters are not."""
    model, ids = build(NAMED["llama"]), token_ids()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    fa.attach(model, CONFIGS["v2-input"])
    train_a_little(model)
    with torch.no_grad():
        expected = model(ids).logits
        exact = copy.deepcopy(model).double()(ids).logits
        fa.fold(model)
        assert_within_budget(model(ids).logits, expected, exact)
