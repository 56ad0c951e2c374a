"""What the chips can do, by their makers' figures, and how much of one a kernel can fill.

Rates: NVIDIA A100 datasheet (80 GB SXM: 2.04 TB/s, 312 TFLOP/s bf16 and fp16, 19.5 fp32); NVIDIA H100 datasheet (SXM:
3.35 TB/s, 989, 67); NVIDIA HGX B200 (per GPU: 8 TB/s, 2250, 80); AMD Instinct MI300X datasheet (5.3 TB/s, 1307, 163).
Dense, without sparsity. A copy on an H100 reaches 3.0 TB/s and a large matrix product 790 TFLOP/s: floors by those
are given beside the ones by the datasheet. Limits of a multiprocessor: CUDA C++ Programming Guide, technical
specifications per compute capability; AMD CDNA 3 instruction set guide.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates of one GPU, and what its multiprocessors (compute units) hold.

    ``registers`` are 32-bit registers of one thread's share times threads: for NVIDIA the file of the
    multiprocessor, for AMD the file of one of the four SIMD units per lane.
    """

    name: str
    terabytes_per_s: float
    tensor_tflops: float
    fp32_tflops: float
    reached_terabytes_per_s: float
    reached_tflops: float
    multiprocessors: int
    warp_size: int
    max_warps: int
    max_blocks: int
    registers: int
    shared: int
    shared_per_block: int
    shared_reserved: int

    def floor_us(self, bytes_moved: int, flops: int, matrix: bool, *, reached: bool = False) -> float:
        """The time below which a call cannot go: memory traffic or arithmetic, whichever takes longer.

        ``matrix``: products of half operands; else of fp32, on NVIDIA by parts (six products of bf16,
        three of tf32) on matrix units.
        """
        bandwidth = self.reached_terabytes_per_s if reached else self.terabytes_per_s
        tensor = self.reached_tflops if reached else self.tensor_tflops
        parts = tensor / 6 if self.warp_size == 32 else 0.0
        rate = tensor if matrix else max(self.fp32_tflops, parts)
        return 1e6 * max(bytes_moved / (bandwidth * 1e12), flops / (rate * 1e12))

    def blocks(self, registers: int, threads: int, shared: int) -> int:
        """Programs that fit one multiprocessor at a time; 0 where one alone does not fit."""
        warps = threads // self.warp_size
        if shared > self.shared_per_block:
            return 0
        limits = [self.max_blocks, self.max_warps // warps]
        if self.warp_size == 32:
            # a warp's registers are given out in units of 256
            per_warp = -(-max(registers, 1) * 32 // 256) * 256
            limits.append(self.registers // per_warp // warps)
        else:
            # each SIMD unit holds waves by its own file, in units of 8 registers; a program spreads over four
            waves = min(self.max_warps // 4, self.registers // (-(-max(registers, 1) // 8) * 8))
            limits.append(4 * waves // warps)
        taken = shared + self.shared_reserved
        if taken:
            limits.append(self.shared // taken)
        return min(limits)

    def occupancy(self, registers: int, threads: int, shared: int) -> float:
        """Share of the warps a multiprocessor can hold that are resident, at most."""
        blocks = self.blocks(registers, threads, shared)
        return blocks * (threads // self.warp_size) / self.max_warps


KIB = 1024
NVIDIA = {"warp_size": 32, "max_warps": 64, "max_blocks": 32, "registers": 65536, "shared_reserved": KIB}
CHIPS = {
    "sm_80": Chip(
        "A100", 2.04, 312, 19.5, 2.04, 312, 108, shared=164 * KIB, shared_per_block=163 * KIB, **NVIDIA
    ),
    "sm_90": Chip(
        "H100", 3.35, 989, 67, 3.0, 790, 132, shared=228 * KIB, shared_per_block=227 * KIB, **NVIDIA
    ),
    "sm_100": Chip(
        "B200", 8.0, 2250, 80, 8.0, 2250, 148, shared=228 * KIB, shared_per_block=227 * KIB, **NVIDIA
    ),
    "gfx942": Chip(
        "MI300X", 5.3, 1307, 163, 5.3, 1307, 304,
        warp_size=64, max_warps=32, max_blocks=16, registers=512,
        shared=64 * KIB, shared_per_block=64 * KIB, shared_reserved=0,
    ),
}  # fmt: skip
