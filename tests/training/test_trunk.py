"""The trunk cache: a run that begins its passes behind the frozen blocks computes what a run of whole passes does.

And it says so, by name, where it cannot: a run goes on with whole passes then, unless it was asked for the cache.
"""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints.files import read_header, read_tensors
from fastadapter.training import TrainingInterrupted, TrunkCache, UserError, tasks
from fastadapter.training.trunk import worth
from fastadapter.training.trunk.start import StartPoint, starting_from
from tests.training.toy import STATE, adapter_bits, make_examples, make_texts
from tests.training.trunk_runs import CONFIGS, LAYERS, make, run

CASES = [
    *(
        (method, "llama")
        for method in (
            "llama-adapter",
            "prefix-tuning",
            "prefix-reparam",
            "bottleneck",
            "parallel",
            "last-layers",
            "last-blocks",
        )
    ),
    ("llama-adapter", "gpt2"),
    *((method, "llama-classes") for method in ("llama-adapter", "last-blocks")),
    *(
        (method, "bert")
        for method in ("llama-adapter", "prefix-tuning", "bottleneck", "last-layers", "last-blocks")
    ),
]
ABOVE = {"last-layers": 0, "last-blocks": 1, "parallel": 1}


def any_size_pays(monkeypatch):
    monkeypatch.setitem(worth._LEAST, "cpu", 0)
    monkeypatch.setattr(worth, "_LEAST_ELSEWHERE", 0)


@pytest.mark.parametrize("method, kind", CASES)
def test_losses_are_those_of_whole_passes(tmp_path, method, kind):
    """Other shapes of batches round otherwise; nothing else may differ."""
    options = {"max_steps": 100, "learning_rate": 0.003, "eval_strategy": "no", "held_out": 8}
    whole = run(tmp_path / "whole", False, method, kind, **options)
    begun = run(tmp_path / "begun", tmp_path / "cache", method, kind, **options)
    assert begun.trunk_cache["blocks"] == LAYERS - ABOVE.get(method, 2) and whole.trunk_cache is None
    np.testing.assert_allclose(begun.losses, whole.losses, rtol=1e-5)
    assert begun.losses[-1] != begun.losses[0]
    for key in ("loss_before", "loss_after"):
        assert begun.eval[key] == pytest.approx(whole.eval[key], rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-classes"])
def test_packed_rows_begin_behind_the_trunk_too(tmp_path, kind):
    options = {"max_steps": 10, "learning_rate": 0.003, "eval_strategy": "no", "held_out": 8}
    whole = run(tmp_path / "whole", False, kind=kind, **options)
    begun = run(tmp_path / "begun", tmp_path / "cache", kind=kind, packing=True, pack_length=40, **options)
    assert begun.trunk_cache["blocks"] == 2
    np.testing.assert_allclose(begun.losses, whole.losses, rtol=1e-5)


def test_completions_and_accumulation(tmp_path):
    """Free completions of several tokens, and micro-batches."""
    examples = make_examples(24, labelled=False)
    options = {"examples": examples, "held_out": 8, "gradient_accumulation_steps": 2}
    whole, begun = (run(tmp_path / str(cache), cache and tmp_path, **options) for cache in (False, "cache"))
    np.testing.assert_allclose(begun.losses, whole.losses, rtol=1e-5)
    assert begun.eval["loss_after"] == pytest.approx(whole.eval["loss_after"], rel=1e-5)


def test_numbers(tmp_path):
    """A regression, whose head has one output."""
    texts = make_texts(24)
    examples = [dataclasses.replace(each, label=str(len(each.prompt) / 50)) for each in texts]
    options = {"examples": examples, "held_out": 8, "task": "regression", "num_train_epochs": 1}
    whole, begun = (
        run(
            tmp_path / str(cache),
            cache and tmp_path,
            kind="llama-classes",
            model=fa.attach(make("llama-classes", num_labels=1), CONFIGS["llama-adapter"]),
            **options,
        )
        for cache in (False, "cache")
    )
    assert begun.trunk_cache["blocks"] == LAYERS - 2
    np.testing.assert_allclose(begun.losses, whole.losses, rtol=1e-5)
    assert begun.eval["loss_after"] == pytest.approx(whole.eval["loss_after"], rel=1e-5)


def test_the_cache_is_found_again_by_other_methods_and_seeds(tmp_path, capsys):
    first = run(tmp_path / "a", tmp_path / "cache", "llama-adapter", progress=True)
    assert "2 of 4 blocks" in (told := capsys.readouterr().err) and "computed once" in told
    again = run(tmp_path / "b", tmp_path / "cache", "llama-adapter")
    other = run(tmp_path / "c", tmp_path / "cache", "bottleneck", seed=1, progress=True)
    assert "all there" in capsys.readouterr().err
    assert first.trunk_cache["computed_tokens"] == first.trunk_cache["tokens"] > 0
    assert again.trunk_cache["computed_tokens"] == other.trunk_cache["computed_tokens"] == 0
    assert again.losses == first.losses and adapter_bits(tmp_path / "a") == adapter_bits(tmp_path / "b")


def test_a_head_drawn_anew_does_not_matter(tmp_path):
    """Every seed of a comparison has a head of its own over the same base, and its methods the same blocks."""

    def fresh(seed):
        model = make("bert", seed=seed)
        model.bert.load_state_dict(make("bert").bert.state_dict())
        return fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3, layers=1))

    for seed, method in enumerate(("adapter", "adapter", "last-blocks")):
        model = fresh(seed) if method == "adapter" else fa.detach(fresh(seed))
        done = run(tmp_path / str(seed), tmp_path / "cache", method, "bert", model=model, num_train_epochs=1)
        assert (done.trunk_cache["computed_tokens"] == 0) == (seed > 0)


