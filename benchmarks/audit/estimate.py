"""How long a call would take on a GPU that is not there: ``python -m benchmarks.audit.estimate OP DIRECTION``.

Every launch of the call is compiled and a few of its programs are walked through (:mod:`.walk`). Of a launch are known:

- how long a warp takes alone: every dependency, barrier and memory access of its loops, at unloaded latencies;
- what it occupies meanwhile: issue slots and arithmetic pipes, special functions, matrix units, shared memory. Warps
  of a scheduler wait for each other there: mean value analysis of a closed queueing network (Schweitzer's
  approximation), with as many warps as registers and shared memory let in, wave by wave;
- bytes from the cache, at ``cache_terabytes_per_s``, and from memory, at what a copy reaches on the card. What was
  read before counts again where the cache cannot have kept it.

The slower of multiprocessors and cache, and memory, overlap as the ``overlap``-norm of both; a launch costs
``launch_us`` besides. These three are fitted to measured rows (:mod:`.calibrate`); everything else is from the
literature, named where it stands. Products by libraries are the slower of bytes and operations at reached rates.
"""

import argparse
import math
import os
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import capture, machine, sass
from .chips import CHIPS
from .walk import Cost, Memory, Walk

ARCH = "sm_90"
ARGUMENTS = 0x210  # where a kernel's arguments start in Hopper's bank of constants
SIZES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
SAMPLED_PROGRAMS = 5
SCHEDULERS = 4
# Tensors up to this size are taken to come from the cache when a program asks for them.
CACHED = 20e6
# mma.sync reaches 63 % of Hopper's 512 multiplications and additions per cycle and scheduler (arXiv:2402.13499).
MATRIX_RATE = 0.63 * 512
SHARED_RATE = 128 / SCHEDULERS  # bytes per cycle


@dataclass(frozen=True)
class Card:
    terabytes_per_s: float  # of a copy, both ways counted, as measured
    cache: float
    ghz: float = 1.755


CARDS = {"H200": Card(4.2, 60e6), "H100": Card(3.0, 50e6)}


@dataclass(frozen=True)
class Constants:
    """Fitted by :mod:`.calibrate`."""

    launch_us: float = 4.0
    cache_terabytes_per_s: float = 9.0
    overlap: float = 4.0


@dataclass(frozen=True)
class Features:
    """What is known of one launch, for any card of its architecture. Counts are of one warp of a program."""

    kernel: str
    programs: int
    warps: int
    registers: int
    shared: int
    cycles: float  # alone
    longest: float  # the slowest of the programs that were walked through
    arithmetic: float  # cycles of issue slots or of the busiest arithmetic pipe
    special: float
    matrix_fma: float
    shared_bytes: float
    barriers: float
    requested: float  # bytes of the launch, from the cache
    touched: int  # bytes of the tensors it uses
    handed_on: int  # of which an earlier launch of the call wrote
    again: dict[str, float] = field(
        default_factory=dict
    )  # bytes read before, by log2 of what the warp moved since
    unknown: int = 0  # instructions that the walk does not understand


@dataclass(frozen=True)
class Library:
    """An operation of PyTorch's own."""

    kernel: str
    touched: int
    handed_on: int
    flops: int


@dataclass(frozen=True)
class Part:
    """The estimate of one launch, in microseconds; what it is made of."""

    kernel: str
    us: float
    processors: float = 0.0
    cache: float = 0.0
    memory: float = 0.0
    resident: int = 0  # programs on a multiprocessor


@dataclass(frozen=True)
class Estimate:
    us: float
    parts: list[Part]
    steps: list[Features | Library]

    def __str__(self) -> str:
        lines = [f"{self.us:.1f} us"]
        for part, step in zip(self.parts, self.steps, strict=True):
            lines.append(
                f"  {part.kernel}: {part.us:.1f} = multiprocessors {part.processors:.1f}, cache {part.cache:.1f}, "
                f"memory {part.memory:.1f}"
            )
            if isinstance(step, Features):
                matrix, shared = step.matrix_fma / MATRIX_RATE, step.shared_bytes / SHARED_RATE
                lines += [
                    f"    {step.programs} programs of {step.warps} warps, {part.resident} resident, "
                    f"{step.registers} registers, {step.shared} bytes shared; "
                    f"{step.touched / 1e6:.1f} MB, {step.requested / 1e6:.1f} from the cache",
                    f"    a warp: alone {step.cycles:.0f} cycles; arithmetic {step.arithmetic:.0f}, "
                    f"special {step.special:.0f}, matrix {matrix:.0f}, shared {shared:.0f}; "
                    f"{step.barriers:.0f} barriers",
                ]
                if step.unknown:
                    lines.append(f"    {step.unknown} instructions not understood")
        return "\n".join(lines)


