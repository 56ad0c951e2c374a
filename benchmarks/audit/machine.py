"""Registers, spills, shared memory and instructions, read from what the compilers wrote."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

# SASS and AMDGCN opcodes of matrix products, by the family that people know them as.
NVIDIA_MATRIX = {
    "wgmma": re.compile(r"\b(?:HGMMA|QGMMA|IGMMA)\b"),
    "tcgen05": re.compile(r"\bUTC\w*MMA\b"),
    "mma.sync": re.compile(r"\b(?:HMMA|IMMA|QMMA|DMMA)\b"),
}
LOADS = re.compile(r"\b(?:LDG|LDGSTS)\b(\S*)")


@dataclass(frozen=True)
class Resources:
    """What one kernel needs and uses.

    ``spills`` counts instructions that move registers to and from memory (NVIDIA) or spilled vector registers
    (AMD, where scalar registers spill into lanes of vector registers). ``matrix`` is "" where there is no matrix
    instruction. ``widest_load`` is in bits, of loads by threads; ``bulk_copies`` says whether TMA is used.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    matrix: str
    matrix_count: int
    widest_load: int
    bulk_copies: bool


def resources(kernel) -> Resources:
    """Of a compiled kernel, for either vendor."""
    return (_amd if kernel.metadata.target.backend == "hip" else _nvidia)(kernel)


def _nvidia(kernel) -> Resources:
    usage, code = _disassemble(kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    counts = {name: len(pattern.findall(code)) for name, pattern in NVIDIA_MATRIX.items()}
    matrix = max(counts, key=counts.__getitem__)
    widths = [
        int(found[1]) for load in LOADS.findall(code) if (found := re.search(r"\.(64|128|256)\b", load))
    ]
    return Resources(
        registers=registers,
        stack=stack,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=kernel.metadata.shared,
        threads=_threads(kernel),
        matrix=matrix if counts[matrix] else "",
        matrix_count=counts[matrix],
        widest_load=max(widths, default=32),
        bulk_copies="UTMALDG" in code or "UTMASTG" in code,
    )


def _amd(kernel) -> Resources:
    text = kernel.asm["amdgcn"]
    field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    widths = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads = re.findall(r"\b(?:global|buffer)_load_(dword(?:x\d)?)\b", text)
    count = len(re.findall(r"\bv_mfma", text))
    return Resources(
        registers=field["vgpr_count"],
        stack=field["private_segment_fixed_size"],
        spills=field["vgpr_spill_count"],
        shared=kernel.metadata.shared,
        threads=_threads(kernel),
        matrix="mfma" if count else "",
        matrix_count=count,
        widest_load=max((widths[load] for load in loads), default=32),
        bulk_copies=False,
    )


def _threads(kernel) -> int:
    """Of a program, with the warps that a warp-specialised kernel adds to ``num_warps``."""
    found = re.search(r'"ttg\.total-num-warps" = (\d+)', kernel.asm.get("ttgir", ""))
    warps = int(found[1]) if found else kernel.metadata.num_warps
    return warps * kernel.metadata.target.warp_size


def instructions(cubin: bytes) -> str:
    """Instructions with their encodings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("nvdisasm", "-c", "-hex", file.name)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout
