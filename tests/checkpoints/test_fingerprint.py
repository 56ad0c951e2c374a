"""An adapter is refused on another base than its own, or loaded with a warning that names what differs if one insists.

What may differ on the same base: dtype, labels and head, the vocabulary, tied or untied, PEFT around it.
"""

import json
import warnings

import pytest
import torch
import transformers as tf

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors, write_tensors
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build

LLAMA = next(family for family in FAMILIES if family.name == "llama")


def made(seed=0, **changes):
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
        **changes,
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path):
    model = fa.attach(made(), CONFIGS["llama-adapter"])
    train_a_little(model)
    return fa.save(model, tmp_path)


def quietly(model, path, name="default"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fa.load(model, path, name)


def tuned():
    """The last layer is another, as after a run that trained it alone."""
    model = made()
    model.model.layers[-1].mlp.down_proj.weight.data *= 1.01
    return model


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
ROPE = {"rope_type": "default", "rope_theta": 5e5}
SIBLINGS = {
    "other weights": (lambda: made(1), "other weights in lm_head.weight"),
    "one layer": (tuned, r"other weights in model.layers.2.mlp.down_proj.weight$"),
    "rotary base": (
        lambda: made(rope_parameters=ROPE),
        r"rope_parameters.rope_theta was 10000.0, now 500000.0",
    ),
    "epsilon": (lambda: made(rms_norm_eps=1e-3), "rms_norm_eps was 1e-06, now 0.001"),
    "activation": (lambda: made(hidden_act="gelu"), "hidden_act was 'silu', now 'gelu'"),
}


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_sibling_is_refused_unless_one_insists(saved, sibling):
    make, message = SIBLINGS[sibling]
    model = make()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with pytest.raises(
        fa.CheckpointError, match=f"made on another base model.*{message.rstrip('$')}.*--any-base"
    ):
        fa.load(model, saved)
    assert model.state_dict().keys() == before.keys()  # nothing is attached
    with pytest.warns(UserWarning, match=f"made on another base model.*{message.rstrip('$')}") as said:
        fa.load(model, saved, strict_base=False)
    assert len(said) == 1 and said[0].filename == __file__


def test_another_kind_of_model_of_the_same_sizes_is_loaded_if_one_insists(saved):
    fields = made().config.to_dict()
    mistral = tf.MistralForCausalLM(tf.MistralConfig(**{k: fields[k] for k in SIZES}, num_key_value_heads=4))
    with pytest.raises(
        fa.CheckpointError, match="made for a model with model_type 'llama', this one has 'mistral'"
    ):
        fa.load(mistral, saved)
    with pytest.warns(UserWarning, match="model_type was 'llama', now 'mistral'"):
        fa.load(mistral, saved, strict_base=False)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m, lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()],
    ids=["as it is", "bf16", "fp16", "fp64"],
)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_the_same(tmp_path, first, cast):
    fa.save(fa.attach(made().to(first), CONFIGS["houlsby"]), tmp_path)
    quietly(cast(made()), tmp_path)


def test_the_same_base_used_otherwise_is_the_same(saved, tmp_path):
    """Not by a folded adapter, an unfrozen matrix, another adapter, dropout or labels."""
    model = made(attention_dropout=0.1, use_cache=False, id2label={0: "a", 1: "b", 2: "c"})
    fa.attach(model, CONFIGS["v2-input"], "v2")
    train_a_little(model)
    fa.fold(model, "v2")
    fa.save(model, tmp_path / "v2", "v2")
    fa.detach(model)
    model.requires_grad_(True)
    quietly(model, saved)
    quietly(model, tmp_path / "v2", "v2")
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(model.config)
    assert fa.checkpoints.fingerprint.unlike(json.loads(read_tensors(saved)[1]["base"]), empty) == []


