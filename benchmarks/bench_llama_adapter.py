"""LLaMA-Adapter on the SmolLM2-135M shape: training step, decode, peak memory; against the bare model and PEFT.

python -m benchmarks.run --only training-step training-step-bf16 decode peak-memory
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from . import memory, models, runner
from .rows import ROOT, Row
from .runner import Case, Meter, Progress, Settings, Variant
from .variants import ADAPTED, BARE, FLOOR, MAKERS, backend_of, runs_of


def training_cases(
    settings: Settings,
    batch: int,
    length: int,
    dtype: torch.dtype,
    entry: str = "training-step",
    shape: Mapping[str, Any] | None = None,
    makers: Mapping[str, Callable] = MAKERS,
) -> Iterator[Case]:
    """All layers adapted, then the top third; all only where another ``shape`` of model is asked for."""
    model = models.build(small=settings.quick, dtype=dtype, device=settings.device, shape=shape)
    total = len(model.model.layers)
    ids = models.tokens(model, batch, length)
    for layers in (total, total // 3) if shape is None else (total,):
        built = {name: make(model, layers).train() for name, make in makers.items()}
        adapted = {name: (built[name], name != "PEFT") for name in ADAPTED}
        models.require_equal_losses(adapted, ids, 1e-4 if dtype == torch.float32 else 0.05)
        variants = [
            Variant(
                name,
                lambda _, name=name, built=built: runs_of(name, models.training_step)(built[name], ids),
                backend=backend_of(name, settings.device),
            )
            for name in built
        ]
        where = "all" if layers == total else "top"
        label = f"{where} {layers} layers, {batch}x{length} tokens"
        yield Case(
            entry,
            label,
            floor=FLOOR,
            variants=variants,
            dtype=str(dtype).removeprefix("torch."),
            unit="ms",
            warmup=1,
        )


def training_step(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    """Forward and backward, no optimizer: its cost is the same for everyone and depends on the recipe.

    The loss is the model's own over all tokens.
    """
    if settings.device == "cuda":
        batch, length, dtype = 8, 512, torch.bfloat16
    else:
        batch, length, dtype = (2, 32, torch.float32) if settings.quick else (4, 128, torch.float32)
    for case in training_cases(settings, batch, length, dtype):
        yield runner.measure(case, settings, meter)


def training_step_bf16(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    """The same in bf16 on a CPU: worth it where the CPU multiplies it, as with AVX512-BF16 or AMX."""
    batch, length = (2, 32) if settings.quick else (4, 128)
    for case in training_cases(settings, batch, length, torch.bfloat16, "training-step-bf16"):
        yield runner.measure(case, settings, meter)


def decode(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    """Greedy decoding with a dynamic cache, the prompt's forward not timed.

    A loop of forward calls rather than ``model.generate``: that adds about a millisecond of its own per token, the
    same for all, which would hide part of what an adapter costs.
    """
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    prompt_len, new_tokens = (8, 4) if settings.quick else (32, 32)
    model = models.build(small=settings.quick, dtype=dtype, device=settings.device)
    layers = len(model.model.layers)
    bare = {BARE: lambda model, layers: models.share(model)}
    makers = bare | {name: MAKERS[name] for name in ("fastadapter", "PEFT")}
    built = {name: make(model, layers).eval() for name, make in makers.items()}
    adapted = {name: (built[name], name != "PEFT") for name in built if name != BARE}
    models.require_equal_losses(
        adapted, models.tokens(model, 2, prompt_len), 1e-4 if dtype == torch.float32 else 0.05
    )
    for batch in (1, 8):
        ids = models.tokens(model, batch, prompt_len)

        @torch.no_grad()
        def prefill(model, ids=ids):
            cache = DynamicCache(config=model.config)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            return cache, logits[:, -1:].argmax(-1)

        @torch.no_grad()
        def generate(model, state):
            cache, token = state
            for _ in range(new_tokens):
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits.argmax(-1)
            return token

        variants = [
            Variant(
                name,
                lambda state, name=name, generate=generate: runs_of(name, generate)(built[name], state),
                lambda name=name, prefill=prefill: runs_of(name, prefill)(built[name]),
                backend_of(name, settings.device),
            )
            for name in built
        ]
        yield runner.measure(
            Case(
                "decode",
                f"batch {batch}, {prompt_len} + {new_tokens} tokens",
                floor=BARE,
                variants=variants,
                dtype=str(dtype).removeprefix("torch."),
                unit="tokens/s",
                tokens=batch * new_tokens,
                warmup=1,
            ),
            settings,
            meter,
        )


def peak_memory(settings: Settings) -> Iterator[list[Row]]:
    """Peak of a training step above the resident model, each sample in a process of its own (``memory.py``)."""
    rounds = 1 if settings.quick else 3
    progress = Progress("peak-memory", rounds * len(MAKERS))
    above: dict[str, list[float]] = {name: [] for name in MAKERS}
    total: dict[str, list[float]] = {name: [] for name in MAKERS}
    for turn in range(rounds):
        for place, name in enumerate(MAKERS, 1):
            answer = memory_of(name, settings.quick)
            above[name].append(answer["peak_mib"] - answer["resident_mib"])
            total[name].append(answer["peak_mib"])
            progress(turn * len(MAKERS) + place)
    what = "all 3 layers, 2x32 tokens" if settings.quick else "all 30 layers, 4x128 tokens"
    variants = [Variant(name, lambda _: None, backend=backend_of(name, "cpu")) for name in MAKERS]
    for measured, samples in (("step above the model", above), ("whole process", total)):
        case = Case("peak-memory", f"{measured}, {what}", FLOOR, variants, "float32", "MiB")
        yield runner.describe(case, samples, settings.environment)


def memory_of(name: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, "-m", f"{__package__}.memory", name, *(["--quick"] if quick else [])]
    inherited = {key: value for key, value in os.environ.items() if key not in runner.ALLOCATOR}
    result = subprocess.run(
        command, cwd=ROOT, env={**inherited, **memory.ALLOCATOR}, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"memory of {name!r} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])
