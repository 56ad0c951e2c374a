"""What surrounds the ops on a GPU: models, training, generators, memory, doctor, explain, on a stand-in.

Correct means: the same results as on a CPU, within rounding of the kernels, and the GPU's own functions are asked.
"""

import json

import pytest
import torch

import fastadapter as fa
from fastadapter.cli import doctor
from tests.support.cuda_standin import cuda_standin, within

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
SECONDS = 240
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    with cuda_standin(monkeypatch, tmp_path / "cache") as state:
        yield state


def adapted(config):
    """A decoder of two layers with a trained-looking adapter."""
    from tests.support.methods import train_a_little
    from tests.training.toy import make_model

    model = make_model()
    fa.attach(model, config)
    train_a_little(model)
    return model


def loss_and_gradients(model):
    ids = torch.arange(12).view(2, 6)
    trained = dict(fa.trainable_parameters(model))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: x.grad.clone() for name, x in trained.items()}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    "config",
    [
        fa.LlamaAdapterConfig(prefix_len=3),
        fa.PrefixTuningConfig(prefix_len=3),
        fa.BottleneckConfig(bottleneck_size=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_model_trains_as_on_a_cpu(config, checkpointed, monkeypatch, tmp_path):
    """The first call is one with gradients, and under activation checkpointing one of a backward: both check there."""
    model = adapted(config)
    expected = loss_and_gradients(model)
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with cuda_standin(monkeypatch, tmp_path / "cache") as gpu:
        found = within(SECONDS, lambda: loss_and_gradients(model))
        assert gpu.launches and not gpu.unguarded and gpu.thread.ran
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-5), name


def test_generation_with_kept_projections(gpu):
    """No gradients, no graph: the path of decoding steps."""
    model = adapted(fa.LlamaAdapterConfig(prefix_len=3))
    ids = torch.arange(6).view(1, 6)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    first = within(SECONDS, lambda: model.generate(ids, **options))
    assert torch.equal(first, model.generate(ids, **options)) and gpu.launches and not gpu.unguarded


def test_explain_names_the_backend_of_a_gpu(gpu):
    model = adapted(fa.LlamaAdapterConfig(prefix_len=3))
    found = {(row["backend"], row["reason"]) for row in fa.explain(model).rows}
    assert found == {("triton", "GPU kernel on the output of the model's attention")}
    (row, *_) = fa.explain(model.double()).rows
    assert row["backend"] == "reference" and "no fp64" in row["reason"]
    model.float()
    for module in model.modules():
        if hasattr(module, "head_dim"):
            module.head_dim = 512
    (row, *_) = fa.explain(model).rows
    assert row["backend"] == "reference" and "head_dim" in row["reason"]


def test_the_devices_generator_is_saved_and_restored(gpu):
    """Dropout on a GPU draws from a generator of its own: a resumed run has to go on with it."""
    from fastadapter.training.state import random_states, restore_random

    saved = random_states(CPU)
    assert "generator.cuda" in saved
    drawn = [torch.rand(3), torch.rand(3, generator=gpu.generator)]
    restore_random({name: state.clone() for name, state in saved.items()}, CPU)
    again = [torch.rand(3), torch.rand(3, generator=gpu.generator)]
    assert all(torch.equal(x, y) for x, y in zip(drawn, again))


def test_a_run_saves_the_generator_resumes_with_it_and_reports_the_devices_memory(gpu, tmp_path):
    from fastadapter.checkpoints.files import read_tensors
    from tests.training.toy import STATE, run

    result = within(
        SECONDS, lambda: run(tmp_path, num_train_epochs=1, batch_size=8, gradient_accumulation_steps=1)
    )
    assert result.peak_cuda_bytes == gpu.peak and gpu.launches and not gpu.unguarded
    tensors, _ = read_tensors(tmp_path / STATE)
    assert "generator.cuda" in tensors
    before = gpu.generator.get_state()
    torch.rand(5, generator=gpu.generator)
    resumed = within(
        SECONDS,
        lambda: run(tmp_path, num_train_epochs=1, batch_size=8, gradient_accumulation_steps=1, resume=True),
    )
    assert resumed.losses == result.losses and torch.equal(gpu.generator.get_state(), before)


def test_doctor_has_rows_of_the_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    rows = {name: (status, detail) for name, status, detail in doctor.report()}
    status, detail = rows["GPU 0"]
    assert status == "ok" and detail.startswith("stand-in, 80 GiB, sm_90, driver ")
    assert rows["gated_prefix on cuda"] == (
        "ok",
        "triton: GPU kernel; the reference for fp64 and head_dim above 256 (128 in fp32)",
    )
    assert rows["bottleneck on cuda"] == ("ok", "triton: GPU kernel; the reference for fp64")
    doctor.run(type("Arguments", (), {"json": True}))
    assert {row["device"] for row in json.loads(capsys.readouterr().out)["backends"]} == {"cpu", "cuda"}