def estimate(call: Callable[[], Any], card: str = "H200", constants: Constants | None = None) -> Estimate:
    """The time of everything that ``call`` launches with tensors on device "meta"; nothing runs.

    >>> m = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    >>> print(estimate(lambda: gated_prefix_forward(m(4, 32, 2048, 128), ...), "H100"))
    """
    found = features(call)
    parts = [time_of(step, CARDS[card], constants or Constants()) for step in found]
    return Estimate(sum(part.us for part in parts), parts, found)


def features(call: Callable[[], Any]) -> list[Features | Library]:
    """Of every launch of ``call``, in order."""
    written: dict[int, Tensor] = {}  # kept, so that no other tensor gets their identity
    return [
        _library_features(step, written) if isinstance(step, Operation) else launch_features(step, written)
        for step in _steps(call)
    ]


def time_of(step: Features | Library, card: Card, constants: Constants) -> Part:
    chip = CHIPS[ARCH]
    handed_on = step.handed_on if step.handed_on <= card.cache / 2 else 0  # the cache still has it
    memory_bytes = step.touched - handed_on
    if isinstance(step, Library):
        memory = memory_bytes / card.terabytes_per_s / 1e6
        products = step.flops / chip.reached_tflops / 1e6
        return Part(step.kernel, constants.launch_us + max(memory, products), products, 0.0, memory)
    processors = chip.multiprocessors
    resident = max(1, chip.blocks(step.registers, 32 * step.warps, step.shared))
    for log, amount in step.again.items():
        since = 2 ** int(log) * step.warps * min(step.programs, resident * processors)
        memory_bytes += amount * (1 - min(1, card.cache / 2 / since))
    whole, rest = divmod(step.programs, resident * processors)
    cycles = step.cycles if whole else step.longest
    wave = with_neighbours(step, resident, cycles)
    if whole > 3:  # they no longer start together
        total = step.programs / (resident * processors) * wave
    else:
        total = whole * wave + (with_neighbours(step, -(-rest // processors), cycles) if rest else 0)
    busy = total / card.ghz / 1e3
    cache = step.requested / constants.cache_terabytes_per_s / 1e6
    memory = memory_bytes / card.terabytes_per_s / 1e6
    norm = constants.overlap
    us = constants.launch_us + (max(busy, cache) ** norm + memory**norm) ** (1 / norm)
    return Part(step.kernel, us, busy, cache, memory, resident)


def with_neighbours(step: Features, programs: int, cycles: float) -> float:
    """Cycles of a program beside others on its multiprocessor: alone, and what its warps wait for theirs."""
    demands = (
        step.arithmetic, step.special, step.matrix_fma / MATRIX_RATE, step.shared_bytes / SHARED_RATE
    )  # fmt: skip
    warps = programs * step.warps / SCHEDULERS
    if warps <= 1:
        return cycles
    total = cycles
    waits = [0.0] * len(demands)
    for _ in range(200):
        queues = [warps * (demand + wait) / total for demand, wait in zip(demands, waits)]
        found = [demand * (warps - 1) / warps * queue for demand, queue in zip(demands, queues)]
        waits = [(old + new) / 2 for old, new in zip(waits, found)]
        total = cycles + sum(waits)
    return total


def launch_features(
    launch: capture.Launch, written: dict[int, Tensor], compiled: capture.Compiled | None = None
) -> Features:
    compiled = compiled or capture.compile_launch(launch, ARCH)
    found = machine.resources(compiled.kernel)
    words, tensors = arguments(launch, compiled.signature)
    places = {k: (not t.is_floating_point(), _size(t) < CACHED) for k, t in enumerate(tensors)}
    code = sass.parse(machine.instructions(compiled.kernel.asm["cubin"]))
    walk = Walk(*code, words, Memory(places))
    costs = [walk.run(program) for program in _sample(launch.grid)]
    programs, warps = math.prod(launch.grid), found.threads // 32

    def mean(value: Callable[[Cost], float]) -> float:
        return sum(map(value, costs)) / len(costs)

    used = {place for cost in costs for place in (*cost.read, *cost.written)}
    if found.bulk_copies:  # whose addresses are in descriptors
        used = set(places)
    unique = {id(tensors[place]): tensors[place] for place in used if place in places}
    again: Counter = Counter()
    for cost in costs:
        for log, amount in cost.again.items():
            again[str(log)] += amount * warps * programs / len(costs)
    features = Features(
        kernel=launch.name, programs=programs, warps=warps, registers=found.registers, shared=found.shared,
        cycles=mean(lambda cost: cost.cycles), longest=max(cost.cycles for cost in costs),
        arithmetic=mean(lambda cost: max(cost.issued, cost.pipes["alu"], cost.pipes["imad"] + cost.pipes["fp32"] / 2)),
        special=mean(lambda cost: cost.pipes["special"]), matrix_fma=mean(lambda cost: cost.matrix_fma),
        shared_bytes=mean(lambda cost: cost.shared_bytes), barriers=mean(lambda cost: cost.barriers),
        requested=mean(lambda cost: cost.read.total() + cost.written.total()) * warps * programs,
        touched=sum(map(_size, unique.values())),
        handed_on=sum(_size(tensor) for key, tensor in unique.items() if key in written),
        again=dict(again), unknown=sum(cost.unknown.total() for cost in costs),
    )  # fmt: skip
    for cost in costs:
        written |= {id(tensors[place]): tensors[place] for place in cost.written if place in places}
    return features


def _sample(grid: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Programs from the first to the last."""
    x, y, z = (*grid, 1, 1)[:3]
    last = x * y * z - 1
    chosen = sorted({round(i * last / (SAMPLED_PROGRAMS - 1)) for i in range(SAMPLED_PROGRAMS)})
    return [(place % x, place // x % y, place // (x * y)) for place in chosen]


def arguments(launch: capture.Launch, signature: dict[str, Any]) -> tuple[dict[int, int], list[Tensor]]:
    """The bank of constants of one launch, by word, and its tensors by place."""
    named = dict(zip(launch.kernel.arg_names, launch.args)) | launch.kwargs
    words: dict[int, int] = {}
    tensors: list[Tensor] = []
    offset = ARGUMENTS
    for name, kind in signature.items():
        for value, one in zip(_flat(named[name]), _flat(kind), strict=True):
            if one == "constexpr":
                continue
            size = 8 if one.startswith("*") else SIZES[one]
            offset = -(-offset // size) * size
            if one.startswith("*"):
                # a tensor that is handed over twice is in memory once
                places = [place for place, tensor in enumerate(tensors) if tensor is value]
                bits = Memory.base(places[0] if places else len(tensors))
                tensors.append(value)
            elif one.startswith("fp"):
                bits = int.from_bytes(struct.pack("<f", float(value)), "little")
            else:
                bits = int(value)
            for word in range(-(-size // 4)):
                words[offset + 4 * word] = bits >> 32 * word & 0xFFFFFFFF
            offset += size
    return words, tensors


def _flat(value) -> Iterator:
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Operation:
    """One call of an operator of PyTorch's."""

    function: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    flops: int


class _Operations(TorchDispatchMode):
    """Notes operators that compute something, beside the launches of kernels."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias")

    def __init__(self, steps: list):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if func.namespace == "aten" and not views and name not in self.FREE:
            inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.steps.append(Operation(func, inputs, outputs, flops))
        return out


def _steps(call: Callable[[], Any]) -> list[capture.Launch | Operation]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("estimates compile kernels: unset TRITON_INTERPRET")
    with capture.recording() as steps, capture.target.assume(ARCH), _Operations(steps):
        call()
    if not steps:
        raise RuntimeError("nothing was launched")
    return steps


def _library_features(step: Operation, written: dict[int, Tensor]) -> Library:
    unique = {id(tensor): tensor for tensor in (*step.inputs, *step.outputs)}
    handed_on = sum(_size(tensor) for key, tensor in unique.items() if key in written)
    written |= {id(tensor): tensor for tensor in step.outputs}
    return Library(str(step.function), sum(map(_size, unique.values())), handed_on, step.flops)


def main() -> int:
    from . import cases
    from .case import Maker

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.estimate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("op")
    parser.add_argument("direction", choices=("forward", "backward"))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--card", nargs="+", choices=CARDS, default=list(CARDS))
    args = parser.parse_args()
    for case in cases.all_cases():
        if (case.op, case.direction, case.dtype) != (
            args.op,
            args.direction,
            args.dtype,
        ) or args.case not in str(case):
            continue
        found = features(lambda case=case: cases.run(case, Maker(case)))
        for card in args.card:
            parts = [time_of(step, CARDS[card], Constants()) for step in found]
            print(card, case, Estimate(sum(part.us for part in parts), parts, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
