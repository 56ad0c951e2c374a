"""Attaching and what lives around it: names, copies, casts, caches, compilers, hosts."""

import copy
import pickle

import pytest
import torch

import fastadapter as fa
from fastadapter.integrations.passes import attention
from fastadapter.integrations.verbs.record import attachments, hosts
from tests.support.budget import same_bits
from tests.support.models import FAMILIES, build, output_of, set_gates, token_ids

CONFIG = fa.LlamaAdapterConfig(prefix_len=4, layers=2)
LLAMA = next(family for family in FAMILIES if family.name == "llama")


@pytest.fixture
def model():
    return build(LLAMA)


@pytest.fixture
def inputs():
    return LLAMA.inputs()


def lookup():
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface.get_interface


@torch.no_grad()
def test_two_adapters_and_switching(model, inputs):
    """Each name gives its own outputs, and detaching one leaves the other."""
    base = output_of(model, inputs)
    fa.attach(model, CONFIG, "first")
    set_gates(model)
    first = output_of(model, inputs)
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3), "second")
    assert same_bits(output_of(model, inputs), base)  # fresh, and the active one
    set_gates(model, 0.2)
    second = output_of(model, inputs)
    fa.set_active(model, "first")
    set_gates(model)
    assert same_bits(output_of(model, inputs), first) and not same_bits(first, second)
    fa.detach(model, "first")
    assert same_bits(output_of(model, inputs), base)  # nothing is active now
    fa.set_active(model, "second")
    set_gates(model, 0.2)
    assert same_bits(output_of(model, inputs), second)
    fa.detach(model)
    assert attachments(model) is None


