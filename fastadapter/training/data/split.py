"""Which examples are trained on, which are held out, and what their labels are."""

import random
from collections.abc import Sequence

from fastadapter.training.config import UserError
from fastadapter.training.data.example import Example


def split_examples(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: ``count`` of them drawn by ``seed``, both in the order of the file.

    Examples with one prompt stay together, so none is on both sides.

    Raises: UserError: ``count`` leaves no example on one side, or cannot be met without parting equal
        prompts.
    """
    if not 1 <= count < len(examples):
        raise UserError(f"held-out examples must be between 1 and {len(examples) - 1}, got {count}")
    groups: dict[str, int] = {}
    for example in examples:
        groups[example.prompt] = groups.get(example.prompt, 0) + 1
    prompts = list(groups)
    random.Random(f"split-{seed}").shuffle(prompts)
    held: set[str] = set()
    missing = count
    for prompt in prompts:
        if groups[prompt] <= missing:
            held.add(prompt)
            missing -= groups[prompt]
    if missing:
        raise UserError(f"cannot hold out {count} examples without parting examples with equal prompts")
    return [e for e in examples if e.prompt not in held], [e for e in examples if e.prompt in held]


def without_prompts_of(examples: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
    """The examples whose prompt is not among those held out.

    Raises: UserError: none is left.
    """
    prompts = {example.prompt for example in held_out}
    left = [example for example in examples if example.prompt not in prompts]
    if not left:
        raise UserError("every training prompt is also in the evaluation data")
    return left


def label_completions(examples: Sequence[Example]) -> dict[str, str]:
    """Completion of each label that occurs, in the order of their names; empty for prompt/completion records.

    Raises: UserError: one label has two completions, or two labels have one.
    """
    completions: dict[str, str] = {}
    for example in examples:
        if (
            example.label is not None
            and completions.setdefault(example.label, example.completion) != example.completion
        ):
            raise UserError(f"{example.source}: label {example.label!r} has two different completions")
    if len(set(completions.values())) < len(completions):
        raise UserError(f"the labels {', '.join(map(repr, sorted(completions)))} share a completion")
    return dict(sorted(completions.items()))
