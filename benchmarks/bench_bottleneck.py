"""bottleneck against what a user would write, forward and forward + backward, residual = x, gelu, fp32.

Floor: a copy that moves as many bytes as the op has to (reads x, writes out; backward reads grad_out and x, writes
grad_x; the parameters once a pass and their gradients). Everything is warm. The decoding shape has a bank with an
entry of its own for each row, where peers loop or use batched products.

    python -m benchmarks.run --only bottleneck
    pytest benchmarks/pytest_bottleneck.py     # pytest-benchmark: one variant at a time, for a profiler or a diff
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
from .bench_gated_prefix import copy_variant
from .rows import Row
from .runner import Case, Settings, Variant


@dataclass(frozen=True)
class Shape:
    batch: int
    q_len: int
    hidden: int
    size: int
    num_entries: int = 1

    def __str__(self) -> str:
        bank = f"-n{self.num_entries}" if self.num_entries > 1 else ""
        return f"b{self.batch}-q{self.q_len}-c{self.hidden}-r{self.size}{bank}"


WIDE = Shape(4, 256, 576, 64)
NARROW = Shape(4, 256, 384, 24)
DECODE = Shape(8, 1, 576, 64, 8)
SHAPES = (WIDE, NARROW, DECODE)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor
    up_bias: Tensor
    row_ids: Tensor | None
    grad_out: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.x, self.down_weight, self.up_weight, self.down_bias, self.up_bias)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, *, grad: bool) -> Inputs:
    """Random operands; the bank's entries are used in no order."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, factor: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype, device=device) * factor

    n, hidden, size = shape.num_entries, shape.hidden, shape.size
    lead = (n,) if n > 1 else ()
    ids = torch.randperm(n, generator=generator, device=device).to(torch.int32) if n > 1 else None
    inputs = Inputs(
        draw(shape.batch, shape.q_len, hidden),
        draw(*lead, size, hidden, factor=hidden**-0.5),
        draw(*lead, hidden, size, factor=size**-0.5),
        draw(*lead, size),
        draw(*lead, hidden),
        ids,
        draw(shape.batch, shape.q_len, hidden),
    )
    for operand in inputs.operands:
        operand.requires_grad_(grad)
    return inputs


def ours(backend: str, x: Tensor, *parameters: Tensor, row_ids: Tensor | None = None) -> Tensor:
    return fa.ops.bottleneck(x, *parameters, residual=x, row_ids=row_ids, backend=backend)


def eager(x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor) -> Tensor:
    """The plain form: what a user would write."""
    return x + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


def gemm_pair(x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor) -> Tensor:
    """Two library products that take biases and residual along, which leaves the activation."""
    rows = x.flatten(0, 1)
    hidden = F.gelu(torch.addmm(down_bias, rows, down.t()))
    return torch.addmm(rows + up_bias, hidden, up.t()).view_as(x)


def modules(x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor) -> Tensor:
    """As adapter libraries do it: projections, scaling, dropout and residual are modules or steps of their own."""
    hidden = F.gelu(F.linear(x, down, down_bias))
    term = F.dropout(F.linear(hidden, up, up_bias) * 1.0, p=0.0, training=True)
    return term + x


def batched(x, down, up, down_bias, up_bias, row_ids):
    """Every row's own adapter by batched products over gathered weights."""
    ids = row_ids.long()
    hidden = F.gelu(torch.baddbmm(down_bias[ids].unsqueeze(1), x, down[ids].mT))
    return x + torch.baddbmm(up_bias[ids].unsqueeze(1), hidden, up[ids].mT)


def loop(x, down, up, down_bias, up_bias, row_ids):
    """Every row's own adapter, one row after the other."""
    rows = [eager(row, down[i], up[i], down_bias[i], up_bias[i]) for row, i in zip(x, row_ids.tolist())]
    return torch.stack(rows)


def forms(shape: Shape, inputs: Inputs) -> dict[str, Callable[..., Tensor]]:
    """Every form of the op for this shape, by the name of its variant; compiled ones compile on use."""
    ids = inputs.row_ids
    found: dict[str, Callable[..., Tensor]] = {
        f"fastadapter-{b}": functools.partial(ours, b, row_ids=ids) for b in ("cpp", "reference")
    }
    peers = {"eager": eager, "gemm-pair": gemm_pair, "modules": modules}
    if ids is not None:
        peers = {
            name: functools.partial(fn, row_ids=ids) for name, fn in (("batched", batched), ("loop", loop))
        }
    first = "eager" if ids is None else "batched"
    return found | peers | {f"{first}-compiled": torch.compile(peers[first])}


def forward(fn: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    return (fn(*inputs.operands),)


def forward_backward(fn: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    out = fn(*inputs.operands)
    return (out, *torch.autograd.grad(out, inputs.operands, inputs.grad_out))


PASSES = {"forward": forward, "forward+backward": forward_backward}


def bytes_moved(shape: Shape, dtype: torch.dtype, direction: str) -> int:
    """What has to move: two activations forward, three backward, the parameters and their gradients."""
    tokens = shape.batch * shape.q_len
    parameters = shape.num_entries * (2 * shape.hidden * shape.size + shape.hidden + shape.size)
    backward = direction == "forward+backward"
    activations = (2 + 3 * backward) * tokens * shape.hidden
    return (activations + (1 + 2 * backward) * parameters) * dtype.itemsize


def usable_forms(
    shape: Shape, direction: str, inputs: Inputs, wanted_forms: Collection[str] | None = None
) -> dict[str, Callable[..., Tensor]]:
    """The forms, all or those asked for, that agree with the reference in fp64; no speed is reported of a wrong result.

    A peer that cannot run here or is wrong is left out and named on stderr. Ours must run and be right.
    """
    run = PASSES[direction]
    wide = make_inputs(shape, inputs.x.dtype, "cpu", grad=False)
    operands = [x.double().requires_grad_(direction != "forward") for x in wide.operands]
    exact = Inputs(*operands, wide.row_ids, wide.grad_out.double())
    wanted = run(functools.partial(ours, "reference", row_ids=wide.row_ids), exact)
    usable = {}
    for name, fn in forms(shape, inputs).items():
        if wanted_forms is not None and name not in wanted_forms:
            continue
        try:
            for mine, right in zip(run(fn, inputs), wanted, strict=True):
                distance = (mine.double() - right).abs().max() / right.abs().max()
                if not distance <= 1e-4:
                    raise RuntimeError(f"off by {distance:.2g} of the largest value")
        except Exception as error:
            if name.startswith("fastadapter"):
                raise
            print(f"bottleneck, {direction} {shape}: {name} is left out: {error}", file=sys.stderr)
            continue
        usable[name] = fn
    return usable


def cases(settings: Settings) -> Iterator[Case]:
    """Interleaved cases on the CPU in fp32."""
    for shape in (NARROW, DECODE) if settings.quick else SHAPES:
        for direction, run in PASSES.items():
            if direction == "forward+backward" and shape.q_len == 1:
                continue  # nobody trains on a single position
            inputs = make_inputs(shape, torch.float32, "cpu", grad=direction != "forward")
            moved = bytes_moved(shape, torch.float32, direction)
            variants = [copy_variant(moved, "cpu")]
            for name, fn in usable_forms(shape, direction, inputs).items():
                variants.append(Variant(name, lambda _, fn=fn, run=run, inputs=inputs: run(fn, inputs)))
            yield Case(
                "bottleneck",
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
