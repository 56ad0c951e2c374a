"""Where the time of a training step goes: products of the base, attention, adapter, head and loss, optimiser, the rest.

A step is that of the recipe: 16 reviews' worth of tokens, the loss of one supervised token a row (a class, for the
encoder), backward, AdamW. The whole step is timed interleaved, as everything else; torch.profiler then says which
operator had the time of a few further steps: its own, without that of operators it calls. What no group claims, the
profiler's own cost with it, is the rest: norms, rotary embedding, activations, Python. An adapter that is made of
ordinary operators, as PEFT's, is in their parts: only ours has one of its own.

    python -m benchmarks.run --only step-stack

``extra`` of a row: milliseconds by part (``gemm_ms``, ``attention_ms``, ``adapter_ms``, ``head_ms``, ``optimizer_ms``,
``rest_ms``) of the profiled step, and ``gflop_per_s`` of the products against ``peak_gflop_per_s``.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification

import fastadapter as fa
from fastadapter.training import Encoded, collate, supervised_loss

from . import models, runner, variants
from .rows import Row
from .runner import Case, Meter, Settings, Variant

ENTRY = "step-stack"
PARTS = ("gemm", "attention", "adapter", "head", "optimizer", "rest")
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_addmm_activation",
    "aten::linear",
}
PRODUCTS |= {"aten::mkldnn_linear", "mkldnn::_linear_pointwise"}
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,  # the sentence encoder is fine-tuned without; masks would be one more part
    "attention_probs_dropout_prob": 0.0,
}
BATCH, LENGTH = 16, 32  # a review has 31 tokens on average


@dataclass(frozen=True)
class Step:
    """One way of taking the step; ``head`` is the size of the output, by which its products are told apart."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    head: int
    surroundings: Callable[[Callable[..., object]], Callable[..., object]]

    def __post_init__(self):
        trained = [each for each in self.model.parameters() if each.requires_grad]
        object.__setattr__(self, "optimizer", torch.optim.AdamW(trained, lr=1e-4) if trained else None)

    def __call__(self) -> None:
        self.surroundings(self._take)()

    def _take(self) -> None:
        self.loss(self.model).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def decoder(settings: Settings, layers: int | None) -> Iterator[tuple[str, Step]]:
    """SmolLM2-135M's shape: the frozen model, ours, PEFT; all with the head on supervised positions only."""
    base = models.build(small=settings.quick)
    layers = layers or len(base.model.layers)
    ids = models.tokens(base, BATCH, 8 if settings.quick else LENGTH).tolist()
    batch = collate([Encoded(tuple(row), len(row) - 1) for row in ids], causal=True)
    for name in (variants.FLOOR, "fastadapter", "PEFT"):
        model = variants.MAKERS[name](base, layers).train()
        yield (
            name,
            Step(
                model,
                lambda model: supervised_loss(model, batch),
                base.config.vocab_size,
                lambda body, name=name: variants.runs_of(name, body),
            ),
        )


def encoder(settings: Settings) -> Iterator[tuple[str, Step]]:
    """MiniLM's shape with a classifier on it: the frozen model with its input's gradient, and ours."""
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "vocab_size": 512} if settings.quick else {}
    base = BertForSequenceClassification(BertConfig(**{**MINILM, **small})).requires_grad_(False)
    ids = models.tokens(base, BATCH, 8 if settings.quick else LENGTH)
    labels = torch.arange(BATCH) % 2

    def loss(model: Any) -> Tensor:
        return model(input_ids=ids, labels=labels).loss

    def frozen(model: nn.Module) -> nn.Module:
        first = model.bert.encoder.layer[0]
        first.register_forward_pre_hook(lambda block, args: (args[0].detach().requires_grad_(), *args[1:]))
        return model

    for name, make in ((variants.FLOOR, frozen), ("fastadapter", _with_gates_open)):
        model = make(models.share(base)).train()
        yield name, Step(model, loss, -1, lambda body, name=name: variants.runs_of(name, body))


