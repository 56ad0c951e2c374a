"""gated_prefix_attention in one pass against torch's attention with the gated term added to it, on a CPU.

"sdpa+gated_prefix" is the route of our own integrations: torch's attention, then the C++ epilogue. "sdpa+sdpa" is what
a user would write without this library. The floor is the base attention alone: what the term is added to.

    python -m benchmarks.run --only gated_prefix_attention
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

import fastadapter as fa

from . import runner
from .bench_prefix_attention import Form, Shape, cases
from .rows import Row
from .runner import Settings


def forms(shape: Shape, operands: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Form]:
    """Every form by the name of its variant."""
    grouped = {"enable_gqa": shape.num_heads != shape.num_kv_heads}

    def single(**x: Tensor) -> Tensor:
        return fa.ops.gated_prefix_attention(**x, is_causal=shape.is_causal, backend="cpp")

    def base(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=shape.is_causal, **grouped)

    def epilogue(query, key, value, prefix_key, prefix_value, gate):
        return fa.ops.gated_prefix(
            base(query, key, value), query, prefix_key, prefix_value, gate, backend="cpp"
        )

    def twice(query, key, value, prefix_key, prefix_value, gate):
        prefix = (x.expand(query.shape[0], -1, -1, -1) for x in (prefix_key, prefix_value))
        term = F.scaled_dot_product_attention(query, *prefix, **grouped)
        return base(query, key, value) + gate.tanh()[..., None, None] * term

    return {
        "fastadapter-cpp": Form.of(single, operands, names),
        "sdpa+gated_prefix": Form.of(epilogue, operands, names),
        "sdpa+sdpa": Form.of(twice, operands, names),
        "sdpa": Form.of(base, {name: operands[name] for name in ("query", "key", "value")}, names),
    }


def entry(settings: Settings) -> Iterator[list[Row]]:
    agreeing = ("fastadapter-cpp", "sdpa+gated_prefix", "sdpa+sdpa")
    for case in cases(settings, "gated_prefix_attention", forms, agreeing, "sdpa"):
        yield runner.measure(case, settings)
