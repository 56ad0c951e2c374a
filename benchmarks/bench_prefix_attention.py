"""prefix_attention against torch's attention over concatenated keys, forward and forward + backward, on a CPU.

The peer is what a user would write: ``scaled_dot_product_attention(query, cat([prefix, key]), cat([prefix, value]))``,
the concatenation being part of the work. "sdpa-ready" gets the keys concatenated before the clock starts; it is the
floor of the ratios, not a lower bound: it computes no gradient of a prefix by itself. A causal mask has to be explicit
for both, since the prefix is visible to every query.

    python -m benchmarks.run --only prefix_attention
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapter as fa

from . import runner
from .rows import Row
from .runner import Case, Settings, Variant


@dataclass(frozen=True)
class Shape:
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    prefix_len: int
    is_causal: bool = False

    def __str__(self) -> str:
        sizes = f"b{self.batch}-h{self.num_heads}-kv{self.num_kv_heads}-q{self.q_len}-s{self.kv_len}"
        return f"{sizes}-d{self.head_dim}-p{self.prefix_len}-{'causal' if self.is_causal else 'full'}"


DECODE = Shape(8, 9, 3, 1, 512, 64, 10)
QUICK = (Shape(1, 3, 1, 32, 32, 64, 10, True), DECODE)
SHAPES = (
    Shape(4, 9, 3, 256, 256, 64, 10, True),
    Shape(4, 9, 3, 256, 256, 64, 20, True),
    Shape(4, 9, 3, 256, 256, 64, 10),
    Shape(4, 9, 3, 256, 256, 64, 20),
    Shape(2, 12, 12, 512, 512, 64, 20, True),
    Shape(2, 12, 12, 512, 512, 64, 20),
    DECODE,
)
# What needs a gradient: prefix and query alone where the keys come from frozen layers without an adapter below.
DIRECTIONS = {
    "forward": (),
    "forward+backward": ("query", "key", "value", "prefix_key", "prefix_value", "gate"),
    "forward+backward frozen kv": ("query", "prefix_key", "prefix_value", "gate"),
}


def make_operands(shape: Shape) -> dict[str, Tensor]:
    """Random operands of both attention ops by name, with gates that are nowhere zero."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    keys = (shape.batch, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    bank = (1, shape.num_kv_heads, shape.prefix_len, shape.head_dim)
    return {
        "query": draw(shape.batch, shape.num_heads, shape.q_len, shape.head_dim),
        "key": draw(*keys),
        "value": draw(*keys),
        "prefix_key": draw(*bank),
        "prefix_value": draw(*bank),
        "gate": draw(1, shape.num_heads).abs() + 0.1,
    }


@dataclass(frozen=True)
class Form:
    """``fn`` on operands by name; ``differentiated`` are the operands whose gradients are taken."""

    fn: Callable[..., Tensor]
    operands: dict[str, Tensor]
    differentiated: tuple[str, ...]

    @classmethod
    def of(cls, fn: Callable[..., Tensor], operands: dict[str, Tensor], names: tuple[str, ...]) -> "Form":
        names = tuple(name for name in names if name in operands)
        leaves = {name: x.detach().clone().requires_grad_(name in names) for name, x in operands.items()}
        return cls(fn, leaves, names)

    def __call__(self, grad_out: Tensor) -> tuple[Tensor, ...]:
        out = self.fn(**self.operands)
        if not self.differentiated:
            return (out,)
        return (
            out,
            *torch.autograd.grad(out, [self.operands[name] for name in self.differentiated], grad_out),
        )


def with_prefix(prefix: Tensor, x: Tensor) -> Tensor:
    return torch.cat([prefix.expand(x.shape[0], -1, -1, -1), x], dim=2)


def forms(shape: Shape, operands: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Form]:
    """Every form by the name of its variant."""
    own = {name: x for name, x in operands.items() if name != "gate"}
    grouped = {"enable_gqa": shape.num_heads != shape.num_kv_heads}
    mask = None
    if shape.is_causal:
        mask = torch.ones(shape.q_len, shape.prefix_len + shape.kv_len, dtype=torch.bool).tril(
            shape.prefix_len
        )

    def single(**x: Tensor) -> Tensor:
        return fa.ops.prefix_attention(**x, is_causal=shape.is_causal, form="single", backend="cpp")

    def merge(**x: Tensor) -> Tensor:
        return fa.ops.prefix_attention(**x, is_causal=shape.is_causal, form="merge", backend="cpp")

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **grouped)

    def concatenated(query, key, value, prefix_key, prefix_value):
        return sdpa(query, with_prefix(prefix_key, key), with_prefix(prefix_value, value))

    ready = {
        "query": own["query"],
        "key": with_prefix(own["prefix_key"], own["key"]),
        "value": with_prefix(own["prefix_value"], own["value"]),
    }
    return {
        "fastadapter-cpp": Form.of(single, own, names),
        "fastadapter-cpp-merge": Form.of(merge, own, names),
        "sdpa": Form.of(concatenated, own, names),
        "sdpa-ready": Form.of(sdpa, ready, names),
    }


def require_agreement(entry: str, found: dict[str, Form], grad_out: Tensor, names: tuple[str, ...]) -> None:
    """No speed is reported of a wrong result: every one of ``names`` gives what the last of them gives."""
    *others, judge = names
    wanted = found[judge](grad_out)
    for name in others:
        for mine, exact in zip(found[name](grad_out), wanted, strict=True):
            distance = (mine - exact).abs().max() / exact.abs().max()
            if not distance <= 1e-4:
                raise RuntimeError(f"{entry}: {name} is off by {distance:.2g} of the largest value")


def cases(
    settings: Settings,
    entry: str,
    make_forms: Callable[[Shape, dict[str, Tensor], tuple[str, ...]], dict[str, Form]],
    agreeing: tuple[str, ...],
    floor: str,
) -> Iterator[Case]:
    """Interleaved cases on the CPU in fp32; ``agreeing`` are the forms that compute the same."""
    for shape in QUICK if settings.quick else SHAPES:
        operands = make_operands(shape)
        grad_out = torch.randn(operands["query"].shape, generator=torch.Generator().manual_seed(1))
        for direction, names in DIRECTIONS.items():
            if shape.q_len == 1 and names:
                continue  # nobody trains on a single position
            found = make_forms(shape, operands, names)
            require_agreement(entry, found, grad_out, agreeing)
            yield Case(
                entry,
                f"{direction} {shape}",
                floor=floor,
                variants=[
                    Variant(name, lambda _, form=form, grad=grad_out: form(grad))
                    for name, form in found.items()
                ],
                unit="us",
                sample_seconds=0.0 if settings.quick else 0.05,
                warmup=1 if settings.quick else 3,
            )


def entry(settings: Settings) -> Iterator[list[Row]]:
    agreeing = ("fastadapter-cpp", "fastadapter-cpp-merge", "sdpa")
    for case in cases(settings, "prefix_attention", forms, agreeing, "sdpa-ready"):
        yield runner.measure(case, settings)
