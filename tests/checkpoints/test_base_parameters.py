"""What of the model itself is trained beside an adapter is saved with it, put back by load and taken out by detach."""

import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints import tensors as tensors_module
from fastadapter.checkpoints.files import read_tensors
from fastadapter.integrations.parts import sharding
from fastadapter.integrations.verbs import base_parameters
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of

LLAMA = next(family for family in FAMILIES if family.name == "llama")
NAME = "model.embed_tokens.weight"
INPUTS = LLAMA.inputs()


def with_new_tokens(count=2, tied=False):
    model = build(LLAMA)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    torch.manual_seed(5)
    model.resize_token_embeddings(64 + count, mean_resizing=False)
    return model.eval()


def trained(method="llama-adapter", **options):
    """An adapter and the embeddings, trained together."""
    model = fa.attach(with_new_tokens(**options), CONFIGS[method])
    model.get_input_embeddings().weight.requires_grad_(True)
    train_a_little(model)
    return model


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_unfrozen_embeddings_come_back_and_go_again(method, tied, tmp_path):
    """Regression: the optimiser got them, the file did not."""
    model = trained(method, tied=tied)
    fa.save(model, tmp_path)
    other = with_new_tokens(tied=tied)
    bare = output_of(other, INPUTS)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    flags = {key: each.requires_grad for key, each in other.named_parameters()}
    fa.load(other, tmp_path)
    assert same_bits(output_of(other, INPUTS), output_of(model, INPUTS))
    assert other.get_parameter(NAME).requires_grad
    assert read_tensors(fa.save(other, tmp_path / "again"))[0].keys() == read_tensors(tmp_path)[0].keys()
    fa.detach(other)
    after = other.state_dict()
    assert after.keys() == before.keys() and all(same_bits(after[key], before[key]) for key in before)
    assert {key: each.requires_grad for key, each in other.named_parameters()} == flags
    assert same_bits(output_of(other, INPUTS), bare)


def test_a_copied_head_beside_them_is_the_adapters(tmp_path):
    bert = next(family for family in FAMILIES if family.name == "bert")
    import transformers as tf

    def classifier():
        torch.manual_seed(0)
        return tf.BertForSequenceClassification(build(bert).config).eval()

    model = fa.attach(classifier(), CONFIGS["houlsby"])
    model.bert.pooler.dense.bias.requires_grad_(True)
    train_a_little(model)
    tensors, _ = read_tensors(fa.save(model, tmp_path))
    assert [key for key in tensors if key.startswith("base-")] == ["base-parameter.bert.pooler.dense.bias"]
    assert "classifier.own.weight" in tensors
    other = fa.load(classifier(), tmp_path)
    with torch.no_grad():
        assert same_bits(output_of(other, bert.inputs()), output_of(model, bert.inputs()))


def refused(model, path, message):
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(fa.CheckpointError, match=message):
        fa.load(model, path)
    assert all(same_bits(value, kept[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == kept.keys()


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    fa.save(trained(), tmp_path)
    refused(build(LLAMA), tmp_path, r"\(66, 32\).*\(64, 32\).*resize_token_embeddings\(66\)")
    model = trained()
    model.lm_head.weight.requires_grad_(True)
    model.extra = torch.nn.Linear(2, 2)
    fa.save(model, tmp_path / "extra")
    refused(with_new_tokens(), tmp_path / "extra", r"parameter extra\.(weight|bias) of a base model")
    model.get_parameter(NAME).data[0, 0] = float("nan")
    del model.extra
    fa.save(model, tmp_path / "nan")
    refused(with_new_tokens(), tmp_path / "nan", "embed_tokens.weight holds NaN")


def test_other_adapters_are_not_put_on_another_base(tmp_path):
    """They would act on embeddings they were not trained with; the same embeddings are no change."""
    model = trained()
    fa.save(model, tmp_path)
    both = fa.attach(with_new_tokens(), CONFIGS["houlsby"], "other")
    with pytest.raises(fa.CheckpointError, match=r"change under the other adapters \(other\)"):
        fa.load(both, tmp_path)
    fa.set_active(both, "other")
    fa.detach(both)
    fa.load(both, tmp_path)
    fa.load(both, tmp_path, "twin")


@pytest.mark.parametrize("attached", [False, True], ids=["fresh", "attached"])
def test_a_load_that_breaks_off_changes_nothing(tmp_path, monkeypatch, attached):
    """Out of memory, or an interrupt, at each tensor in turn."""
    fa.save(trained("houlsby"), tmp_path)
    model = with_new_tokens()
    if attached:
        fa.attach(model, CONFIGS["houlsby"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: each.requires_grad for key, each in model.named_parameters()}
    write, left = sharding.write, [0]

    def breaking(target, value):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        write(target, value)

    monkeypatch.setattr(tensors_module, "write", breaking)
    monkeypatch.setattr(base_parameters, "write", breaking)
    for step in range(25):
        left[0] = step
        with pytest.raises(KeyboardInterrupt):
            fa.load(model, tmp_path)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(same_bits(after[key], before[key]) for key in before)
        assert {key: each.requires_grad for key, each in model.named_parameters()} == flags
    left[0] = 1000
    fa.load(model, tmp_path)


def test_embeddings_in_another_dtype_are_cast(tmp_path):
    model = trained()
    fa.save(model, tmp_path)
    half = fa.load(with_new_tokens().bfloat16(), tmp_path)
    assert same_bits(half.get_parameter(NAME).detach(), model.get_parameter(NAME).detach().bfloat16())
