"""Walks through the machine code of one program as one warp would, and notes what it costs.

Thread 0 is followed: its integers, addresses and predicates are computed, so loops take as many turns as they would;
values that come from memory or from floating-point arithmetic are all the same ordinary number, which sends data
dependent branches the ordinary way (nothing is infinite or NaN, a gate is not zero, a row has an adapter). Time
passes as the code's own scheduling says (:mod:`.sass`), results that take a variable time arrive after the
latencies below. So ``cycles`` is how long the warp would take alone, with nothing to wait for but its own results.
"""

import struct
from collections import Counter, deque
from dataclasses import dataclass, field

from .sass import NO_BARRIER, Address, Constant, Immediate, Instruction, Other, Predicate, Register
from .semantics import FLOATS, HANDLERS, NO_RESULT, ORDINARY, UNIFORM, WORD, following, signed, width

MAX_STEPS = 4_000_000

# Cycles until a result arrives, unless the code waits a fixed time. Shared memory and cache as in Luo et al.,
# "Benchmarking and dissecting the Nvidia Hopper GPU architecture via microbenchmarking" (arXiv:2402.13499), rounded;
# memory is about 370 ns (with 1000 cycles, the median error against measurements is 10 % instead of 8 %).
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
            issue, active = time, self.holds(step.guard)
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
                elif all(self.holds(x) for x in step.operands if isinstance(x, Predicate)):
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
                time = max(time, bulk.get(self.address(step.operands[1]), 0.0))
                self.set(step.operands[0], True)
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
        size = width(step)
        if op in ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS"):
            if op in ("LDSM", "STSM"):  # 8 x 8 matrices of 2-byte numbers
                last = step.modifiers[-1]
                size = 4 * (int(last) if last.isdigit() else 1)
            cost.shared_bytes += 32 * (4 if op == "SHFL" else size)
        if op in ("LDG", "STG", "LDGSTS"):
            where = [x for x in step.operands if isinstance(x, Address)][-1]
            if (
                op == "LDGSTS"
                and isinstance(step.operands[-1], Predicate)
                and not self.holds(step.operands[-1])
            ):
                return CACHE_LATENCY  # zeros are written
            address = self.address(where)
            place = self.memory.place(address)
            if op == "STG":
                cost.written[place] += 32 * size
            else:
                cost.read[place] += 32 * size
                if address in self.seen:
                    cost.again[(self.streamed - self.seen[address]).bit_length()] += 32 * size
                self.seen[address] = self.streamed
            self.streamed += 32 * size
            cached = self.memory.tensors.get(place, (False, True))[1]
            return CACHE_LATENCY if cached else MEMORY_LATENCY
        if op in ("LDS", "LDSM", "LDC"):
            return SHARED_LATENCY
        return OTHER_LATENCY

    def holds(self, predicate: Predicate | None) -> bool:
        if predicate is None:
            return True
        value = (
            True
            if predicate.index is None
            else self.predicates[predicate.uniform].get(predicate.index, False)
        )
        return value != predicate.negated

    def set(self, target, value: bool) -> None:
        if isinstance(target, Predicate) and target.index is not None:
            self.predicates[target.uniform][target.index] = value

    def address(self, address: Address) -> int:
        total = address.offset
        for number, register in enumerate(address.registers):
            value = self.value(register)
            if number == 0 and address.wide:
                value |= self.value(following(register)) << 32
            total += value
        return total & (WORD << 32 | WORD)

    def value(self, operand) -> int:
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

    def pair(self, operand) -> int:
        if isinstance(operand, Constant):
            return self.constants.get(operand.offset, 0) | self.constants.get(operand.offset + 4, 0) << 32
        return self.value(operand) | self.value(following(operand)) << 32

    def number(self, operand) -> float:
        plain = operand
        if isinstance(operand, Register):
            plain = Register(operand.uniform, operand.index)
        value = struct.unpack("<f", struct.pack("<I", self.value(plain)))[0]
        if isinstance(operand, Register):
            value = abs(value) if operand.absolute else value
            value = -value if operand.sign else value
        return value

    def write(self, target, value: int, words: int = 1) -> None:
        if isinstance(target, Register) and target.index is not None:
            for number in range(words):
                self.registers[target.uniform][target.index + number] = value >> 32 * number & WORD

    def _execute(self, step: Instruction) -> None:
        op = step.opcode
        plain = op[1:] if op.startswith("U") and op[1:] in UNIFORM else op
        handler = HANDLERS.get(plain)
        if handler is not None:
            handler(self, step)
        elif op in NO_RESULT:
            return
        elif op in FLOATS:
            words = 4 if op in ("HMMA", "IMMA") else 1
            self.write(step.operands[0], sum(ORDINARY << 32 * i for i in range(words)), words)
        else:
            self.cost.unknown[".".join([op, *step.modifiers])] += 1


def _signed_away(value: int, sign: str, absolute: bool) -> int:
    if absolute:
        value = abs(signed(value))
    return {"": value, "-": -value, "~": ~value}[sign] & WORD
