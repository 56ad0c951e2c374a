"""Whole models on a GPU: training steps, decoding and the commands, each case in a process of its own.

    python -m benchmarks.gpu_models CASE [--dry-run]        # rows as JSON lines; status 2 without a GPU

A case takes a ``gpu_tools.Bench`` and yields rows as they are measured, within 40 s on a current card, compiling
included. Weights are random and made on the device. A variant that cannot run is named on stderr and left out; one of
ours that cannot also ends the case with an error, after the rows of the others. ``--dry-run`` walks through a case on
a CPU with tiny sizes and measures nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import fastadapter as fa

from . import bench_llama_adapter, bench_methods, gpu_commands, gpu_tools, models, rows, runner, variants
from .gpu_tools import Bench
from .rows import Row
from .runner import Case, Settings, Variant

ROUNDS = 11
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 64,
}  # fmt: skip
# Compiling stops here, so that what is compiled is also measured before the case's time is over.
COMPILE_SECONDS = 24
Rows = Iterator[Row]


def settings_of(bench: Bench) -> Settings:
    return Settings(
        rounds=1 if bench.dry else ROUNDS,
        quick=bench.dry,
        device=bench.device,
        environment=rows.environment(bench.device),
    )


def shape_of(bench: Bench, shape: Mapping[str, Any]) -> Mapping[str, Any]:
    return TINY if bench.dry else shape


# ---- training steps


def to_the_lowest_adapter(model: nn.Module, layers: int) -> nn.Module:
    """The least that any LLaMA-Adapter asks of the frozen model: gradients down to the lowest attention's output.

    Less than ``models.with_input_gradient`` by that layer's projections and attention.
    """
    model = models.share(model)
    lowest = model.model.layers[len(model.model.layers) - layers].self_attn.o_proj
    lowest.register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(),))
    return model


def from_embeddings(model: nn.Module) -> nn.Module:
    """The frozen floor with its gradient's end outside the blocks, which are compiled one by one."""
    model = models.share(model)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    return model


def rows_of(bench: Bench, case: Case, settings: Settings) -> Rows:
    yield from dataclasses.replace(bench, rounds=settings.rounds).measure(case)


def measured(bench: Bench, case: Case, settings: Settings) -> Rows:
    """Time of a case's variants, then their peak memory above what is allocated between steps."""
    yield from rows_of(bench, case, settings)
    yield from peak_memory(bench, case, settings)


def peak_memory(bench: Bench, case: Case, settings: Settings) -> Rows:
    """Peak of each variant above what is allocated between steps."""
    if bench.warm:
        return
    peaks = {variant.name: [peak_mib(bench, variant)] for variant in case.variants}
    memory = dataclasses.replace(case, entry=f"{case.entry}, peak memory", unit="MiB")
    yield from runner.describe(memory, peaks, settings.environment)


def peak_mib(bench: Bench, variant: Variant) -> float:
    if bench.device != "cuda":
        variant.run(variant.prepare())
        return 1.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.run(variant.prepare())
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def llama_adapter_step(bench: Bench, entry: str, shape: Mapping[str, Any], batch: int, length: int) -> Rows:
    settings = settings_of(bench)
    batch, length = (2, 16) if bench.dry else (batch, length)
    makers = {**variants.MAKERS, "(to the lowest adapter)": to_the_lowest_adapter}
    cases = bench_llama_adapter.training_cases(
        settings, batch, length, bench.dtype, entry, shape_of(bench, shape), makers
    )
    for case in cases:
        yield from measured(bench, case, settings)


def step_8b(bench: Bench) -> Rows:
    """Four layers of 8B's shape, 4 x 2048 tokens, LLaMA-Adapter in all of them."""
    yield from llama_adapter_step(bench, "8B-shape step, LLaMA-Adapter", LLAMA_8B, 4, 2048)


def step_smollm2(bench: Bench) -> Rows:
    """SmolLM2-135M's shape, 8 x 512 tokens, LLaMA-Adapter in all layers."""
    yield from llama_adapter_step(bench, "SmolLM2-shape step, LLaMA-Adapter", models.SMOLLM2_135M, 8, 512)


