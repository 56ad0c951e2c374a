"""What a training step costs as the prefix grows, and how many tokens a second it makes as the batch grows.

LLaMA-Adapter in all layers of SmolLM2-135M's shape; forward and backward of the model's own loss over all tokens.

    python -m benchmarks.run --only prefix-length batch
"""

from collections.abc import Iterator

from . import models, runner, variants
from .rows import Row
from .runner import Case, Meter, Settings, Variant

SHOWN = (variants.FLOOR, "fastadapter", "PEFT")


def _case(entry: str, shape: str, settings: Settings, prefix_len: int, batch: int, length: int) -> Case:
    model = models.build(small=settings.quick)
    layers = len(model.model.layers)
    ids = models.tokens(model, batch, length)
    makers = {
        variants.FLOOR: models.with_input_gradient,
        "fastadapter": lambda model, layers: models.with_fastadapter(model, layers, prefix_len),
        "PEFT": lambda model, layers: models.with_peft(model, layers, prefix_len),
    }
    built = {name: makers[name](model, layers).train() for name in SHOWN}
    adapted = {name: (built[name], name != "PEFT") for name in SHOWN if name != variants.FLOOR}
    models.require_equal_losses(adapted, ids, 1e-4)
    timed = [
        Variant(
            name,
            lambda _, name=name: variants.runs_of(name, models.training_step)(built[name], ids),
            backend=variants.backend_of(name, "cpu"),
        )
        for name in SHOWN
    ]
    tokens = {"unit": "tokens/s", "tokens": batch * length} if entry == "batch" else {"unit": "ms"}
    return Case(entry, shape, variants.FLOOR, timed, warmup=1, **tokens)


def _measured(case: Case, settings: Settings, meter: Meter | None, **numbers: float) -> list[Row]:
    found = runner.measure(case, settings, meter)
    for row in found:
        row.extra.update(numbers)
    return found


def prefix_length(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    batch, length = (2, 8) if settings.quick else (4, 64)
    for prefix_len in (2, 10) if settings.quick else (1, 10, 30, 100, 300):
        shape = f"prefix {prefix_len}, all layers, {batch}x{length} tokens"
        case = _case("prefix-length", shape, settings, prefix_len, batch, length)
        yield _measured(case, settings, meter, prefix_len=prefix_len)


def batch(settings: Settings, meter: Meter | None = None) -> Iterator[list[Row]]:
    length = 8 if settings.quick else 32
    for batch in (1, 2) if settings.quick else (1, 4, 16):
        shape = f"batch {batch}, all layers, {batch}x{length} tokens"
        case = _case("batch", shape, settings, models.PREFIX_LEN, batch, length)
        yield _measured(case, settings, meter, batch=batch)
