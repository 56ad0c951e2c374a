"""What a step of a real recipe costs on a GPU: records of real lengths, learned tokens only, packed or padded.

A step is forward and backward of LLaMA-Adapter on records spread like Alpaca's (``fastadapter.planning.lengths``), in
tokens of records a second: padding does not count. Peak memory is above what is allocated between steps.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastadapter as fa
from fastadapter.integrations.passes.packed import PACKED, attending_packed
from fastadapter.planning.lengths import named_lengths
from fastadapter.training import DataCollatorWithPacking, causal_lm_loss
from fastadapter.training import loss as training_loss
from fastadapter.training.loss import IGNORED

from . import models
from .gpu_models import dtype_of, measured, peak_memory, rows_of, settings_of, shape_of
from .gpu_tools import Bench
from .rows import Row
from .runner import Case, Variant

Rows = Iterator[Row]
Batch = dict[str, Any]
LLAMA_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
# LLaMA-Adapter's own run adapts the top 30 of 32 blocks.
ADAPTED = 30
# Of PEFT's padded batches, which hold every logit in fp32.
PEFT_RECORDS = 8
# Gradients of a packed and of a padded step in bf16 agree to this cosine: other attentions round elsewhere.
COSINE = 0.995


def records(model: nn.Module, count: int) -> list[dict[str, list[int]]]:
    """Random tokens, as long as records of instructions are, in random order; prompts are not learned."""
    spread = named_lengths("alpaca-like", True, 4 * count)
    pairs = list(zip(spread.prompts, spread.completions, strict=True))[:count]
    generator = torch.Generator().manual_seed(3)
    found = []
    for prompt, completion in pairs:
        ids = torch.randint(model.config.vocab_size, (prompt + completion,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return found


def padded(features: list[dict[str, list[int]]], device: str, mask: bool) -> Batch:
    """On the right; ``mask``: as others hand it over. A causal model's real tokens do not see what is behind them."""
    width = max(len(each["input_ids"]) for each in features)
    rows = {
        name: torch.tensor([each[name] + [fill] * (width - len(each[name])) for each in features])
        for name, fill in (("input_ids", 0), ("labels", IGNORED))
    }
    if mask:
        lengths = torch.tensor([len(each["input_ids"]) for each in features])
        rows["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return {name: rows[name].to(device) for name in rows}


def packed(features: list[dict[str, list[int]]], device: str, by_sequence: bool) -> Batch:
    batch = DataCollatorWithPacking()(features)
    moved: dict[int, Tensor] = {}  # the offsets stand under several names
    for name, value in batch.items():
        if torch.is_tensor(value):
            batch[name] = moved.setdefault(id(value), value.to(device))
    if not by_sequence:
        del batch[PACKED]
    return batch


def backward_of(model: nn.Module, batch: Batch, items: Tensor) -> Tensor:
    loss = causal_lm_loss(model, batch, items)
    loss.backward()
    return loss.detach()


def peft_step(model: nn.Module, batches: list[Batch], items: Tensor) -> Tensor:
    """The model's own loss, as transformers' ``Trainer`` accumulates it."""
    total = torch.zeros((), device=items.device)
    for batch in batches:
        loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    return total


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def gradients_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def llama_adapter(bench: Bench, entry: str, shape: Mapping[str, Any], count: int, layers: int | None) -> Rows:
    settings = dataclasses.replace(settings_of(bench), rounds=1 if bench.dry else 7)
    model = models.build(dtype=bench.dtype, device=bench.device, shape=shape_of(bench, shape))
    total = len(model.model.layers)
    layers = min(layers or total, total)
    features = records(model, 4 if bench.dry else count)
    tokens = sum(len(each["input_ids"]) for each in features)
    device = bench.device
    whole, under_mask = packed(features, device, True), packed(features, device, False)
    items = (whole["labels"] != IGNORED).sum()
    rows = padded(features, device, False)
    parts = [
        padded(features[at : at + PEFT_RECORDS], device, True) for at in range(0, len(features), PEFT_RECORDS)
    ]
    ours = models.with_fastadapter(model, layers).train()
    frozen, peft = models.with_input_gradient(model, layers).train(), models.with_peft(model, layers).train()
    steps: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor], bool]] = {
        "frozen model, packed": (frozen, lambda each: backward_of(each, whole, items), True),
        "fastadapter, packed": (ours, lambda each: backward_of(each, whole, items), True),
        "(fastadapter, packed under a mask)": (ours, lambda each: backward_of(each, under_mask, items), True),
        "fastadapter, padded": (ours, lambda each: backward_of(each, rows, items), True),
        f"PEFT, padded, {PEFT_RECORDS} at a time": (peft, lambda each: peft_step(each, parts, items), False),
    }  # fmt: skip
    check(bench, entry, steps)
    variants = []
    for name, (each, step, hooked) in steps.items():

        def run(_, each=each, step=step, hooked=hooked):
            with attending_packed() if hooked else models.without_hook():
                result = step(each)
            clear(each)
            return result

        variants.append(Variant(name, run, backend="triton" if "fastadapter" in name else ""))
    widest = rows["input_ids"].shape[1]
    what = f"top {layers} of {total} layers, {len(features)} records, {tokens} tokens, longest {widest}"
    case = Case(
        entry, what, "frozen model, packed", variants, dtype_of(bench), "tokens/s", tokens=tokens, warmup=1
    )
    yield from rows_of(bench, case, settings)
    # memory of as many records at a time only
    alike = [variant for variant in variants if not variant.name.startswith("PEFT")]
    yield from peak_memory(bench, dataclasses.replace(case, variants=alike), settings)