def step_compiled(bench: Bench) -> Rows:
    """The same, every block compiled: one graph serves all blocks that have the same sizes."""
    settings = settings_of(bench)
    batch, length = (2, 16) if bench.dry else (8, 512)
    shape = shape_of(bench, models.SMOLLM2_135M)
    model = models.build(dtype=bench.dtype, device=bench.device, shape=shape)
    layers, ids = len(model.model.layers), models.tokens(model, batch, length)
    built = {
        "frozen model": from_embeddings(model),
        "frozen model, compiled": from_embeddings(model),
        "fastadapter": models.with_fastadapter(model, layers),
        "fastadapter, compiled": models.with_fastadapter(model, layers),
    }

    def prepare(name: str) -> Callable[[], Any]:
        adapted = built[name].train()
        if name.endswith("compiled"):
            for block in adapted.model.layers:
                block.compile(dynamic=False, fullgraph=True, **({"backend": "eager"} if bench.dry else {}))

        def run() -> Any:
            with contextlib.nullcontext() if name.startswith("fastadapter") else models.without_hook():
                return models.training_step(adapted, ids)

        return run

    usable, failed = first_calls({name: prepare(name) for name in built})
    case = Case(
        "SmolLM2-shape step, LLaMA-Adapter", f"blocks compiled or not, {batch}x{length} tokens", "frozen model",
        [Variant(name, lambda _, run=run: run(), backend=backend_of(name, bench)) for name, run in usable.items()],
        dtype_of(bench), warmup=1,
    )  # fmt: skip
    yield from measured(bench, case, settings)
    raise_if_ours(failed)


def step_methods(bench: Bench) -> Rows:
    """Prefix tuning, soft prompts and Houlsby's bottlenecks on SmolLM2-135M's shape, against PEFT or plain modules."""
    settings = dataclasses.replace(settings_of(bench), rounds=1 if bench.dry else 7)
    batch, length = (2, 16) if bench.dry else (8, 512)
    shape = shape_of(bench, models.SMOLLM2_135M)
    for case in bench_methods.method_cases(settings, batch, length, bench.dtype, shape):
        yield from measured(bench, dataclasses.replace(case, entry="SmolLM2-shape step"), settings)


# ---- decoding


class Decoding:
    """One token after the other behind a prompt, with a static cache; every tensor stays where it is.

    Args:
        model: with or without an adapter.
        chosen: the adapter of every row; ``None``: what is active acts on all.
        hooked: whether our hook is installed meanwhile; the bare model should not pay for it.
    """

    def __init__(
        self, model: nn.Module, ids: torch.Tensor, new_tokens: int, chosen: Sequence[str] | None, hooked: bool
    ):
        from transformers import StaticCache

        self.model, self.call, self.chosen, self.hooked = model, model, chosen, hooked
        self.prompt_len = ids.shape[1]
        # a few more than are counted: for warming up and capturing
        slots = self.prompt_len + new_tokens + 8
        self.cache = StaticCache(config=model.config, max_cache_len=slots)
        self.slots = torch.arange(slots, device=ids.device)
        self.position = torch.full((1,), self.prompt_len, device=ids.device)
        self.keyword = models.cache_keyword(model)
        with self.surroundings():
            logits = model(input_ids=ids, use_cache=True, **{self.keyword: self.cache}).logits
            self.first = logits[:, -1:].argmax(-1)
        self.token = self.first.clone()

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if not self.hooked:
                stack.enter_context(models.without_hook())
            if self.chosen is not None:
                stack.enter_context(fa.rows(self.model, self.chosen))
            yield

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt_len)
        self.position.fill_(self.prompt_len)
        self.token.copy_(self.first)

    def step(self) -> torch.Tensor:
        # Without a mask transformers lets a single query see the slots that are still empty; from one that is
        # (batch, length) it would read whether all is seen, and wait for that.
        seen = (self.slots <= self.position)[None, None, None]
        out = self.call(
            input_ids=self.token, attention_mask=seen, use_cache=True, **{self.keyword: self.cache}
        )
        self.position += 1
        return self.token.copy_(out.logits[:, -1:].argmax(-1))

    def run(self, steps: int, step: Callable[[], Any] | None = None) -> None:
        with self.surroundings():
            for _ in range(steps):
                (step or self.step)()


