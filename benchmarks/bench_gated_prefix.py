"""gated_prefix against what a user would write, forward and forward + backward.

Floor: a copy that moves as many bytes as the op has to (reads base and query, writes out; backward reads grad_out
and query, writes grad_query; the prefix is small). Everything is warm, as after the base attention. Layouts: "bhtd"
is contiguous, "bthd" what transformers' attention really hands over (heads inside, transposed).

    python -m benchmarks.run --only gated_prefix
    pytest benchmarks/pytest_gated_prefix.py     # pytest-benchmark: one variant at a time, for a profiler or a diff
"""

import functools
import sys
from collections.abc import Callable, Collection, Iterator
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
    head_dim: int
    prefix_len: int
    layout: str = "bhtd"

    def __str__(self) -> str:
        sizes = f"b{self.batch}-h{self.num_heads}-kv{self.num_kv_heads}-q{self.q_len}-d{self.head_dim}"
        return f"{sizes}-p{self.prefix_len}-{self.layout}"

    @property
    def elements(self) -> int:
        return self.batch * self.num_heads * self.q_len * self.head_dim


TRAINING = Shape(4, 9, 3, 256, 64, 10)
MODEL_LAYOUT = Shape(4, 9, 3, 256, 64, 10, "bthd")
DECODE = Shape(8, 9, 3, 1, 64, 10)
SHAPES = (TRAINING, MODEL_LAYOUT, DECODE)


@dataclass(frozen=True)
class Inputs:
    base: Tensor
    query: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    gate: Tensor
    grad_out: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.base, self.query, self.prefix_key, self.prefix_value, self.gate)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, *, grad: bool) -> Inputs:
    """Random operands with gates that are nowhere zero."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype, device=device)

    def draw_activation() -> Tensor:
        if shape.layout == "bhtd":
            return draw(shape.batch, shape.num_heads, shape.q_len, shape.head_dim)
        return draw(shape.batch, shape.q_len, shape.num_heads, shape.head_dim).transpose(1, 2)

    prefix = (1, shape.num_kv_heads, shape.prefix_len, shape.head_dim)
    gate = draw(1, shape.num_heads, dtype=torch.float32).abs() + 0.1
    inputs = Inputs(
        draw_activation(), draw_activation(), draw(*prefix), draw(*prefix), gate, draw_activation()
    )
    for operand in inputs.operands:
        operand.requires_grad_(grad)
    return inputs


def eager(base: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """The plain form: what a user would write."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    probs = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return base + gate.tanh().to(base.dtype)[..., None, None] * (probs @ value)


def sdpa(base: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """The short form on torch's own attention."""
    batch = query.shape[0]
    key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return base + gate.tanh().to(base.dtype)[..., None, None] * attended


PEERS: dict[str, Callable[..., Tensor]] = {"eager": eager, "sdpa": sdpa}


def forms(device: str) -> dict[str, Callable[..., Tensor]]:
    """Every form of the op that runs on ``device``, by the name of its variant; compiled ones compile on use."""
    fast = "triton" if device == "cuda" else "cpp"
    own = {f"fastadapter-{b}": functools.partial(fa.ops.gated_prefix, backend=b) for b in (fast, "reference")}
    # every shape its own graph (dynamic=False), and an error rather than eager when there are too many (fullgraph)
    compiled = {name: torch.compile(fn, dynamic=False, fullgraph=True) for name, fn in PEERS.items()}
    return own | PEERS | {f"{name}-compiled": fn for name, fn in compiled.items()}


def forward(fn: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return fn(*inputs.operands)


def forward_backward(fn: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    out = fn(*inputs.operands)
    return (out, *torch.autograd.grad(out, inputs.operands, inputs.grad_out))


PASSES = {"forward": forward, "forward+backward": forward_backward}


def bytes_moved(shape: Shape, dtype: torch.dtype, direction: str) -> int:
    """What has to move: three activations a pass, and the prefix."""
    prefix = 2 * shape.num_kv_heads * shape.prefix_len * shape.head_dim
    passes = 2 if direction == "forward+backward" else 1
    return passes * (3 * shape.elements + prefix) * dtype.itemsize


def copy_variant(bytes_moved: int, device: str) -> Variant:
    """A copy that moves this many bytes, half of them read and half written."""
    source = torch.randn(bytes_moved // 8, device=device)
    target = torch.empty_like(source)
    return Variant("copy", lambda _: target.copy_(source))


def usable_forms(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    direction: str,
    inputs: Inputs,
    wanted_forms: Collection[str] | None = None,
) -> dict[str, Callable[..., Tensor]]:
    """The forms, all or those asked for, that agree with the reference; no speed is reported of a wrong result.

    A peer that cannot run here or is wrong is left out and named on stderr. Ours must run and be right.
    """
    run = PASSES[direction]
    wide = make_inputs(shape, dtype, device, grad=False)
    wide_operands = [x.double().requires_grad_(direction != "forward") for x in wide.operands]
    exact_op = functools.partial(fa.ops.gated_prefix, backend="reference")
    wanted = run(exact_op, Inputs(*wide_operands, wide.grad_out.double()))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    usable = {}
    for name, fn in forms(device).items():
        if wanted_forms is not None and name not in wanted_forms:
            continue
        try:
            found = run(fn, inputs)
            for mine, exact in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
                distance = (mine.double() - exact).abs().max() / exact.abs().max()
                if not distance <= tolerance:
                    raise RuntimeError(f"off by {distance:.2g} of the largest value")
        except Exception as error:
            if name.startswith("fastadapter"):
                raise
            print(f"gated_prefix, {direction} {shape}: {name} is left out: {error}", file=sys.stderr)
            continue
        usable[name] = fn
    return usable


def cases(settings: Settings) -> Iterator[Case]:
    """Interleaved cases on the CPU in fp32."""
    for shape in (TRAINING, DECODE) if settings.quick else SHAPES:
        for direction, run in PASSES.items():
            if direction == "forward+backward" and shape.q_len == 1:
                continue  # nobody trains on a single position
            if direction == "forward" and shape is TRAINING and settings.quick:
                continue
            inputs = make_inputs(shape, torch.float32, "cpu", grad=direction != "forward")
            usable = usable_forms(shape, torch.float32, "cpu", direction, inputs)
            moved = bytes_moved(shape, torch.float32, direction)
            variants = [copy_variant(moved, "cpu")]
            for name, fn in usable.items():
                variants.append(Variant(name, lambda _, fn=fn, run=run, inputs=inputs: run(fn, inputs)))
            yield Case(
                "gated_prefix",
                f"{direction} {shape}",
                floor="copy",
                variants=variants,
                unit="us",
                bytes_moved=moved,
                sample_seconds=0.0 if settings.quick else 0.05,
                warmup=1 if settings.quick else 5,
            )


def entry(settings: Settings) -> Iterator[list[Row]]:
    for case in cases(settings):
        yield runner.measure(case, settings)
