"""Walks through the machine code of one program as one warp would, and notes what it costs.

Thread 0 is followed: its integers, addresses and predicates are computed, so loops take as many turns as they would;
values that come from memory or from floating-point arithmetic are all the same ordinary number, which sends data
dependent branches the ordinary way (nothing is infinite or NaN, a gate is not zero, a row has an adapter). Time
passes as the code's own scheduling says (:mod:`.sass`), results that take a variable time arrive after the
latencies below. So ``cycles`` is how long the warp would take alone, with nothing to wait for but its own results.
"""

import math
import struct
from collections import Counter, deque
from dataclasses import dataclass, field

from .sass import NO_BARRIER, Address, Constant, Immediate, Instruction, Other, Predicate, Register

WORD = 0xFFFFFFFF
ORDINARY = 0x3EBD70A4  # 0.37 as fp32; as two halves neither zero, infinite nor NaN
MAX_STEPS = 4_000_000

# Cycles until a result arrives, unless the code waits a fixed time: Luo et al., "Benchmarking and dissecting the
# Nvidia Hopper GPU architecture via microbenchmarking" (arXiv:2402.13499), tables 4 and 5, rounded.
SHARED_LATENCY = 30
CACHE_LATENCY = 270
MEMORY_LATENCY = 650
OTHER_LATENCY = 24
OPERAND_READ = 12
BARRIER_CYCLES = 30

# Cycles that an instruction of a warp occupies a pipe of its scheduler: CUDA C++ Programming Guide, throughput of
# native arithmetic instructions, compute capability 9.0 (a quarter of the multiprocessor's lanes per scheduler).
ALU = {
    "IADD3", "LOP3", "ISETP", "SEL", "FSEL", "FSETP", "FMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX", "PRMT", "SHF", "LEA",
    "PLOP3", "IABS", "SGXT", "P2R", "VIADD", "F2FP", "HSETP2", "HMNMX2", "R2P", "I2FP", "BMSK", "CS2R",
}  # fmt: skip
PIPES = {"alu": (ALU, 2), "imad": ({"IMAD", "HFMA2"}, 2), "fp32": ({"FMUL", "FADD", "FFMA"}, 1)}
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO"}
SPECIAL_CYCLES = 8


@dataclass
class Cost:
    """Of one program: cycles of one warp alone, and what each warp occupies."""

    cycles: float = 0.0
    issued: int = 0
    pipes: Counter = field(default_factory=Counter)  # cycles of a scheduler, by pipe
    matrix_fma: int = 0  # multiplications and additions on matrix units, per warp
    shared_bytes: int = 0  # through shared memory, per warp
    barriers: int = 0
    read: Counter = field(
        default_factory=Counter
    )  # bytes of global memory per warp, by place of the argument
    written: Counter = field(default_factory=Counter)
    again: Counter = field(
        default_factory=Counter
    )  # bytes read before, by log2 of what the warp moved since then
    unknown: Counter = field(default_factory=Counter)  # instructions that are not understood


class Memory:
    """What an address belongs to: arguments lie far apart."""

    SPACE = 40

    def __init__(self, tensors: dict[int, tuple[bool, bool]]):
        self.tensors = tensors  # place -> (holds integers, fits the cache)

    @classmethod
    def base(cls, place: int) -> int:
        return ((place + 1) << cls.SPACE) + (1 << (cls.SPACE - 1))

    def place(self, address: int) -> int:
        return (address >> self.SPACE) - 1