def test_older_files_load_with_a_word_and_damaged_ones_are_refused(saved):
    tensors, metadata = read_tensors(saved)
    base = json.loads(metadata["base"])
    old = {key: value for key, value in base.items() if key not in ("config", "weights")}
    write_tensors(saved, tensors, {**metadata, "base": json.dumps(old)})
    with pytest.warns(UserWarning, match="does not tell which base model it was made on"):
        fa.load(made(1), saved)
    spoilt_bases = (
        {"config": [1]},
        {"weights": {"lm_head.weight": [[64, 32], "xy"]}},
        {"weights": {"a": 1}},
        {"name": ["x"]},
    )
    for spoilt in spoilt_bases:
        write_tensors(saved, tensors, {**metadata, "base": json.dumps({**base, **spoilt})})
        with pytest.raises(fa.CheckpointError, match="record of the base model is malformed"):
            fa.load(made(), saved)


def classifier(seed):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{k: made().config.to_dict()[k] for k in SIZES}, num_labels=2, pad_token_id=0)
    model = tf.LlamaForSequenceClassification(config).eval()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    return model


def test_a_head_that_the_adapter_has_a_copy_of_may_be_any(tmp_path):
    """It is drawn in every model that is made for the task; of a file from before it was left out, too."""
    fa.save(fa.attach(classifier(1), CONFIGS["houlsby"]), tmp_path)
    quietly(classifier(2), tmp_path)
    tensors, metadata = read_tensors(tmp_path)
    base = json.loads(metadata["base"])
    assert "score.weight" not in base["weights"]
    base["weights"]["score.weight"] = [[2, 32], "00" * 16]
    write_tensors(tmp_path, tensors, {**metadata, "base": json.dumps(base)})
    quietly(classifier(2), tmp_path)


def test_a_resized_vocabulary_is_the_same_base_untied_weights_are_compared(saved, tmp_path):
    grown = made()
    grown.resize_token_embeddings(80)
    quietly(grown, saved)
    fa.save(fa.attach(made(tie_word_embeddings=True), CONFIGS["houlsby"]), tmp_path / "tied")
    untied = made(tie_word_embeddings=True)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.model.embed_tokens.weight.detach().clone())
    quietly(untied, tmp_path / "tied")
    fa.detach(untied)
    untied.lm_head.weight.data *= 1.5
    with pytest.raises(fa.CheckpointError, match="other weights in lm_head"):
        fa.load(untied, tmp_path / "tied")


def test_peft_around_the_base_is_seen_through_and_merged_weights_are_others(saved):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made(), peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))
    names = set(fa.checkpoints.fingerprint.fingerprint(model)["weights"])
    assert {"lm_head.weight", "model.layers.2.mlp.down_proj.weight"} <= names
    base = json.loads(read_tensors(saved)[1]["base"])
    assert fa.checkpoints.fingerprint.unlike(base, model) == []
    for key, each in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.ones_(each)
    model.merge_adapter()
    (said,) = fa.checkpoints.fingerprint.unlike(base, model)
    assert said.startswith("other weights in model.layers.0.mlp.down_proj.weight")


def test_lora_that_was_there_must_be_there(saved):
    peft = pytest.importorskip("peft")
    base = json.loads(read_tensors(saved)[1]["base"])
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    base["weights"][name] = [[8, 32], "00" * 16]
    assert fa.checkpoints.fingerprint.unlike(base, made()) == [f"no {name}"]
    model = peft.get_peft_model(made(), peft.LoraConfig(target_modules=["q_proj"]))
    model.requires_grad_(False)
    assert any(".lora_A." in key for key in fa.checkpoints.fingerprint.fingerprint(model)["weights"])


def test_digests_are_those_of_the_base_in_fp32_and_bf16(saved):
    base = json.loads(read_tensors(saved)[1]["base"])
    for model in (made(), made().bfloat16()):
        found = fa.checkpoints.fingerprint.fingerprint(model.requires_grad_(False))
        assert all(found[key] == base[key] for key in ("fingerprint", "weights_digest"))
    others = [
        fa.checkpoints.fingerprint.fingerprint(make().requires_grad_(False)) for make, _ in SIBLINGS.values()
    ]
    assert len({(each["fingerprint"], each["weights_digest"]) for each in others}) == len(SIBLINGS)


def test_every_family_is_like_itself(tmp_path):
    for family in FAMILIES:
        model = fa.attach(build(family), CONFIGS["llama-adapter"])
        quietly(build(family), fa.save(model, tmp_path / family.name))