def check(bench: Bench, entry: str, steps: Mapping[str, Any]) -> None:
    """Packed, padded and PEFT's: one loss and one gradient."""
    losses, gradients = {}, {}
    for name, (model, step, hooked) in steps.items():
        if name.startswith("frozen"):
            continue
        with attending_packed() if hooked else models.without_hook():
            losses[name] = step(model).item()
        gradients[name] = gradients_of(model) if "fastadapter" in name else None
        clear(model)
    first = gradients["fastadapter, padded"]
    cosines = {
        name: float(nn.functional.cosine_similarity(first, found, dim=0))
        for name, found in gradients.items()
        if found is not None
    }
    print(f"{entry}: losses {losses}, cosines of gradients {cosines}", flush=True)
    if max(losses.values()) - min(losses.values()) > 0.05 or not min(cosines.values()) > COSINE:
        bench.problems.append(f"{entry}: losses {losses}, cosines of gradients {cosines}")


def recipe_7b(bench: Bench) -> Rows:
    """LLaMA-Adapter's own model and layers, 32 records a step: what `fastadapter bench plan` predicts."""
    yield from llama_adapter(bench, "7B recipe", LLAMA_7B, 32, ADAPTED)


def recipe_smollm2(bench: Bench) -> Rows:
    yield from llama_adapter(bench, "SmolLM2-shape recipe", models.SMOLLM2_135M, 64, None)


