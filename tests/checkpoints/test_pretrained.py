"""transformers' own saving: the adapter is beside the base's files, in a Trainer's checkpoints too, and it says so."""

import copy
import gc
import io
import logging
import warnings

import pytest
import torch
import transformers as tf

import fastadapter as fa
from fastadapter.integrations.verbs.record import attachments
from tests.support.budget import same_bits
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of

LLAMA = next(family for family in FAMILIES if family.name == "llama")
INPUTS = LLAMA.inputs()
SAYS = pytest.warns(UserWarning, match=r"wrote the adapter to adapter\.safetensors")


def adapted(method="llama-adapter", name="default", model=None):
    model = fa.attach(model or build(LLAMA), CONFIGS[method], name)
    train_a_little(model)
    return model


def base_of(folder):
    return tf.LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_base_and_adapter_come_back(method, tmp_path):
    """Regression: the folder reloaded as the bare base without a word from anybody."""
    model = adapted(method)
    with SAYS:
        model.save_pretrained(tmp_path)
    again = base_of(tmp_path)
    bare = output_of(again, INPUTS)
    assert same_bits(output_of(fa.load(again, tmp_path), INPUTS), output_of(model, INPUTS))
    assert same_bits(output_of(fa.detach(model), INPUTS), bare)


def test_from_pretrained_says_what_it_ignores(tmp_path):
    with SAYS:
        adapted().save_pretrained(tmp_path)
    logger, said = logging.getLogger("transformers"), io.StringIO()
    handler, level = logging.StreamHandler(said), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        base_of(tmp_path)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert "fa_prefix" in said.getvalue() and "UNEXPECTED" in said.getvalue()


@torch.no_grad()
def test_of_several_adapters_each_has_its_file(tmp_path):
    """`load` takes the file of the name; without one, the adapter that was active."""
    model = adapted("houlsby", "b", adapted("prefix", "a"))
    fa.set_active(model, "a")
    with pytest.warns(UserWarning, match="adapter-a.safetensors, adapter-b.safetensors") as said:
        model.save_pretrained(tmp_path)
    assert said[0].filename == __file__
    for name, other in (("a", "a"), ("b", "b"), ("default", "a")):
        fa.set_active(model, other)
        again = fa.load(base_of(tmp_path), tmp_path, name)
        assert same_bits(output_of(again, INPUTS), output_of(model, INPUTS))
    fa.detach(model, "b")
    train_a_little(model, seed=2)
    with pytest.warns(UserWarning, match=r"adapter.safetensors, adapter-a.safetensors in"):
        model.save_pretrained(tmp_path)  # the older file of that name is not left behind
    assert same_bits(output_of(fa.load(base_of(tmp_path), tmp_path, "a"), INPUTS), output_of(model, INPUTS))


def test_copies_save_their_own_and_the_last_detach_takes_the_hook_out(tmp_path):
    gc.collect()  # the models of other tests
    fa.detach(adapted())
    plain = tf.PreTrainedModel.save_pretrained
    model = adapted()
    assert tf.PreTrainedModel.save_pretrained is not plain
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "pickle.pt")
    train_a_little(twin)
    fa.detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "adapter.safetensors").exists()
    with SAYS:
        twin.save_pretrained(tmp_path / "twin")
    fa.detach(twin)
    assert tf.PreTrainedModel.save_pretrained is plain
    thawed = torch.load(tmp_path / "pickle.pt", weights_only=False)
    with SAYS:
        thawed.save_pretrained(tmp_path / "thawed")
    fa.detach(thawed)
    assert tf.PreTrainedModel.save_pretrained is plain


def test_what_is_not_the_base_is_not_saved_as_the_base(tmp_path):
    model = fa.fold(adapted("v2-input"))
    with pytest.raises(ValueError, match="hold adapter 'default', folded"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="leaves out the adapters in it"):
        adapted().model.save_pretrained(tmp_path)


@torch.no_grad()
def test_beside_lora_both_are_saved(tmp_path):
    """PEFT has a save_pretrained of its own, which writes LoRA alone."""
    peft = pytest.importorskip("peft")
    model = adapted()
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with SAYS:
        tuned.save_pretrained(tmp_path)
    again = fa.load(peft.PeftModel.from_pretrained(build(LLAMA), tmp_path), tmp_path)
    assert same_bits(output_of(again.eval(), INPUTS), output_of(tuned.eval(), INPUTS))
    with pytest.raises(fa.CheckpointError, match=r"lora_A.* must be there first"):
        fa.load(build(LLAMA), tmp_path)
    fa.detach(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.save_pretrained(tmp_path / "lora")


@torch.no_grad()
def test_gathered_weights_are_taken_instead_of_the_models(tmp_path):
    """A trainer with sharded weights gathers them for all and lets one process save."""
    model, other = adapted(), adapted()
    train_a_little(other, seed=3)
    with SAYS:
        model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert same_bits(output_of(fa.load(base_of(tmp_path), tmp_path), INPUTS), output_of(other, INPUTS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second" / "adapter.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_checkpoints_hold_the_adapter_and_resume_it(tmp_path):
    """Two steps at once equal one step, a checkpoint and another, bit for bit; so does loading the checkpoint."""

    def train(steps, resume=None):
        model = fa.attach(build(LLAMA), CONFIGS["houlsby"])
        options = tf.TrainingArguments(
            tmp_path / "out", max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, seed=1, lr_scheduler_type="constant", learning_rate=0.01, disable_tqdm=True,
        )  # fmt: skip
        ids = [{"input_ids": row, "labels": row} for row in INPUTS["input_ids"].repeat(2, 1)]
        tf.Trainer(model, options, train_dataset=ids).train(resume_from_checkpoint=resume)
        return model.eval()

    with SAYS:
        whole = train(2)
    with SAYS:
        resumed = train(2, tmp_path / "out" / "checkpoint-1")
    with torch.no_grad():
        expected = output_of(whole, INPUTS)
        assert same_bits(output_of(resumed, INPUTS), expected)
        loaded = fa.load(base_of(tmp_path / "out" / "checkpoint-2"), tmp_path / "out" / "checkpoint-2")
        assert same_bits(output_of(loaded, INPUTS), expected)
    assert attachments(loaded).active == "default"
