"""GPU cases of whole training steps, bf16: one layer that is nearly all attention, four layers of 8B, SmolLM2."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from .bench_llama_adapter import training_cases
from .gpu_tools import Bench
from .rows import Row

LLAMA_8B = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 32000,
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION_ALONE = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 512}


def _step(
    bench: Bench, entry: str, batch: int, length: int, changes: dict[str, Any] | None
) -> Iterator[list[Row]]:
    shape = None if changes is None else {**(SMALL if bench.dry else LLAMA_8B), **changes}
    if bench.dry:
        batch, length = 2, 16
    for case in training_cases(bench.settings, batch, length, bench.dtype, entry, shape):
        yield bench.measure(case)


CASES: dict[str, Callable[[Bench], Iterator[list[Row]]]] = {
    "step_attention": functools.partial(
        _step, entry="step attention block", batch=4, length=2048, changes=ATTENTION_ALONE
    ),
    "step_8b": functools.partial(
        _step, entry="step 8B shape", batch=4, length=2048, changes={"num_hidden_layers": 4}
    ),
    "step_smollm2": functools.partial(_step, entry="step SmolLM2", batch=8, length=512, changes=None),
}
