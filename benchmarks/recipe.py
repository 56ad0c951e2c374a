"""The whole recipe on real reviews, against the libraries that a user would take instead.

Every party fine-tunes SmolLM2-135M on the same reviews with the same settings in a process of its own, in an
environment of its own where its library needs one (``scripts/peer_environments.py``). They take turns of a few steps
(:mod:`.peers.protocol`): who waits does not run, so that even long runs of several processes are interleaved, and a
ratio is that of one round of turns. Tokens per second count real tokens, no padding. What a party prepares after the
start, such as reading records or building a cache, is spread over its first epoch.

    python -m benchmarks.run --only recipe-all-layers recipe-top-layers recipe-pfeiffer recipe-memory
    python -m benchmarks.run --only time-to-accuracy-top-layers --records 800 --held-out 400

Rows of ``recipe-``: epoch 1 and epoch 2 apart. Of ``time-to-accuracy-``: seconds at the end of each epoch, and in
``extra`` the accuracy there; and seconds until the first epoch that is as accurate as the last one of the floor.
"""

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import memory, recipe_data, runner
from .rows import ROOT, Row
from .runner import Case, Progress, Settings, Variant

PEERS = Path(__file__).parent / "peers"
MOST_OFF = (
    1e-3  # between the losses that the parties find before training; an adapter that starts random: 0.1
)


@dataclass(frozen=True)
class Party:
    """Who trains: a file of ``peers`` in an environment, or our own worker with some options."""

    name: str
    runner: str = ""
    environment: str = ""
    options: tuple[str, ...] = ()


OURS = Party("fastadapter")
PACKED = Party("fastadapter, packed", options=("packing",))
CACHED = Party("fastadapter, packed, trunk cached", options=("packing", "trunk_cache"))
PEFT = Party("PEFT", "train_peft.py")
LITGPT = Party("litgpt 0.5.13", "train_litgpt.py", "litgpt")
ADAPTERS = Party("adapters 1.3.0", "train_adapters.py", "adapters")


@dataclass(frozen=True)
class Recipe:
    """One comparison; the first party is the floor of its ratios. ``name`` is in the names of its entries."""

    name: str
    title: str
    parties: tuple[Party, ...]
    layers: int | None = None  # the top so many; None: all
    method: str = "llama-adapter"


RECIPES = (
    Recipe("all-layers", "LLaMA-Adapter, all layers", (PEFT, OURS, PACKED, LITGPT)),
    Recipe("top-layers", "LLaMA-Adapter, top 10 layers", (PEFT, OURS, PACKED, CACHED, LITGPT), layers=10),
    Recipe("pfeiffer", "Pfeiffer adapters, all layers", (ADAPTERS, OURS, PACKED), method="pfeiffer"),
)


