"""Rows of the audit: made, stored as CSV, judged and compared."""

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from fastadapter.kernels import toolchain

from ..rows import RESULTS
from . import capture, cases, machine
from .case import Case, Maker
from .chips import CHIPS
from .offsets import narrow_products

TABLE = RESULTS / "audit.csv"
# Bytes a thread of an fp32 kernel may spill.
FP32_STACK = 128


@dataclass(frozen=True)
class Row:
    """One kernel of one call on one architecture; bytes, flops and floors are those of the call."""

    op: str
    direction: str
    dtype: str
    case: str
    arch: str
    kernel: str
    launch: int  # place among the launches of the call
    tile: str
    num_warps: int
    grid: int  # programs
    registers: int
    stack: int
    spills: int
    shared: int
    blocks_per_multiprocessor: int
    occupancy: float  # at most
    products: int  # in the source, on half operands or by parts of fp32: matrix units have to do them
    matrix: str
    matrix_count: int
    widest_load: int
    bulk_copies: bool
    narrow_offsets: int  # 32-bit products in addresses
    compile_seconds: float  # of processor time
    bytes: int
    flops: int
    floor_us: float
    reached_floor_us: float  # by what the chip was seen to reach, where known
    triton: str
    ptxas: str

    @property
    def key(self) -> tuple:
        return (self.op, self.direction, self.dtype, self.case, self.arch, self.launch)


@dataclass(frozen=True)
class Finding:
    """What one compile says; the same for every launch that Triton would compile to the same kernel."""

    resources: machine.Resources
    num_warps: int
    products: int
    narrow_offsets: int
    seconds: float


def launches_of(case: Case, arch: str) -> list[capture.Launch]:
    return capture.launches_of(lambda: cases.run(case, Maker(case)), arch)


def inspect(case: Case, arch: str, index: int) -> Finding:
    """Compile launch ``index`` of ``case``."""
    launch = launches_of(case, arch)[index]
    compiled = capture.compile_launch(launch, arch)
    ttir = compiled.kernel.asm["ttir"]
    narrow = narrow_products(ttir, tiles_of(launch).values())
    products = len(re.findall(r"\btt\.dot\b.*(?:tf32|bf16x|: tensor<[\dx]+(?:b?f16)>)", ttir))
    found = machine.resources(compiled.kernel)
    return Finding(
        found, compiled.kernel.metadata.num_warps, products, len(narrow), round(compiled.seconds, 2)
    )


def tiles_of(launch: capture.Launch) -> dict[str, int]:
    return {name: size for name, size in launch.constants.items() if name.startswith("BLOCK")}


def make_row(case: Case, arch: str, index: int, launch: capture.Launch, finding: Finding) -> Row:
    chip, found = CHIPS[arch], finding.resources
    filled = (found.registers, found.threads, found.shared)
    work = (cases.bytes_of(case), cases.flops_of(case), case.matrix)
    return Row(
        op=case.op, direction=case.direction, dtype=case.dtype, case=str(case), arch=arch,
        kernel=launch.name, launch=index,
        tile=" ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in tiles_of(launch).items()),
        num_warps=finding.num_warps, grid=math.prod(launch.grid),
        registers=found.registers, stack=found.stack, spills=found.spills, shared=found.shared,
        blocks_per_multiprocessor=chip.blocks(*filled), occupancy=round(chip.occupancy(*filled), 3),
        products=finding.products, matrix=found.matrix, matrix_count=found.matrix_count,
        widest_load=found.widest_load, bulk_copies=found.bulk_copies,
        narrow_offsets=finding.narrow_offsets, compile_seconds=finding.seconds,
        bytes=work[0], flops=work[1],
        floor_us=round(chip.floor_us(*work), 2),
        reached_floor_us=round(chip.floor_us(*work, reached=True), 2),
        triton=triton.__version__, ptxas=toolchain.installed(arch).ptxas,
    )  # fmt: skip


def faults(row: Row) -> list[str]:
    """What must not be: empty for a sound row."""
    found = []
    # of fp32 operands in three parts a few registers' worth may lie in the L1 cache
    few = row.dtype == "fp32" and row.stack <= FP32_STACK
    if not few and (row.spills or (row.stack and not row.arch.startswith("gfx"))):
        found.append(f"{row.spills} spills, {row.stack} bytes of stack")
    if not row.blocks_per_multiprocessor:
        found.append(f"does not fit: {row.registers} registers, {row.shared} bytes of shared memory")
    if row.products and not row.matrix:
        found.append(f"no matrix instructions for {row.products} products")
    if row.narrow_offsets:
        found.append(f"{row.narrow_offsets} products of strides in 32 bits")
    return found


def store(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.key))


def update(path: Path, rows: Iterable[Row]) -> None:
    """Replace the stored rows of the audited cases; rows of cases that no longer exist go."""
    rows = list(rows)
    known = {(case.op, case.direction, case.dtype, str(case)) for case in cases.all_cases()}
    audited = {row.key[:-1] for row in rows}
    kept = (
        [row for row in load(path) if row.key[:4] in known and row.key[:-1] not in audited]
        if path.exists()
        else []
    )
    store(path, [*kept, *rows])


def load(path: Path = TABLE) -> list[Row]:
    """Raises: ValueError: columns that are missing or unknown, or a value of the wrong type, with its line."""
    kinds = {field.name: {int: int, float: float, bool: _truth}.get(field.type, str) for field in fields(Row)}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if odd := kinds.keys() ^ set(reader.fieldnames or ()):
            raise ValueError(f"{path}: missing or unknown columns {sorted(odd)}")
        rows = []
        for values in reader:
            try:
                rows.append(Row(**{name: kind(values[name]) for name, kind in kinds.items()}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    return rows


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"expected True or False, got {text!r}")
    return text == "True"


def differences(stored: Row, found: Row) -> list[str]:
    """Where a compile of today differs from the stored one, apart from how long it took."""
    old, new = asdict(stored), asdict(found)
    names = [name for name in new if name != "compile_seconds" and old[name] != new[name]]
    return [f"{name}: stored {old[name]}, now {new[name]}" for name in names]
