"""Options of how tokens are chosen, by the names that transformers has for them."""

import argparse
from typing import Any, NamedTuple

from fastadapter.cli.options import require_number, unescape
from fastadapter.training import UserError


class _Number(NamedTuple):
    """An option that is a number: its neutral value, its bounds, and what it does."""

    neutral: int | float | None
    low: float
    high: float
    above: bool
    help: str
    why: str = ""


_INF = float("inf")
# With --do-sample only. What transformers itself takes where nothing is said (top_k 50) differs from one release and
# model to the next; here nothing is cut away unless asked.
_DRAWING = {
    "temperature": _Number(
        1.0, 1e-6, 1e6, False, "below 1: likely tokens become likelier; above 1: less so",
        "beyond, scores overflow; without --do-sample the most likely token is taken",
    ),
    "top_k": _Number(0, 0, _INF, False, "draw from so many of the most likely tokens; 0: from all"),
    "top_p": _Number(1.0, 0, 1, True, "draw from the most likely tokens of this total probability"),
    "min_p": _Number(0.0, 0, 1, False, "draw from tokens at least this share as likely as the likeliest"),
    "typical_p": _Number(1.0, 0, 1, True, "draw from the tokens of most typical surprise, of this total probability"),
}  # fmt: skip
_ALWAYS = {
    "min_new_tokens": _Number(0, 0, _INF, False, "no end token before so many"),
    "repetition_penalty": _Number(1.0, 0, 1e6, True, "divide the scores of tokens that occurred; 1: leave them"),
    "no_repeat_ngram_size": _Number(0, 0, _INF, False, "no group of so many tokens occurs twice; 0: any may"),
    "num_beams": _Number(1, 1, _INF, False, "beams of a beam search; 1: none"),
    "length_penalty": _Number(1.0, -1e6, 1e6, False, "of a beam search: above 0 prefers long answers, below 0 short"),
    "num_return_sequences": _Number(1, 1, _INF, False, "answers to each prompt"),
}  # fmt: skip


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("choice of tokens")
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens of an answer")
    group.add_argument(
        "--stop",
        action="append",
        type=unescape,
        metavar="TEXT",
        help=r"end an answer before this text; can be given several times; \n is a new line",
    )
    group.add_argument(
        "--do-sample", action="store_true", help="draw tokens; otherwise the most likely one is taken"
    )
    for name, number in {**_DRAWING, **_ALWAYS}.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(number.neutral),
            metavar="N" if isinstance(number.neutral, int) else "X",
            # whether it was given matters: some need --do-sample
            default=argparse.SUPPRESS,
            help=f"{number.help} (default: {number.neutral})",
        )
    group.add_argument("--seed", type=int, default=0, help="of the drawing")
    group.add_argument(
        "--cache-implementation",
        choices=("dynamic", "static"),
        default="dynamic",
        help="static: of a fixed size; transformers then compiles the model on a GPU",
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for ``generate``. All are given, so that none is left to a model's own generation settings.

    Raises: UserError: a number out of its bounds, or options that contradict each other, by their names.
    """
    given = vars(args)
    require_number("--max-new-tokens", args.max_new_tokens, 1)
    require_number("--seed", args.seed, 0, 2**32 - 1)
    for name, number in {**_DRAWING, **_ALWAYS}.items():
        if name not in given:
            continue
        option = f"--{name.replace('_', '-')}"
        if name in _DRAWING and not args.do_sample:
            raise UserError(f"{option} needs --do-sample")
        require_number(option, given[name], number.low, number.high, above=number.above, why=number.why)
    values = {name: given.get(name, number.neutral) for name, number in {**_DRAWING, **_ALWAYS}.items()}
    if not args.do_sample:  # transformers warns of what would have no effect
        values.update(dict.fromkeys(_DRAWING))
    _require_agreement(args, values)
    if values["num_beams"] == 1:
        values["length_penalty"] = None
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample, **values}
    if args.cache_implementation != "dynamic":
        options["cache_implementation"] = args.cache_implementation
    return options


def _require_agreement(args: argparse.Namespace, values: dict[str, Any]) -> None:
    beams, answers = values["num_beams"], values["num_return_sequences"]
    if values["min_new_tokens"] > args.max_new_tokens:
        raise UserError(
            f"--min-new-tokens {values['min_new_tokens']} is more than --max-new-tokens {args.max_new_tokens}"
        )
    if "length_penalty" in vars(args) and beams == 1:
        raise UserError("--length-penalty needs --num-beams of at least 2")
    if answers > 1 and not args.do_sample and answers > beams:
        raise UserError(
            f"--num-return-sequences {answers} needs --do-sample, or --num-beams of at least as many; "
            "otherwise all answers would be the same"
        )
    if args.do_sample and beams > 1 and answers > beams:
        raise UserError(f"--num-return-sequences {answers} is more than --num-beams {beams}")
    if beams > 1 and args.cache_implementation != "dynamic":
        raise UserError("--cache-implementation static does not go with --num-beams")
    for text in args.stop or ():
        if not text:
            raise UserError("--stop must not be empty")
