"""How fast this machine's CPU multiplies and copies: half a second, the best of many tries."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

SECONDS = 0.25  # for each of the two


def cpu_rates(threads: int) -> tuple[float, float, float, str]:
    """GFLOP/s of an fp32 product of a small model's size, GB/s of a copy, GiB of memory, and the CPU's name.

    The best counts, not the mean: others may use the machine, and a floor is asked for.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, inner, outer = 512, 576, 1536
        x, weight = torch.randn(rows, inner, device="cpu"), torch.randn(outer, inner, device="cpu")
        gflops = 2 * rows * inner * outer / _best(lambda: torch.nn.functional.linear(x, weight)) / 1e9
        source = torch.randn(1 << 24, device="cpu")
        target = torch.empty_like(source)
        gb_per_s = 2 * source.numel() * 4 / _best(lambda: target.copy_(source)) / 1e9
    finally:
        torch.set_num_threads(before)
    return gflops, gb_per_s, _memory_gib(), _name()


def _best(call: Callable[[], object]) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _memory_gib() -> float:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0.0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
