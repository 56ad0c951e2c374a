"""A packed row holds several sequences; each must be what it is alone, whatever is attached and whoever packed it."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorWithFlattening, Gemma3ForCausalLM, Gemma3TextConfig

import fastadapter as fa
from fastadapter.integrations.passes import packed, shared_softmax
from fastadapter.integrations.passes.attention import _hosts
from fastadapter.integrations.passes.packed import PACKED, attending_packed
from fastadapter.ops import base_attention
from fastadapter.ops.attention import Options
from fastadapter.ops.backends import triton_error
from fastadapter.training import DataCollatorWithPacking
from tests.support.budget import same_bits
from tests.support.gated_prefix import needs_extension
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, set_gates

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LENGTHS = (9, 1, 4, 7)  # the windows of mistral and gemma3 are 6
DECODERS = {family.name: family for family in FAMILIES if family.decoder}
# The three that differ in what matters here: rotary and learned positions, k-norm; and the two with windows.
SEVERAL = ("llama", "gpt2", "qwen3")
METHODS = ("llama-adapter", "v2-output", "prefix", "soft-prompt", "houlsby")
CASES = [(family, method) for family in SEVERAL for method in METHODS]
CASES += [(family, method) for family in ("mistral", "gemma3") for method in ("llama-adapter", "prefix")]
CASES += [(family, "prefix") for family in DECODERS if family not in (*SEVERAL, "mistral", "gemma3")]


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (1, length), generator=generator) for length in LENGTHS]


def features():
    return [{"input_ids": each[0].tolist()} for each in sequences()]


def adapted(family, method=None, attention="sdpa"):
    model = build(DECODERS[family])
    model.set_attn_implementation(attention)
    if method is not None:
        fa.attach(model, CONFIGS[method])
        set_gates(model)
        train_a_little(model)
    return model


def alone(model):
    return torch.cat([model(each, use_cache=False).logits for each in sequences()], dim=1)


def row(collator):
    batch = dict(collator(features()))
    batch.pop("labels")
    return {**batch, "use_cache": False}


@pytest.fixture
def ran(monkeypatch):
    """How often attention ran over each sequence by itself."""
    calls, op = [], packed.prefix_attention

    def counted(*args, **options):
        if options.get("cu_seqlens") is not None:
            calls.append(options["window"])
        return op(*args, **options)

    monkeypatch.setattr(packed, "prefix_attention", counted)
    monkeypatch.setattr(shared_softmax, "prefix_attention", counted)
    return calls


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize(("family", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_a_sequence_is_what_it_is_alone(family, method, ran):
    """From our collator, by sequence in every layer; from transformers', under the model's mask."""
    model = adapted(family, method)
    expected = alone(model)
    found = model(**row(DataCollatorWithPacking())).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(ran) == model.config.num_hidden_layers
    ran.clear()
    found = model(**row(DataCollatorWithFlattening())).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not ran


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_eager_attention_runs_under_its_mask(method, ran):
    model = adapted("llama", method, "eager")
    found = model(**row(DataCollatorWithPacking())).logits
    torch.testing.assert_close(found, alone(model), rtol=1e-5, atol=1e-6)
    assert not ran


@needs_extension
@pytest.mark.parametrize("method", ["llama-adapter", "prefix", "soft-prompt", None])
def test_gradients_are_those_of_sequences_alone(method):
    """Under activation checkpointing too, which runs the layers again with the arguments they had."""
    model = adapted("llama", method).train()
    grads = []
    for checkpointing in (False, True, None):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with attending_packed():
            logits = alone(model) if checkpointing is None else model(**row(DataCollatorWithPacking())).logits
        logits.square().sum().backward()
        grads.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert len(grads[0]) >= (1 if method else 20)
    for found in grads[:2]:
        assert found.keys() == grads[2].keys()
        for name, expected in grads[2].items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@needs_extension
@torch.no_grad()
def test_a_model_without_an_adapter_takes_part_while_asked(ran):
    model = adapted("qwen3")
    with attending_packed():
        assert any(isinstance(host, packed._AsLongAsPacking) for host in _hosts)
        found = model(**row(DataCollatorWithPacking())).logits
    assert len(ran) == 3
    assert not any(isinstance(host, packed._AsLongAsPacking) for host in _hosts)
    torch.testing.assert_close(found, alone(model), rtol=1e-5, atol=1e-6)


@needs_extension
@torch.no_grad()
def test_every_layer_has_its_own_window(ran):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2
    )
    model = fa.attach(Gemma3ForCausalLM(config).eval(), CONFIGS["prefix"])
    torch.testing.assert_close(
        model(**row(DataCollatorWithPacking())).logits, alone(model), rtol=1e-5, atol=1e-6
    )
    assert ran == [6, None] * 2


@needs_extension
@torch.no_grad()
def test_a_mask_that_says_otherwise_decides(ran):
    """Offsets that are not those of the positions; and a window that the model's attention was not told of."""
    model = adapted("llama", "prefix")
    inputs = row(DataCollatorWithPacking())
    inputs[PACKED] = torch.tensor([0, 10, 21], dtype=torch.int32)
    torch.testing.assert_close(model(**inputs).logits, alone(model), rtol=1e-5, atol=1e-6)
    assert not ran
    windowed = adapted("gemma3", "prefix")
    expected = alone(windowed)
    for layer in windowed.model.layers:
        layer.self_attn.sliding_window = None
    torch.testing.assert_close(
        windowed(**row(DataCollatorWithPacking())).logits, expected, rtol=1e-5, atol=1e-6
    )
    assert not ran


