"""Saving and loading adapters: strict, whole or not at all, and refused with the file and the reason."""

import json
import subprocess
import sys

import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.integrations.verbs.record import attachments
from tests.support.budget import same_bits
from tests.support.models import FAMILIES, build, output_of, set_gates

CONFIG = fa.LlamaAdapterConfig(prefix_len=4, layers=2, gate="identity", gate_per_head=False)
LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture
def saved(tmp_path):
    model = fa.attach(build(LLAMA), CONFIG)
    set_gates(model)
    return fa.save(model, tmp_path / "reviews")


def rewritten(path, *, tensors=None, metadata=None):
    """The same file with a change and a digest that fits it: what a careful forger would make."""
    old_tensors, old_metadata = read_tensors(path)
    return write_tensors(path, tensors or old_tensors, {**old_metadata, **(metadata or {})})


@torch.no_grad()
def test_a_fresh_process_gives_the_same_bits(saved, tmp_path):
    """Configuration, prompts and gates come back whole; the loaded adapter is active."""
    model = fa.load(build(LLAMA), saved, "other")
    torch.save(output_of(model, LLAMA.inputs()), tmp_path / "here.pt")
    program = (
        "import sys, torch, fastadapter as fa\n"
        "from tests.support.models import FAMILIES, build, output_of\n"
        "family = next(f for f in FAMILIES if f.name == 'llama')\n"
        "model = fa.load(build(family), sys.argv[1])\n"
        "with torch.no_grad(): output = output_of(model, family.inputs())\n"
        "assert torch.equal(output, torch.load(sys.argv[2]))\n"
        "assert not torch.equal(output, output_of(fa.detach(model), family.inputs()))\n"
    )
    subprocess.run([sys.executable, "-c", program, saved, tmp_path / "here.pt"], check=True)


def test_files_are_small_and_complete(saved):
    """Only the adapter is in the file, named by module, with its configuration beside it."""
    tensors, metadata = read_tensors(saved)
    assert sorted(tensors)[0] == "model.layers.1.self_attn.gate" and len(tensors) == 4
    assert json.loads(metadata["config"]) == CONFIG.to_dict() and metadata["method"] == "llama-adapter"
    assert saved.stat().st_size < 8192


def test_load_into_an_attached_adapter(saved):
    """The same configuration is overwritten in place; another is an error."""
    model = fa.attach(build(LLAMA), CONFIG)
    parameters = [p for _, p in fa.trainable_parameters(model)]
    fa.load(model, saved)
    assert [p for _, p in fa.trainable_parameters(model)] == parameters and parameters[1].abs().min() > 0
    other = fa.attach(build(LLAMA), fa.LlamaAdapterConfig(prefix_len=4))
    with pytest.raises(ValueError, match=r"is attached with .* but .* holds"):
        fa.load(other, saved)


def test_loading_draws_no_random_numbers(saved):
    model = build(LLAMA)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fa.load(model, saved)
    assert torch.equal(torch.rand(2), expected)


def _drop_one(path):
    tensors, _ = read_tensors(path)
    tensors.pop(sorted(tensors)[0])
    rewritten(path, tensors=tensors)


def _add_one(path):
    rewritten(path, tensors={**read_tensors(path)[0], "model.layers.9.self_attn.gate": torch.zeros(1)})


def _attribute_name(path):
    rewritten(path, tensors={**read_tensors(path)[0], "__class__": torch.zeros(1)})


def _change(key, value):
    def change(path):
        tensors, _ = read_tensors(path)
        name = next(name for name in sorted(tensors) if name.endswith(key))
        rewritten(path, tensors={**tensors, name: value(tensors[name])})

    return change


def _metadata(**fields):
    return lambda path: rewritten(path, metadata=fields)


def _config(**fields):
    return _metadata(config=json.dumps({**CONFIG.to_dict(), **fields}))


BAD_FILES = [
    ("missing tensor", _drop_one, "missing model.layers.1.self_attn.gate"),
    ("unexpected tensor", _add_one, "unexpected model.layers.9.self_attn.gate"),
    ("attribute as a name", _attribute_name, "unexpected __class__"),
    ("gate of another head count", _change("gate", lambda x: torch.zeros(3)), r"gate must be .* \(1,\), got"),
    (
        "other hidden size",
        _change("prompt", lambda x: torch.zeros(4, 16)),
        r"prompt must be .* \(4, 32\), got",
    ),
    ("prompt shorter than its config", _change("prompt", lambda x: x[:2]), "prefix_len 4"),
    ("other dtype", _change("prompt", lambda x: x.half()), "must be torch.float32"),
    ("not finite", _change("prompt", lambda x: x * float("inf")), "holds NaN or Inf"),
    ("other format", _metadata(format="other"), "not one of fastadapter's"),
    ("newer version", _metadata(format_version="2"), "format version '2'"),
    ("unknown method", _metadata(method="lora"), "holds the method 'lora'"),
    ("method as code", _metadata(method="os.system"), "holds the method 'os.system'"),
    ("malformed config", _metadata(config="{"), "."),
    ("config is a list", _metadata(config="[1]"), "."),
    ("unknown config field", _config(auto_mapping="evil"), "configuration is malformed"),
    ("config out of range", _config(prefix_len=10**9), "prefix_len must be between"),
    ("bool as int", _config(prefix_len=True), "prefix_len must be an int"),
    ("more layers than the model", _config(layers=40), "layers must be at most 3"),
    (
        "other base model",
        _metadata(base=json.dumps({"hidden_size": 64})),
        "made for a model with hidden_size 64",
    ),
    ("base is a list", _metadata(base="[]"), "'base' is not a JSON object"),
]


@pytest.mark.parametrize(
    ("spoil", "message"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES]
)
@torch.no_grad()
def test_bad_files_leave_the_model_untouched(saved, spoil, message):
    """One exception type with the file and the reason; another adapter stays active with its bits."""
    model = fa.attach(build(LLAMA), CONFIG, "good")
    set_gates(model, 0.3)
    before = output_of(model, LLAMA.inputs())
    spoil(saved)
    with pytest.raises(fa.CheckpointError, match=message) as raised:
        fa.load(model, saved, "bad")
    assert str(saved) in str(raised.value)
    assert list(attachments(model).configs) == ["good"]
    assert same_bits(output_of(model, LLAMA.inputs()), before)
    fresh = build(LLAMA)
    with pytest.raises(fa.CheckpointError):
        fa.load(fresh, saved)
    assert attachments(fresh) is None and all(p.requires_grad for p in fresh.parameters())


def test_nonfinite_weights_open_on_request(saved):
    _change("prompt", lambda x: x * float("nan"))(saved)
    fa.load(build(LLAMA), saved, allow_nonfinite=True)


def test_unknown_format(saved):
    model = fa.attach(build(LLAMA), CONFIG)
    with pytest.raises(ValueError, match="format must be one of fastadapter, got 'zip'"):
        fa.save(model, saved, format="zip")