def packed_methods(bench: Bench) -> Rows:
    """Every method packed and padded, on SmolLM2-135M's shape: one function, and what each costs."""
    settings = dataclasses.replace(settings_of(bench), rounds=1 if bench.dry else 5)
    model = models.build(dtype=bench.dtype, device=bench.device, shape=shape_of(bench, models.SMOLLM2_135M))
    features = records(model, 4 if bench.dry else 64)
    tokens = sum(len(each["input_ids"]) for each in features)
    whole, rows = packed(features, bench.device, True), padded(features, bench.device, False)
    items = (whole["labels"] != IGNORED).sum()
    for name, config in (
        ("prefix tuning", fa.PrefixTuningConfig(prefix_len=20)),
        ("soft prompt", fa.SoftPromptConfig(prompt_len=20)),
        ("houlsby", fa.BottleneckConfig(bottleneck_size=36, init="houlsby")),
        ("version 2", fa.LlamaAdapterV2Config(models.PREFIX_LEN)),
    ):
        each = fa.attach(models.share(model), config).train()
        with torch.no_grad():
            for key, parameter in fa.trainable_parameters(each):
                if key.endswith("gate"):
                    parameter.fill_(models.GATE)
        steps = {
            "fastadapter, padded": (each, lambda adapted: backward_of(adapted, rows, items), True),
            "fastadapter, packed": (each, lambda adapted: backward_of(adapted, whole, items), True),
        }
        check(bench, f"packed, {name}", steps)

        def variant(key: str, steps: Mapping[str, Any] = steps) -> Variant:
            adapted, step, _ = steps[key]

            def run(_: Any) -> None:
                step(adapted)
                clear(adapted)

            return Variant(key, run, backend="triton")

        case = Case(
            "SmolLM2-shape recipe", f"{name}, {len(features)} records, {tokens // len(features)} tokens",
            "fastadapter, padded", [variant(key) for key in steps], dtype_of(bench), "tokens/s",
            tokens=tokens, warmup=1,
        )  # fmt: skip
        yield from measured(bench, case, settings)


def loss(bench: Bench) -> Rows:
    """Head and loss of SmolLM2-135M's shape, every token learned: all logits at once, in pieces, Liger's kernel."""
    settings = dataclasses.replace(settings_of(bench), rounds=1 if bench.dry else 7)
    shape = {**shape_of(bench, models.SMOLLM2_135M), "num_hidden_layers": 2}
    model = fa.attach(
        models.build(dtype=bench.dtype, device=bench.device, shape=shape), fa.LlamaAdapterConfig(10)
    )
    batch, length = (2, 16) if bench.dry else (16, 512)
    ids = models.tokens(model, batch, length)
    inputs = {"input_ids": ids, "labels": ids}
    most = 64 * 17 if bench.dry else training_loss.MAX_LOGIT_BYTES  # more than one piece
    pieces = lambda: causal_lm_loss(model, inputs, max_logit_bytes=most)  # noqa: E731
    ways = {
        "model's own loss": (lambda: model(**inputs, use_cache=False).loss, ()),
        "fastadapter, pieces": (pieces, ()),
    }
    if importlib.util.find_spec("liger_kernel") is not None and not bench.dry:
        ways["fastadapter, Liger"] = (pieces, ("cuda",))
    found, variants = {}, []
    for name, (make, fused) in ways.items():

        def run(_: Any = None, make: Callable = make, fused: tuple[str, ...] = fused) -> Tensor:
            with mock.patch.object(training_loss, "_FUSED_ON", fused):
                value = make()
                value.backward()
            return value.detach()

        found[name] = (run().item(), gradients_of(model))
        clear(model)
        variants.append(Variant(name, run, prepare=lambda: clear(model), backend=""))
    own = found["model's own loss"]
    for name, (value, gradient) in found.items():
        cosine = float(nn.functional.cosine_similarity(own[1], gradient, dim=0))
        print(f"loss, {name}: {value}, gradients' cosine {cosine}", flush=True)
        if abs(value - own[0]) > 0.02 or not cosine > COSINE:
            bench.problems.append(f"loss, {name}: {value} beside {own[0]}, cosine of gradients {cosine}")
    what = f"{batch}x{length} tokens, vocabulary {model.config.vocab_size}, 2 layers"
    case = Case("loss", what, "model's own loss", variants, dtype_of(bench), "ms", warmup=1)
    yield from measured(bench, case, settings)


CASES: dict[str, Callable[[Bench], Rows]] = {
    "recipe-7b": recipe_7b,
    "recipe-smollm2": recipe_smollm2,
    "packed-methods": packed_methods,
    "loss": loss,
}