class Walk:
    def __init__(
        self, code: list[Instruction], labels: dict[str, int], constants: dict[int, int], memory: Memory
    ):
        self.code, self.labels, self.constants, self.memory = code, labels, constants, memory

    def run(self, program: tuple[int, int, int]) -> Cost:
        self.program = program
        self.registers = ({}, {})  # ordinary and uniform
        self.predicates = ({}, {})
        self.shared: dict[int, int] = {}
        self.last_shared = 0
        self.cost = Cost()
        self.seen: dict[int, int] = {}
        self.streamed = 0
        ready = [0.0] * 6
        groups: deque[float] = deque(maxlen=16)
        copies, bulk = 0.0, {}
        time, at, calls = 0.0, 0, []
        for _ in range(MAX_STEPS):
            step = self.code[at]
            at += 1
            for barrier in range(6):
                if step.waits >> barrier & 1:
                    time = max(time, ready[barrier])
            issue, active = time, self._holds(step.guard)
            time += max(step.stall, 1)
            self.cost.issued += 1
            latency = self._occupy(step) if active else 0
            op = step.opcode
            if active and op == "EXIT":
                self.cost.cycles = time
                return self.cost
            if active and op in ("BRA", "CALL", "RET"):
                if op == "RET":
                    at = calls.pop()
                elif all(self._holds(x) for x in step.operands if isinstance(x, Predicate)):
                    if op == "CALL":
                        calls.append(at)
                    at = self.labels[step.operands[-1].text.strip("`()")]
                time += 8  # the pipeline is refilled
            elif active and op == "BAR":
                time += BARRIER_CYCLES
                self.cost.barriers += 1
            elif active and op == "LDGDEPBAR":
                groups.append(copies)
            elif active and op == "DEPBAR" and "LE" in step.modifiers:
                left = step.operands[1].bits
                if len(groups) > left:
                    time = max(time, groups[-1 - left])
            elif active and op == "SYNCS" and "PHASECHK" in step.modifiers:
                time = max(time, bulk.get(self._address(step.operands[1]), 0.0))
                self._set(step.operands[0], True)
            elif active and op == "UTMALDG":
                barrier = self.registers[1].get(step.operands[0].registers[0].index + 1, 0)
                bulk[barrier] = issue + MEMORY_LATENCY
            elif active:
                if op == "LDGSTS":
                    copies = max(copies, issue + latency)
                self._execute(step)
            if step.sets_result != NO_BARRIER and active:
                ready[step.sets_result] = max(ready[step.sets_result], issue + latency)
            if step.sets_read != NO_BARRIER and active:
                ready[step.sets_read] = max(ready[step.sets_read], issue + OPERAND_READ)
        raise RuntimeError("the program does not end")

    def _occupy(self, step: Instruction) -> int:
        """Note what one instruction occupies; cycles until its result."""
        op, cost = step.opcode, self.cost
        for name, (opcodes, cycles) in PIPES.items():
            if op in opcodes:
                cost.pipes[name] += cycles
        if op in SPECIAL:
            cost.pipes["special"] += SPECIAL_CYCLES
        if op in ("HMMA", "IMMA"):
            m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[step.modifiers[0]]
            # tf32 takes twice the time of a half-precision product
            cost.matrix_fma += m * n * k * (2 if "TF32" in step.modifiers else 1)
        if op == "HGMMA":
            m, n, k = map(int, step.modifiers[0].split("x"))
            cost.matrix_fma += m * n * k // 4
        width = _width(step)
        if op in ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS"):
            if op in ("LDSM", "STSM"):  # 8 x 8 matrices of 2-byte numbers
                last = step.modifiers[-1]
                width = 4 * (int(last) if last.isdigit() else 1)
            cost.shared_bytes += 32 * (4 if op == "SHFL" else width)
        if op in ("LDG", "STG", "LDGSTS"):
            where = [x for x in step.operands if isinstance(x, Address)][-1]
            if (
                op == "LDGSTS"
                and isinstance(step.operands[-1], Predicate)
                and not self._holds(step.operands[-1])
            ):
                return CACHE_LATENCY  # zeros are written
            address = self._address(where)
            place = self.memory.place(address)
            if op == "STG":
                cost.written[place] += 32 * width
            else:
                cost.read[place] += 32 * width
                if address in self.seen:
                    cost.again[(self.streamed - self.seen[address]).bit_length()] += 32 * width
                self.seen[address] = self.streamed
            self.streamed += 32 * width
            cached = self.memory.tensors.get(place, (False, True))[1]
            return CACHE_LATENCY if cached else MEMORY_LATENCY
        if op in ("LDS", "LDSM", "LDC"):
            return SHARED_LATENCY
        return OTHER_LATENCY

    def _holds(self, predicate: Predicate | None) -> bool:
        if predicate is None:
            return True
        value = (
            True
            if predicate.index is None
            else self.predicates[predicate.uniform].get(predicate.index, False)
        )
        return value != predicate.negated

    def _set(self, target, value: bool) -> None:
        if isinstance(target, Predicate) and target.index is not None:
            self.predicates[target.uniform][target.index] = value

    def _address(self, address: Address) -> int:
        total = address.offset
        for number, register in enumerate(address.registers):
            value = self._value(register)
            if number == 0 and address.wide:
                value |= self._value(_next(register)) << 32
            total += value
        return total & (WORD << 32 | WORD)

    def _value(self, operand) -> int:
        """32 bits of an operand."""
        if isinstance(operand, Register):
            value = (
                0 if operand.index is None else self.registers[operand.uniform].get(operand.index, ORDINARY)
            )
            return _signed_away(value, operand.sign, operand.absolute)
        if isinstance(operand, Immediate):
            return operand.bits
        if isinstance(operand, Constant):
            return _signed_away(self.constants.get(operand.offset, 0), operand.sign, False)
        if isinstance(operand, Other):
            return {
                "SR_CTAID.X": self.program[0],
                "SR_CTAID.Y": self.program[1],
                "SR_CTAID.Z": self.program[2],
            }.get(operand.text, 0)
        return 0

    def _pair(self, operand) -> int:
        if isinstance(operand, Constant):
            return self.constants.get(operand.offset, 0) | self.constants.get(operand.offset + 4, 0) << 32
        return self._value(operand) | self._value(_next(operand)) << 32

    def _float(self, operand) -> float:
        plain = operand
        if isinstance(operand, Register):
            plain = Register(operand.uniform, operand.index)
        value = struct.unpack("<f", struct.pack("<I", self._value(plain)))[0]
        if isinstance(operand, Register):
            value = abs(value) if operand.absolute else value
            value = -value if operand.sign else value
        return value

    def _write(self, target, value: int, words: int = 1) -> None:
        if isinstance(target, Register) and target.index is not None:
            for number in range(words):
                self.registers[target.uniform][target.index + number] = value >> 32 * number & WORD

    def _execute(self, step: Instruction) -> None:
        op = step.opcode
        plain = op[1:] if op.startswith("U") and op[1:] in SAME else op
        handler = HANDLERS.get(plain)
        if handler is not None:
            handler(self, step)
        elif op in NO_RESULT:
            return
        elif op in FLOATS:
            words = 4 if op in ("HMMA", "IMMA") else 1
            self._write(step.operands[0], sum(ORDINARY << 32 * i for i in range(words)), words)
        else:
            self.cost.unknown[".".join([op, *step.modifiers])] += 1


