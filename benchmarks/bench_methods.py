"""A training step of each method, and decoding with a different adapter in every row, on the SmolLM2-135M shape.

python -m benchmarks.run --only method-step mixed-decode generate generate-1b
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

import fastadapter as fa

from . import models, runner
from .rows import Row
from .runner import Case, Meter, Settings, Variant

LENGTH = 20  # of prefixes and soft prompts
REDUCTION = 16  # of the hidden size, which makes a rank of 36
RANK = models.SMOLLM2_135M["hidden_size"] // REDUCTION
ROWS = 8


def _joined(model: nn.Module) -> nn.Module:
    """The frozen model with a trainable prompt in front of every row: what a soft prompt cannot do without, joined."""
    model = models.share(model)
    prompt = torch.randn(1, LENGTH, model.config.hidden_size, device=model.device, dtype=model.dtype)
    model.prompt = nn.Parameter(prompt)
    return model


def _joined_step(model: nn.Module, ids: Tensor) -> Tensor:
    embedded = torch.cat([model.prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)
    labels = torch.cat([torch.full_like(ids[:, :1], -100).expand(-1, LENGTH), ids], dim=1)
    loss = model(inputs_embeds=embedded, labels=labels, use_cache=False).loss
    loss.backward()
    model.prompt.grad = None
    return loss.detach()


class _Eager(nn.Module):
    """A bottleneck adapter as one would write it."""

    def __init__(self, hidden_size: int, like: nn.Module):
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, RANK), nn.Linear(RANK, hidden_size)
        self.to(next(like.parameters()))

    def forward(self, module: nn.Module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        adapted = first + self.up(nn.functional.gelu(self.down(first)))
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


def _eager_houlsby(model: nn.Module) -> nn.Module:
    model = models.share(model)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            part.eager_adapter = _Eager(model.config.hidden_size, model)
            part.register_forward_hook(part.eager_adapter)
    return model


def _ours(config) -> Callable[[nn.Module], nn.Module]:
    return lambda model: fa.attach(models.share(model), config)


def _frozen(model: nn.Module) -> nn.Module:
    return models.with_input_gradient(model, len(model.model.layers))


def _variants(makers, model: nn.Module, ids: Tensor, device: str) -> list[Variant]:
    variants = []
    for name, (make, step) in makers.items():
        built = make(model).train()
        ours = name.startswith("fastadapter")

        def run(_, built=built, step=step, ours=ours):
            if ours:
                return step(built, ids)
            with models.without_hook():
                return step(built, ids)

        variants.append(Variant(name, run, backend=("triton" if device == "cuda" else "cpp") if ours else ""))
    return variants


def method_cases(
    settings: Settings, batch: int, length: int, dtype: torch.dtype, shape: Mapping[str, Any] | None = None
) -> Iterator[Case]:
    """Forward and backward of the model's own loss over all tokens; no optimizer."""
    model = models.build(small=settings.quick, dtype=dtype, device=settings.device, shape=shape)
    ids = models.tokens(model, batch, length)
    step = models.training_step
    prefix = PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
    prompt = PromptTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
    cases = {
        f"prefix tuning, {LENGTH}": {
            "frozen model": (_frozen, step),
            "fastadapter": (_ours(fa.PrefixTuningConfig(prefix_len=LENGTH)), step),
            "PEFT": (lambda model: get_peft_model(models.share(model), prefix), step),
        },
        f"soft prompt, {LENGTH}": {
            "joined embeddings": (_joined, _joined_step),
            "fastadapter": (_ours(fa.SoftPromptConfig(prompt_len=LENGTH)), step),
            "PEFT": (lambda model: get_peft_model(models.share(model), prompt), step),
            "frozen model": (_frozen, step),
        },
        f"houlsby, rank {RANK}": {
            "frozen model": (_frozen, step),
            "fastadapter": (_ours(fa.BottleneckConfig(bottleneck_size=RANK)), step),
            "eager modules": (_eager_houlsby, step),
        },
    }
    for name, makers in cases.items():
        variants = _variants(makers, model, ids, settings.device)
        yield Case(
            "method-step",
            f"{name}, all layers, {batch}x{length} tokens",
            floor=variants[0].name,
            variants=variants,
            dtype=str(dtype).removeprefix("torch."),
            unit="ms",
            warmup=1,
        )


