"""Packing changes how rows lie in a forward pass and nothing else: losses and gradients are those of padded rows.

Equal but for rounding, which AdamW amplifies from step to step; so the learning rates of the long runs are moderate.
"""

import contextlib
import json

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fastadapter as fa
from fastadapter.integrations.parts.heads import Heads
from fastadapter.integrations.passes.packed import attending_packed
from fastadapter.training import (
    Encoded,
    TrainingConfig,
    TrainingInterrupted,
    UserError,
    collate,
    encode_examples,
    finetune,
    pack,
    packing,
    supervised_loss,
    tasks,
)
from fastadapter.training.batching import lay_out
from fastadapter.training.classification import class_logits, packed_class_logits
from fastadapter.training.packing import MOST_TOKENS, Layout
from fastadapter.training.run_record import read_run
from tests.training.toy import (
    WORDS,
    adapter_bits,
    history,
    make_classifier,
    make_examples,
    make_texts,
    make_tokenizer,
    run,
)

SIZES = {
    "vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
WITHOUT_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2_SIZES = {"vocab_size": 70, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **WITHOUT_DROPOUT}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, initializer_range=0.15)),
}
METHODS = {
    "llama-adapter": fa.LlamaAdapterConfig(prefix_len=3),
    "v2": fa.LlamaAdapterV2Config(prefix_len=3, layers=1),
    "prefix": fa.PrefixTuningConfig(prefix_len=3),
    "prefix-reparam": fa.PrefixTuningConfig(prefix_len=3, reparam_size=4),
    "soft-prompt": fa.SoftPromptConfig(prompt_len=3, init="random"),
    "houlsby": fa.BottleneckConfig(bottleneck_size=4),
    "parallel": fa.BottleneckConfig(placement="parallel", bottleneck_size=4),
    "parameters": None,
}
# A hundred steps on one family; what sets the families apart shows in the first.
STEPS = {"llama": 100, "qwen3": 6, "gpt2": 6}


def data(count=9):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        length = int(torch.randint(3, 14, (1,), generator=generator))
        ids = torch.randint(0, 70, (length,), generator=generator).tolist()
        examples.append(Encoded(tuple(ids), int(torch.randint(1, length, (1,), generator=generator))))
    return examples


def made(family, method):
    torch.manual_seed(0)
    model = MODELS[family]().train()
    if METHODS[method] is not None:
        torch.manual_seed(1)
        fa.attach(model, METHODS[method])
    return model


def trained(family, method, lay, steps):
    """Losses and norms of the gradients of some steps of three rows, and the first gradient."""
    model, examples = made(family, method), data()
    parameters = [each for each in model.parameters() if each.requires_grad]
    rate = 3e-4 if METHODS[method] is None else 2e-3  # so many parameters learn three rows by heart
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.02)
    losses, norms, first = [], [], None
    with attending_packed() if METHODS[method] is None else contextlib.nullcontext():
        for step in range(steps):
            batch = lay([examples[(3 * step + each) % 9] for each in range(3)])
            optimizer.zero_grad()
            loss = supervised_loss(model, batch) / batch.num_supervised
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            norms.append(float(torch.nn.utils.get_total_norm([each.grad for each in parameters])))
            if first is None:
                first = torch.cat([each.grad.flatten() for each in parameters])
    return losses, norms, first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_losses_and_gradients_of_many_steps(family, method):
    padded, padded_norms, expected = trained(
        family, method, lambda rows: collate(rows, causal=True), STEPS[family]
    )
    losses, norms, first = trained(family, method, pack, STEPS[family])
    assert losses == pytest.approx(padded, rel=1e-5, abs=0) and losses[-1] < losses[0]
    assert norms == pytest.approx(padded_norms, rel=1e-3, abs=0)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_pack_holds_what_padded_rows_hold():
    examples = data(4)
    packed, padded = pack(examples), collate(examples)
    assert packed.targets.tolist() == padded.targets.tolist() and packed.rows.tolist() == padded.rows.tolist()
    assert packed.input_ids.shape == (1, sum(len(each.input_ids) for each in examples))
    before = packed.input_ids.flatten()[packed.positions]
    assert before.tolist() == padded.input_ids.flatten()[padded.positions].tolist()
    assert packed.position_ids[0].tolist() == [at for each in examples for at in range(len(each.input_ids))]
    assert packed.cu_seqlens.dtype == torch.int32 and packed.attention_mask is None
    ids = [torch.tensor(each.input_ids)[:, None] for each in examples]
    for batch in (packed, padded):
        assert lay_out(batch.input_ids.shape, batch.places, ids)[..., 0].tolist() == batch.input_ids.tolist()
    given = packed.model_inputs()
    assert given["max_length_q"] == max(len(each.input_ids) for each in examples)
    assert given["cu_seq_lens_k"].tolist() == packed.cu_seqlens.tolist()
    assert set(padded.model_inputs()) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="examples must hold at least one, got none"):
        pack([])


