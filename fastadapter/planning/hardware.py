"""What cards and CPUs reach: products, copies, memory, links. Each with where the number is from."""

from dataclasses import dataclass

from fastadapter.training.config import UserError

GIB = 2**30
# What a copy and a large bf16 product reach of the data sheet: an H200, whose sheet says 989 TFLOP/s and 4.8 TB/s,
# reached 800 and 4.2 (docs/gpu.md). Cards that nobody here has measured are taken to reach the same share.
REACHED_PRODUCT, REACHED_COPY = 0.81, 0.875


@dataclass(frozen=True)
class Device:
    """One card, or a CPU with so many threads.

    Attributes:
        tflops: reached by a large product, by dtype.
        gb_per_s: of a large copy, reading and writing both counted.
        memory_gib: what there is; 0: not known, nothing is compared with it.
        attention: share of ``tflops`` that the library's best causal attention reaches, forward and backward.
        plain_attention: the same of what ``scaled_dot_product_attention`` chooses by itself.
        link_gb_per_s: to another card of the same machine, one way.
        rows_name: how stored rows call it; what none of them is from gets wider ranges.
        source: of the figures.
    """

    name: str
    tflops: dict[str, float]
    gb_per_s: float
    memory_gib: float
    attention: float
    plain_attention: float
    link_gb_per_s: float
    source: str
    rows_name: str = ""
    cpu: bool = False

    def product(self, dtype: str) -> float:
        """FLOP/s of a large product."""
        return self.tflops[dtype] * 1e12


def _card(
    name: str,
    half: float,
    full: float,
    gb_per_s: float,
    memory_gib: float,
    link: float,
    attention: tuple[float, float],
    source: str,
) -> Device:
    """A card by its data sheet (dense half-precision and fp32 TFLOP/s, GB/s)."""
    half, full = half * REACHED_PRODUCT, full * REACHED_PRODUCT
    return Device(
        name,
        {"bf16": half, "fp16": half, "fp32": full},
        gb_per_s * REACHED_COPY,
        memory_gib,
        *attention,
        link,
        f"{source}; {REACHED_PRODUCT:.0%} of its products and {REACHED_COPY:.1%} of its bandwidth, as an H200 reaches",
    )


# cuDNN's and flash-attention 2's rates on Hopper: 428 and 249 of 800 TFLOP/s, rows of 4x2048 tokens, heads of 128.
_HOPPER = (0.53, 0.31)
# flash-attention 2 reaches 50 to 73 % of 312 TFLOP/s on an A100 (arXiv:2307.08691), the only one there.
_AMPERE = (0.6, 0.6)
GPUS = {
    card.name: card
    for card in (
        Device(
            "h200", {"bf16": 800, "fp16": 800, "fp32": 54}, 4200, 139.8, *_HOPPER, 450,
            "product and copy as measured (docs/gpu.md); fp32 81 % of the data sheet's 67 TFLOP/s",
            rows_name="NVIDIA H200",
        ),
        Device(
            "h100", {"bf16": 790, "fp16": 790, "fp32": 54}, 3000, 79.1, *_HOPPER, 450,
            "H100 SXM; product and copy as others measured them; fp32 81 % of the data sheet's 67 TFLOP/s",
            rows_name="NVIDIA H100 80GB HBM3",
        ),
        _card("h100-pcie", 756, 51, 2000, 79.1, 50, _HOPPER, "data sheet of the H100 PCIe"),
        _card("a100", 312, 19.5, 2039, 79.2, 250, _AMPERE, "data sheet of the A100 80 GB SXM"),
        _card("a100-40gb", 312, 19.5, 1555, 39.4, 250, _AMPERE, "data sheet of the A100 40 GB SXM"),
        _card("l40s", 362, 91.6, 864, 44.5, 25, _AMPERE, "data sheet of the L40S"),
        _card("rtx-4090", 165, 82.6, 1008, 23.5, 25, _AMPERE, "data sheet of the RTX 4090"),
    )
}  # fmt: skip
# Of one thread: the best of many products of 512 x 576 x 1536 and of copies of 64 MB. Two threads have twice that.
EPYC = "AMD EPYC"
_THREAD_TFLOPS, _THREAD_GB_PER_S = 0.092, 21.5
# The C++ attention and PyTorch's own reach about half of what products do, at a few hundred tokens.
_CPU_ATTENTION = (0.5, 0.5)


def resolve_gpu(name: str) -> Device:
    """The card of that name.

    Raises: UserError: there is none, naming those that there are.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name!r} is unknown: there is {', '.join(GPUS)}")
    return GPUS[name.lower()]


def epyc(threads: int) -> Device:
    """The CPU that the stored rows are from."""
    tflops = _THREAD_TFLOPS * threads
    return Device(
        f"{EPYC}, {threads} thread{'s' * (threads > 1)}",
        {"fp32": tflops},
        _THREAD_GB_PER_S * threads,
        0.0,
        *_CPU_ATTENTION,
        0.0,
        "best of many products and copies on one thread, times threads",
        rows_name=EPYC,
        cpu=True,
    )


def this_cpu(threads: int) -> Device:
    """This machine's CPU, by products and copies timed for about half a second."""
    from fastadapter.planning.calibrate import cpu_rates

    gflops, gb_per_s, memory_gib, model = cpu_rates(threads)
    return Device(
        f"{model}, {threads} thread{'s' * (threads > 1)}",
        {"fp32": gflops / 1e3},
        gb_per_s,
        memory_gib,
        *_CPU_ATTENTION,
        0.0,
        "the best of a few products and copies, timed just now",
        rows_name=model,
        cpu=True,
    )