def _next(operand):
    if isinstance(operand, Register) and operand.index is not None:
        return Register(operand.uniform, operand.index + 1, operand.sign)
    return Immediate(0)


def _signed_away(value: int, sign: str, absolute: bool) -> int:
    if absolute:
        value = abs(_signed(value))
    return {"": value, "-": -value, "~": ~value}[sign] & WORD


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _width(step: Instruction) -> int:
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


def _imad(walk: Walk, step: Instruction) -> None:
    written, target, (a, b, c), carries = _split(step)
    if "WIDE" in step.modifiers or "HI" in step.modifiers:
        left, right = walk._value(a), walk._value(b)
        if "U32" not in step.modifiers:
            left, right = _signed(left), _signed(right)
        total = left * right + walk._pair(c) + sum(walk._holds(x) for x in carries)
        for predicate in written:
            walk._set(predicate, total >> 64 != 0)
        if "HI" in step.modifiers:
            walk._write(target, total >> 32 & WORD)
        else:
            walk._write(target, total & (WORD << 32 | WORD), 2)
        return
    total = walk._value(a) * walk._value(b) + walk._value(c) + sum(walk._holds(x) for x in carries)
    walk._write(target, total & WORD)


def _iadd3(walk: Walk, step: Instruction) -> None:
    written, target, read, carries = _split(step)
    # -x is ~x + 1, and the 1 takes part in the carry
    total = sum(walk._holds(x) for x in carries) if "X" in step.modifiers else 0
    for operand in read:
        value = walk._value(operand)
        negative = isinstance(operand, Register | Constant) and operand.sign == "-"
        total += (1 << 32) if negative and value == 0 else value
    for number, predicate in enumerate(written):
        walk._set(predicate, total >> 32 > number)
    walk._write(target, total & WORD)


