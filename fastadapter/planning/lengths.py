"""How long records are, and what batches of them hold: simulated on the lengths, not guessed."""

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastadapter.training.batching import epoch_batches, share
from fastadapter.training.config import UserError
from fastadapter.training.packing import MOST_TOKENS

LAYOUTS = {
    "grouped": "batches of records of about the same length, padded to the longest (as finetune does)",
    "packed": "records one after another in one row, no padding (--packing)",
    "random": "batches of random records, padded to the longest (as PEFT's examples and trainers do)",
    "max_length": "every record padded to --max-length (as LLaMA-Adapter's training code does)",
}
# Tokens of the 8,309 reviews that the demo and `compare` train on: the 0, 2.5, 5 ... 100 % points of the sorted counts.
_REVIEWS = {
    # "Review: {text}\nSentiment:" with SmolLM2's tokenizer
    True: "8 12 14 15 17 18 19 20 21 22 22 23 24 25 25 26 27 28 28 29 30 30 31 32 32 33 34 35 36 37 38 39 40 41 42 43 "
    "45 47 49 53 75",
    # the text alone, with MiniLM's
    False: "4 8 10 12 13 14 15 16 17 18 19 19 20 21 22 23 23 24 25 26 26 27 28 28 29 30 31 31 32 33 34 35 36 37 39 40 "
    "42 44 46 51 72",
}
REVIEW_RECORDS = 8309
GROUPS = 8  # of steps of like size
# Records of Alpaca have 547 bytes with its template (47.8 MB for instruction, input, output and all three in the
# template, of 52,002 records), about 4.2 a token; half of them are the template and the instruction. The shape is
# taken to be log-normal, answers spread as wide as their mean.
_ALPACA = {"prompt": (66, 20), "completion": (64, 64)}
ALPACA_RECORDS = 52_002
DATA = {
    "reviews": "the 8,309 movie reviews of the demo, one label token each",
    "alpaca-like": "52,002 records, prompts of 66 and answers of 64 tokens in the mean, log-normal",
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of every record: of the prompt and of what is learned."""

    name: str
    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    source: str

    def __post_init__(self):
        if not self.prompts or len(self.prompts) != len(self.completions):
            raise UserError(f"{self.name}: no records")
        for number, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True), 1):
            if prompt < 0 or completion < 0 or prompt + completion < 1:
                raise UserError(f"{self.name}: record {number} has no tokens")

    @property
    def totals(self) -> list[int]:
        return [
            prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]

    def cut(self, max_length: int) -> "Lengths":
        """With the end of longer records cut off, as ``--truncation end`` does."""
        if max_length < 1:
            raise UserError(f"--max-length must be at least 1, got {max_length}")
        pairs = [
            (min(prompt, max_length), min(completion, max(0, max_length - prompt)))
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]
        count = sum(total > max_length for total in self.totals)
        source = f"{self.source}; {count:,} cut to {max_length}" if count else self.source
        return Lengths(self.name, tuple(p for p, _ in pairs), tuple(c for _, c in pairs), source)

    def describe(self) -> str:
        totals = self.totals
        return (
            f"{len(totals):,} records, {statistics.fmean(totals):.0f} tokens in the mean "
            f"({statistics.fmean(self.completions):.0f} learned), longest {max(totals)}"
        )


def named_lengths(name: str, causal: bool, records: int | None = None) -> Lengths:
    """A data set of :data:`DATA`, or so many records spread like it."""
    if name == "reviews":
        count = records or REVIEW_RECORDS
        texts = tuple(_between([int(word) for word in _REVIEWS[causal].split()], count))
        learned = (1 if causal else 0,) * count
        return Lengths(name, texts, learned, "token counts of the real reviews, stored as quantiles")
    count = records or ALPACA_RECORDS
    drawn = random.Random("alpaca-like")
    prompts, completions = (_log_normal(drawn, *_ALPACA[part], count) for part in ("prompt", "completion"))
    return Lengths(name, prompts, completions, "an assumption about Alpaca's records, not their tokens")


def drawn_lengths(mean: float, std: float, records: int, completion_share: float) -> Lengths:
    """Log-normal lengths of that mean and standard deviation.

    Raises: UserError: naming the option.
    """
    for option, value, low in (
        ("--mean-tokens", mean, 1),
        ("--std-tokens", std, 0),
        ("--records", records, 1),
    ):
        if not math.isfinite(value) or value < low:
            raise UserError(f"{option} must be at least {low}, got {value:g}")
    if not 0 < completion_share <= 1:
        raise UserError(f"--completion-share must be above 0 and at most 1, got {completion_share:g}")
    totals = _log_normal(random.Random("lengths"), mean, std, records)
    learned = tuple(max(1, round(total * completion_share)) for total in totals)
    prompts = tuple(total - part for total, part in zip(totals, learned, strict=True))
    return Lengths(
        f"{mean:g} ± {std:g} tokens",
        prompts,
        learned,
        "log-normal, from the mean and deviation that were given",
    )


def _between(quantiles: Sequence[int], count: int) -> list[int]:
    steps = len(quantiles) - 1
    found = []
    for number in range(count):
        at = (number + 0.5) / count * steps
        low = int(at)
        found.append(round(quantiles[low] + (at - low) * (quantiles[min(low + 1, steps)] - quantiles[low])))
    return found


def _log_normal(drawn: random.Random, mean: float, std: float, count: int) -> tuple[int, ...]:
    variance = math.log(1 + (std / mean) ** 2)
    middle, width = math.log(mean) - variance / 2, math.sqrt(variance)
    return tuple(max(1, round(drawn.lognormvariate(middle, width))) for _ in range(count))


@dataclass(frozen=True)
class Batching:
    """How records become forward passes.

    Attributes:
        batch_size: records of a step, over all cards and passes.
        layout: one of :data:`LAYOUTS`.
        max_length: what ``"max_length"`` pads to.
        pack_length: most tokens of a packed row; what a step has beyond takes further passes. ``None``: 8192, or the
            longest record where that is longer.
    """

    batch_size: int
    layout: str = "grouped"
    num_gpus: int = 1
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    pack_length: int | None = None

    def __post_init__(self):
        for option in ("batch_size", "num_gpus", "gradient_accumulation_steps"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"--{option.replace('_', '-')} must be an int of at least 1, got {value!r}")
        if self.layout not in LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.layout == "max_length" and self.max_length is None:
            raise UserError("--padding max_length needs --max-length")
        if self.pack_length is not None:
            if self.layout != "packed":
                raise UserError(f"--pack-length {self.pack_length} goes with --packing")
            if self.pack_length < 1:
                raise UserError(f"--pack-length must be at least 1, got {self.pack_length}")
        if self.batch_size < self.num_gpus * self.gradient_accumulation_steps:
            raise UserError(
                f"--batch-size {self.batch_size} must be at least --num-gpus {self.num_gpus} times "
                f"--gradient-accumulation-steps {self.gradient_accumulation_steps}: each pass needs a record"
            )


@dataclass(frozen=True)
class Workload:
    """The mean forward pass of the card that a step waits for, and the largest one.

    Attributes:
        tokens: computed positions, padding included.
        squares: sum of the squared lengths that attention sees.
        rows: sequences.
        learned: positions with a target.
        steps: of an epoch; ``passes`` of each on that card, in the mean.
        epoch_tokens: real tokens of an epoch; ``useful``: their share of the computed ones.
        groups: the same for steps of like size, with their share of all: a small step may wait for something else
            than a large one.
    """

    tokens: float
    squares: float
    rows: float
    learned: float
    largest_tokens: int = 0
    largest_learned: int = 0
    steps: int = 1
    passes: float = 1
    epoch_tokens: int = 0
    useful: float = 1.0
    groups: tuple[tuple[float, "Workload"], ...] = ()


def one_pass(rows: int, length: int, learned: int | None = None) -> Workload:
    """So many rows of one length; by default with a target at every position."""
    tokens = rows * length
    learned = tokens if learned is None else learned
    return Workload(tokens, rows * length**2, rows, learned, tokens, learned, epoch_tokens=tokens)


def simulate(lengths: Lengths, batching: Batching) -> Workload:
    """One epoch's batches, in the order in which ``finetune`` would take them with seed 0."""
    totals, learned = lengths.totals, lengths.completions
    sizes = batching.batch_size
    if batching.layout in ("random", "max_length"):
        order = list(range(len(totals)))
        random.Random(0).shuffle(order)
        steps = [order[start : start + sizes] for start in range(0, len(order), sizes)]
    else:
        steps = epoch_batches(totals, sizes, 0, 0)
    if batching.layout == "max_length" and max(totals) > batching.max_length:
        raise UserError(
            f"--max-length {batching.max_length} is below the longest record, {max(totals)} tokens"
        )
    if batching.layout == "packed" and max(totals) > (batching.pack_length or max(totals)):
        raise UserError(
            f"--pack-length {batching.pack_length} is below the longest record, {max(totals)} tokens; cut records with "
            "--max-length"
        )
    most = None
    if batching.layout == "packed":
        most = batching.pack_length or max(MOST_TOKENS, max(totals))
    count = batching.gradient_accumulation_steps
    waited: list[tuple[float, ...]] = []
    computed, largest = 0, (0, 0)
    for step in steps:
        slowest: tuple[float, ...] = ()
        for rank in share(step, batching.num_gpus):
            parts = [each for part in share(rank, count) for each in _rows_of_passes(part, totals, most)]
            passes = [_pass(part, totals, learned, batching) for part in parts]
            computed += sum(each[0] for each in passes)
            largest = max(largest, *((each[0], each[3]) for each in passes), (0, 0))
            sums = (*(float(sum(each[place] for each in passes)) for place in range(4)), float(len(passes)))
            slowest = max(slowest, sums)
        waited.append(slowest)
    waited.sort()
    bounds = [len(waited) * part // GROUPS for part in range(GROUPS + 1)]
    groups = tuple(
        ((high - low) / len(waited), _mean(waited[low:high]))
        for low, high in itertools.pairwise(bounds)
        if high > low
    )
    return dataclasses.replace(
        _mean(waited),
        largest_tokens=largest[0],
        largest_learned=largest[1],
        steps=len(steps),
        epoch_tokens=sum(totals),
        useful=sum(totals) / computed,
        groups=groups,
    )


def _mean(steps: Sequence[tuple[float, ...]]) -> Workload:
    """The mean pass of steps, given what each sums up and how many passes it has."""
    tokens, squares, rows, learned, passes = (sum(each[place] for each in steps) for place in range(5))
    return Workload(
        tokens / passes, squares / passes, rows / passes, learned / passes, passes=passes / len(steps)
    )


def _rows_of_passes(rows: Sequence[int], totals: Sequence[int], most: int | None) -> list[list[int]]:
    """One pass of all rows, or as many as packs of ``most`` tokens take, in the order of the rows."""
    if not rows or most is None:
        return [list(rows)] if rows else []
    found: list[list[int]] = [[]]
    tokens = 0
    for row in rows:
        tokens += totals[row]
        if tokens > most and found[-1]:
            found.append([])
            tokens = totals[row]
        found[-1].append(row)
    return found


def _pass(
    rows: Sequence[int], totals: Sequence[int], learned: Sequence[int], batching: Batching
) -> tuple[int, int, int, int]:
    lengths = [totals[row] for row in rows]
    targets = sum(learned[row] for row in rows)
    if batching.layout == "packed":
        return sum(lengths), sum(length**2 for length in lengths), len(rows), targets
    width = batching.max_length if batching.layout == "max_length" else max(lengths)
    return len(rows) * width, len(rows) * width**2, len(rows), targets