def layout(lengths, **options):
    return Layout(
        lengths, [f"line {at}" for at in range(len(lengths))], TrainingConfig(packing=True, **options)
    )


def test_a_step_with_more_tokens_than_a_pack_takes_several_passes():
    found = layout([5, 3, 4, 8, 1], pack_length=8)
    assert found.passes([0, 1, 2, 3, 4]) == [[0, 1], [2], [3], [4]]
    assert found.passes([4, 2, 1, 0]) == [[4, 2, 1], [0]] and found.passes([]) == []
    assert layout([5, 3, 4, 2, 2, 1], pack_length=8).passes(range(6)) == [[0, 1], [2, 3, 4], [5]]
    assert found.utilisation([[0, 1], [], [3]]) == 1.0
    padded = Layout([5, 3, 4], [""] * 3, TrainingConfig())
    assert padded.passes([0, 1, 2]) == [[0, 1, 2]] and padded.utilisation([[0, 1], [2]]) == 12 / 14
    assert padded.line() is None
    assert layout([5]).pack_length == MOST_TOKENS and layout([9000, 5]).pack_length == 9000


def test_bad_settings_are_named():
    with pytest.raises(
        UserError, match="line 2: the record has 9 tokens, a pack at most 8; raise pack_length"
    ):
        layout([5, 3, 9], pack_length=8)
    with pytest.raises(UserError, match="pack_length goes with packing"):
        TrainingConfig(pack_length=8)
    with pytest.raises(TypeError, match="packing must be a bool, got 1"):
        TrainingConfig(packing=1)
    with pytest.raises(UserError, match="pack_length must be at least 2, got 1"):
        TrainingConfig(packing=True, pack_length=1)
    assert TrainingConfig.from_dict({"seed": 1}).packing is False


def test_a_record_longer_than_a_pack_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"toy line \d+: the record has 2\d tokens, a pack at most 20"):
        run(tmp_path / "out", labelled=False, packing=True, pack_length=20)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), labelled=False)


def test_a_run_has_the_losses_of_one_without(plain, tmp_path, capsys, monkeypatch):
    """Small packs: most shares of a step take two passes. What is computed and why is told."""
    passes, loss = [], tasks.supervised_loss
    monkeypatch.setattr(
        tasks, "supervised_loss", lambda model, batch: passes.append(batch.num_examples) or loss(model, batch)
    )
    packed = run(tmp_path / "out", labelled=False, packing=True, pack_length=28, progress=True)
    assert packed.losses == pytest.approx(plain.losses, rel=1e-5, abs=0)
    assert sum(passes) == 2 * 22 and len(passes) > 2 * 6 * 2
    told = capsys.readouterr().err
    assert "packing: up to 28 tokens in a forward pass, attention " in told and "utilisation 100.0%" in told
    record = read_run(tmp_path / "out")
    assert record["packing"] == {"packed": True, "pack_length": 28, "reason": None}
    assert record["training"]["packing"] is True and record["epochs"][1]["utilisation"] == 1.0
    assert "utilisation" not in plain.epochs[0]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    options = {"labelled": False, "packing": True, "pack_length": 28, "dropout": 0.2}
    whole = run(tmp_path / "whole", **options)
    calls, loss = [], tasks.supervised_loss

    def killed(model, batch):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return loss(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "supervised_loss", killed)
        with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
            run(tmp_path / "out", **options)
    resumed = run(tmp_path / "out", resume=True, **options)
    assert history(resumed) == history(whole)
    assert adapter_bits(tmp_path / "out") == adapter_bits(tmp_path / "whole")
    with pytest.raises(UserError, match="packing was True, now False"):
        run(tmp_path / "out", labelled=False, dropout=0.2, resume=True)


