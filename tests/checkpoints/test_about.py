"""What an adapter's file tells of its origin: written by every save, kept by a load, no part of what it computes."""

import json

import pytest
import torch
import transformers as tf

import fastadapter as fa
from fastadapter.checkpoints.about import annotate, read_about
from fastadapter.checkpoints.files import read_tensors, write_tensors
from tests.support.methods import CONFIGS

FACTS = {"task": "classification", "labels": ["bad", "göod"], "template": "{text}", "base_name": "some/base"}


def made():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return fa.attach(tf.LlamaForCausalLM(config).eval(), CONFIGS["llama-adapter"])


def test_a_file_names_its_base_task_labels_template_dtype_and_versions(tmp_path):
    model = made().bfloat16()
    annotate(model, "default", FACTS)
    _, metadata = read_tensors(fa.save(model, tmp_path))
    about, base = read_about(metadata), json.loads(metadata["base"])
    assert (about["task"], about["labels"], about["template"]) == (
        "classification",
        ["bad", "göod"],
        "{text}",
    )
    assert about["dtype"] == "bf16" and about["versions"]["torch"] == torch.__version__
    assert about["versions"].keys() == {"fastadapter", "torch", "transformers", "python"}
    assert base["name"] == "some/base" and len(base["fingerprint"]) == len(base["weights_digest"]) == 64


def test_a_load_keeps_it_and_detach_forgets_it(tmp_path):
    model = made()
    annotate(model, "default", FACTS)
    first = fa.save(model, tmp_path / "a").read_bytes()
    fa.detach(model)
    fa.load(model, tmp_path / "a")
    assert fa.save(model, tmp_path / "b").read_bytes() == first
    fa.detach(model)
    fa.attach(model, CONFIGS["llama-adapter"])
    assert "task" not in read_about(read_tensors(fa.save(model, tmp_path / "c"))[1])


def test_a_base_from_a_folder_is_called_by_its_last_part(tmp_path):
    """A file travels: the path of the machine it was made on helps nobody."""
    fa.detach(made()).save_pretrained(tmp_path / "private" / "little-llama")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "private" / "little-llama")
    path = fa.save(fa.attach(model, CONFIGS["houlsby"]), tmp_path / "out")
    assert json.loads(read_tensors(path)[1]["base"])["name"] == "little-llama"
    assert b"private" not in path.read_bytes()


@pytest.mark.parametrize(
    "facts, kind, message",
    [
        ({"speed": 1}, ValueError, "expected some of task, labels"),
        ({"labels": "ab"}, TypeError, "'labels' must be list or null, got str"),
        ({"labels": [1]}, TypeError, "strings"),
        ({"task": 3}, TypeError, "'task' must be str or null, got int"),
    ],
)
def test_what_is_said_is_checked(facts, kind, message):
    with pytest.raises(kind, match=message):
        annotate(made(), "default", facts)


@pytest.mark.parametrize("spoilt", ["[1]", '{"labels": [1]}', "{", '{"versions": 3}', "[" * 50_000])
def test_a_malformed_record_is_refused_by_name(tmp_path, spoilt):
    path = fa.save(made(), tmp_path)
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "about": spoilt})
    with pytest.raises(fa.CheckpointError, match=f"{path}: "):
        fa.load(fa.detach(made()), path)


def test_unknown_fields_of_a_later_release_are_left_out(tmp_path):
    path = fa.save(made(), tmp_path)
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "about": '{"task": "generation", "mood": {"a": 1}}'})
    assert read_about(read_tensors(path)[1]) == {"task": "generation"}


def test_same_tensors_same_bytes(tmp_path):
    """In the library that serialises them, metadata is a hash map of another order each time."""
    tensors = {name: torch.arange(5.0) for name in "cab"}
    metadata = {letter: letter * 3 for letter in "qwertyuiopasdfgh"}
    paths = [write_tensors(tmp_path / f"{n}.safetensors", tensors, metadata) for n in range(4)]
    paths.append(write_tensors(tmp_path / "again.safetensors", *read_tensors(paths[0])))
    assert len({path.read_bytes() for path in paths}) == 1
