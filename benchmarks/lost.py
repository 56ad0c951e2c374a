"""Where we lose: every stored row in which something else was cheaper than ours, for the documents.

The marker is ``<!-- where-we-lose: DEVICE-KIND -->``, ``cpu`` or ``gpu``. The list is drawn from the rows that the
tables show, so it cannot be shortened by hand: a row leaves it when a later run is won.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import rows
from .rows import Row

# Ours, as a user gets it. Other forms of ours, such as the reference op, are there to be compared with.
OURS = {
    "fastadapter", "fastadapter-cpp", "8 adapters",
    "LLaMA-Adapter", "version 2", "version 2, folded", "prefix tuning", "soft prompt", "houlsby",
}  # fmt: skip
OURS_BEGINS = ("fastadapter, packed", "fastadapter, fp32 masters", "fastadapter, pieces")
# What does less than was asked for: a floor, not a rival. Names in brackets are floors of the GPU's entries.
FLOORS = {
    "copy", "frozen model", "frozen model, packed", "bare model", "joined embeddings", "one adapter", "gemm peak",
    "triad peak", "sdpa-ready", "idle adapter",
}  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """One row of ours and a rival of the same case that was cheaper."""

    ours: Row
    rival: Row

    @property
    def factor(self) -> float:
        """Our cost over the rival's."""
        return self.ours.ratio / self.rival.ratio

    @property
    def within_spread(self) -> bool:
        """Whether the rounds' middle parts overlap."""
        return self.ours.ratio_p20 <= self.rival.ratio_p80


def is_ours(variant: str) -> bool:
    return variant in OURS or variant.startswith(OURS_BEGINS)


def is_rival(row: Row) -> bool:
    """Whether it does the same work and is not of this library."""
    variant = row.variant
    if is_ours(variant) or "fastadapter" in variant or variant == "sdpa+gated_prefix":
        return False  # ours, if only in part: torch's attention with our term
    # torch's attention alone is less than what was asked for; over concatenated keys it is all of it
    alone = (row.entry, variant) == ("gated_prefix_attention", "sdpa")
    return not alone and variant not in FLOORS and not variant.startswith("(")


def losses(stored: Sequence[Row]) -> Iterator[Loss]:
    """In the order of the rows; of several of ours in a case, each against each rival.

    A red test of the run, which no speedup is drawn from, makes no loss less of one.
    """
    cases: dict[tuple, list[Row]] = {}
    for row in rows.latest(rows.published(list(stored))):
        key = (row.entry, row.shape, row.dtype, row.floor, row.device, row.threads)
        cases.setdefault(key, []).append(row)
    for found in cases.values():
        for ours in (row for row in found if is_ours(row.variant)):
            for rival in filter(is_rival, found):
                if ours.ratio > rival.ratio:
                    yield Loss(ours, rival)


def block(names: Sequence[str], stored: Sequence[Row]) -> str:
    """The list as a table; ``names``: cpu, gpu.

    Raises: ValueError: another name.
    """
    from .table import number

    if odd := [name for name in names if name not in ("cpu", "gpu")]:
        raise ValueError(f"where-we-lose is drawn for cpu and gpu, got {', '.join(odd)}")
    chosen = [loss for loss in losses(stored) if ("gpu" if loss.ours.driver else "cpu") in names]
    if not chosen:
        return "No stored row of these devices is lost."
    lines = ["| what | ours | cheaper | ours costs |", "| --- | --- | --- | --- |"]
    for loss in sorted(chosen, key=lambda loss: (loss.ours.device, loss.within_spread, -loss.factor)):
        what = f"{loss.ours.entry}, {loss.ours.shape}, {loss.ours.dtype}"
        if loss.ours.driver:
            what += f" ({loss.ours.device})"
        ours, rival = (f"{row.variant}, {number(row.median)} {row.unit}" for row in (loss.ours, loss.rival))
        spread = ", within the spread" if loss.within_spread else ""
        lines.append(f"| {what} | {ours} | {rival} | {loss.factor:.2f} x{spread} |")
    return "\n".join(lines)