def test_a_model_with_a_state_from_token_to_token_gets_padded_rows(tmp_path, capsys):
    """Seen by a look, not by name: its convolutions reach into the neighbour."""
    results = []
    for packed in (False, True):
        torch.manual_seed(0)
        sizes = {**SIZES, "vocab_size": len(WORDS), "num_key_value_heads": 2}
        model = Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **sizes))
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3))
        config = TrainingConfig(batch_size=4, max_steps=3, packing=packed)
        folder = tmp_path / str(packed)
        results.append(
            finetune(
                model, make_tokenizer(), make_examples(12, labelled=False), None, config, output_dir=folder
            )
        )
    assert results[0].losses == results[1].losses
    told = capsys.readouterr().err
    why = "Lfm2ForCausalLM gives other logits in a packed row than for its texts alone"
    assert f"packing: batches are grouped by length instead: {why}" in told
    record = json.loads((tmp_path / "True" / "run.json").read_text())["packing"]
    assert record["packed"] is False and record["reason"].startswith(why)
    assert 0.5 < results[1].epochs[0]["utilisation"] < 1.0


def test_what_cannot_be_packed_is_named(tmp_path):
    """A prompt that the model runs with the text; a model without positions to give; one that has no mask."""

    def reason(model, examples):
        held = tasks.GenerationTask(model, make_tokenizer(), examples, None, TrainingConfig(packing=True))
        held.settle(model, torch.device("cpu"))
        return held.layout.reason

    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(WORDS), "num_key_value_heads": 2}
    examples = make_examples(5, labelled=False)
    joined = Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **sizes))
    fa.attach(joined, fa.SoftPromptConfig(prompt_len=3, init="random"))
    assert "a row of several packed texts has no place for a soft prompt" in reason(joined, examples)

    class WithoutPositions(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    bare = WithoutPositions(LlamaConfig(**sizes))
    assert reason(bare, examples) == "WithoutPositions takes no position_ids"
    assert reason(LlamaForCausalLM(LlamaConfig(**sizes)), examples[:1]) is None  # one row, next to itself
    half = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    assert reason(half, examples) is None


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_heads_that_read_the_last_token(task, kind, tmp_path, capsys):
    """In a decoder each text's own last token; an encoder is not given packed rows."""
    outputs = 2 if task == "classification" else 1
    losses = []
    texts = make_texts(14)
    if task == "regression":
        numbers = {"good": "1.5", "bad": "-0.5"}
        texts = [type(each)(each.prompt, "", numbers[each.label], each.source) for each in texts]
    for packed in (False, True):
        model = classifier(kind, outputs)
        torch.manual_seed(1)
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3))
        config = TrainingConfig(batch_size=4, max_steps=4, packing=packed, pack_length=48 if packed else None)
        found = finetune(
            model, make_tokenizer(), texts, None, config, output_dir=tmp_path / str(packed), task=task
        )
        losses.append(found.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=0)
    told = capsys.readouterr().err
    instead = "packing: batches are grouped by length instead: BertForSequenceClassification does not take a packed row"
    assert (instead in told) == (kind == "bert")
    assert ("packing: up to 48 tokens" in told) == (kind != "bert")


def classifier(kind, outputs):
    if kind != "gpt2":
        return make_classifier(kind, num_labels=outputs)
    torch.manual_seed(0)
    config = GPT2Config(**{**GPT2_SIZES, "vocab_size": len(WORDS)}, num_labels=outputs)
    return GPT2ForSequenceClassification(config)


def test_a_text_that_ends_in_padding_is_read_where_it_is_alone():
    """transformers takes the last token that is no padding, also where a text of its own ends in that token."""
    torch.manual_seed(0)
    model = make_classifier("llama")
    model.config.pad_token_id = 7
    texts = [(3, 4, 5), (6, 7), (8, 9, 7, 7)]
    with torch.no_grad(), attending_packed():
        packed = packed_class_logits(model, texts, 2, 7, torch.device("cpu"))
        alone = [class_logits(model, [each], 2, 7, torch.device("cpu"))[0] for each in texts]
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_head_that_is_not_called_on_all_tokens_is_named(monkeypatch):
    monkeypatch.setattr(packing, "find_heads", lambda model: Heads({}, []))
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match="the classification head was called 0 times on all tokens"),
    ):
        packing.packed_outputs(make_classifier("llama"), [(1, 2), (3,)], 0, torch.device("cpu"))


def test_examples_of_the_tokenizer_pack(tmp_path):
    """Conversations and completions alike: several spans that are trained on, and spans that are not."""
    examples = [Encoded((5, 6, 7, 8, 9), 1, ((2, 4),)), *encode_examples(make_tokenizer(), make_examples(2))]
    packed, padded = pack(examples), collate(examples)
    assert packed.targets.tolist()[:2] == [6, 9] and packed.targets.tolist() == padded.targets.tolist()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    losses = [supervised_loss(model, batch).item() for batch in (packed, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