def _with_gates_open(model: nn.Module) -> nn.Module:
    model = fa.attach(model, fa.LlamaAdapterConfig(models.PREFIX_LEN))
    with torch.no_grad():
        for name, parameter in fa.trainable_parameters(model):
            if name.endswith("gate"):
                parameter.fill_(models.GATE)
    return model


def part_of(name: str, shapes: Any, head: int) -> str | None:
    """The part that an operator stands for; ``None``: it says nothing."""
    if name.startswith("Optimizer.step"):
        return "optimizer"
    if name.startswith("fastadapter::"):
        return "adapter"
    if "attention" in name:
        return "attention"
    if any(head in shape for shape in shapes or () if isinstance(shape, list)):
        return "head"
    if "loss" in name or "log_softmax" in name:
        return "head"
    return "gemm" if name in PRODUCTS else None


def own_milliseconds(events: Any, head: int) -> tuple[dict[str, float], int]:
    """By part, and the operations of the base's products.

    Of an operator and those that called it, the outermost that stands for a part decides: a product within attention
    is attention, one within a step of the optimiser the optimiser's.
    """
    found = dict.fromkeys(PARTS, 0.0)
    flops = 0
    for event in events:
        part, above = None, event
        while above is not None:
            part = part_of(above.name, above.input_shapes, head) or part
            above = above.cpu_parent
        if part is not None:
            found[part] += event.self_cpu_time_total / 1e3
        if part == "gemm":
            flops += event.flops or 0
    return found, flops


def profiled(step: Step) -> dict[str, float]:
    """One step under the profiler: milliseconds by part, the rest of its wall time, GFLOP/s of the base's products."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as seen:
        start = time.perf_counter()
        step()
        wall = 1e3 * (time.perf_counter() - start)
    found, flops = own_milliseconds(seen.events(), step.head)
    found["rest"] = wall - sum(found.values())
    rate = flops / found["gemm"] / 1e6 if found["gemm"] else 0.0
    return {f"{part}_ms": value for part, value in found.items()} | {"gflop_per_s": rate}


def entry(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    total = 3 if settings.quick else models.SMOLLM2_135M["num_hidden_layers"]
    tokens = f"{BATCH}x{8 if settings.quick else LENGTH} tokens"
    for shape, steps in (
        (f"SmolLM2-135M, all {total} layers, {tokens}", decoder(settings, None)),
        (f"SmolLM2-135M, top {total // 3} layers, {tokens}", decoder(settings, total // 3)),
        (f"MiniLM, all {2 if settings.quick else 6} layers, {tokens}", encoder(settings)),
    ):
        yield measure(shape, dict(steps), settings, meter)


def measure(shape: str, steps: dict[str, Step], settings: Settings, meter: Meter | None) -> list[Row]:
    """Rows of one shape: steps timed interleaved with a product as large as the roofline's, then profiled."""
    size = 128 if settings.quick else 1024
    a, b, out = (torch.randn(size, size) for _ in range(3))
    peak = Variant("gemm peak", lambda _: torch.mm(a, b, out=out), flops=2 * size**3)
    timed = [
        Variant(name, lambda _, step=step: step(), backend=variants.backend_of(name, "cpu"))
        for name, step in steps.items()
    ]
    case = Case(ENTRY, shape, variants.FLOOR, [*timed, peak], unit="ms", warmup=1)
    samples = settings.interleave(case, settings.rounds, meter or runner.wall_meter())
    found = runner.describe(case, samples, settings.environment)
    # a round of all after another, as the timing does it
    looks = [{name: profiled(step) for name, step in steps.items()} for _ in range(min(3, settings.rounds))]
    for row in found:
        if row.variant in steps:
            keys = looks[0][row.variant]
            row.extra.update(
                {key: statistics.median(look[row.variant][key] for look in looks) for key in keys}
            )
            row.extra["peak_gflop_per_s"] = peak.flops / min(samples[peak.name]) / 1e9
    return [row for row in found if row.variant in steps]
