"""Predictions: what bounds them, how they move with options, and what is refused."""

import dataclasses

import pytest

import fastadapter as fa
from fastadapter.planning import factors
from fastadapter.planning.cost import Job, exchange_seconds, step_parts
from fastadapter.planning.factors import Range
from fastadapter.planning.hardware import GPUS, Device, epyc
from fastadapter.planning.lengths import Batching, drawn_lengths, named_lengths, one_pass
from fastadapter.planning.memory import step_memory
from fastadapter.planning.predict import baseline, predict, require_fits
from fastadapter.planning.shapes import MODELS, ModelShape, changed, resolve_shape
from fastadapter.training import UserError

LENGTHS = drawn_lengths(130, 70, 2000, 0.5).cut(512)
ADAPTER = fa.LlamaAdapterConfig(layers=30)
LLAMA = Job(MODELS["llama-7b"], ADAPTER)


def plan(job=LLAMA, device=GPUS["h100"], epochs=2, lengths=LENGTHS, **batching):
    return predict("fastadapter", job, lengths, Batching(**{"batch_size": 32, **batching}), device, epochs)


def test_parameters_of_known_models():
    """As their cards say: 6.74, 8.03 and 0.1345 billion, and 22.7 million with positions and pooler."""
    assert MODELS["llama-7b"].parameters == pytest.approx(6.74e9, rel=0.001)
    assert MODELS["llama-3-8b"].parameters == pytest.approx(8.03e9, rel=0.001)
    assert MODELS["smollm2"].parameters == pytest.approx(134.5e6, rel=0.001)
    assert MODELS["minilm"].parameters == pytest.approx(22.7e6, rel=0.03)


def test_the_papers_trained_numbers():
    """LLaMA-Adapter trains 1.2 million parameters (arXiv:2303.16199)."""
    assert LLAMA.trained_parameters() == pytest.approx(1.2e6, rel=0.03)


def test_the_facts_floor_of_a_frozen_step():
    """Forward and input gradient of llama-7b, 4 x 2048 tokens, every product at 790 TFLOP/s: 294 ms by hand."""
    job = Job(MODELS["llama-7b"], fa.LlamaAdapterConfig(), "frozen", all_logits=True)
    parts = step_parts(job, one_pass(4, 2048))
    assert sum(part.flops for part in parts) / 790e12 == pytest.approx(0.294, rel=0.02)


def test_packing_and_the_trunk_cache_never_cost():
    job = Job(MODELS["smollm2"], fa.LlamaAdapterConfig(layers=10), dtype="fp32")
    reviews = named_lengths("reviews", True, 800)
    cached = dataclasses.replace(job, trunk_cache=True)
    ways = [
        plan(each, epyc(2), 3, reviews, batch_size=16, layout=layout)
        for each in (job, cached)
        for layout in ("random", "grouped", "packed")
    ]
    epochs = [way.epoch_seconds.mid for way in ways]
    assert epochs == sorted(epochs, reverse=True)
    assert ways[3].cache_bytes == sum(reviews.totals) * 576 * 4 and ways[0].cache_bytes == 0
    assert ways[4].total_seconds.mid == pytest.approx(3 * epochs[4] + ways[4].cache_seconds.mid)


def test_small_passes_wait_for_python_and_large_ones_do_not():
    few, many = plan(num_gpus=8), plan(batch_size=512, num_gpus=8)
    assert few.waiting == 1 and many.waiting < 0.1
    assert few.step_seconds.mid >= factors.host_milliseconds(LLAMA)[0].mid / 1e3


def test_more_cards_are_faster_but_not_more_than_their_number():
    one, eight = plan(batch_size=256, gradient_accumulation_steps=8), plan(batch_size=256, num_gpus=8)
    assert 1 < one.total_seconds.mid / eight.total_seconds.mid <= 8.01
    assert exchange_seconds(LLAMA, GPUS["h100"], 1) == 0 < exchange_seconds(LLAMA, GPUS["h100"], 8) < 1e-3


def test_checkpointing_trades_memory_for_time():
    kept = plan(batch_size=128, gradient_accumulation_steps=4)
    again = plan(
        dataclasses.replace(LLAMA, gradient_checkpointing=True), batch_size=128, gradient_accumulation_steps=4
    )
    assert again.memory_gib.mid < 0.5 * kept.memory_gib.mid
    assert 1.2 < again.step_seconds.mid / kept.step_seconds.mid < 1.6


def test_logits_exist_in_pieces_unless_all_are_asked_for():
    load = one_pass(64, 512)
    everything = dataclasses.replace(LLAMA, all_logits=True)
    assert step_memory(everything, load).logits == 12 * 64 * 512 * 32000
    assert step_memory(LLAMA, load).logits == 3 * 2**26  # of 64 MiB in fp32
    few = one_pass(64, 512, learned=100)
    assert step_memory(LLAMA, few).logits == 12 * 100 * 32000

    def products(job, of):
        return next(part.flops for part in step_parts(job, of) if part.name == "head")

    assert products(LLAMA, load) == 1.5 * products(everything, load)
    assert products(LLAMA, few) == 4 * 100 * 32000 * 4096