def adapted_for_decoding(model: nn.Module, adapters: int) -> nn.Module:
    """A model with LLaMA-Adapters ``a0`` to ``a<adapters - 1>`` whose gates are open."""
    adapted = models.share(model)
    for number in range(adapters):
        fa.attach(adapted, fa.LlamaAdapterConfig(models.PREFIX_LEN), f"a{number}")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(models.GATE)
    fa.set_active(adapted, "a0")
    return adapted.eval()


def decoders(bench: Bench, shape: Mapping[str, Any], batch: int, new_tokens: int) -> dict[str, Callable]:
    """Makers of what decodes, by name: the bare model, one adapter for all rows, an adapter of its own for each."""
    model = models.build(dtype=bench.dtype, device=bench.device, shape=shape_of(bench, shape)).eval()
    ids = models.tokens(model, batch, 4 if bench.dry else 128)
    adapted = adapted_for_decoding(model, batch)
    names = [f"a{row}" for row in range(batch)]
    makers = {
        "bare model": lambda: Decoding(model, ids, new_tokens, None, hooked=False),
        "fastadapter": lambda: Decoding(adapted, ids, new_tokens, None, hooked=True),
    }
    if batch > 1:
        makers["fastadapter, an adapter per row"] = lambda: Decoding(adapted, ids, new_tokens, names, True)
    return makers


def recorded(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """``step`` as a CUDA graph; on a CPU ``step`` itself."""
    if device != "cuda":
        return step
    variant = Variant("", lambda _: step())
    replay = gpu_tools.graphed(variant)
    return lambda: replay(None)


def graphed(decoding: Decoding, device: str) -> Callable[[], Any]:
    """A decoding step as a CUDA graph; on a CPU the step itself."""
    with decoding.surroundings():
        decoding.rewind()
        return recorded(decoding.step, device)


def compiled(decoding: Decoding, dry: bool) -> Callable[[], Any]:
    """A decoding step under ``torch.compile(mode="reduce-overhead")``, called often enough to be recorded."""
    how: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "reduce-overhead"}
    decoding.call = torch.compile(decoding.model, fullgraph=True, dynamic=False, **how)
    decoding.rewind()
    decoding.run(3)
    return decoding.step


def decode(
    bench: Bench, entry: str, shape: Mapping[str, Any], batch: int, new_tokens: int, forms: Sequence[str]
) -> Rows:
    """Tokens a second of one forward call and argmax per token, the prompt's forward not timed.

    Not ``model.generate``: that adds about a millisecond of its own per token, which would hide an adapter's cost.
    """
    settings = dataclasses.replace(settings_of(bench), rounds=1 if bench.dry else 7)
    new_tokens, batch = (2, min(batch, 3)) if bench.dry else (new_tokens, batch)
    makers = decoders(bench, shape, batch, new_tokens)
    for form in forms:
        made: dict[str, tuple[Decoding, Callable[[], Any]]] = {}

        def make(name: str, form: str = form, made: dict = made) -> None:
            decoding = makers[name]()
            make_step = {
                "eager": lambda: decoding.step,
                "CUDA graph": lambda: graphed(decoding, bench.device),
                "reduce-overhead": lambda: compiled(decoding, bench.dry),
            }
            made[name] = decoding, make_step[form]()

        calls = {name: (lambda name=name, make=make: make(name)) for name in makers}
        usable, failed = first_calls(calls, COMPILE_SECONDS)
        variants = [
            Variant(
                name,
                lambda _, pair=made[name]: pair[0].run(new_tokens, pair[1]),
                prepare=made[name][0].rewind,
                backend=backend_of(name, bench),
            )
            for name in usable
        ]
        what = f"{form}, batch {batch}, {makers_prompt(bench)} + {new_tokens} tokens, static cache"
        case = Case(
            entry, what, "bare model", variants, dtype_of(bench), "tokens/s", tokens=batch * new_tokens, warmup=1
        )  # fmt: skip
        yield from rows_of(bench, case, settings)
        raise_if_ours(failed)


