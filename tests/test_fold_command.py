"""``fastadapter fold``: the folder it writes gives, loaded by plain transformers, the logits of the adapted model.

Judged as everywhere: by rounding, against the adapter beside the weights. What no weight can hold is beside the model;
what cannot be folded is refused with the reason, before anything is written.
"""

import os

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError

import fastadapter as fa
from fastadapter.checkpoints.about import annotate
from fastadapter.checkpoints.describe import describe_file
from fastadapter.cli import main
from tests.support.methods import CONFIGS, train_a_little
from tests.training.toy import make_classifier, make_model, make_tokenizer

IDS = torch.arange(12).reshape(2, 6)


def saved_base(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def trained(folder, base, config, *, closed=False, **facts):
    kind = tf.AutoModelForSequenceClassification if facts else tf.AutoModelForCausalLM
    model = fa.attach(kind.from_pretrained(base), config)
    train_a_little(model)
    if closed:
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.data.zero_()
    annotate(model, "default", facts)
    fa.save(model, folder)
    with torch.no_grad():
        return model(IDS).logits


def fold(base, adapter, out, *more):
    words = ["--model", str(base), "--adapter", str(adapter), "--output-dir", str(out), "--device", "cpu"]
    return main(["fold", *words, *more])


def loads_whole(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def close(model, expected):
    with torch.no_grad():
        found = model(IDS).logits
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", ["input", "output"])
def test_v2_is_in_the_weights_its_prompts_beside_them(tmp_path, capsys, scale):
    base = saved_base(tmp_path / "base", make_model())
    expected = trained(tmp_path / "a", base, CONFIGS[f"v2-{scale}"])
    assert fold(base, tmp_path / "a", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "with the adapter in its weights" in said and "llama-adapter: prefix_len 4, layers 2" in said
    model = loads_whole(tf.AutoModelForCausalLM, tmp_path / "out")
    assert model.config.attention_bias and model.config.mlp_bias
    assert not close(model, expected)
    fa.load(model, tmp_path / "out")
    assert close(model, expected)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("w1")["input_ids"]
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "out"]  # no temporary folder stays
    with pytest.raises(fa.CheckpointError, match="another base model"):
        fa.load(tf.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")


def test_closed_gates_leave_nothing_beside(tmp_path, capsys):
    base = saved_base(tmp_path / "base", make_model())
    expected = trained(tmp_path / "a", base, CONFIGS["v2-input"], closed=True)
    assert fold(base, tmp_path / "a", tmp_path / "out") == 0
    assert "from_pretrained gives the whole" in capsys.readouterr().out
    assert close(loads_whole(tf.AutoModelForCausalLM, tmp_path / "out"), expected)
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_keeps_its_head(tmp_path, capsys, kind):
    model = make_classifier(kind)
    model.config.pad_token_id = 0
    base = saved_base(tmp_path / "base", model)
    facts = {"task": "classification", "labels": ["bad", "good"]}
    expected = trained(tmp_path / "a", base, CONFIGS["v2-input"], closed=True, **facts)
    assert fold(base, tmp_path / "a", tmp_path / "out") == 0
    model = loads_whole(tf.AutoModelForSequenceClassification, tmp_path / "out")
    assert close(model, expected) and model.config.id2label == {0: "bad", 1: "good"}


def test_the_network_behind_a_prefix_goes(tmp_path, capsys):
    base = saved_base(tmp_path / "base", make_model())
    expected = trained(tmp_path / "a", base, CONFIGS["prefix-reparam"])
    assert fold(base, tmp_path / "a", tmp_path / "out") == 0
    assert "prefix-tuning: prefix_len 5" in capsys.readouterr().out
    left = describe_file(tmp_path / "out")
    assert left["options"]["reparam_size"] is None
    model = fa.load(loads_whole(tf.AutoModelForCausalLM, tmp_path / "out"), tmp_path / "out")
    assert close(model, expected)


REFUSED = {
    "llama-adapter": "gated attention depends on the query",
    "prefix": "there is no network behind them to fold",
    "soft-prompt": "stand before the text",
    "houlsby": "nonlinearity",
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_folded_is_refused_before_the_model_is_loaded(tmp_path, capsys, method):
    fa.save(fa.attach(make_model(), CONFIGS[method]), tmp_path / "a")
    assert fold("not-there", tmp_path / "a", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert REFUSED[method] in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_biases_without_a_place_are_refused(tmp_path, capsys):
    """Mistral's layers have no biases, whatever its configuration says: transformers would drop them."""
    fields = {
        key: make_model().config.to_dict()[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    }
    config = tf.MistralConfig(**fields, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    base = saved_base(tmp_path / "base", tf.MistralForCausalLM(config))
    trained(tmp_path / "a", base, CONFIGS["v2-input"])
    capsys.readouterr()
    assert fold(base, tmp_path / "a", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "MistralForCausalLM has no place for 14 biases" in error
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


def test_folders_in_use_another_base_and_a_full_disk_are_refused(tmp_path, capsys, monkeypatch):
    base = saved_base(tmp_path / "base", make_model())
    other = saved_base(tmp_path / "other", make_model(seed=3))
    trained(tmp_path / "a", base, CONFIGS["v2-input"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert fold(base, tmp_path / "a", tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err
    assert fold(base, tmp_path / "a", tmp_path / "full" / "mine") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert fold(other, tmp_path / "a", tmp_path / "out") == 2
    assert "--any-base" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="another base model"):
        assert fold(other, tmp_path / "a", tmp_path / "out", "--any-base") == 0

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", full)
    capsys.readouterr()
    assert fold(base, tmp_path / "a", tmp_path / "next") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "cannot be written" in error
    assert not (tmp_path / "next").exists() and not [
        each for each in os.listdir(tmp_path) if each.startswith(".")
    ]
