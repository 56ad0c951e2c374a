"""An adapter on another base than its own is loaded with a warning that names what differs; on its own, without."""

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
def test_a_sibling_is_warned_about(saved, sibling):
    make, message = SIBLINGS[sibling]
    with pytest.warns(UserWarning, match=f"made on another base model.*{message}") as said:
        fa.load(make(), saved)
    assert len(said) == 1 and said[0].filename == __file__


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


def test_older_files_say_nothing_and_damaged_ones_are_refused(saved):
    tensors, metadata = read_tensors(saved)
    base = json.loads(metadata["base"])
    old = {key: value for key, value in base.items() if key not in ("config", "weights")}
    write_tensors(saved, tensors, {**metadata, "base": json.dumps(old)})
    quietly(made(1), saved)
    for spoilt in ({"config": [1]}, {"weights": {"lm_head.weight": [[64, 32], "xy"]}}, {"weights": {"a": 1}}):
        write_tensors(saved, tensors, {**metadata, "base": json.dumps({**base, **spoilt})})
        with pytest.raises(fa.CheckpointError, match="record of the base model is malformed"):
            fa.load(made(), saved)


def test_every_family_is_like_itself(tmp_path):
    for family in FAMILIES:
        model = fa.attach(build(family), CONFIGS["llama-adapter"])
        quietly(build(family), fa.save(model, tmp_path / family.name))
