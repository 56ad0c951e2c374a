"""What is audited: calls of the launchers, with the bytes they have to move and the operations they have to do.

A case calls the same launcher whether its tensors have no memory (the audit) or are small and real (the count of
bytes under the interpreter, :mod:`.traffic`). ``bytes`` is what a perfect kernel moves once: every input read, every
result written. ``flops`` counts a multiplication and an addition as two, in matrix products only.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Activations, and what trained operands are kept in.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16+fp32": (torch.float16, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """One call: ``op`` is a key of :data:`OPS`, ``sizes`` and ``options`` what its entry takes."""

    op: str
    direction: str
    dtype: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{size}" for name, size in self.sizes.items() if size)
        options = [
            name if value is True else f"{name}={value}" for name, value in self.options.items() if value
        ]
        return "-".join([sizes, *options])

    @property
    def call(self) -> Callable[["Maker"], Any]:
        return lambda make: OPS[self.op].run(self, make)

    @property
    def bytes(self) -> int:
        return OPS[self.op].bytes(self)

    @property
    def flops(self) -> int:
        return OPS[self.op].flops(self)

    @property
    def matrix(self) -> bool:
        """Whether the products belong on matrix units: fp32 keeps to full precision, on vector units."""
        return not self.dtype.endswith("fp32")

    @property
    def itemsizes(self) -> tuple[int, int]:
        activation, trained = DTYPES[self.dtype]
        return activation.itemsize, trained.itemsize


class Maker:
    """Makes the tensors of a case: without memory by default, random under :class:`RealMaker`.

    ``gap`` multiplies the batch stride: strides beyond 2^31 are passed as 64-bit integers.
    """

    def __init__(self, case: Case, gap: int = 1):
        self.activation, self.trained = DTYPES[case.dtype]
        self.gap = gap

    def activations(self, *shape: int) -> Tensor:
        return self._make(shape, self.activation, self.gap)

    def weights(self, *shape: int) -> Tensor:
        return self._make(shape, self.trained, self.gap)

    def fp32(self, *shape: int) -> Tensor:
        return self._make(shape, torch.float32, 1)

    def row_ids(self, batch: int, num_entries: int) -> Tensor | None:
        """None where there is a single entry."""
        return torch.empty(batch, dtype=torch.int32, device="meta") if num_entries > 1 else None

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, gap: int) -> Tensor:
        strides = torch.empty(shape, device="meta").stride()
        return torch.empty_strided(shape, (strides[0] * gap, *strides[1:]), dtype=dtype, device="meta")


@dataclass(frozen=True)
class Op:
    run: Callable[[Case, Maker], Any]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    cases: Callable[[], Iterator[Case]]
    small: Callable[[], Iterator[Case]]  # for the interpreter, which has fp32 and fp16


def launcher(op: str, direction: str) -> Callable:
    return getattr(importlib.import_module(f"fastadapter.kernels.{op}"), f"{op}_{direction}")


def _gated_prefix(case: Case, make: Maker) -> Any:
    s = case.sizes
    query, base = (make.activations(s["b"], s["h"], s["q"], s["d"]) for _ in range(2))
    key, value = (make.weights(max(s["n"], 1), s["kv"], s["p"], s["d"]) for _ in range(2))
    gate, row_ids = make.fp32(max(s["n"], 1), s["h"]), make.row_ids(s["b"], s["n"])
    constants = (row_ids, s["d"] ** -0.5, "tanh")
    run = launcher("gated_prefix", case.direction)
    if case.direction == "forward":
        return run(base, query, key, value, gate, *constants)
    needs = (True, not case.options.get("query_only"), True)
    return run(base, query, key, value, gate, *constants, *needs)


def _gated_prefix_bytes(case: Case) -> int:
    """Forward reads base and query and writes out; backward reads grad_out and query and writes grad_query."""
    s, (activation, trained) = case.sizes, case.itemsizes
    prefix = 2 * max(s["n"], 1) * s["kv"] * s["p"] * s["d"] * trained
    gate = max(s["n"], 1) * s["h"] * 4
    both = 1 if case.direction == "forward" or case.options.get("query_only") else 2
    gates = 1 if case.direction == "forward" else 2
    return 3 * s["b"] * s["h"] * s["q"] * s["d"] * activation + both * prefix + gates * gate


def _gated_prefix_flops(case: Case) -> int:
    """S and p V forward; S, dO V^T, dS K, dS^T Q and p^T dO backward."""
    s = case.sizes
    products = 2 if case.direction == "forward" else 3 if case.options.get("query_only") else 5
    return 2 * products * s["b"] * s["h"] * s["q"] * s["p"] * s["d"]


def _gated_prefix_cases() -> Iterator[Case]:
    llama = {"b": 4, "h": 32, "kv": 8, "q": 2048, "d": 128, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            for d in (64, 128):
                yield Case("gated_prefix", direction, dtype, llama | {"d": d})
        for dtype in ("bf16", "fp32", "bf16+fp32"):
            for d in (32, 80, 256):
                yield Case("gated_prefix", direction, dtype, llama | {"d": d})
            for p in (32, 64, 128):
                yield Case("gated_prefix", direction, dtype, llama | {"p": p})
        for d, p in ((64, 128), (256, 128), (256, 32)):
            yield Case("gated_prefix", direction, "bf16", llama | {"d": d, "p": p})
        # an adapter per row, and one token of each
        yield Case("gated_prefix", direction, "bf16", llama | {"n": 4})
        if direction == "forward":
            yield Case("gated_prefix", direction, "bf16", llama | {"b": 64, "q": 1, "n": 64})
    yield Case("gated_prefix", "backward", "bf16", llama, {"query_only": True})


def _gated_prefix_small() -> Iterator[Case]:
    sizes = {"b": 2, "h": 4, "kv": 2, "q": 80, "d": 64, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        for dtype in ("fp16", "fp32"):
            yield Case("gated_prefix", direction, dtype, sizes)
        yield Case("gated_prefix", direction, "fp16", sizes | {"p": 40})
        yield Case("gated_prefix", direction, "fp16", sizes | {"n": 2})


OPS = {
    "gated_prefix": Op(
        _gated_prefix, _gated_prefix_bytes, _gated_prefix_flops, _gated_prefix_cases, _gated_prefix_small
    ),
}


def all_cases() -> list[Case]:
    """The table in the repository has a row for each of these on every architecture.

    >>> len({(case.op, case.direction, case.dtype, str(case)) for case in all_cases()}) == len(all_cases())
    True
    """
    return [case for op in OPS.values() for case in op.cases()]


def small_cases() -> list[Case]:
    """Whose bytes are counted."""
    return [case for op in OPS.values() for case in op.small()]


def sample(architectures: Sequence[str]) -> list[tuple[Case, str]]:
    """A case of every op and pass, on two architectures each in rotation: what is checked with every change."""
    chosen = []
    for place, (_, group) in enumerate(
        itertools.groupby(all_cases(), key=lambda case: (case.op, case.direction))
    ):
        case = next(case for case in group if case.dtype == "bf16" and case.sizes.get("d", 128) == 128)
        chosen += [(case, architectures[(2 * place + step) % len(architectures)]) for step in range(2)]
    return chosen


def with_sizes(case: Case, **sizes: int) -> Case:
    return dataclasses.replace(case, sizes={**case.sizes, **sizes})