def test_frozen_base_and_trainable_parameters(model):
    """Only the adapter trains; counts are prefix_len * hidden + heads per layer; detach gives the flags back."""
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    fa.attach(model, CONFIG)
    names = [name for name, _ in fa.trainable_parameters(model)]
    assert sum(p.numel() for _, p in fa.trainable_parameters(model)) == 2 * (4 * 32 + 4)
    assert all(".fa_prefix." in name for name in names) and len(names) == 4
    fa.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_top_layers_are_adapted(model):
    fa.attach(model, CONFIG)
    assert list(hosts(model)) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": CONFIG.to_dict()}, TypeError, "config must be a configuration such as"),
        ({"config": fa.LlamaAdapterConfig(layers=4)}, ValueError, "layers must be at most 3"),
        ({"name": "taken"}, ValueError, "'taken' is already attached"),
        ({"name": ""}, ValueError, "name must be"),
        ({"name": "../x"}, ValueError, "name must be"),
        ({"name": "a" * 65}, ValueError, "name must be"),
        ({"name": None}, ValueError, "name must be"),
        ({"model": "llama"}, TypeError, r"model must be a torch.nn.Module"),
    ],
)
def test_bad_attach_leaves_everything(model, change, error, message):
    fa.attach(model, CONFIG, "taken")
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        fa.attach(**{"model": model, "config": CONFIG, "name": "other", **change})
    assert list(attachments(model).configs) == ["taken"] and attachments(model).active == "taken"
    assert all(same_bits(p.detach(), state[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefix_len": 0}, ValueError, "prefix_len must be between 1 and 1024, got 0"),
        ({"prefix_len": 10**9}, ValueError, "prefix_len must be between 1 and 1024"),
        ({"prefix_len": 2.5}, TypeError, "prefix_len must be an int"),
        ({"prefix_len": True}, TypeError, "prefix_len must be an int"),
        ({"layers": 0}, ValueError, "layers must be at least 1"),
        ({"layers": "all"}, TypeError, "layers must be an int or None"),
        ({"gate": "relu"}, ValueError, "gate must be one of"),
        ({"gate_per_head": 1}, TypeError, "gate_per_head must be a bool"),
    ],
)
def test_bad_configurations(arguments, error, message):
    with pytest.raises(error, match=message):
        fa.LlamaAdapterConfig(**arguments)


def test_unknown_names(model):
    for call in (fa.detach, fa.set_active, lambda m, name: fa.save(m, "nowhere", name)):
        with pytest.raises(ValueError, match="no adapter"):
            call(model, "missing")
    fa.attach(model, CONFIG)
    for call in (fa.detach, fa.set_active, lambda m, name: fa.save(m, "nowhere", name)):
        with pytest.raises(ValueError, match="'missing' is attached; there is default"):
            call(model, "missing")


def test_gpt2_that_bypasses_the_interface_is_refused():
    """``reorder_and_upcast_attn`` computes attention in the module when eager: the adapter would be lost in silence."""
    family = next(family for family in FAMILIES if family.name == "gpt2")
    model = build(family)
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    with pytest.raises(TypeError, match="reorder_and_upcast_attn"):
        fa.attach(model, CONFIG)


@torch.no_grad()
def test_copies_keep_working(model, inputs):
    """A deep copy and a pickled copy have adapters of their own, also after the original is detached."""
    fa.attach(model, CONFIG)
    set_gates(model)
    adapted = output_of(model, inputs)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    fa.detach(model)
    for twin in (copied, pickled):
        assert same_bits(output_of(twin, inputs), adapted)
        fa.detach(twin)


def test_hook_is_gone_after_the_last_detach(model, monkeypatch):
    """Also after a refused attach, and kept while another model needs it."""
    # models of earlier tests may still be alive, and must not be what holds the hook here
    original, other = attention._original_lookup or lookup(), build(LLAMA)
    monkeypatch.setattr(attention, "_hosts", type(attention._hosts)())
    monkeypatch.setattr("transformers.modeling_utils.AttentionInterface.get_interface", original)
    with pytest.raises(ValueError, match="layers must be at most"):
        fa.attach(model, fa.LlamaAdapterConfig(layers=99))
    assert lookup() is original
    fa.attach(model, CONFIG)
    fa.attach(other, CONFIG)
    assert lookup() is not original
    fa.detach(model)
    assert lookup() is not original
    fa.detach(other)
    assert lookup() is original


@torch.no_grad()
def test_another_attention_implementation_after_attach(model, inputs):
    """``set_attn_implementation`` does not lose the adapter."""
    fa.attach(model, CONFIG)
    set_gates(model)
    sdpa = output_of(model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(output_of(model, inputs), sdpa, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_masters_stay_fp32(model, inputs, dtype):
    """Casting the model keeps every bit of prompt and gate, and the zero gate is still exact."""
    fa.attach(model, CONFIG)
    prompts = [host.adapters["default"].prompt.detach().clone() for [host] in hosts(model).values()]
    model.to(dtype)
    fa.set_active(model, None)
    base = output_of(model, inputs)
    fa.set_active(model, "default")
    assert base.dtype == dtype and same_bits(output_of(model, inputs), base)
    set_gates(model)
    assert not same_bits(output_of(model, inputs), base)
    for [host], prompt in zip(hosts(model).values(), prompts):
        assert same_bits(host.adapters["default"].prompt.detach(), prompt)
        assert host.adapters["default"].gate.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_gate_steps_accumulate(model, inputs, dtype):
    """A thousand steps of 1e-3 move the gate by one; a bf16 gate would not move at all from 0.5 on."""
    model.to(dtype)
    fa.attach(model, CONFIG)
    gate = next(p for name, p in fa.trainable_parameters(model) if name.endswith("gate"))
    with torch.no_grad():
        gate.fill_(0.5)
        for _ in range(1000):
            gate.add_(1e-3)
    torch.testing.assert_close(gate, torch.full_like(gate, 1.5), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_kept_projections_follow_their_sources(model, inputs):
    """In eval the projected prompt is kept, but never past a change of what it came from."""
    fa.attach(model, CONFIG)
    set_gates(model)
    [host] = next(iter(hosts(model).values()))
    attention, adapter = model.model.layers[1].self_attn, host.adapters["default"]
    before = output_of(model, inputs)
    [kept] = host._kept.values()
    assert same_bits(output_of(model, inputs), before) and [*host._kept.values()] == [kept]

    def changes():
        adapter.prompt.add_(0.1)
        yield "prompt in place"
        adapter.prompt.data = adapter.prompt.data + 0.1
        yield "prompt storage"
        adapter.gate.add_(0.1)
        yield "gate"
        attention.k_proj.weight.add_(0.01)
        yield "key projection"
        attention.v_proj = copy.deepcopy(attention.v_proj)
        attention.v_proj.weight.data *= 1.5
        yield "another value projection"

    for change in changes():
        after = output_of(model, inputs)
        assert not same_bits(after, before), change
        fresh = copy.deepcopy(model)
        assert same_bits(output_of(fresh, inputs), after), change
        before = after


def test_evaluation_between_training_steps(model, inputs):
    """A validation pass never takes the gradient from the prompt, nor does training read what it kept."""
    fa.attach(model, CONFIG)
    set_gates(model)
    optimizer = torch.optim.SGD([p for _, p in fa.trainable_parameters(model)], lr=0.1)
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            kept = output_of(model, inputs)
        with torch.inference_mode():
            assert same_bits(output_of(model, inputs), kept)
        optimizer.zero_grad()
        output = output_of(model, inputs)  # in eval mode, but with gradients
        assert same_bits(output.detach(), kept)
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in fa.trainable_parameters(model))
        optimizer.step()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "distilbert"])
def test_compiles_fullgraph(name):
    """One graph with the adapter in it, equal to eager, forward and gradients, also after the gate changes."""
    family = next(family for family in FAMILIES if family.name == name)
    model, inputs = build(family), family.inputs()
    fa.attach(model, CONFIG)
    set_gates(model)
    options = {"use_cache": False} if family.decoder else {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for gate in (0.5, 0.8):
        set_gates(model, gate)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = output_of(run, {**inputs, **options})
            output.square().sum().backward()
            results.append([output.detach(), *(p.grad.clone() for _, p in fa.trainable_parameters(model))])
        for plain, traced in zip(*results):
            torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attach_after_compile_is_seen(model, inputs):
    """A model that was compiled and run before still gets its adapter."""
    compiled = torch.compile(model, backend="eager")
    base = output_of(compiled, {**inputs, "use_cache": False})
    fa.attach(compiled, CONFIG)
    set_gates(model)
    adapted = output_of(compiled, {**inputs, "use_cache": False})
    assert not same_bits(adapted, base)
    torch.testing.assert_close(adapted, output_of(model, inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_autocast(model, inputs):
    """Under autocast the term follows the attention's dtype."""
    fa.attach(model, CONFIG)
    set_gates(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = output_of(model, inputs)
    torch.testing.assert_close(half.float(), output_of(model, inputs), rtol=0.1, atol=0.05)


def test_state_dict_holds_the_adapter(model):
    """As a child module it is part of the model for everything that walks modules."""
    fa.attach(model, CONFIG)
    keys = [key for key in model.state_dict() if "fa_prefix" in key]
    assert len(keys) == 4 and keys[0] == "model.layers.1.self_attn.fa_prefix.adapters.default.prompt"


@torch.no_grad()
def test_olmo2_whose_key_norm_spans_all_heads():
    """A layer whose keys no recipe covers is projected by its own forward."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Olmo2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = tf.Olmo2ForCausalLM(config).eval()
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3))
    [host] = hosts(model)["model.layers.0.self_attn"]
    assert not host.projection.by_modules
    attention, prompt = model.model.layers[0].self_attn, host.adapters["default"].prompt
    key, value = host._project("default", attention, torch.float32)
    expected = attention.k_norm(attention.k_proj(prompt)).view(3, 2, 8).transpose(0, 1)
    torch.testing.assert_close(key[0], expected)
    torch.testing.assert_close(value[0], attention.v_proj(prompt).view(3, 2, 8).transpose(0, 1))
    fa.verify(model)


def test_verify_catches_a_silent_no_op(model, monkeypatch):
    """An adapter whose term is dropped, and a cache that loses it, are named."""
    fa.attach(model, CONFIG)
    from fastadapter.integrations.passes.prefix import PrefixHost

    monkeypatch.setattr(PrefixHost, "attend", lambda self, base, *_: base())
    with pytest.raises(fa.VerificationError, match="it changes the output"):
        fa.verify(model)
    monkeypatch.undo()
    original = PrefixHost.attend

    def only_prefill(self, base, attention, query, *rest):
        return original(self, base, attention, query, *rest) if query.shape[2] > 1 else base()

    monkeypatch.setattr(PrefixHost, "attend", only_prefill)
    with pytest.raises(fa.VerificationError, match="cached generation"):
        fa.verify(model)


def test_verify_needs_an_active_adapter(model):
    with pytest.raises(ValueError, match="no adapter is active"):
        fa.verify(model)


@torch.no_grad()
def test_unsupported_attention_layout_is_an_error(model, inputs):
    """An attention function that returns another layout is refused, not misread."""
    from transformers import AttentionInterface

    def flat(module, query, *_, **__):
        return query.transpose(1, 2).flatten(2), None

    AttentionInterface.register("flat_attention", flat)
    fa.attach(model, CONFIG)
    set_gates(model)
    model.config._attn_implementation = "flat_attention"
    with pytest.raises(ValueError, match=r"flat_attention.*returned shape"):
        output_of(model, inputs)


@torch.no_grad()
def test_beam_search_and_batches(model):
    """Beams reorder the cache, and a prompt gives the same tokens alone and in a padded batch."""
    fa.attach(model, CONFIG)
    set_gates(model)
    long, short = token_ids(batch=1, length=7), token_ids(batch=1, length=4, seed=3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3}
    alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    together = model.generate(input_ids=batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 7:], alone[0, 4:])