REFUSED = [
    (
        "bert",
        fa.LlamaAdapterConfig(prefix_len=3, layers=2),
        0.1,
        r"draws random numbers.*hidden_dropout_prob 0.1",
    ),
    (
        "llama",
        fa.LlamaAdapterConfig(prefix_len=3, layers=2),
        0.1,
        r"draws random numbers.*attention_dropout 0.1",
    ),
    ("llama", fa.LlamaAdapterConfig(prefix_len=3), 0.0, "from the first block on"),
    ("llama", fa.LlamaAdapterV2Config(prefix_len=3, layers=2), 0.0, "from the first block on"),
    ("llama", fa.PrefixTuningConfig(prefix_len=3), 0.0, "from the first block on"),
    (
        "llama",
        fa.SoftPromptConfig(prompt_len=3),
        0.0,
        "not called once each.*soft prompt|from the first block on",
    ),  # on a GPU: with the text
    ("bert", fa.SoftPromptConfig(prompt_len=3), 0.0, "from the first block on"),
    ("llama", fa.BottleneckConfig(reduction_factor=4), 0.0, "from the first block on"),
]


@pytest.mark.parametrize("kind, config, dropout, why", REFUSED, ids=lambda value: type(value).__name__[:14])
def test_what_is_not_exact_is_refused_by_name(tmp_path, monkeypatch, capsys, kind, config, dropout, why):
    def fresh():
        return fa.attach(make(kind, dropout=dropout), config)

    options = {"num_train_epochs": 1, "held_out": 0, "max_steps": 2}
    with pytest.raises(UserError, match=f"trunk_cache: .*{why}"):
        run(tmp_path / "out", tmp_path / "cache", kind=kind, model=fresh(), **options)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out" / STATE).exists()
    any_size_pays(monkeypatch)
    cache = TrunkCache(tmp_path / "cache", required=False)
    capsys.readouterr()
    done = run(tmp_path / "out", cache, kind=kind, model=fresh(), progress=True, **options)
    assert done.trunk_cache is None and len(done.losses) == 2
    # where blocks are frozen and chance forbids it, a user may want to know
    assert ("trunk cache: none, it draws random" in capsys.readouterr().err) == bool(dropout)


def test_all_parameters_trained_is_refused(tmp_path):
    model = make()
    from fastadapter.training import TrainingConfig, finetune
    from tests.training.toy import make_tokenizer

    with pytest.raises(UserError, match="from the first block on"):
        finetune(
            model,
            make_tokenizer(),
            make_examples(8),
            config=TrainingConfig(max_steps=1),
            output_dir=tmp_path / "out",
            trainable=["*"],
            trunk_cache=True,
            progress=False,
        )