@dataclass(frozen=True)
class Sizes:
    """How long a comparison is."""

    records: int = 320
    held_out: int = 0
    epochs: int = 2
    turns: int = 4  # of every party in an epoch

    def __post_init__(self):
        for name, low in (("records", 1), ("held_out", 0), ("epochs", 1), ("turns", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an int, at least {low}, got {value!r}")


@dataclass
class Told:
    """What a party said of itself."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    accuracies: dict[int, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    ready: dict[str, Any] = field(default_factory=dict)

    def seconds(self, epoch: int) -> float:
        """From the start to the end of an epoch, preparations and all."""
        return sum(turn["seconds"] + turn["setup"] for turn in self.turns if turn["epoch"] <= epoch)

    def seconds_per_token(self, epoch: int) -> list[float]:
        """Of each turn of an epoch; its preparations spread over all its tokens."""
        mine = [turn for turn in self.turns if turn["epoch"] == epoch]
        prepared = sum(turn["setup"] for turn in mine) / sum(turn["tokens"] for turn in mine)
        return [turn["seconds"] / turn["tokens"] + prepared for turn in mine]

    def tokens_per_second(self, epoch: int) -> float:
        """Of a whole epoch: a median over turns does not show one turn that was slow."""
        mine = [turn for turn in self.turns if turn["epoch"] == epoch]
        seconds = sum(turn["seconds"] + turn["setup"] for turn in mine)
        return sum(turn["tokens"] for turn in mine) / seconds


class Process:
    """A party at work."""

    def __init__(self, party: Party, job: Mapping[str, Any], folder: Path, allocator: Mapping[str, str]):
        self.party, self.told, self.over = party, Told(), False
        file = folder / f"{party.name}.json"
        file.write_text(json.dumps({**job, "options": list(party.options)}), encoding="utf-8")
        self.messages = (folder / f"{party.name}.txt").open("w+")
        clean = {key: value for key, value in os.environ.items() if key not in runner.ALLOCATOR}
        self.process = subprocess.Popen(
            [*command(party), str(file)],
            cwd=ROOT if party.runner == "" else PEERS,
            env={**clean, **allocator, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        """Its next line. Raises: RuntimeError: it ended without one; what it said last is in the message."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.messages.seek(0)
            raise RuntimeError(
                f"{self.party.name} ended with status {self.process.returncode}:\n{self.messages.read()[-3000:]}"
            )
        return json.loads(line)

    def until_ready(self) -> None:
        said = self.hear()
        assert said["event"] == "ready"
        self.told.ready = said

    def turn(self) -> None:
        """Let it take one turn, with all it does and says at the turn's end."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        said = self.hear()
        self.told.turns.append(said)
        if said["ends_epoch"] and self.judged:
            self.told.accuracies[said["epoch"]] = self.hear()["accuracy"]
        if said["ends_run"]:
            while (said := self.hear())["event"] != "done":
                self.told.memory = said
            self.over = True

    @property
    def judged(self) -> bool:
        return self.told.ready["judged"]

    def close(self) -> None:
        """End it, wherever it is."""
        self.process.stdin.close()
        try:
            self.process.wait(10 if self.over else 0.1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.messages.close()


def peer_python(environment: str) -> Path:
    return ROOT / ".venv-peers" / environment / "bin" / "python"


def command(party: Party) -> list[str]:
    """What runs the party, save for its job."""
    if not party.runner:
        return [sys.executable, "-m", f"{__package__}.recipe_worker"]
    python = str(peer_python(party.environment)) if party.environment else sys.executable
    return [python, str(PEERS / party.runner)]


def missing(party: Party) -> str:
    """Why the party cannot take part here; empty: it can."""
    if party.environment and not peer_python(party.environment).exists():
        return "it has no environment: python scripts/peer_environments.py"
    if not party.runner:
        from . import recipe_worker

        if unknown := recipe_worker.lacks(list(party.options)):
            return f"this version has no {' and no '.join(unknown)}"
    return ""


def present(recipe: Recipe) -> list[Party]:
    """The parties that can take part; the others are named on stderr."""
    found = []
    for party in recipe.parties:
        if why := missing(party):
            print(f"recipe, {recipe.title}: {party.name} is left out: {why}", file=sys.stderr)
        else:
            found.append(party)
    return found


def side_by_side(
    recipe: Recipe, parties: Sequence[Party], job: Mapping[str, Any], folder: Path
) -> dict[str, Told]:
    """What each party said of itself, all of them interleaved.

    Raises: RuntimeError: one failed, or does other work than the first.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for party in parties:
            running.append(Process(party, job, folder, runner.ALLOCATOR))
            stack.callback(running[-1].close)
            running[-1].until_ready()
        require_equal_losses(recipe, [each.told.ready["loss"] for each in running], parties)
        order, shuffle = list(running), random.Random(0).shuffle
        turns = -(-len(job["train"]) // job["batch_size"] // job["turn_steps"]) * job["num_train_epochs"]
        progress, done = Progress(f"recipe, {recipe.title}", turns), 0
        while not all(each.over for each in running):
            shuffle(order)
            for each in order:
                each.turn()
            done += 1
            progress(done)
        return {each.party.name: each.told for each in running}


def one_after_another(parties: Sequence[Party], job: Mapping[str, Any], folder: Path) -> dict[str, Told]:
    """The same without company: memory is no matter of turns, and an allocator that keeps nothing is slow."""
    found = {}
    for party in parties:
        process = Process(party, job, folder, memory.ALLOCATOR)
        try:
            process.until_ready()
            while not process.over:
                process.turn()
        finally:
            process.close()
        found[party.name] = process.told
    return found


def require_equal_losses(recipe: Recipe, losses: Sequence[float], parties: Sequence[Party]) -> None:
    """All of them start from the same model and rows. Raises: RuntimeError: naming the losses."""
    # Pfeiffer's adapters start close to nothing in one library and at nothing in the other
    most = 0.1 if recipe.method == "pfeiffer" else MOST_OFF
    if max(losses) - min(losses) > most * abs(losses[0]):
        found = {party.name: loss for party, loss in zip(parties, losses)}
        raise RuntimeError(f"recipe, {recipe.title}: not the same work; losses before training: {found}")


def rows_of(
    entry: str, recipe: Recipe, what: str, unit: str, samples: Mapping[str, list[float]], settings: Settings,
    extra: Mapping[str, Mapping[str, float]],
) -> list[Row]:  # fmt: skip
    """Of one line of comparison, the first party its floor."""
    timed = [
        Variant(name, lambda _: None, backend="cpp" if name.startswith("fastadapter") else "")
        for name in samples
    ]
    case = Case(entry, f"{recipe.title}, {what}", next(iter(samples)), timed, unit=unit, tokens=1)
    found = runner.describe(case, samples, settings.environment)
    for row in found:
        row.extra.update(extra.get(row.variant, {}))
    return found


def _comparable(recipe: Recipe) -> list[Party]:
    """Who can take part; nobody, said so, where the floor or everybody else cannot."""
    parties = present(recipe)
    if recipe.parties[0] in parties and len(parties) > 1:
        return parties
    print(f"recipe, {recipe.title}: left out: nobody to compare with", file=sys.stderr)
    return []


def _sizes(settings: Settings, **defaults: int) -> Sizes:
    """The defaults, made small for a quick run, and what was asked for; who judges nobody holds nothing out."""
    judges = bool(defaults.get("held_out"))
    small = {"records": 8, "held_out": 4 if judges else 0, "turns": 1} if settings.quick else {}
    names = ("records", "epochs", "held_out") if judges else ("records", "epochs")
    given = {name: settings.options[name] for name in names if name in settings.options}
    return Sizes(**{**defaults, **small, **given})


def tokens_per_second(recipe: Recipe, settings: Settings) -> Iterator[list[Row]]:
    """Real tokens per second in each epoch."""
    sizes = _sizes(settings)
    if not (parties := _comparable(recipe)):
        return
    with tempfile.TemporaryDirectory() as folder:
        job = recipe_data.make_job(recipe, sizes, settings, Path(folder), measure_memory=False)
        told = side_by_side(recipe, parties, job, Path(folder))
    for epoch in range(1, sizes.epochs + 1):
        samples = {name: each.seconds_per_token(epoch) for name, each in told.items()}
        extra = {
            name: {"epoch": float(epoch), "epoch_tokens_per_s": each.tokens_per_second(epoch)}
            for name, each in told.items()
        }
        what = f"epoch {epoch}, {sizes.records} reviews, batch {job['batch_size']}"
        yield rows_of(f"recipe-{recipe.name}", recipe, what, "tokens/s", samples, settings, extra)


def peak_memory(settings: Settings) -> Iterator[list[Row]]:
    """Peak of a few steps of every recipe above the model, and of the whole process."""
    sizes = _sizes(settings, records=96, epochs=1, turns=1)
    for recipe in RECIPES:
        if not (parties := _comparable(recipe)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = recipe_data.make_job(recipe, sizes, settings, Path(folder), measure_memory=True)
            told = one_after_another(parties, job, Path(folder))
        peak = {name: [each.memory["peak_mib"]] for name, each in told.items()}
        above = {name: [each.memory["peak_mib"] - each.memory["resident_mib"]] for name, each in told.items()}
        for what, samples in (("training above the model", above), ("whole process", peak)):
            shape = f"{what}, {sizes.records} reviews, batch {job['batch_size']}"
            yield rows_of("recipe-memory", recipe, shape, "MiB", samples, settings, {})


def time_to_accuracy(recipe: Recipe, settings: Settings) -> Iterator[list[Row]]:
    """Seconds and accuracy at the end of every epoch, and seconds until as accurate as the floor at its end."""
    sizes = _sizes(settings, records=800, held_out=400, epochs=3)
    if not (parties := _comparable(recipe)):
        return
    with tempfile.TemporaryDirectory() as folder:
        job = recipe_data.make_job(recipe, sizes, settings, Path(folder), measure_memory=False)
        told = side_by_side(recipe, parties, job, Path(folder))
    entry, of = f"time-to-accuracy-{recipe.name}", f"{sizes.records} reviews, batch {job['batch_size']}"
    for epoch in range(1, sizes.epochs + 1):
        samples = {name: [each.seconds(epoch)] for name, each in told.items()}
        extra = {
            name: {"epoch": float(epoch), "accuracy": each.accuracies[epoch]} for name, each in told.items()
        }
        yield rows_of(entry, recipe, f"after epoch {epoch}, {of}", "s", samples, settings, extra)
    samples, extra = reached(recipe, told, sizes.epochs)
    what = f"until as accurate as {recipe.parties[0].name} after {sizes.epochs} epochs, {of}"
    yield rows_of(entry, recipe, what, "s", samples, settings, extra)


def reached(
    recipe: Recipe, told: Mapping[str, Told], epochs: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds until the floor's accuracy at its end, and the epoch; who never gets there is named on stderr."""
    goal = told[recipe.parties[0].name].accuracies[epochs]
    samples, extra = {}, {}
    for name, each in told.items():
        good = [epoch for epoch, accuracy in sorted(each.accuracies.items()) if accuracy >= goal]
        if good:
            samples[name] = [each.seconds(good[0])]
            extra[name] = {"epoch": float(good[0]), "accuracy": each.accuracies[good[0]]}
        else:
            print(f"recipe, {recipe.title}: {name} never reached {goal:.1%}", file=sys.stderr)
    return samples, extra


ENTRIES: dict[str, Callable[[Settings], Iterator[list[Row]]]] = {
    **{f"recipe-{each.name}": functools.partial(tokens_per_second, each) for each in RECIPES},
    "recipe-memory": peak_memory,
    **{f"time-to-accuracy-{each.name}": functools.partial(time_to_accuracy, each) for each in RECIPES},
}