def makers_prompt(bench: Bench) -> int:
    return 4 if bench.dry else 128


def decode_8b(bench: Bench) -> Rows:
    for batch in (1, 64):
        yield from decode(bench, "8B-shape decode", LLAMA_8B, batch, 32, ("eager", "CUDA graph"))


def decode_smollm2(bench: Bench) -> Rows:
    yield from decode(bench, "SmolLM2-shape decode", models.SMOLLM2_135M, 1, 16, ("eager", "CUDA graph"))


def decode_smollm2_64(bench: Bench) -> Rows:
    yield from decode(bench, "SmolLM2-shape decode", models.SMOLLM2_135M, 64, 16, ("eager", "CUDA graph"))


def decode_compiled(bench: Bench) -> Rows:
    yield from decode(bench, "8B-shape decode", LLAMA_8B, 1, 32, ("reduce-overhead",))


def decode_compiled_64(bench: Bench) -> Rows:
    yield from decode(bench, "8B-shape decode", LLAMA_8B, 64, 32, ("reduce-overhead",))


def generate_methods(bench: Bench) -> Rows:
    """``model.generate`` with every method on SmolLM2-135M's shape: every token waits for Python."""
    settings = dataclasses.replace(settings_of(bench), rounds=1 if bench.dry else 5)
    shape = shape_of(bench, models.SMOLLM2_135M)
    for case in bench_methods.generate_cases(settings, bench.dtype, 2 if bench.dry else 16, shape):
        yield from rows_of(bench, dataclasses.replace(case, entry="SmolLM2-shape generate"), settings)


# ---- what the cases share


def first_calls(
    calls: Mapping[str, Callable[[], Any]], seconds: float = float("inf")
) -> tuple[dict[str, Callable[[], Any]], dict[str, Exception]]:
    """Call each once, to compile it, and sort out those that fail; after ``seconds`` no further one is begun."""
    usable: dict[str, Callable[[], Any]] = {}
    failed: dict[str, Exception] = {}
    started = time.monotonic()
    for name, call in calls.items():
        if usable and time.monotonic() - started > seconds:
            print(f"{name}: no time left to compile it", file=sys.stderr)
            continue
        try:
            call()
            usable[name] = call
        except Exception as error:
            failed[name] = error
            print(f"{name} is left out: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    return usable, failed


def raise_if_ours(failed: Mapping[str, Exception]) -> None:
    for name, error in failed.items():
        if name.startswith("fastadapter"):
            raise RuntimeError(f"{name} cannot run here") from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def backend_of(name: str, bench: Bench) -> str:
    return variants.backend_of(name, bench.device)


def dtype_of(bench: Bench) -> str:
    return str(bench.dtype).removeprefix("torch.")


CASES: dict[str, Callable[[Bench], Rows]] = {
    "step-8b": step_8b,
    "step-smollm2": step_smollm2,
    "step-compiled": step_compiled,
    "step-methods": step_methods,
    "decode-8b": decode_8b,
    "decode-smollm2": decode_smollm2,
    "decode-smollm2-64": decode_smollm2_64,
    "generate-methods": generate_methods,
    "decode-compiled": decode_compiled,
    "decode-compiled-64": decode_compiled_64,
    **gpu_commands.CASES,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--dry-run", action="store_true", help="walk through it on a CPU, tiny sizes")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu_models: no GPU; nothing was run", file=sys.stderr)
        return 2
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cpu" if args.dry_run else "cuda"
    bench = Bench(device, args.dry_run, environment=rows.environment(device))
    for row in CASES[args.case](bench):
        print(json.dumps(dataclasses.asdict(row)), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