def test_blocks_that_hand_each_other_more_are_found_out(tmp_path, monkeypatch, capsys):
    """What the first block leaves for the last, as shared keys and values, is not in its hidden states."""
    any_size_pays(monkeypatch)

    def fresh():
        model = make()
        blocks, left = model.model.layers, {}
        blocks[0].register_forward_hook(lambda module, args, output: left.update(states=output))
        blocks[3].register_forward_pre_hook(lambda module, args: (args[0] + left["states"], *args[1:]))
        return fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3, layers=2))

    with pytest.raises(UserError, match="trunk_cache: a pass that begins behind it differs from a whole one"):
        run(tmp_path / "a", tmp_path / "cache", model=fresh())
    whole = run(tmp_path / "b", False, model=fresh())
    auto = TrunkCache(tmp_path / "cache", required=False)
    done = run(tmp_path / "c", auto, model=fresh(), progress=True)
    assert "trunk cache: none, a pass that begins behind it differs" in capsys.readouterr().err
    assert done.losses == whole.losses and not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:adapter 'default' acts in a training pass")
def test_a_frozen_part_of_the_adapter_is_no_trunk(tmp_path):
    model = fa.attach(make(), fa.LlamaAdapterConfig(prefix_len=3, layers=4))
    for name, parameter in fa.trainable_parameters(model):
        parameter.requires_grad_("layers.3" in name)
    with pytest.raises(UserError, match=r"adapter 'default' acts in model.layers.0.self_attn, frozen"):
        run(tmp_path / "a", tmp_path / "cache", model=model)


def test_a_run_too_small_goes_without_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTADAPTER_CACHE", str(tmp_path / "cache"))
    assert run(tmp_path / "a", None, progress=True).trunk_cache is None
    assert "trunk" not in capsys.readouterr().err and not (tmp_path / "cache").exists()
    any_size_pays(monkeypatch)
    done = run(tmp_path / "b", None)
    assert (tmp_path / "cache" / "trunks" / done.trunk_cache["trunk"]).is_dir()
    one = {"num_train_epochs": 1, "held_out": 0}
    assert run(tmp_path / "c", TrunkCache(tmp_path / "d", required=False), **one).trunk_cache is None
    many = TrunkCache(tmp_path / "d", required=False, runs=3)  # the first of three pays for all
    assert run(tmp_path / "e", many, **one).trunk_cache is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_have_the_dtype_of_the_base(tmp_path, dtype):
    model = fa.attach(make().to(dtype), fa.LlamaAdapterConfig(prefix_len=3, layers=2))
    result = run(tmp_path / "a", tmp_path / "cache", model=model, num_train_epochs=1)
    kinds = {read_header(shard)[0]["states"][0] for shard in (tmp_path / "cache").rglob("*.safetensors")}
    assert (
        kinds == {{torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]} and np.isfinite(result.losses).all()
    )


def test_bf16_states_are_asked_for_and_another_run(tmp_path):
    cache = TrunkCache(tmp_path / "cache", dtype="bf16")
    options = {"num_train_epochs": 1}
    rounded, exact = run(tmp_path / "a", cache, **options), run(tmp_path / "b", tmp_path / "cache", **options)
    assert 2 * rounded.trunk_cache["bytes"] == exact.trunk_cache["bytes"]
    assert rounded.losses != exact.losses
    np.testing.assert_allclose(rounded.losses, exact.losses, rtol=1e-2)
    with pytest.raises(UserError, match="trunk_cache was 'bf16', now None"):
        run(tmp_path / "a", tmp_path / "cache", resume=True, **options)


@pytest.mark.parametrize(
    "make_it, why",
    [
        (lambda: TrunkCache(dtype="fp8"), "trunk_cache dtype must be one of base, bf16, got 'fp8'"),
        (lambda: TrunkCache(max_bytes=0), "trunk_cache max_bytes must be an int, at least 1, got 0"),
        (lambda: TrunkCache(dtype="bf16", required=False), "so it must be required"),
        (lambda: TrunkCache(folder=3), "trunk_cache folder must be a path, got 3"),
        (lambda: run("never", 7), "trunk_cache must be True, False, None, a folder or a TrunkCache, got 7"),
    ],
)
def test_options_that_make_no_sense(make_it, why):
    with pytest.raises((UserError, TypeError), match=why):
        make_it()


