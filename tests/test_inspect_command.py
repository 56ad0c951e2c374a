"""``fastadapter inspect`` tells what is in a file or a folder by its header, and answers hostile ones with one line."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

import fastadapter as fa
from fastadapter.checkpoints.about import annotate
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.cli import main
from tests.support.methods import CONFIGS, train_a_little
from tests.training.toy import make_adapted, make_model, run


@pytest.fixture
def saved(tmp_path):
    model = make_adapted()
    train_a_little(model)
    facts = {
        "task": "classification",
        "labels": ["bad", "good"],
        "template": "{text}",
        "base_name": "some/base",
    }
    annotate(model, "default", facts)
    return fa.save(model, tmp_path / "adapter")


def inspect(path, capsys, *more):
    code = main(["inspect", str(path), *more])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_adapter_is_told_without_its_base(saved, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.load", lambda *_: pytest.fail("weights were loaded"))
        code, out, _ = inspect(saved, capsys)
    assert code == 0
    for words in (
        "method    llama-adapter",
        "options   prefix_len 3, gate tanh, gate_per_head True",
        "base      some/base, llama",
        "hidden_size 32",
        "task      classification",
        "labels    bad, good",
        "template  '{text}'",
        f"torch {torch.__version__}",
        "4 of F32, 200 numbers",
    ):
        assert words in out, words
    code, out, _ = inspect(saved.parent, capsys, "--json")
    (found,) = json.loads(out)["files"]
    gates = torch.cat(
        [each.flatten() for key, each in read_tensors(saved)[0].items() if key.endswith("gate")]
    )
    assert found["gates"]["max"] == pytest.approx(float(gates.tanh().max())) and found["gates"]["count"] == 8
    assert found["dtype"] == "fp32" and len(found["tensors"]) == 4 and "metadata" not in found


@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_can_be_told(tmp_path, capsys, method):
    path = fa.save(fa.attach(make_model(), CONFIGS[method]), tmp_path)
    code, out, _ = inspect(path, capsys)
    assert code == 0 and f"method    {CONFIGS[method].method}\n" in out


def test_a_run_is_told_with_its_numbers(tmp_path, capsys):
    run(tmp_path)
    code, out, _ = inspect(tmp_path, capsys)
    assert code == 0 and "run: llama-adapter, generation, finished after 2 epochs" in out
    assert "best/adapter.safetensors: an adapter" in out and "step      12, 2 epochs complete" in out
    assert "22 records, 10 held out" in out and "accuracy_after" in out
    found = json.loads(inspect(tmp_path, capsys, "--json")[1])
    assert found["run"]["finished"] and len(found["files"]) == 3
    assert "2 epochs" in inspect(tmp_path / "best" / "adapter.safetensors", capsys)[1]


FOREIGN = {
    "a LLaMA-Adapter of PEFT": "base_model.model.model.layers.1.self_attn.adaption_gate",
    "a prefix or a soft prompt of PEFT": "prompt_embeddings",
    "an adapter of PEFT": "base_model.model.model.layers.1.q_proj.lora_A.weight",
    "a LLaMA-Adapter of litgpt": "transformer.h.2.attn.gating_factor",
    "a LLaMA-Adapter of the authors": "adapter_query.weight",
    "an adapter of AdapterHub's adapters": "bert.encoder.layer.0.output.adapters.mine.adapter_up.weight",
    "none of an adapter that is known here": "model.layers.0.mlp.weight",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_other_libraries_are_named(tmp_path, capsys, what):
    save_file({FOREIGN[what]: torch.full((2,), 0.5)}, tmp_path / "x.safetensors")
    code, out, _ = inspect(tmp_path / "x.safetensors", capsys)
    assert code == 0 and what in out


def test_folders_of_other_libraries_are_named_and_pickles_stay_shut(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "a/b"}'
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    code, out, _ = inspect(tmp_path, capsys)
    assert code == 0 and "PREFIX_TUNING of peft" in out and "a/b" in out and "not opened" in out
    (tmp_path / "adapter_config.json").write_text('{"config": {"architecture": null}, "model_name": "bert"}')
    assert "bottleneck of adapters" in inspect(tmp_path, capsys)[1]


def header(entries, payload=b""):
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": (b"", "0 bytes, too few"),
    "pickle": (b"\x80\x04" + b"x" * 40, "a Python pickle"),
    "page": (b"<html>" + b" " * 40, "an HTML"),
    "claims": (struct.pack("<Q", 2**40) + b"{" * 40, "do not start with a safetensors header"),
    "deep": (struct.pack("<Q", 60_000) + b'{"a":' * 12_000, "nested too deeply"),
    "twice": (struct.pack("<Q", 17) + b'{"a": 1,"a": 2}  ', "names a field twice"),
    "truncated": (header({"gate": FLOAT}, b"1234"), "truncated or malformed"),
    "offsets": (header({"gate": {**FLOAT, "data_offsets": [0, 4]}}, b"12345678"), "x.safetensors: "),
    "version": (
        header({"__metadata__": {"format": "fastadapter", "format_version": "9"}, "a": FLOAT}, b"1" * 8),
        "format version '9'; this release reads 1",
    ),
    "method": (
        header({"__metadata__": {"format": "fastadapter", "format_version": "1", "method": "\x1b[2J"}}),
        r"the method '\x1b[2J'",
    ),
    "state": (
        header({"__metadata__": {"format": "fastadapter-training-state-1", "progress": "{}"}}),
        "its record is damaged: KeyError",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_line(tmp_path, capsys, name):
    content, message = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    code, out, err = inspect(path, capsys)
    assert code == 2 and out == "" and err.count("\n") == 1 and str(path) in err and message in err


def test_other_things_in_place_of_a_file_get_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"\x80")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, message in (
        (tmp_path, "a model, no adapter"),
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "model.bin", "expected a folder or a .safetensors file"),
        (tmp_path / "pipe.safetensors", "not a regular file"),
    ):
        code, _, err = inspect(path, capsys)
        assert code == 2 and err.count("\n") == 1 and message in err


def test_text_of_a_file_does_not_steer_the_terminal(saved, capsys):
    tensors, metadata = read_tensors(saved)
    about = {**json.loads(metadata["about"]), "labels": ["\x1b[2J", "ö"]}
    write_tensors(saved, tensors, {**metadata, "about": json.dumps(about)})
    _, out, _ = inspect(saved, capsys)
    assert "\x1b" not in out and r"\x1b[2J, ö" in out


def test_a_damaged_record_beside_it_is_named(saved, capsys):
    (saved.parent / "run.json").write_text("{")
    code, _, err = inspect(saved, capsys)
    assert code == 2 and "run.json: damaged, it is no JSON" in err and err.count("\n") == 1
