"""Which known faults of Triton and ptxas touch this installation, and what is done about each.

A wrong product is silent, so the tables of tiles keep products with an operand in registers below 64 rows, whatever
is installed: Hopper compiles those to ``mma.sync``, which none of the faults touches. What remains is caught by the
self-check that runs before the first real launch (``fastadapter.ops.self_check``).

>>> [hazard.name for hazard in hazards("3.6.0", "12.8", "sm_90")]
['wgmma-register-reuse', 'transposed-dot']
>>> hazards("3.9.0", "13.4", "sm_90")
[]
"""

import functools
import re
from typing import NamedTuple


class Hazard(NamedTuple):
    """A fault, as it was reported, and what these kernels do where it applies."""

    name: str
    what: str
    source: str
    action: str


class Toolchain(NamedTuple):
    triton: str
    ptxas: str  # "" where none is used (AMD)


MMA_SYNC = "products with an operand in registers run on mma.sync: their tiles have fewer than 64 rows"


def hazards(triton_version: str, ptxas_version: str, arch: str) -> list[Hazard]:
    """The faults of this combination on ``arch`` ("sm_90", "gfx942", ...), worst first.

    Raises: ValueError: a version that starts with no number.
    """
    found: list[Hazard] = []
    if arch != "sm_90":
        return found  # wgmma is Hopper's alone
    triton = _parse("triton", triton_version)
    if ptxas_version and _parse("ptxas", ptxas_version) < (13, 3):
        found.append(
            Hazard(
                "wgmma-register-reuse",
                f"ptxas {ptxas_version} may reuse the registers of a wgmma operand before they are read: wrong "
                "products, silently (fixed in 13.3)",
                "triton issue 11781, flash-linear-attention issue 1262",
                MMA_SYNC + "; TRITON_PTXAS_PATH names a newer ptxas",
            )
        )
    if (3, 4, 0) <= triton < (3, 7, 1):
        found.append(
            Hazard(
                "transposed-dot",
                f"triton {triton_version} miscompiles dot(trans(x), y) of a product x on wgmma tiles (fixed in 3.7.1)",
                "flash-linear-attention issues 640 and 826",
                MMA_SYNC,
            )
        )
    if triton[:3] == (3, 7, 1):
        found.append(
            Hazard(
                "wgmma-32-wide",
                f"triton {triton_version} emits wgmma that faults for tiles 32 wide",
                "triton issue 11366",
                MMA_SYNC,
            )
        )
    return found


@functools.cache
def installed(arch: str) -> Toolchain:
    """The Triton that is installed and the ptxas it takes for ``arch``.

    Raises: ImportError: no Triton.
    """
    import triton

    if not arch.startswith("sm_"):
        return Toolchain(triton.__version__, "")
    from triton.backends.nvidia.compiler import get_ptxas

    return Toolchain(triton.__version__, get_ptxas(int(arch.removeprefix("sm_"))).version)


def _parse(name: str, version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    if found is None:
        raise ValueError(f"toolchain: {name} version must start with a number, got {version!r}")
    return tuple(int(part) for part in found[0].split("."))
