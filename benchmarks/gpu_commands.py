"""The commands on a GPU: ``finetune``, its resumption, ``generate`` and ``compare`` on a tiny model made on the spot.

No timing to be quoted: a row says that a command ended well on the device in bf16, and how many seconds it took. One
that does not raises, with what was wrong.
"""

import contextlib
import csv
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import runner
from .gpu_tools import Bench
from .rows import Row, environment
from .runner import Case, Variant

WORDS = [f"w{number}" for number in range(60)] + "good bad Review Sentiment : <s> </s> ?".split()
# head_dim 32: every kernel takes it
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": len(WORDS), "initializer_range": 0.15,
}  # fmt: skip
STOP_AFTER = 3  # steps


def make_model(folder: Path) -> None:
    """A random Llama and a tokenizer of whole words, as ``from_pretrained`` wants them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_reviews(path: Path, count: int) -> None:
    """Good ones hold more even than odd word numbers."""
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            numbers = [draw.randrange(60) for _ in range(draw.randint(4, 40))]
            label = "good" if 2 * sum(number % 2 for number in numbers) < len(numbers) else "bad"
            writer.writerow([" ".join(f"w{number}" for number in numbers), label])


class Commands:
    """A folder with a model and data, and calls of the commands in this process, so that a hang shows its stack."""

    def __init__(self, folder: Path, bench: Bench):
        self.folder, self.bench = folder, bench
        self.model, self.data = folder / "model", folder / "reviews.csv"
        make_model(self.model)
        make_reviews(self.data, 24 if bench.dry else 64)

    def __call__(self, command: str, *options: Any, expect: int = 0) -> None:
        """Raises: RuntimeError: another exit status than ``expect``."""
        from fastadapter.cli import main

        # bf16 is emulated on many CPUs
        how = (
            ("--device", "cpu", "--dtype", "fp32")
            if self.bench.dry
            else ("--device", "cuda", "--dtype", "bf16")
        )
        words = [command, "--model", self.model, *how, *options]
        with contextlib.redirect_stdout(sys.stderr):
            status = main([str(word) for word in words])
        if status != expect:
            raise RuntimeError(f"fastadapter {command} ended with status {status}, expected {expect}")

    def finetune(self, folder: str, *options: Any, expect: int = 0) -> dict[str, Any]:
        """What ``--json`` wrote; empty where the run did not come to its end."""
        out, record = self.folder / folder, self.folder / f"{folder}.json"
        self(
            "finetune", "--data", self.data, "--eval-count", 8, "--output-dir", out, "--json", record,
            "--batch-size", 8, "--num-train-epochs", 2, "--save-steps", 2, *options,
            expect=expect,
        )  # fmt: skip
        return json.loads(record.read_text()) if record.exists() else {}

    def require_device(self, found: Any) -> None:
        if not self.bench.dry and not found:
            raise RuntimeError("the command ran, but not on the GPU")


def finetune(commands: Commands, methods: Sequence[str] = ("llama-adapter", "prefix-tuning")) -> None:
    """Every method trains, and on the device."""
    for method in methods:
        record = commands.finetune(method, "--adapter", method)
        commands.require_device(record["peak_cuda_bytes"])


def finetune_others(commands: Commands) -> None:
    """The same for the other methods, whose kernels take their time to compile too."""
    finetune(commands, ("llama-adapter-v2", "soft-prompt", "bottleneck"))


def resume(commands: Commands) -> None:
    """A run that a signal stopped and that was resumed ends in the bits of one that was not.

    In torch's deterministic mode: attention's backward adds up in any order otherwise, on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        _resume(commands)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def _resume(commands: Commands) -> None:
    from fastadapter.checkpoints.files import read_tensors
    from fastadapter.training.report import Reporter
    from fastadapter.training.targets import AdapterTarget

    whole = commands.finetune("whole")
    commands.require_device(whole["peak_cuda_bytes"])
    step, calls = Reporter.step, 0

    def stop_at(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == STOP_AFTER:
            signal.raise_signal(signal.SIGTERM)
        step(self, *args)

    Reporter.step = stop_at
    try:
        commands.finetune("stopped", expect=128 + signal.SIGTERM)
    finally:
        Reporter.step = step
    resumed = commands.finetune("stopped", "--resume")
    if resumed["losses"] != whole["losses"]:
        raise RuntimeError(f"resumed, the losses are {resumed['losses']} instead of {whole['losses']}")
    one, other = (
        read_tensors(commands.folder / name / AdapterTarget.file)[0] for name in ("whole", "stopped")
    )
    if different := [name for name in one if not torch.equal(one[name], other[name])]:
        raise RuntimeError(f"resumed, the run ended with other weights: {', '.join(different)}")


def generate(commands: Commands) -> None:
    """One prompt with one adapter, then a batch whose rows have adapters of their own, greedy and drawn."""
    commands.finetune("first")
    commands.finetune("second", "--seed", 1)
    prompts = commands.folder / "prompts.jsonl"

    def ask(name: str, *options: Any) -> list[dict[str, Any]]:
        out = commands.folder / f"{name}.jsonl"
        commands("generate", "--max-new-tokens", 8, "--output", out, *options)
        return [json.loads(line) for line in out.read_text().splitlines()]

    adapters = [commands.folder / name for name in ("first", "second")]
    (answer,) = ask("one", "--adapter", adapters[0], "--prompt", "Review : w1 w2 w3 Sentiment :")
    if not answer["new_tokens"]:
        raise RuntimeError("generate made no tokens")
    chosen = ["first", None, "second", "first"]
    # on a GPU transformers compiles the decoding step then, and records it as a CUDA graph
    static = ("--cache-implementation", "static")
    ask("static", "--adapter", adapters[0], "--prompt", "Review : w1 w2", *static)
    lines = [{"prompt": f"Review : w{row} w2", "adapter": name} for row, name in enumerate(chosen)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = [f"{path.name}={path}" for path in adapters]
    for name, more in (("greedy", ()), ("drawn", ("--do-sample", "--top-p", 0.9))):
        answers = ask(name, "--adapters", *named, "--file", prompts, *more)
        found = [each["adapter"] for each in answers]
        if found != chosen:
            raise RuntimeError(f"generate answered for the adapters {found}, asked for {chosen}")


def compare(commands: Commands) -> None:
    """One epoch of an adapter in a process of its own, and the report."""
    out, record = commands.folder / "comparison", commands.folder / "comparison.json"
    commands(
        "compare", "--data", commands.data, "--methods", "llama-adapter", "--seeds", 0,
        "--num-train-epochs", 1, "--output-dir", out, "--json", record,
    )  # fmt: skip
    for run in json.loads(record.read_text())["runs"]:
        commands.require_device(run["device"] != "cpu")


def _case(
    name: str, commands_of: Callable[[Commands], None], needs: Sequence[str] = ()
) -> Callable[[Bench], Iterator[Row]]:
    def case(bench: Bench) -> Iterator[Row]:
        if missing := [package for package in needs if importlib.util.find_spec(package) is None]:
            print(f"{name} is left out: {', '.join(missing)} is not installed", file=sys.stderr)
            return
        with tempfile.TemporaryDirectory() as folder:
            commands = Commands(Path(folder), bench)
            started = time.perf_counter()
            commands_of(commands)
            seconds = time.perf_counter() - started
        entry = Case(name, "tiny Llama", "seconds", [Variant("seconds", lambda _: None)], "bfloat16", "s")
        yield from runner.describe(entry, {"seconds": [seconds]}, environment(bench.device))

    case.__doc__ = commands_of.__doc__
    return case


CASES = {
    "finetune-cli": _case("finetune-cli", finetune),
    "finetune-others-cli": _case("finetune-others-cli", finetune_others),
    "resume-cli": _case("resume-cli", resume),
    "generate-cli": _case("generate-cli", generate),
    "compare-cli": _case("compare-cli", compare, needs=("sklearn", "matplotlib")),
}
