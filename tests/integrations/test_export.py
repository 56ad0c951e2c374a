"""Adapted models as programs: exported, saved, loaded, taken apart into plain PyTorch, and as ONNX.

An exported program calls our ops. Taken apart with their table, it holds PyTorch's own alone.
"""

import io

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastadapter as fa
from fastadapter.ops import decompositions
from tests.support.models import set_gates, token_ids

CONFIGS = {
    "llama-adapter": fa.LlamaAdapterConfig(3),
    "v2": fa.LlamaAdapterV2Config(3),
    "prefix": fa.PrefixTuningConfig(3),
    "prefix-reparam": fa.PrefixTuningConfig(3, reparam_size=4),
    "soft-prompt": fa.SoftPromptConfig(4),
    "houlsby": fa.BottleneckConfig(bottleneck_size=4, init="houlsby"),
    "parallel": fa.BottleneckConfig(placement="parallel", bottleneck_size=4, init="houlsby"),
}
every_method = pytest.mark.parametrize("method", CONFIGS)


class Logits(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def adapted(*methods):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    for method in methods:
        set_gates(fa.attach(model, CONFIGS[method], method))
    return Logits(model)


def our_ops(program):
    return {str(node.target) for node in program.graph.nodes if "fastadapter" in str(node.target)}


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@every_method
@torch.no_grad()
def test_export_save_load_and_run(method):
    model, ids, file = adapted(method), token_ids(), io.BytesIO()
    truth = model(ids)
    torch.export.save(torch.export.export(model, (ids,)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert our_ops(program)
    close(program.module()(ids), truth)
    plain = program.run_decompositions(decompositions())
    assert not our_ops(plain)
    close(plain.module()(ids), truth)


@torch.no_grad()
def test_lengths_may_vary():
    """Both in the program with our ops and in the one without."""
    model = adapted("v2")
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (token_ids(),), dynamic_shapes=({1: length},))
    plain = program.run_decompositions(decompositions())
    for ids in (token_ids(length=5), token_ids(length=23)):
        close(program.module()(ids), model(ids))
        close(plain.module()(ids), model(ids))


@torch.no_grad()
def test_an_adapter_per_row():
    model, ids = adapted("llama-adapter", "houlsby"), token_ids(3)
    with fa.rows(model.model, ["houlsby", None, "llama-adapter"]):
        truth = model(ids)
        program = torch.export.export(model, (ids,)).run_decompositions(decompositions())
    close(program.module()(ids), truth)


class Fused(nn.Module):
    """Attention and term in one call, which no model makes on a CPU."""

    def forward(self, query, key, value, prefix, gate):
        attended = fa.ops.gated_prefix_attention(query, key, value, prefix, prefix, gate, is_causal=True)
        return fa.ops.prefix_attention(query, key, attended, prefix, prefix, softmax_scale=0.3)


@torch.no_grad()
def test_ops_by_themselves():
    arguments = (*(torch.randn(2, 4, 5, 8) for _ in range(3)), torch.randn(1, 4, 3, 8), torch.randn(1, 4))
    program = torch.export.export(Fused(), arguments)
    assert len(our_ops(program)) == 2
    close(program.run_decompositions(decompositions()).module()(*arguments), Fused()(*arguments))


def test_every_op_can_be_taken_apart():
    ours = {name for name in dir(torch.ops.fastadapter) if not name.startswith("_") and name != "name"}
    # repeated calls are for eager passes: none is in a program
    ours -= {"bottleneck_prepared", "gated_prefix_prepared", "scaled_linear_prepared"}
    ours -= {"repeat", "repeat_two", "release"}
    ours -= {"cpu_capability", "cpu_vendor"}
    named = {str(op).split(".")[1] for op in decompositions()}
    assert named >= ours


@pytest.mark.parametrize(
    "method",
    ["v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("prefix", "houlsby", "soft-prompt"))],
)
@torch.no_grad()
def test_onnx_gives_the_same_outputs(method, tmp_path):
    """In operators of ONNX itself."""
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    runtime = pytest.importorskip("onnxruntime")
    model, ids = adapted(method), token_ids()
    program = torch.export.export(model, (ids,)).run_decompositions(decompositions())
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert {each.domain for each in exported.model_proto.opset_import} <= {"", "ai.onnx"}
    exported.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    close(torch.from_numpy(found), model(ids))