def test_the_model_is_as_it_was(tmp_path):
    model = fa.attach(make(), fa.LlamaAdapterConfig(prefix_len=3, layers=2))
    run(tmp_path / "a", tmp_path / "cache", model=model, num_train_epochs=1)
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # what another library put there stays
    with pytest.raises(ZeroDivisionError), StartPoint(list(model.model.layers), 2, [None] * 4):
        assert model.model.layers[1].forward is not own
        raise ZeroDivisionError
    assert model.model.layers[1].__dict__["forward"] is own
    assert "forward" not in model.model.layers[0].__dict__


def test_states_that_no_pass_takes_or_that_do_not_fit_are_an_error():
    model, ids = make(), torch.tensor([[1, 2, 3]])
    whole = model(ids).logits
    with pytest.raises(RuntimeError, match="0 forward passes began"), starting_from(torch.zeros(1, 3, 32)):
        model(ids)
    with StartPoint(list(model.model.layers), 2, [None] * 4) as point:
        states = point.states(lambda: model.model(ids))
        with starting_from(states):
            assert torch.equal(model(ids).logits, whole)
        assert torch.equal(model(ids).logits, whole)
        with (
            pytest.raises(RuntimeError, match=r"shape \(1, 3, 32\), got \(1, 2, 32\)"),
            starting_from(states[:, :2]),
        ):
            model(ids)


def _stop_at(monkeypatch, call):
    plain, calls = tasks.supervised_loss, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    monkeypatch.setattr(tasks, "supervised_loss", stopping)


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, monkeypatch, lost):
    """Whether states were just computed or are read back; dropout above the trunk takes part."""

    def fresh():
        model = make()
        for block in model.model.layers[2:]:
            block.self_attn.attention_dropout = 0.2
        torch.manual_seed(1)
        return fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3, layers=2))

    whole = run(tmp_path / "a", tmp_path / "one", model=fresh())
    assert whole.trunk_cache["blocks"] == 2
    _stop_at(monkeypatch, 9)  # two of them prove the trunk
    with pytest.raises(TrainingInterrupted, match="after step 7"):
        run(tmp_path / "b", tmp_path / "two", model=fresh())
    monkeypatch.undo()
    for shard in list((tmp_path / "two").rglob("*.safetensors"))[: 1 if lost else 0]:
        shard.unlink()
    # not asked, it goes on as it began
    resumed = run(tmp_path / "b", TrunkCache(tmp_path / "two", required=False), model=fresh(), resume=True)
    assert (resumed.trunk_cache["computed_tokens"] > 0) == lost
    assert resumed.losses == whole.losses and adapter_bits(tmp_path / "a") == adapter_bits(tmp_path / "b")


def test_a_run_that_goes_on_otherwise_says_so(tmp_path, monkeypatch, capsys):
    _stop_at(monkeypatch, 6)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "a", tmp_path / "cache")
    monkeypatch.undo()
    done = run(tmp_path / "a", False, resume=True, progress=True)
    assert done.trunk_cache is None and "was begun with it and goes on without" in capsys.readouterr().err
    metadata = read_tensors(tmp_path / "a" / STATE)[1]
    assert '"trunk_cached": false' in metadata["progress"]


def test_a_signal_while_states_are_computed_keeps_what_is_done(tmp_path, monkeypatch):
    from fastadapter.training.trunk import store

    monkeypatch.setattr(store, "SHARD_SEQUENCES", 8)
    write, written = store.Store.write, []

    def signalling(self, shard, states):
        write(self, shard, states)
        written.append(shard)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(store.Store, "write", signalling)
    with pytest.raises(TrainingInterrupted, match="SIGINT while the trunk was cached") as stop:
        run(tmp_path / "a", tmp_path / "cache")
    assert stop.value.exit_code == 130 and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    done = run(tmp_path / "a", tmp_path / "cache", resume=True)
    assert 0 < done.trunk_cache["computed_tokens"] < done.trunk_cache["tokens"]