@needs_extension
@pytest.mark.parametrize("option", ["attention_dropout", "output_attentions"])
def test_what_the_op_cannot_do_stays_under_the_mask(option, ran):
    model = adapted("llama", "llama-adapter")
    inputs = row(DataCollatorWithPacking())
    if option == "attention_dropout":
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    else:
        inputs[option] = True
    model(**inputs)
    assert not ran


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "more",
    [
        {"use_cache": True},
        {"attention_mask": torch.ones(1, 1, 21, 21, dtype=torch.bool).tril()},
        {PACKED: torch.tensor([0, 5, 21], dtype=torch.int32)},
        {PACKED: torch.tensor([0, 9, 20], dtype=torch.int32)},
    ],
    ids=["cache", "mask", "other-offsets", "too-few"],
)
def test_sequences_that_would_see_each_other_are_refused(more, attention):
    """With a cache a model does not look for packed rows, and a mask of the caller's it takes as it is."""
    model = adapted("llama", "llama-adapter", attention)
    with pytest.raises(
        ValueError, match=r"fa_cu_seqlens: LlamaAttention was given \d sequences in one row, and no mask"
    ):
        model(**row(DataCollatorWithPacking()) | more)


@torch.no_grad()
def test_one_sequence_needs_no_mask():
    model = adapted("llama", "llama-adapter")
    one = DataCollatorWithPacking()(features()[:1]) | {"use_cache": True}
    assert same_bits(model(**one).logits, model(sequences()[0]).logits)


@torch.no_grad()
def test_a_closed_gate_keeps_the_bits_under_the_names_of_transformers():
    plain = build(DECODERS["llama"])
    model = fa.attach(build(DECODERS["llama"]), CONFIGS["llama-adapter"])
    inputs = row(DataCollatorWithPacking())
    del inputs[PACKED]
    assert same_bits(model(**inputs).logits, plain(**inputs).logits)


@needs_extension
@torch.no_grad()
def test_autocast_and_half_precision_come_close():
    model = adapted("llama", "prefix")
    expected = alone(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**row(DataCollatorWithPacking())).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
    half = adapted("llama", "llama-adapter").bfloat16()
    found, expected = half(**row(DataCollatorWithPacking())).logits, alone(half)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


def test_the_explanation_names_the_way():
    def ways(model):
        return {line["packed_rows"] for line in fa.explain(model).rows}

    by_op = packed.reason_for_mask(torch.device("cpu"), torch.float32, 8) is None
    assert ways(adapted("llama", "prefix")) == {"by sequence (cpp)" if by_op else "under a mask of the row"}
    assert ways(adapted("llama", "prefix", "eager")) == {"under a mask of the row"}
    assert ways(adapted("llama", "houlsby")) == {""}
    assert "refused" in ways(adapted("mistral", "soft-prompt"))


def test_a_gpu_takes_flash_attention_by_sequence_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(base_attention, "_capability", lambda device: 9)
    gpu = torch.device("cuda")

    def way(dtype, **config):
        named = SimpleNamespace(
            **{"_attn_implementation": "sdpa", "hidden_size": 64, "num_attention_heads": 4, **config}
        )
        return packed.packed_path(named, gpu, dtype)

    by_flash, by_mask = "by sequence (flash)", "under a mask of the row"
    if triton_error("cuda") is None:
        assert way(torch.bfloat16) == way(torch.float16, head_dim=128) == by_flash
    assert way(torch.float32) == way(torch.bfloat16, hidden_size=4 * 12) == by_mask
    assert way(torch.float32, _attn_implementation="flash_attention_2") == by_flash
    monkeypatch.setattr(base_attention, "_capability", lambda device: 7)
    assert way(torch.bfloat16) == by_mask


@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_flash_attention_is_given_the_offsets(window, monkeypatch):
    """It was given them as something else, and a row's sequences saw each other; the reference stands in for it."""
    monkeypatch.setattr(base_attention, "_flash_forward", base_attention._reference_forward)
    query = torch.randn(1, 4, 21, 8)
    key, value = torch.randn(2, 1, 2, 21, 8)
    ends = torch.tensor([0, 9, 10, 14, 21], dtype=torch.int32)
    found = base_attention.packed_attention(query, key, value, ends, window, None)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        length = end - start
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
        parts = (x[:, :, start:end] for x in (query, key, value))
        alone = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True)
        torch.testing.assert_close(found[:, :, start:end], alone)


def test_flash_attention_is_launched_for_the_longest_sequence_that_is_known():
    """Of offsets on a GPU the host knows nothing; what it was told holds until they are written to."""
    query = torch.zeros(1, 2, 21, 8)
    ends = torch.tensor([0, 9, 10, 14, 21], dtype=torch.int32)
    options = Options(None, ends, None, 0.5, is_causal=True, window=0, softcap=0.0)

    def lengths():
        return base_attention._flash_call(query, query, options)[0][2:]

    assert lengths() == (21, 21)
    base_attention.note_longest(ends, 9)
    assert lengths() == (9, 9)
    ends[1] = 1
    assert lengths() == (21, 21)
