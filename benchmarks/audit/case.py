"""One audited call of a launcher, with the bytes it has to move and the operations it has to do.

A case calls the same launcher whether its tensors have no memory (the audit) or are small and real (the count of
bytes under the interpreter, :mod:`.traffic`). ``bytes`` is what a perfect kernel moves once: every input read, every
result written. ``flops`` counts a multiplication and an addition as two, in matrix products only.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
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
    """One call: ``op`` is a key of :data:`.cases.OPS`, ``sizes`` and ``options`` what its entry takes."""

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
    def matrix(self) -> bool:
        """Whether products have half operands: fp32 masters beside half activations are rounded in the kernel."""
        return self.dtype != "fp32"

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