def method_step(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    batch, length = (2, 32) if settings.quick else (4, 128)
    for case in method_cases(settings, batch, length, dtype):
        yield runner.measure(case, settings, meter)


def mixed_decode(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    """Greedy decoding of 8 rows: one adapter for all, one each, and one row after the other."""
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    prompt_len, new_tokens = (8, 4) if settings.quick else (32, 16)
    model = models.build(small=settings.quick, dtype=dtype, device=settings.device)
    ids = models.tokens(model, ROWS, prompt_len)
    names = [f"a{row}" for row in range(ROWS)]
    for method, config in (
        ("LLaMA-Adapter", fa.LlamaAdapterConfig(models.PREFIX_LEN)),
        ("prefix tuning", fa.PrefixTuningConfig(LENGTH)),
        ("houlsby", fa.BottleneckConfig(bottleneck_size=RANK, init="houlsby")),
    ):
        adapted = models.share(model).eval()
        for name in names:
            fa.attach(adapted, config, name)
        with torch.no_grad():
            for key, parameter in fa.trainable_parameters(adapted):
                if key.endswith("gate"):
                    parameter.fill_(models.GATE)

        @torch.no_grad()
        def decode(chosen: list[str], rows: Tensor, adapted=adapted) -> None:
            with fa.rows(adapted, chosen):
                cache = DynamicCache(config=adapted.config)
                token = rows
                for _ in range(new_tokens):
                    logits = adapted(input_ids=token, past_key_values=cache, use_cache=True).logits
                    token = logits[:, -1:].argmax(-1)

        @torch.no_grad()
        def decode_one(rows: Tensor, name: str, adapted=adapted) -> None:
            fa.set_active(adapted, name)
            cache = DynamicCache(config=adapted.config)
            token = rows
            for _ in range(new_tokens):
                logits = adapted(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)

        def loop(_, decode_one=decode_one) -> None:
            for row, name in enumerate(names):
                decode_one(ids[row : row + 1], name)

        variants = [
            Variant("one adapter", lambda _, decode_one=decode_one: decode_one(ids, names[0])),
            Variant("8 adapters", lambda _, decode=decode: decode(names, ids)),
            Variant("loop over adapters", loop),
        ]
        yield runner.measure(
            Case(
                "mixed-decode",
                f"{method}, {ROWS} rows, {prompt_len} + {new_tokens} tokens",
                floor="one adapter",
                variants=variants,
                dtype=str(dtype).removeprefix("torch."),
                unit="tokens/s",
                tokens=ROWS * new_tokens,
                warmup=1,
            ),
            settings,
            meter,
        )


def _folded(model: nn.Module) -> nn.Module:
    return fa.fold(_ours(fa.LlamaAdapterV2Config(models.PREFIX_LEN))(model).eval())


def _idle(model: nn.Module) -> nn.Module:
    model = _ours(fa.LlamaAdapterConfig(models.PREFIX_LEN))(model)
    fa.set_active(model, None)
    return model


def generate_cases(
    settings: Settings, dtype: torch.dtype, new_tokens: int, shape: Mapping[str, Any] | None = None
) -> Iterator[Case]:
    """``model.generate`` with each method against the bare model, all in one interleaved run; greedy, dynamic cache."""
    prompt_len = 8 if settings.quick else 32
    model = models.build(small=settings.quick, dtype=dtype, device=settings.device, shape=shape)
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "bare model": models.share,
        "idle adapter": _idle,
        "LLaMA-Adapter": _ours(fa.LlamaAdapterConfig(models.PREFIX_LEN)),
        "version 2": _ours(fa.LlamaAdapterV2Config(models.PREFIX_LEN)),
        "version 2, folded": _folded,
        "prefix tuning": _ours(fa.PrefixTuningConfig(LENGTH)),
        "soft prompt": _ours(fa.SoftPromptConfig(prompt_len=LENGTH)),
        "houlsby": _ours(fa.BottleneckConfig(reduction_factor=REDUCTION, init="houlsby")),
    }
    built = {name: make(model).eval() for name, make in makers.items()}
    for each in built.values():
        with torch.no_grad():
            for key, parameter in each.named_parameters():
                if key.endswith("gate"):
                    parameter.fill_(models.GATE)
    for batch in (1, ROWS):
        ids = models.tokens(model, batch, prompt_len)

        def run(_, each, ids=ids):
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            return each.generate(ids, attention_mask=torch.ones_like(ids), **options)

        def bare(_, run=run):
            with models.without_hook():
                return run(_, built["bare model"])

        variants = [
            Variant(name, bare if name == "bare model" else lambda _, each=each, run=run: run(_, each))
            for name, each in built.items()
        ]
        yield Case(
            "generate",
            f"batch {batch}, {prompt_len} + {new_tokens} tokens",
            floor="bare model",
            variants=variants,
            dtype=str(dtype).removeprefix("torch."),
            unit="tokens/s",
            tokens=batch * new_tokens,
            warmup=1,
        )


def generate(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    for case in generate_cases(settings, dtype, 4 if settings.quick else 32):
        yield runner.measure(case, settings, meter)


def generate_1b(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    """The same on Llama-3.2-1B's shape, where a token takes longer than what Python adds to it."""
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    shape = None if settings.quick else models.LLAMA_1B
    for case in generate_cases(settings, dtype, 4 if settings.quick else 8, shape):
        yield runner.measure(dataclasses.replace(case, entry="generate-1b"), settings, meter)
