"""Adapted models under ``torch.compile``: one graph, the same numbers, training and decoding, blocks that share it."""

import copy

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fastadapter as fa
from fastadapter.integrations.passes import soft_prompt_decoder
from tests.support.models import set_gates, token_ids

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama-adapter": fa.LlamaAdapterConfig(3),
    "v2": fa.LlamaAdapterV2Config(3),
    "prefix": fa.PrefixTuningConfig(3),
    "prefix-reparam": fa.PrefixTuningConfig(3, reparam_size=4),
    "soft-prompt": fa.SoftPromptConfig(4),
    "houlsby": fa.BottleneckConfig(bottleneck_size=4, init="houlsby"),
    "pfeiffer": fa.BottleneckConfig(placement="pfeiffer", bottleneck_size=4, init="houlsby"),
    "parallel": fa.BottleneckConfig(placement="parallel", bottleneck_size=4, init="houlsby"),
}
QUICK = ("llama-adapter", "v2", "prefix", "houlsby")
every_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def adapted(method, layers=2, names=("default",)):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)).eval()
    for name in names:
        fa.attach(model, CONFIGS[method], name)
    set_gates(model)
    return model


@every_method
def test_a_training_step_is_one_graph(method):
    """Forward and backward, in training mode, equal to eager."""
    model, ids = adapted(method).train(), token_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for _, p in fa.trainable_parameters(model))])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)


def decode(model, call, ids, steps=3):
    """Logits of some steps behind a prompt, in a static cache."""
    cache, found = StaticCache(config=model.config, max_cache_len=12), []
    token = model(ids, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
    for number in range(steps):
        seen = (torch.arange(12) <= ids.shape[1] + number)[None, None, None]
        logits = call(input_ids=token, attention_mask=seen, cache=cache, use_cache=True).logits
        found.append(logits.clone())
        token = logits.argmax(-1)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("mixed", [False, True], ids=["one", "rows"])
@every_method
@torch.no_grad()
def test_a_decoding_step_is_one_graph(method, mixed):
    """With a static cache; compiled once for all steps, and what rows need is handed in, not made in the graph."""
    model, ids, graphs = adapted(method, names=("one", "two")), token_ids(length=5), []

    def look(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    with fa.rows(model, ["one", "two"]) if mixed else torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=look)
        found, expected = decode(model, compiled, ids), decode(model, model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert not made_on_the_host(graphs)


def made_on_the_host(graphs):
    """Tensors of numbers in a graph: they are copied to a GPU in every call, and a CUDA graph cannot hold them."""
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    return [node for node in nodes if node.target is torch.tensor or "_tensor_constant" in str(node.target)]


@pytest.mark.parametrize("method", ["llama-adapter", "v2", "prefix", "houlsby"])
@torch.no_grad()
def test_rows_are_ready_before_the_first_call(method):
    """Also where nothing has run in eager mode before."""
    model, ids, graphs = adapted(method, names=("one", "two")), token_ids(length=5), []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    with fa.rows(model, ["two", None]):
        torch.compile(model, fullgraph=True, backend=look)(ids, use_cache=False)
    assert graphs and not made_on_the_host(graphs)


@pytest.mark.parametrize("method", ["llama-adapter", pytest.param("prefix", marks=pytest.mark.slow)])
def test_blocks_share_their_graphs(method):
    """Compiled one by one, five blocks are two graphs: with and without a gradient for their input."""
    model, ids, graphs = adapted(method, layers=5).train(), token_ids(), []
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss

    def look(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = copy.deepcopy(model)
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend=look)
    loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


@torch.no_grad()
def test_nothing_is_kept_while_a_graph_is_recorded(monkeypatch):
    """What is made during a capture has no values yet, and lives in the graph's memory."""
    from fastadapter.integrations.passes import choice, entry, host

    model, ids = adapted("prefix", names=("one", "two")), token_ids()
    for module in (choice, host):
        monkeypatch.setattr(module, "may_keep", lambda device: False)
    monkeypatch.setattr(entry, "is_captured", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"), fa.rows(model, ["one", "two"]):
        model(ids)
    fa.set_active(model, "one")
    model(ids, use_cache=False)
    assert not any(each._kept for each in model.modules() if isinstance(each, host.Host))


@pytest.mark.parametrize("method", CONFIGS)
def test_hooks_stand_where_dynamo_counts_them(method):
    """torch 2.11 looks a hook up by its place in the dictionary beneath the ordered one, and found another."""
    model = adapted(method)
    fa.attach(model, CONFIGS["soft-prompt"], "another")
    fa.attach(model, CONFIGS["houlsby"], "third")
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            assert list(hooks) == list(dict.keys(hooks))
    decoder = list(model.model._forward_pre_hooks.values())
    names = [getattr(hook, "__name__", None) or hook.func.__name__ for hook in decoder]
    assert names == ["_begin", "_count", "_enter"]


def test_a_compiled_step_with_a_soft_prompt_is_one_graph_where_python_is_waited_for(monkeypatch):
    monkeypatch.setattr(soft_prompt_decoder, "WAITING_DEVICES", {"cpu", "cuda"})
    model, ids = adapted("soft-prompt").train(), token_ids()
    loss = torch.compile(model, fullgraph=True, backend="eager")(
        input_ids=ids, labels=ids, use_cache=False
    ).loss
    torch.testing.assert_close(
        loss, model(input_ids=ids, labels=ids, use_cache=False).loss, rtol=1e-5, atol=1e-6
    )