def _lea(walk: Walk, step: Instruction) -> None:
    written, target, read, carries = _split(step)
    carry = sum(walk._holds(x) for x in carries)
    shift = walk._value(read[-1]) & 31
    low, base = walk._value(read[0]), walk._value(read[1])
    if "HI" not in step.modifiers:
        total = (low << shift & WORD) + base + carry
        for predicate in written:
            walk._set(predicate, total >> 32 != 0)
        walk._write(target, total & WORD)
        return
    if "SX32" in step.modifiers:
        high = WORD if low >> 31 else 0
    else:
        high = walk._value(read[2]) if len(read) > 3 else 0
    walk._write(target, ((high << 32 | low) << shift >> 32) + base + carry & WORD)


def _lop3(walk: Walk, step: Instruction) -> None:
    written, target, read, carries = _split(step)
    a, b, c = (walk._value(x) for x in read[:3])
    result = _lookup(read[3].bits, a, b, c, WORD)
    for predicate in written:
        walk._set(predicate, result != 0)
    walk._write(target, result)


def _lookup(table: int, a: int, b: int, c: int, ones: int) -> int:
    result = 0
    for place in range(8):
        if table >> place & 1:
            result |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return result & ones


def _plop3(walk: Walk, step: Instruction) -> None:
    targets, (a, b, c) = step.operands[:2], (int(walk._holds(x)) for x in step.operands[2:5])
    for target, table in zip(targets, step.operands[5:7], strict=True):
        walk._set(target, bool(_lookup(table.bits, a, b, c, 1)))


def _shf(walk: Walk, step: Instruction) -> None:
    _, target, (low, shift, high), _ = _split(step)
    kind = next(name for name in step.modifiers if name in ("U32", "S32", "U64", "S64"))
    upper, by = walk._value(high), walk._value(shift)
    both = upper << 32 | walk._value(low)
    by = min(by, 63) if kind.endswith("64") else min(by, 32)
    if "L" in step.modifiers:
        shifted = both << by
        value = shifted >> 32 if "HI" in step.modifiers else (walk._value(low) << by)
    else:
        both = _signed(both, 64) if kind.startswith("S") else both
        value = both >> by
        value = (value >> 32) if "HI" in step.modifiers else value
    walk._write(target, value & WORD)


COMPARE = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


def _combine(walk: Walk, step: Instruction, holds: bool, given: Predicate) -> None:
    other = walk._holds(given)
    results = (holds, not holds)
    for target, value in zip(step.operands[:2], results):
        walk._set(target, (value or other) if "OR" in step.modifiers else (value and other))


def _isetp(walk: Walk, step: Instruction) -> None:
    left, right = (walk._value(x) for x in step.operands[2:4])
    if "U32" not in step.modifiers:
        left, right = _signed(left), _signed(right)
    name = step.modifiers[0]
    holds = COMPARE[name](left, right)
    if "EX" in step.modifiers:  # the upper halves of what the low ones were compared for before
        low = walk._holds(step.operands[5])
        if name in ("EQ", "NE"):
            holds = (left == right and low) if name == "EQ" else (left != right or low)
        elif left == right:
            holds = low
    _combine(walk, step, holds, step.operands[4])