def test_a_card_without_rows_has_a_wider_range():
    """Of the same assumption, on a card that was measured and on one that was not."""
    measured, other = (
        plan(batch_size=512, gradient_accumulation_steps=16, device=GPUS[x]) for x in ("h200", "h100")
    )
    spread = [run.step_seconds.high / run.step_seconds.low for run in (measured, other)]
    assert spread[1] > 1.2 * spread[0]
    assert any("no row of this one" in text for text in other.assumptions)


def test_ranges_are_ordered():
    for field in dataclasses.fields(run := plan(num_gpus=2)):
        if isinstance(value := getattr(run, field.name), Range):
            assert 0 <= value.low <= value.mid <= value.high, field.name


def test_the_comparison_pads_and_makes_all_logits():
    theirs = baseline(LLAMA, LENGTHS, Batching(32), GPUS["h200"], 1, "random")
    ours = plan(device=GPUS["h200"], epochs=1)
    assert theirs.job.all_logits and theirs.load.useful < 0.6 < ours.load.useful
    assert theirs.total_seconds.mid > 1.5 * ours.total_seconds.mid
    second = Job(MODELS["llama-7b"], fa.LlamaAdapterV2Config())
    assert baseline(second, LENGTHS, Batching(32), GPUS["h200"], 1, "random") is None


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    run = plan(batch_size=128)
    with pytest.raises(UserError) as refused:
        require_fits(run, LENGTHS, 2)
    said = str(refused.value)
    excess = run.memory_gib.mid - GPUS["h100"].memory_gib
    assert f"{excess:.1f} GiB too much (12.6 GiB of it weights" in said
    assert "--gradient-accumulation-steps" in said and "--gradient-checkpointing" in said
    require_fits(plan(batch_size=128, gradient_accumulation_steps=32), LENGTHS, 2)


def test_what_fits_on_no_card_says_so():
    few = drawn_lengths(10, 1, 64, 0.5)
    run = plan(Job(MODELS["llama-65b"], ADAPTER, dtype="fp32"), GPUS["h200"], lengths=few)
    with pytest.raises(UserError, match=r"GiB too much .*--dtype bf16 \("):
        require_fits(run, few, 2)
    small = plan(Job(MODELS["llama-65b"], ADAPTER, dtype="fp32"), GPUS["h100"], lengths=few)
    with pytest.raises(UserError, match="What would help: a smaller model; models split over cards"):
        require_fits(small, few, 2)


def test_sizes_in_place_of_the_tables():
    half = changed(MODELS["llama-7b"], hidden_size=2048, vocab_size=None)
    assert (half.head_dim, half.num_hidden_layers, half.vocab_size) == (64, 32, 32000)
    assert changed(MODELS["llama-7b"]) is MODELS["llama-7b"]


def test_a_folders_configuration(tmp_path):
    from transformers import BertConfig, LlamaConfig, MambaConfig

    LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32).save_pretrained(
        tmp_path
    )
    shape = resolve_shape(str(tmp_path))
    assert (shape.hidden_size, shape.query_size, shape.kv_size, shape.gated, shape.causal) == (
        64,
        128,
        64,
        True,
        True,
    )
    BertConfig(hidden_size=48, num_attention_heads=4).save_pretrained(tmp_path)
    shape = resolve_shape(str(tmp_path))
    assert (shape.hidden_size, shape.head_dim, shape.gated, shape.causal) == (48, 12, False, False)
    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mamba has blocks that are not modelled"):
        resolve_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: resolve_shape("llama-8b"), "--model 'llama-8b' is unknown: there is minilm"),
        (lambda: ModelShape("odd", 64, 1, 3, 2, 64, 64), "num_attention_heads 3 must be a multiple"),
        (
            lambda: ModelShape("none", 64, 0, 2, 2, 64, 64),
            "none: num_hidden_layers must be an int of at least 1",
        ),
        (
            lambda: Job(MODELS["llama-7b"], fa.LlamaAdapterConfig(layers=33)),
            "--layers must be at most the 32",
        ),
        (lambda: dataclasses.replace(LLAMA, dtype="int8"), "--dtype must be one of fp32, bf16, fp16"),
        (
            lambda: Job(MODELS["llama-7b"], fa.SoftPromptConfig(), trunk_cache=True),
            "--trunk-cache: soft-prompt trains down to the first block",
        ),
        (
            lambda: Job(MODELS["llama-7b"], fa.LlamaAdapterConfig(), trunk_cache=True),
            "adapt fewer with --layers",
        ),
        (lambda: plan(epochs=0), "--num-train-epochs must be an int of at least 1, got 0"),
        (lambda: plan(device=epyc(2)), "--dtype bf16: of AMD EPYC, 2 threads only fp32 is known"),
        (
            lambda: plan(dataclasses.replace(LLAMA, dtype="fp32"), epyc(2), num_gpus=2),
            "--num-gpus 2: AMD EPYC, 2 threads is no GPU",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_every_device_says_where_its_numbers_are_from():
    for device in (*GPUS.values(), epyc(1)):
        assert isinstance(device, Device) and device.source and min(device.tflops.values()) > 0
