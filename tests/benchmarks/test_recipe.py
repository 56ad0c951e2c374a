"""The recipe: parties in processes that take turns, what they say of themselves, and that each does the same work."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import recipe, recipe_data, recipe_worker, runner
from benchmarks.peers import common, protocol
from benchmarks.recipe import OURS, PEFT, Party, Recipe, Sizes, Told
from tests.benchmarks.test_runner import ENVIRONMENT

pytest.importorskip("accelerate")
QUICK = runner.Settings(quick=True, environment=ENVIRONMENT)
# A party without PyTorch. It notes when it ran, so that a test can see that two of them never did at once.
FAKE = """
import sys, time
sys.path.insert(0, {peers!r})
import protocol
job = protocol.read_job(sys.argv[1])
pacer = protocol.Pacer(job, (lambda: 0.75) if job["held_out"] else None)
print("a library that prints to stdout")
pacer.ready({loss}, 12, "1.0")
pacer.first_step()
for step in range(pacer.total):
    with open({log!r}, "a") as file:
        file.write(f"{name} {{step}}\\n")
    {body}
    pacer.step(10, 0.5)
pacer.finish()
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """``make(name, loss, body)``: a party of the recipe that is a file of six lines."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(recipe, "command", lambda party: [sys.executable, str(tmp_path / party.runner)])

    def make(name, loss=1.0, body="pass"):
        values = {"peers": str(recipe.PEERS), "log": str(log), "name": name, "loss": loss, "body": body}
        (tmp_path / f"{name}.py").write_text(FAKE.format(**values))
        return Party(name, f"{name}.py")

    return SimpleNamespace(make=make, log=log)


def job(**changes):
    rows = [{"input_ids": [1, 2, 3], "prompt_len": 2}] * 5
    settings = {"batch_size": 2, "num_train_epochs": 2, "turn_steps": 2, "measure_memory": False}
    return {"train": rows, "held_out": [], **settings, **changes}


def test_parties_take_turns_and_only_one_runs(fakes, tmp_path):
    """Two steps a turn, the last of an epoch shorter; a turn of each before the next of any."""
    parties = [fakes.make("a"), fakes.make("b")]
    told = recipe.side_by_side(Recipe("x", "x", tuple(parties)), parties, job(), tmp_path)
    for each in told.values():
        assert [(turn["epoch"], turn["steps"], turn["tokens"]) for turn in each.turns] == [
            (1, 2, 20), (1, 1, 10), (2, 2, 20), (2, 1, 10)
        ]  # fmt: skip
    lines = fakes.log.read_text().split("\n")[:-1]
    turns = [[0, 1], [2], [3, 4], [5]]
    for turn in turns:
        part, lines = lines[: 2 * len(turn)], lines[2 * len(turn) :]
        halves = [part[: len(turn)], part[len(turn) :]]
        assert sorted(halves) == [[f"{name} {step}" for step in turn] for name in "ab"]


def test_accuracy_is_asked_for_at_the_end_of_each_epoch_outside_the_time(fakes, tmp_path):
    party = fakes.make("a", body="time.sleep(0.01)")
    other = fakes.make("b")
    told = recipe.side_by_side(Recipe("x", "x", (party, other)), [party, other], job(held_out=[1]), tmp_path)
    assert told["a"].accuracies == {1: 0.75, 2: 0.75}
    assert told["a"].seconds(1) >= 0.03


def test_other_work_is_refused(fakes, tmp_path):
    parties = [fakes.make("a", 1.0), fakes.make("b", 1.01)]
    with pytest.raises(
        RuntimeError, match=r"not the same work; losses before training: {'a': 1.0, 'b': 1.01}"
    ):
        recipe.side_by_side(Recipe("x", "x", tuple(parties)), parties, job(), tmp_path)


def test_a_party_that_fails_is_named_with_its_last_words(fakes, tmp_path):
    parties = [fakes.make("a"), fakes.make("b", body="raise ValueError('no memory')")]
    with pytest.raises(RuntimeError, match=r"b ended with status 1:\n(.|\n)*no memory"):
        recipe.side_by_side(Recipe("x", "x", tuple(parties)), parties, job(), tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux resets a process's peak")
def test_peak_memory_is_that_of_training(fakes, tmp_path):
    """What was there before the first turn is resident, what training takes on top is the peak."""
    party = fakes.make("a", body="block = bytearray(40 * 2**20); block = None")
    told = recipe.one_after_another([party], job(measure_memory=True), tmp_path)["a"]
    assert 35 < told.memory["peak_mib"] - told.memory["resident_mib"] < 60


def test_preparations_belong_to_the_first_epoch():
    """Spread over its tokens in the rates, and part of the seconds until an accuracy."""
    turns = [
        {"epoch": 1, "tokens": 10, "seconds": 1.0, "setup": 3.0},
        {"epoch": 1, "tokens": 20, "seconds": 4.0, "setup": 0.0},
        {"epoch": 2, "tokens": 10, "seconds": 2.0, "setup": 0.0},
    ]
    told = Told(turns=turns)
    assert told.seconds_per_token(1) == pytest.approx([0.1 + 0.1, 0.2 + 0.1])
    assert told.seconds_per_token(2) == pytest.approx([0.2])
    assert (told.seconds(1), told.seconds(2)) == (8.0, 10.0)
    assert (told.tokens_per_second(1), told.tokens_per_second(2)) == pytest.approx((30 / 8, 5.0))


def test_who_reaches_the_floor_s_last_accuracy_first(capsys):
    def of(seconds, *accuracies):
        turns = [{"epoch": at, "seconds": seconds, "setup": 0.0} for at in (1, 2)]
        return Told(turns=turns, accuracies=dict(enumerate(accuracies, 1)))

    told = {"PEFT": of(6.0, 0.7, 0.8), "ours": of(2.0, 0.8, 0.79), "late": of(1.0, 0.5, 0.6)}
    samples, extra = recipe.reached(Recipe("x", "x", (PEFT,)), told, 2)
    assert samples == {"PEFT": [12.0], "ours": [2.0]}
    assert extra["ours"] == {"epoch": 1.0, "accuracy": 0.8}
    assert "late never reached 80.0%" in capsys.readouterr().err


def test_a_rate_of_turns_becomes_rows():
    samples = {"PEFT": [0.02, 0.04], "fastadapter": [0.01, 0.02]}
    floor, ours = recipe.rows_of("recipe-x", recipe.RECIPES[0], "epoch 1", "tokens/s", samples, QUICK, {})
    assert (floor.unit, ours.ratio, ours.median) == ("tokens/s", 0.5, 75.0)
    assert (floor.variant, ours.backend) == ("PEFT", "cpp")


def test_what_cannot_take_part_is_left_out_and_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    unknown = Party("fastadapter, of the future", options=("foresight",))
    chosen = Recipe("x", "title", (PEFT, OURS, unknown, recipe.LITGPT))
    assert recipe.present(chosen) == [PEFT, OURS]
    said = capsys.readouterr().err
    assert "of the future is left out: this version has no foresight" in said
    assert "litgpt 0.5.13 is left out: it has no environment: python scripts/peer_environments.py" in said
    assert list(recipe.tokens_per_second(Recipe("x", "title", (recipe.ADAPTERS, OURS)), QUICK)) == []
    assert "nobody to compare with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"records": 0}, {"epochs": 0}, {"turns": 0}, {"held_out": -1}, {"records": 1.5}]
)
def test_sizes_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be an int, at least"):
        Sizes(**wrong)


def test_sizes_are_asked_for_where_they_mean_something():
    """Held-out reviews only where somebody is judged by them."""
    asked = runner.Settings(options={"records": 50, "held_out": 20, "epochs": 1})
    assert recipe._sizes(asked) == Sizes(50, 0, 1, 4)
    assert recipe._sizes(asked, records=800, held_out=400, epochs=3) == Sizes(50, 20, 1, 4)
    assert recipe._sizes(QUICK, held_out=400) == Sizes(8, 4, 2, 1)


class Notes:
    """A pacer that notes instead of waiting."""

    def __init__(self, job, judge=None):
        self.job, self.judge, self.said, self.steps = job, judge, {}, []
        Notes.last = self

    def ready(self, loss, trainable_parameters, version):
        self.said = {"loss": loss, "trainable": trainable_parameters}

    def first_step(self, seconds=None):
        self.said["first"] = seconds

    def step(self, tokens, loss):
        self.steps.append((tokens, loss))

    def finish(self):
        self.said["accuracy"] = self.judge()


def run_party(main, module, path, monkeypatch):
    monkeypatch.setattr(module, "Pacer", Notes)
    monkeypatch.setattr(sys, "argv", ["party", str(path)])
    main()
    return Notes.last


@pytest.fixture
def job_file(tmp_path, default_threads):
    torch.set_num_threads(1)
    sizes = Sizes(records=20, held_out=6, epochs=2, turns=1)
    made = recipe_data.make_job(recipe.RECIPES[1], sizes, QUICK, tmp_path, measure_memory=False)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**made, "options": [], "threads": 1}))
    return path, made


def test_ours_and_peft_do_the_same_work(job_file, monkeypatch):
    """The loss before training, the tokens of an epoch, the number of steps; both learn and are judged alike."""
    path, made = job_file
    ours = run_party(recipe_worker.main, protocol, path, monkeypatch)
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(recipe.PEERS))
    import protocol as peers_protocol
    import train_peft

    theirs = run_party(train_peft.main, peers_protocol, path, monkeypatch)
    assert ours.said["loss"] == pytest.approx(theirs.said["loss"], rel=1e-5)
    total = sum(len(row["input_ids"]) for row in made["train"])
    for party in (ours, theirs):
        assert len(party.steps) == 4 and sum(tokens for tokens, _ in party.steps[:2]) == total
        assert 0 <= party.said["accuracy"] <= 1
    assert ours.said["first"] > 0 and theirs.said["first"] is None
    # a gate for each head where PEFT has one for the layer
    assert ours.said["trainable"] - theirs.said["trainable"] == 9 - 1


def test_our_tokens_are_counted_in_the_order_of_the_steps(job_file):
    _, made = job_file
    found = list(recipe_worker.tokens_of_steps(made))
    total = sum(len(row["input_ids"]) for row in made["train"])
    assert len(found) == 4 and sum(found[:2]) == sum(found[2:]) == total


def test_the_judge_looks_at_the_last_token_of_the_prompt():
    """Right where the label's first token is likelier than the other's, whatever stands behind in padding."""
    made = {
        "labels": [[7], [8]],
        "held_out": [{"prompt_ids": [1, 2, 3], "label": 0}, {"prompt_ids": [1], "label": 1}],
    }

    def logits_of(ids):
        logits = torch.zeros(*ids.shape, 10)
        for row, tokens in enumerate(ids.tolist()):
            logits[row, :, 7 if tokens[1] else 8] = 1.0
            logits[row, :, 9] = 5.0  # no label
        return logits

    assert common.accuracy(made, torch.nn.Identity(), logits_of) == 1.0


def test_batches_are_random_and_padded_to_the_longest():
    rows = [{"input_ids": list(range(length)), "prompt_len": length - 1} for length in (2, 5, 3)]
    made = {"train": rows, "seed": 0, "num_train_epochs": 2, "batch_size": 2}
    found = list(common.random_batches(made))
    assert [len(batch) for batch in found] == [2, 1, 2, 1]
    features = common.features(rows)
    assert features[1]["labels"] == [-100] * 4 + [4]
    assert common.padded([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]


def test_every_peer_is_pinned_and_has_a_file():
    sys.path.insert(0, str(recipe.ROOT / "scripts"))
    try:
        import peer_environments
    finally:
        sys.path.pop(0)
    for party in {party for each in recipe.RECIPES for party in each.parties if party.runner}:
        assert (recipe.PEERS / party.runner).is_file()
        if party.environment:
            wanted, _ = peer_environments.PEERS[party.environment]
            assert all(re.fullmatch(r"[\w-]+==[\d.]+", each) for each in wanted)
            assert f"{party.environment}=={party.name.split()[1]}" in wanted
