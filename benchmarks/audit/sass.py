"""Machine code of an NVIDIA kernel as a list of instructions, with what the compiler tells the scheduler.

Since Volta an instruction carries its own timing: cycles until the next may issue, one of six barriers that it sets
when its result arrives or its operands were read, and the barriers it waits for. nvdisasm prints them only as bits of
the encoding; their places are those of Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking"
(arXiv:1804.06826), section 2, which Hopper still has.
"""

import re
import struct
from dataclasses import dataclass

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* (0x[0-9a-f]{16}) \*/$")
ENCODING = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/$")
LABEL = re.compile(r"^(\S+):$")
GUARD = re.compile(r"^@(!?)(U?P(?:\d|T)) ")
REGISTER = re.compile(r"^(-|~)?(\|)?(U?R(?:\d+|Z))(?:\.[\w]+)*\|?(?:\.[\w]+)*$")
PREDICATE = re.compile(r"^(!)?(U?P(?:\d|T))$")
NO_BARRIER = 7


@dataclass(frozen=True)
class Register:
    """``index`` is None for the register that reads as zero."""

    uniform: bool
    index: int | None
    sign: str = ""  # "-" or "~"
    absolute: bool = False


@dataclass(frozen=True)
class Predicate:
    """``index`` is None for the one that is always true."""

    uniform: bool
    index: int | None
    negated: bool = False


@dataclass(frozen=True)
class Address:
    """Registers that are added up, with an offset; ``wide`` where the first names a pair."""

    registers: tuple[Register, ...]
    offset: int
    wide: bool


@dataclass(frozen=True)
class Constant:
    """A place in the bank of constants that holds the arguments."""

    offset: int
    sign: str = ""


@dataclass(frozen=True)
class Immediate:
    bits: int


@dataclass(frozen=True)
class Other:
    """A label, a special register, a descriptor."""

    text: str


@dataclass(frozen=True)
class Instruction:
    guard: Predicate | None
    opcode: str  # "HMMA"
    modifiers: tuple[str, ...]  # ("16816", "F32", "BF16")
    operands: tuple
    stall: int  # cycles until the next instruction
    sets_result: int  # barriers, NO_BARRIER for none
    sets_read: int
    waits: int  # mask of barriers


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of ``nvdisasm -c -hex``, and the place of every label."""
    found, labels = [], {}
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if match := LINE.match(line):
            high = ENCODING.match(lines[number + 1])
            if high is None:
                raise ValueError(f"no encoding after {line.strip()!r}")
            found.append(_instruction(match[2], int(high[1], 16) >> 41))
        elif label := LABEL.match(line):
            labels[label[1]] = len(found)
    return found, labels


def _instruction(text: str, control: int) -> Instruction:
    guard = None
    if match := GUARD.match(text):
        guard = _predicate(match[2], bool(match[1]))
        text = text[match.end() :]
    name, _, rest = text.strip().partition(" ")
    opcode, *modifiers = name.split(".")
    operands = tuple(_operand(part.strip()) for part in _split(rest)) if rest.strip() else ()
    return Instruction(
        guard, opcode, tuple(modifiers), operands,
        stall=control & 15, sets_result=control >> 5 & 7, sets_read=control >> 8 & 7, waits=control >> 11 & 63,
    )  # fmt: skip


def _split(text: str) -> list[str]:
    """Operands: commas, but not those of a list in braces."""
    return re.split(r",(?![^{]*\})", text)


def _predicate(name: str, negated: bool) -> Predicate:
    index = None if name.endswith("T") else int(name.lstrip("UP"))
    return Predicate(name.startswith("U"), index, negated)


def _operand(text: str):
    text = re.sub(r"\.reuse\b", "", text)
    if match := PREDICATE.match(text):
        return _predicate(match[2], bool(match[1]))
    if match := REGISTER.match(text):
        name = match[3]
        index = None if name.endswith("Z") else int(name.lstrip("UR"))
        return Register(name.startswith("U"), index, match[1] or "", bool(match[2]))
    if match := re.match(r"^(-|~)?\|?c\[0x[0-9a-f]+\]\[(0x[0-9a-f]+)\]\|?$", text):
        return Constant(int(match[2], 16), match[1] or "")
    if "[" in text and not text.startswith("c["):
        return _address(text[text.rindex("[") + 1 : text.rindex("]")])
    if re.match(r"^-?0x[0-9a-f]+$", text):
        return Immediate(int(text, 16) & 0xFFFFFFFF)
    if re.match(r"^[-+]?(\d+(\.\d*)?(e[-+]?\d+)?|INF|QNAN)$", text):
        value = float(text.replace("QNAN", "nan"))
        return Immediate(struct.unpack("<I", struct.pack("<f", value))[0])
    return Other(text)


def _address(text: str) -> Address:
    registers, offset, wide = [], 0, False
    for part in text.split("+"):
        if re.match(r"^-?0x[0-9a-f]+$", part):
            offset += int(part, 16)
        elif match := REGISTER.match(part):
            name = match[3]
            registers.append(
                Register(name.startswith("U"), None if name.endswith("Z") else int(name.lstrip("UR")))
            )
            wide |= ".64" in part
    return Address(tuple(registers), offset, wide)