def _fsetp(walk: Walk, step: Instruction) -> None:
    left, right = (walk._float(x) for x in step.operands[2:4])
    name = step.modifiers[0]
    unordered = math.isnan(left) or math.isnan(right)
    if name in ("NAN", "NUM"):
        holds = unordered == (name == "NAN")
    else:
        holds = COMPARE[name[:2]](left, right) if not unordered else name.endswith("U")
    _combine(walk, step, holds, step.operands[4])


def _hsetp2(walk: Walk, step: Instruction) -> None:
    holds = any(name.startswith(("NE", "GT", "GE")) for name in step.modifiers)
    for target in step.operands[:2]:
        walk._set(target, holds)


def _select(walk: Walk, step: Instruction) -> None:
    target, a, b, given = step.operands
    walk._write(target, walk._value(a if walk._holds(given) else b))


def _minmax(walk: Walk, step: Instruction) -> None:
    target, *read, given = step.operands
    values = [walk._value(x) for x in read]
    if step.opcode == "VIADDMNMX":
        values = [(values[0] + values[1]) & WORD, values[2]]
    if "U32" not in step.modifiers:
        values = [_signed(x) for x in values]
    value = min(values) if walk._holds(given) else max(values)
    walk._write(target, (max(value, 0) if "RELU" in step.modifiers else value) & WORD)


def _prmt(walk: Walk, step: Instruction) -> None:
    target, a, selector, b = step.operands
    both = walk._value(b) << 32 | walk._value(a)
    result = 0
    for place in range(4):
        pick = walk._value(selector) >> 4 * place & 15
        byte = both >> 8 * (pick & 7) & 255
        if pick & 8:
            byte = 255 if byte >> 7 else 0
        result |= byte << 8 * place
    walk._write(target, result)


def _sgxt(walk: Walk, step: Instruction) -> None:
    target, a, bits = step.operands
    width = walk._value(bits)
    value = walk._value(a) & (1 << width) - 1
    walk._write(target, (value if "U32" in step.modifiers else _signed(value, width)) & WORD)


def _i2f(walk: Walk, step: Instruction) -> None:
    value = walk._pair(step.operands[1]) if "U64" in step.modifiers else walk._value(step.operands[1])
    if "U64" not in step.modifiers and "U32" not in step.modifiers:
        value = _signed(value)
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", single))[0]
    walk._write(step.operands[0], bits + 1 if "RP" in step.modifiers and single < value else bits)


def _f2i(walk: Walk, step: Instruction) -> None:
    value = walk._float(step.operands[1])
    wide = "U64" in step.modifiers
    whole = min(max(int(value), 0), (1 << (64 if wide else 32)) - 1) if math.isfinite(value) else 0
    walk._write(step.operands[0], whole, 2 if wide else 1)


def _mufu(walk: Walk, step: Instruction) -> None:
    value = walk._float(step.operands[1])
    if "RCP" in step.modifiers and value and math.isfinite(value) and abs(value) < 1e38:
        walk._write(step.operands[0], struct.unpack("<I", struct.pack("<f", 1.0 / value))[0])
    else:
        walk._write(step.operands[0], ORDINARY)


def _hfma2(walk: Walk, step: Instruction) -> None:
    """Half products with zero are how constants are made."""
    target, a, b, *constants = step.operands
    if getattr(a, "index", 0) is None and len(constants) == 2:
        halves = [struct.pack("<e", struct.unpack("<f", struct.pack("<I", x.bits))[0]) for x in constants]
        high, low = (struct.unpack("<H", half)[0] for half in halves)
        walk._write(target, high << 16 | low)
    else:
        walk._write(target, ORDINARY)


