"""Counts the bytes a call really touches, by running its kernels in Triton's interpreter on small tensors.

Every load and store of the interpreter ends in one of two methods, descriptors included. Replaced for the time of a
call, they note which addresses are used; so does the one function through which launchers ask the library for a
product, which counts as a launch, and results that no launch wrote are the library's. Three counts, each of bytes read
plus bytes written:

- ``touched``: every address of the caller's tensors once per call. The formula of the case must agree with it.
- ``moved``: every address once per launch, scratch memory included. What comes from and goes to memory when a cache
  keeps what one launch reads again, and nothing between launches.
- ``requested``: every address once per tile that asks for it. What reaches the caches.
"""

import contextlib
import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch
from fastadapter.kernels import bottleneck_tiles, target
from torch import Tensor
from triton.runtime import interpreter

from ..rows import RESULTS
from . import cases
from .case import Case, Maker

TABLE = RESULTS / "traffic.csv"


@dataclass(frozen=True)
class Count:
    """Of one call; ``bytes`` is the formula's."""

    op: str
    direction: str
    dtype: str
    case: str
    arch: str
    bytes: int
    touched: int
    moved: int
    requested: int

    @property
    def ratio(self) -> float:
        return self.touched / self.bytes


class RealMaker(Maker):
    """Random tensors in memory; keeps them, so that no address is used twice during a call."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.made: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def row_ids(self, batch: int, num_entries: int) -> Tensor | None:
        if num_entries <= 1:
            return None
        self.made.append(torch.arange(batch, dtype=torch.int32) % num_entries)
        return self.made[-1]

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, gap: int) -> Tensor:
        self.made.append(torch.randn(shape, generator=self.generator).to(dtype))
        return self.made[-1]


class Log:
    """The addresses of loads and stores, by kind."""

    def __init__(self):
        self.seen: dict[tuple[str, int], list[tuple[int, numpy.ndarray]]] = {}
        self.launch = 0
        self.requested = 0

    def note(self, kind: str, addresses: numpy.ndarray, mask: numpy.ndarray, itemsize: int) -> None:
        used = numpy.unique(numpy.asarray(addresses)[numpy.asarray(mask, dtype=bool)])
        self.seen.setdefault((kind, itemsize), []).append((self.launch, used))
        self.requested += used.size * itemsize

    def note_tensor(self, kind: str, tensor: Tensor) -> None:
        """Every element of ``tensor``, as one access."""
        offsets = numpy.zeros(1, dtype=numpy.uint64)
        for size, stride in zip(tensor.shape, tensor.stride()):
            steps = numpy.arange(size, dtype=numpy.uint64) * numpy.uint64(stride * tensor.itemsize)
            offsets = (offsets[:, None] + steps).reshape(-1)
        addresses = offsets + numpy.uint64(tensor.data_ptr())
        self.note(kind, addresses, numpy.ones(addresses.shape, dtype=bool), tensor.itemsize)

    def note_results(self, tensors: Iterable[Tensor]) -> None:
        """As written by the library, those of which no launch wrote anything."""
        self.launch += 1
        parts = [used for (kind, _), found in self.seen.items() if kind == "written" for _, used in found]
        written = numpy.concatenate(parts)
        for tensor in tensors:
            start, size = tensor.data_ptr(), tensor.nbytes
            if not ((written >= start) & (written < start + size)).any():
                self.note_tensor("written", tensor)

    def touched(self, tensors: Iterable[Tensor]) -> int:
        """Bytes within ``tensors``, once per call."""
        ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
        total = 0
        for (_, itemsize), parts in self.seen.items():
            addresses = numpy.unique(numpy.concatenate([used for _, used in parts]))
            known = numpy.zeros(addresses.shape, dtype=bool)
            for start, size in ranges:
                known |= (addresses >= start) & (addresses < start + size)
            total += int(known.sum()) * itemsize
        return total

    def moved(self) -> int:
        """Bytes anywhere, once per launch."""
        total = 0
        for (_, itemsize), parts in self.seen.items():
            for launch in {launch for launch, _ in parts}:
                mine = [used for of, used in parts if of == launch]
                total += numpy.unique(numpy.concatenate(mine)).size * itemsize
        return total


@contextlib.contextmanager
def logging() -> Iterator[Log]:
    """Inside the block, what interpreted kernels load and store is noted."""
    log = Log()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    execute = interpreter.GridExecutor.__call__
    product = bottleneck_tiles.product

    def create_masked_load(self, ptrs, mask, *rest):
        log.note("read", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        log.note("written", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest)

    def __call__(self, *args, **kwargs):
        log.launch += 1
        return execute(self, *args, **kwargs)

    def noted(*operands, **options):
        log.launch += 1
        result = product(*operands, **options)
        for operand in (*operands, *options.values()):
            if isinstance(operand, Tensor):
                log.note_tensor("read", operand)
        log.note_tensor("written", result)
        return result

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    interpreter.GridExecutor.__call__ = __call__
    bottleneck_tiles.product = noted
    try:
        yield log
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = execute
        bottleneck_tiles.product = product


def count(case: Case, arch: str) -> Count:
    """Run ``case`` with the tiles and routes of ``arch``.

    Raises: RuntimeError: nothing was read, so kernels are not being interpreted.
    """
    make = RealMaker(case)
    with logging() as log, target.assume(arch):
        results = _tensors(cases.run(case, make))
        log.note_results(results)
    touched = log.touched([*make.made, *results])
    if not touched:
        raise RuntimeError(
            f"{case.op}: nothing was loaded; set TRITON_INTERPRET=1 before kernels are imported"
        )
    what = {"op": case.op, "direction": case.direction, "dtype": case.dtype, "case": str(case), "arch": arch}
    return Count(
        **what, bytes=cases.bytes_of(case), touched=touched, moved=log.moved(), requested=log.requested
    )


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for t in results if isinstance(t, Tensor)]


def count_all(architectures: Iterable[str], ops: Iterable[str] | None = None) -> list[Count]:
    """All small cases of the ops, with the routes of each architecture."""
    chosen = [case for case in cases.small_cases() if ops is None or case.op in ops]
    return [count(case, arch) for case in chosen for arch in architectures]


def store(path: Path, counts: Iterable[Count]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Count)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(count) for count in counts)


def update(path: Path, counts: Iterable[Count]) -> None:
    """Replace the stored counts of the same calls; those of cases that no longer exist go."""
    counts = list(counts)
    order = {
        (case.op, case.direction, case.dtype, str(case)): place
        for place, case in enumerate(cases.small_cases())
    }

    def key(count: Count) -> tuple[str, str, str, str]:
        return count.op, count.direction, count.dtype, count.case

    new = {(*key(count), count.arch) for count in counts}
    old = load(path) if path.exists() else []
    kept = [count for count in old if key(count) in order and (*key(count), count.arch) not in new]
    store(path, sorted([*kept, *counts], key=lambda count: (order[key(count)], count.arch)))


def load(path: Path = TABLE) -> list[Count]:
    with path.open(encoding="utf-8", newline="") as file:
        kinds = {field.name: int if field.type is int else str for field in fields(Count)}
        return [
            Count(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)
        ]
