"""What instructions compute, as far as addresses and loops depend on it: integers, predicates, conversions.

Each handler takes the walk (:mod:`.walk`) whose registers it reads and writes, and the instruction. Floating-point
results are all ``ORDINARY``, but for the reciprocal, which integer divisions begin with.
"""

import math
import struct

from .sass import Address, Constant, Immediate, Instruction, Predicate, Register

WORD = 0xFFFFFFFF
ORDINARY = 0x3EBD70A4  # 0.37 as fp32; as two halves neither zero, infinite nor NaN


def following(operand):
    if isinstance(operand, Register) and operand.index is not None:
        return Register(operand.uniform, operand.index + 1, operand.sign)
    return Immediate(0)


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def width(step: Instruction) -> int:
    """Bytes per thread of a load or store."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[name] for name in step.modifiers if name in sizes), 4)


def _split(step: Instruction):
    """Predicates written, register written, operands read, predicates read."""
    operands, first = step.operands, 0
    while first < len(operands) and isinstance(operands[first], Predicate):
        first += 1
    if first and (first == len(operands) or step.opcode.lstrip("U") in ("ISETP", "FSETP", "HSETP2", "PLOP3")):
        return operands[:first], None, operands[first:], ()
    written = list(operands[:first])
    target, first = operands[first], first + 1
    while first < len(operands) and isinstance(operands[first], Predicate):
        written.append(operands[first])
        first += 1
    rest = operands[first:]
    read = [x for x in rest if not isinstance(x, Predicate)]
    return written, target, read, [x for x in rest if isinstance(x, Predicate)]


def _imad(walk, step: Instruction) -> None:
    written, target, (a, b, c), carries = _split(step)
    if "WIDE" in step.modifiers or "HI" in step.modifiers:
        left, right = walk.value(a), walk.value(b)
        if "U32" not in step.modifiers:
            left, right = signed(left), signed(right)
        total = left * right + walk.pair(c) + sum(walk.holds(x) for x in carries)
        for predicate in written:
            walk.set(predicate, total >> 64 != 0)
        if "HI" in step.modifiers:
            walk.write(target, total >> 32 & WORD)
        else:
            walk.write(target, total & (WORD << 32 | WORD), 2)
        return
    total = walk.value(a) * walk.value(b) + walk.value(c) + sum(walk.holds(x) for x in carries)
    walk.write(target, total & WORD)


def _iadd3(walk, step: Instruction) -> None:
    written, target, read, carries = _split(step)
    # -x is ~x + 1, and the 1 takes part in the carry
    total = sum(walk.holds(x) for x in carries) if "X" in step.modifiers else 0
    for operand in read:
        value = walk.value(operand)
        negative = isinstance(operand, Register | Constant) and operand.sign == "-"
        total += (1 << 32) if negative and value == 0 else value
    for number, predicate in enumerate(written):
        walk.set(predicate, total >> 32 > number)
    walk.write(target, total & WORD)


def _lea(walk, step: Instruction) -> None:
    written, target, read, carries = _split(step)
    carry = sum(walk.holds(x) for x in carries)
    shift = walk.value(read[-1]) & 31
    low, base = walk.value(read[0]), walk.value(read[1])
    if "HI" not in step.modifiers:
        total = (low << shift & WORD) + base + carry
        for predicate in written:
            walk.set(predicate, total >> 32 != 0)
        walk.write(target, total & WORD)
        return
    if "SX32" in step.modifiers:
        high = WORD if low >> 31 else 0
    else:
        high = walk.value(read[2]) if len(read) > 3 else 0
    walk.write(target, ((high << 32 | low) << shift >> 32) + base + carry & WORD)


def _lop3(walk, step: Instruction) -> None:
    written, target, read, carries = _split(step)
    a, b, c = (walk.value(x) for x in read[:3])
    result = _lookup(read[3].bits, a, b, c, WORD)
    for predicate in written:
        walk.set(predicate, result != 0)
    walk.write(target, result)


def _lookup(table: int, a: int, b: int, c: int, ones: int) -> int:
    result = 0
    for place in range(8):
        if table >> place & 1:
            result |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return result & ones


def _plop3(walk, step: Instruction) -> None:
    targets, (a, b, c) = step.operands[:2], (int(walk.holds(x)) for x in step.operands[2:5])
    for target, table in zip(targets, step.operands[5:7], strict=True):
        walk.set(target, bool(_lookup(table.bits, a, b, c, 1)))


def _shf(walk, step: Instruction) -> None:
    _, target, (low, shift, high), _ = _split(step)
    kind = next(name for name in step.modifiers if name in ("U32", "S32", "U64", "S64"))
    upper, by = walk.value(high), walk.value(shift)
    both = upper << 32 | walk.value(low)
    by = min(by, 63) if kind.endswith("64") else min(by, 32)
    if "L" in step.modifiers:
        shifted = both << by
        value = shifted >> 32 if "HI" in step.modifiers else (walk.value(low) << by)
    else:
        both = signed(both, 64) if kind.startswith("S") else both
        value = both >> by
        value = (value >> 32) if "HI" in step.modifiers else value
    walk.write(target, value & WORD)


COMPARE = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


def _combine(walk, step: Instruction, holds: bool, given: Predicate) -> None:
    other = walk.holds(given)
    results = (holds, not holds)
    for target, value in zip(step.operands[:2], results):
        walk.set(target, (value or other) if "OR" in step.modifiers else (value and other))


def _isetp(walk, step: Instruction) -> None:
    left, right = (walk.value(x) for x in step.operands[2:4])
    if "U32" not in step.modifiers:
        left, right = signed(left), signed(right)
    name = step.modifiers[0]
    holds = COMPARE[name](left, right)
    if "EX" in step.modifiers:  # the upper halves of what the low ones were compared for before
        low = walk.holds(step.operands[5])
        if name in ("EQ", "NE"):
            holds = (left == right and low) if name == "EQ" else (left != right or low)
        elif left == right:
            holds = low
    _combine(walk, step, holds, step.operands[4])


def _fsetp(walk, step: Instruction) -> None:
    left, right = (walk.number(x) for x in step.operands[2:4])
    name = step.modifiers[0]
    unordered = math.isnan(left) or math.isnan(right)
    if name in ("NAN", "NUM"):
        holds = unordered == (name == "NAN")
    else:
        holds = COMPARE[name[:2]](left, right) if not unordered else name.endswith("U")
    _combine(walk, step, holds, step.operands[4])


def _hsetp2(walk, step: Instruction) -> None:
    holds = any(name.startswith(("NE", "GT", "GE")) for name in step.modifiers)
    for target in step.operands[:2]:
        walk.set(target, holds)


def _select(walk, step: Instruction) -> None:
    target, a, b, given = step.operands
    walk.write(target, walk.value(a if walk.holds(given) else b))


def _minmax(walk, step: Instruction) -> None:
    target, *read, given = step.operands
    values = [walk.value(x) for x in read]
    if step.opcode == "VIADDMNMX":
        values = [(values[0] + values[1]) & WORD, values[2]]
    if "U32" not in step.modifiers:
        values = [signed(x) for x in values]
    value = min(values) if walk.holds(given) else max(values)
    walk.write(target, (max(value, 0) if "RELU" in step.modifiers else value) & WORD)


def _prmt(walk, step: Instruction) -> None:
    target, a, selector, b = step.operands
    both = walk.value(b) << 32 | walk.value(a)
    result = 0
    for place in range(4):
        pick = walk.value(selector) >> 4 * place & 15
        byte = both >> 8 * (pick & 7) & 255
        if pick & 8:
            byte = 255 if byte >> 7 else 0
        result |= byte << 8 * place
    walk.write(target, result)


def _sgxt(walk, step: Instruction) -> None:
    target, a, bits = step.operands
    width = walk.value(bits)
    value = walk.value(a) & (1 << width) - 1
    walk.write(target, (value if "U32" in step.modifiers else signed(value, width)) & WORD)


def _i2f(walk, step: Instruction) -> None:
    value = walk.pair(step.operands[1]) if "U64" in step.modifiers else walk.value(step.operands[1])
    if "U64" not in step.modifiers and "U32" not in step.modifiers:
        value = signed(value)
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", single))[0]
    walk.write(step.operands[0], bits + 1 if "RP" in step.modifiers and single < value else bits)


def _f2i(walk, step: Instruction) -> None:
    value = walk.number(step.operands[1])
    wide = "U64" in step.modifiers
    whole = min(max(int(value), 0), (1 << (64 if wide else 32)) - 1) if math.isfinite(value) else 0
    walk.write(step.operands[0], whole, 2 if wide else 1)


def _mufu(walk, step: Instruction) -> None:
    value = walk.number(step.operands[1])
    if "RCP" in step.modifiers and value and math.isfinite(value) and abs(value) < 1e38:
        walk.write(step.operands[0], struct.unpack("<I", struct.pack("<f", 1.0 / value))[0])
    else:
        walk.write(step.operands[0], ORDINARY)


def _hfma2(walk, step: Instruction) -> None:
    """Half products with zero are how constants are made."""
    target, a, b, *constants = step.operands
    if getattr(a, "index", 0) is None and len(constants) == 2:
        halves = [struct.pack("<e", struct.unpack("<f", struct.pack("<I", x.bits))[0]) for x in constants]
        high, low = (struct.unpack("<H", half)[0] for half in halves)
        walk.write(target, high << 16 | low)
    else:
        walk.write(target, ORDINARY)


def _move(walk, step: Instruction) -> None:
    wide = next((int(name) // 32 for name in step.modifiers if name in ("64", "128")), 1)
    target, source = step.operands[0], step.operands[1]
    if step.opcode == "CS2R":
        wide = 1 if "32" in step.modifiers else 2
    if isinstance(source, Constant):
        value = sum(walk.constants.get(source.offset + 4 * i, 0) << 32 * i for i in range(wide))
    else:
        value = walk.value(source)
    walk.write(target, value, wide)


def _load(walk, step: Instruction) -> None:
    target = next(x for x in step.operands if isinstance(x, Register))
    address = walk.address(next(x for x in step.operands if isinstance(x, Address)))
    integers = walk.memory.tensors.get(walk.memory.place(address), (False, False))[0]
    words = max(1, width(step) // 4)
    word = 0 if integers else ORDINARY
    walk.write(target, sum(word << 32 * i for i in range(words)), words)


def _shared(walk, step: Instruction) -> None:
    words = max(1, width(step) // 4)
    if step.opcode == "STS":
        where, source = step.operands[:2]
        for number in range(words):
            register = (
                source
                if number == 0
                else Register(source.uniform, source.index + number if source.index is not None else None)
            )
            walk.shared[walk.address(where) + 4 * number] = walk.last_shared = walk.value(register)
        return
    target, where = step.operands[:2]
    address = walk.address(where)
    # another thread's: this one's latest stands in for it
    values = [walk.shared.get(address + 4 * i, walk.last_shared) for i in range(words)]
    walk.write(target, sum(value << 32 * i for i, value in enumerate(values)), words)


def _own(walk, step: Instruction) -> None:
    """Shuffles and reductions: every thread holds what this one does."""
    target, source = [x for x in step.operands if isinstance(x, Register)][:2]
    walk.write(target, walk.value(source))


def _vote(walk, step: Instruction) -> None:
    *targets, given = step.operands
    holds = walk.holds(given)
    for target in targets:
        if isinstance(target, Predicate):
            walk.set(target, holds)
        else:
            walk.write(target, WORD if holds else 0)


def _elect(walk, step: Instruction) -> None:
    walk.set(step.operands[0], True)


def _p2r(walk, step: Instruction) -> None:
    target, _, base, mask = step.operands
    bits = sum(walk.holds(Predicate(False, i)) << i for i in range(7))
    walk.write(target, (bits & mask.bits) | (walk.value(base) & ~mask.bits & WORD))


def _r2p(walk, step: Instruction) -> None:
    _, source, mask = step.operands
    for place in range(7):
        if mask.bits >> place & 1:
            walk.set(Predicate(False, place), bool(walk.value(source) >> place & 1))


def _iabs(walk, step: Instruction) -> None:
    walk.write(step.operands[0], abs(signed(walk.value(step.operands[1]))) & WORD)


def _popc(walk, step: Instruction) -> None:
    walk.write(step.operands[0], walk.value(step.operands[1]).bit_count())


HANDLERS = {
    "IMAD": _imad, "IADD3": _iadd3, "VIADD": _iadd3, "LEA": _lea, "LOP3": _lop3, "PLOP3": _plop3, "SHF": _shf,
    "ISETP": _isetp, "FSETP": _fsetp, "HSETP2": _hsetp2, "SEL": _select, "FSEL": _select, "VIMNMX": _minmax,
    "VIMNMX3": _minmax, "VIADDMNMX": _minmax, "PRMT": _prmt, "SGXT": _sgxt, "I2F": _i2f, "F2I": _f2i, "MUFU": _mufu,
    "HFMA2": _hfma2, "MOV": _move, "LDC": _move, "S2R": _move, "S2UR": _move, "CS2R": _move, "R2UR": _move,
    "LDG": _load, "LDS": _shared, "STS": _shared, "SHFL": _own, "REDUX": _own, "VOTE": _vote, "VOTEU": _vote,
    "ELECT": _elect, "P2R": _p2r, "R2P": _r2p, "IABS": _iabs, "POPC": _popc,
}  # fmt: skip
# the uniform datapath has its own names for the same
UNIFORM = {
    "IMAD",
    "IADD3",
    "LEA",
    "LOP3",
    "PLOP3",
    "SHF",
    "ISETP",
    "SEL",
    "MOV",
    "LDC",
    "SGXT",
    "PRMT",
    "VIMNMX",
    "POPC",
}
FLOATS = {
    "HMMA",
    "IMMA",
    "FMUL",
    "FADD",
    "FFMA",
    "FMNMX",
    "F2FP",
    "F2F",
    "I2FP",
    "HADD2",
    "HMUL2",
    "HMNMX2",
    "FLO",
    "ATOMG",
}
NO_RESULT = {
    "LDSM", "STSM", "STG", "LDGSTS", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "SYNCS", "UTMASTG", "UTMACCTL",
    "UTMACMDFLUSH", "FENCE", "MEMBAR", "CCTL", "WARPGROUP", "HGMMA", "ERRBAR", "YIELD", "UTMAPF", "R2B", "LDL", "STL",
}  # fmt: skip