def _move(walk: Walk, step: Instruction) -> None:
    wide = next((int(name) // 32 for name in step.modifiers if name in ("64", "128")), 1)
    target, source = step.operands[0], step.operands[1]
    if step.opcode == "CS2R":
        wide = 1 if "32" in step.modifiers else 2
    if isinstance(source, Constant):
        value = sum(walk.constants.get(source.offset + 4 * i, 0) << 32 * i for i in range(wide))
    else:
        value = walk._value(source)
    walk._write(target, value, wide)


def _load(walk: Walk, step: Instruction) -> None:
    target = next(x for x in step.operands if isinstance(x, Register))
    address = walk._address(next(x for x in step.operands if isinstance(x, Address)))
    integers = walk.memory.tensors.get(walk.memory.place(address), (False, False))[0]
    words = max(1, _width(step) // 4)
    word = 0 if integers else ORDINARY
    walk._write(target, sum(word << 32 * i for i in range(words)), words)


def _shared(walk: Walk, step: Instruction) -> None:
    words = max(1, _width(step) // 4)
    if step.opcode == "STS":
        where, source = step.operands[:2]
        for number in range(words):
            register = (
                source
                if number == 0
                else Register(source.uniform, source.index + number if source.index is not None else None)
            )
            walk.shared[walk._address(where) + 4 * number] = walk.last_shared = walk._value(register)
        return
    target, where = step.operands[:2]
    address = walk._address(where)
    # another thread's: this one's latest stands in for it
    values = [walk.shared.get(address + 4 * i, walk.last_shared) for i in range(words)]
    walk._write(target, sum(value << 32 * i for i, value in enumerate(values)), words)


def _own(walk: Walk, step: Instruction) -> None:
    """Shuffles and reductions: every thread holds what this one does."""
    target, source = [x for x in step.operands if isinstance(x, Register)][:2]
    walk._write(target, walk._value(source))


def _vote(walk: Walk, step: Instruction) -> None:
    *targets, given = step.operands
    holds = walk._holds(given)
    for target in targets:
        if isinstance(target, Predicate):
            walk._set(target, holds)
        else:
            walk._write(target, WORD if holds else 0)


def _elect(walk: Walk, step: Instruction) -> None:
    walk._set(step.operands[0], True)


def _p2r(walk: Walk, step: Instruction) -> None:
    target, _, base, mask = step.operands
    bits = sum(walk._holds(Predicate(False, i)) << i for i in range(7))
    walk._write(target, (bits & mask.bits) | (walk._value(base) & ~mask.bits & WORD))


def _r2p(walk: Walk, step: Instruction) -> None:
    _, source, mask = step.operands
    for place in range(7):
        if mask.bits >> place & 1:
            walk._set(Predicate(False, place), bool(walk._value(source) >> place & 1))


def _iabs(walk: Walk, step: Instruction) -> None:
    walk._write(step.operands[0], abs(_signed(walk._value(step.operands[1]))) & WORD)


def _popc(walk: Walk, step: Instruction) -> None:
    walk._write(step.operands[0], walk._value(step.operands[1]).bit_count())


HANDLERS = {
    "IMAD": _imad, "IADD3": _iadd3, "VIADD": _iadd3, "LEA": _lea, "LOP3": _lop3, "PLOP3": _plop3, "SHF": _shf,
    "ISETP": _isetp, "FSETP": _fsetp, "HSETP2": _hsetp2, "SEL": _select, "FSEL": _select, "VIMNMX": _minmax,
    "VIMNMX3": _minmax, "VIADDMNMX": _minmax, "PRMT": _prmt, "SGXT": _sgxt, "I2F": _i2f, "F2I": _f2i, "MUFU": _mufu,
    "HFMA2": _hfma2, "MOV": _move, "LDC": _move, "S2R": _move, "S2UR": _move, "CS2R": _move, "R2UR": _move, "LDG": _load,
    "LDS": _shared, "STS": _shared, "SHFL": _own, "REDUX": _own, "VOTE": _vote, "VOTEU": _vote, "ELECT": _elect, "P2R": _p2r,
    "R2P": _r2p, "IABS": _iabs, "POPC": _popc,
}  # fmt: skip
# the uniform datapath has its own names for the same
SAME = {
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
