"""Finds address arithmetic in 32 bits: a tensor with few elements can have strides whose products exceed 2^31.

Triton passes a stride that fits 32 bits as a 32-bit integer, so ``row * stride`` wraps silently unless one factor was
widened before the product. Read from Triton's first intermediate code, where every value has a name: from the
offset of each ``tt.addptr`` (and the address of each descriptor) backwards to 32-bit products of two values known
only at run time, or of one with a constant that is no tile size.

Divisions, remainders and comparisons end the walk: what they yield is bounded by the grid or by a length.
"""

import re
from collections.abc import Iterable

DEFINITION = re.compile(r"^\s*(%[\w$.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
NAME = re.compile(r"%[\w$.-]+")
ITERATION = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+)")
CONSTANT = re.compile(r"(?:dense<(-?\d+)>|(?<![\w.])(-?\d+)) : ")
# results that stay within a length, whatever goes in
ENDS = (
    "arith.divsi",
    "arith.divui",
    "arith.remsi",
    "arith.remui",
    "arith.cmpi",
    "arith.fptosi",
    "tt.load",
    "arith.constant",
)
CASTS = (
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
)


def narrow_products(ttir: str, tile_sizes: Iterable[int]) -> list[str]:
    """The 32-bit products that reach an address, each as the line of code that makes it."""
    tiles = {1, 2, *tile_sizes}
    definitions, queue = _parse(ttir)
    found, seen = [], set()
    while queue:
        name = queue.pop()
        if name in seen or name not in definitions:
            continue
        seen.add(name)
        op, rest = definitions[name]
        if op in ENDS:
            continue
        operands = NAME.findall(rest)
        if op == "arith.muli" and re.search(r"i32>?$", rest):
            values = [_constant(operand, definitions) for operand in operands]
            if all(value is None or value not in tiles for value in values):
                found.append(f"{name} = {op}{rest}")
        queue.extend(operands)
    return sorted(found)


def _parse(ttir: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Operation and operands of every value, and the offsets that are added to pointers.

    A loop-carried value, and what a loop or branch results in, is any of what it starts as and is given.
    """
    definitions: dict[str, tuple[str, str]] = {}
    offsets: list[str] = []
    blocks: list[list[str]] = []  # the values that a yield gives something to, of the blocks that are open
    for line in ttir.splitlines():
        text = re.split(r" loc\(", line, maxsplit=1)[0].rstrip()
        if text.startswith("#"):
            continue
        receivers = []
        if match := DEFINITION.match(text):
            name, op, rest = match.groups()
            definitions[name] = (op, "" if op.startswith("scf.") else rest)
            if op == "tt.addptr":
                offsets.append(NAME.findall(rest)[1])
            if op.startswith("scf."):
                receivers.append(name)
        if " iter_args(" in text:
            for carried, initial in ITERATION.findall(text.split(" iter_args(")[1].split(") -> ")[0]):
                definitions[carried] = ("carried", initial)
                receivers.append(carried)
        if text.lstrip().startswith("scf.yield"):
            for receiver in blocks[-1] if blocks else ():
                op, rest = definitions[receiver]
                definitions[receiver] = (op, rest + text)
        # a line may close one block and open another: "} else {"
        if text.lstrip().startswith("}"):
            closed = blocks.pop() if blocks else []
            receivers = receivers or (closed if text.endswith("{") else [])
        if text.endswith("{"):
            blocks.append(receivers)
    return definitions, offsets


def _constant(name: str, definitions: dict[str, tuple[str, str]]) -> int | None:
    """The value of ``name`` if the compiler knows it, through casts and splats."""
    while name in definitions:
        op, rest = definitions[name]
        if op == "arith.constant":
            found = CONSTANT.search(rest)
            return int(found[1] or found[2]) if found else None
        if op not in CASTS:
            return None
        name = NAME.findall(rest)[0]
    return None
