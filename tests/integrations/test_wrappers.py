"""Public functions look through whatever is around the adapted model, and act on that model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.verbs.record import attachments
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of

LLAMA = next(family for family in FAMILIES if family.name == "llama")


class Lit(nn.Module):
    """A trainer's module: the model is one child of several, and none of the wrapper's attributes is the model's."""

    def __init__(self, model):
        super().__init__()
        self.loss, self.net = nn.CrossEntropyLoss(), model

    def forward(self, **inputs):
        return self.net(**inputs)


WRAPPERS = {
    "lightning": Lit,
    "data-parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "nested": lambda model: nn.DataParallel(Lit(torch.compile(model, backend="eager"))),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


@torch.no_grad()
def test_every_verb_through_a_wrapper(wrap, tmp_path):
    inputs = LLAMA.inputs()
    model = build(LLAMA)
    base = output_of(model, inputs)
    outer = wrap(model)
    assert fa.attach(outer, CONFIGS["v2-input"]) is not None and attachments(model) is not None
    train_a_little(outer)
    names = [name for name, _ in fa.trainable_parameters(outer)]
    assert names == [name for name, _ in fa.trainable_parameters(model)] and names
    adapted = output_of(model, inputs)
    fa.set_active(outer, None)
    assert same_bits(output_of(model, inputs), base)
    with fa.rows(outer, ["default", None]) as yielded:
        assert yielded is outer
        assert same_bits(output_of(model, inputs)[1], base[1])
    fa.set_active(outer, "default")
    assert all(check.passed for check in fa.verify(outer))
    assert str(fa.explain(outer)) == str(fa.explain(model)) and "default*" in str(fa.explain(outer))
    fa.save(outer, tmp_path)
    assert fa.fold(outer) is outer and fa.unfold(outer) is outer
    fa.detach(outer)
    assert same_bits(output_of(model, inputs), base)
    assert fa.load(outer, tmp_path) is outer
    assert same_bits(output_of(model, inputs), adapted)


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_an_average_of_weights_saves_the_averages(method, tmp_path):
    """AveragedModel copies the model and its adapters; neither of the two touches the other's."""
    inputs = LLAMA.inputs()
    model = fa.attach(build(LLAMA), CONFIGS[method])
    train_a_little(model, seed=1)
    average = AveragedModel(model, multi_avg_fn=None)
    average.update_parameters(model)
    train_a_little(model, seed=2)
    average.update_parameters(model)
    expected = output_of(average.module, inputs)
    trained = output_of(model, inputs)
    assert not same_bits(expected, trained)
    fa.save(average, tmp_path)
    fresh = fa.load(build(LLAMA), tmp_path)
    assert same_bits(output_of(fresh, inputs), expected)
    fa.detach(average)
    assert attachments(average) is None and same_bits(output_of(model, inputs), trained)


def test_two_adapted_models_in_one_are_named():
    both = nn.ModuleDict({"actor": fa.attach(build(LLAMA), CONFIGS["houlsby"])})
    both["critic"] = copy.deepcopy(both["actor"])
    with pytest.raises(ValueError, match=r"several adapted models \(actor, critic\); pass one of them"):
        fa.save(both, "nowhere")


def test_a_model_with_one_child_is_no_wrapper():
    """OPT's model holds a decoder and nothing else, and a user's module around a backbone may be all there is."""
    from transformers import OPTConfig, OPTModel

    model = OPTModel(OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4))
    assert unwrap(model) is model and unwrap(AveragedModel(model)).__class__ is OPTModel
    linear, stack = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    assert unwrap(linear) is linear and unwrap(stack) is stack


def test_a_part_that_is_adapted_is_found_in_the_whole(tmp_path):
    model = build(LLAMA)
    fa.attach(model.model, CONFIGS["houlsby"])
    assert unwrap(model) is model.model
    model.lm_head.requires_grad_(False)
    assert fa.save(model, tmp_path) == fa.save(model.model, tmp_path)


def test_a_head_around_an_adapted_backbone_is_trained_and_not_saved_in_silence(tmp_path):
    """The adapter's file is the backbone's: what is around it has no place there, so it is named."""
    model = Lit(fa.attach(build(LLAMA), CONFIGS["houlsby"]))
    model.head = nn.Linear(4, 2)
    assert [name for name, _ in fa.trainable_parameters(model)][-2:] == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"head.weight, head.bias .* outside"):
        fa.save(model, tmp_path)
    fa.save(model.net, tmp_path)


@torch.no_grad()
def test_names_in_a_file_are_those_without_wrappers_inside(tmp_path):
    """Regression: an adapter on compiled blocks could not be loaded into the model as it is served."""
    inputs = LLAMA.inputs()
    model = build(LLAMA)
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    fa.attach(model, CONFIGS["houlsby"])
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    train_a_little(model)
    tensors, _ = read_tensors(fa.save(model, tmp_path))
    assert not any("_orig_mod" in name for name in tensors)
    whole = fa.load(build(LLAMA), tmp_path)
    torch.testing.assert_close(output_of(whole, inputs), output_of(model, inputs))
    fa.detach(model)
    fa.load(model, tmp_path)


def test_parts_of_parameters_are_never_saved_as_if_they_were_whole(tmp_path):
    """As FSDP and DeepSpeed leave them: flat, or elsewhere."""
    model = fa.attach(build(LLAMA), CONFIGS["houlsby"])
    kept = dict(fa.trainable_parameters(model))
    for parameter in kept.values():
        parameter._fsdp_flattened = True
    fa.save(model, tmp_path)  # whole, as inside summon_full_params
    for parameter in kept.values():
        parameter.data = parameter.data.flatten()
    for call in (fa.save, fa.load):
        with pytest.raises((ValueError, fa.CheckpointError), match="summon_full_params"):
            call(model, tmp_path)
    model = fa.attach(build(LLAMA), CONFIGS["houlsby"])
    name, parameter = fa.trainable_parameters(model)[0]
    parameter.data, parameter.ds_id = torch.empty(0), 7
    with pytest.raises(ValueError, match=r"DeepSpeed keeps a part of model\.layers\.0"):
        fa.save(model, tmp_path)


def test_a_part_of_an_adapted_model_is_not_a_model_of_its_own(tmp_path):
    """It has no record, but adapters act in it: another record would fight over them with the first."""
    model = fa.attach(build(LLAMA), CONFIGS["houlsby"])
    calls = [
        lambda part: fa.attach(part, CONFIGS["houlsby"], "second"),
        lambda part: fa.save(part, tmp_path),
        lambda part: fa.set_active(part, None),
        fa.detach,
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match="this LlamaModel is a part of a model that adapters are attached to"
        ):
            call(model.model)
    assert list(attachments(model).configs) == ["default"]
