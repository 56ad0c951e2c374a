import json
import math
import struct
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from . import capture, chips, machine, sass
from .walk import Memory, Walk

ARGUMENTS = {80: 0x160, 90: 0x210, 100: 0x380}  # where the arguments start in the bank of constants
SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
CACHED = 20e6
SAMPLES = 5


@dataclass(frozen=True)
class Card:
    name: str
    chip: str
    terabytes_per_s: float
    cache: float
    ghz: float = 1.755


CARDS = {"H200": Card("H200", "sm_90", 4.2, 60e6), "H100": Card("H100", "sm_90", 3.0, 50e6)}

@dataclass(frozen=True)
class Constants:
    launch_us: float = 3.0
    cache_terabytes_per_s: float = 9.0
    fma_per_cycle: float = 330.0   # of a scheduler's matrix unit under mma.sync: 62 % of 512... 

@dataclass
class Features:
    kernel: str
    programs: int
    warps: int
    registers: int
    shared: int
    cycles: float
    longest: float
    issued: float
    alu: float
    imad: float
    fp32: float
    special: float
    matrix_fma: float
    shared_bytes: float
    barriers: float
    bytes: int  # of tensors that are touched, each once
    handed: int  # of which written by an earlier launch of the call
    requested: float # from the cache, all programs
    again: dict
    unknown: int = 0


def _flat(value):
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value

def arguments(launch, signature, base):
    """The bank of constants of one launch, and its tensors by place."""
    named = dict(zip(launch.kernel.arg_names, launch.args)) | launch.kwargs
    words, tensors, offset = {}, [], base
    for name, kind in signature.items():
        for value, one in zip(_flat(named[name]), _flat(kind), strict=True):
            if one == "constexpr":
                continue
            size = 8 if one.startswith("*") else SIZES[one]
            offset = -(-offset // size) * size
            if one.startswith("*"):
                # a tensor that is handed over twice is in memory once
                places = [place for place, tensor in enumerate(tensors) if tensor is value]
                bits = Memory.base(places[0] if places else len(tensors))
                tensors.append(value)
            elif one.startswith("fp"):
                bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
            else:
                bits = int(value)
            for word in range(max(1, size // 4)):
                words[offset + 4 * word] = bits >> 32 * word & 0xFFFFFFFF
            offset += size
    return words, tensors


def size(t):
    return t.numel()*t.element_size()

def features(launch, arch, written, code=None, res=None):
    if code is not None:
        signature = res[1]; res = res[0]
    elif code is None:
        compiled = capture.compile_launch(launch, arch)
        signature = compiled.signature
        code = machine.disassemble(compiled.kernel.asm["cubin"])
        res = machine.resources(compiled.kernel)
    ins, labels = sass.parse(code)
    words, tensors = arguments(launch, signature, ARGUMENTS[90])
    memory = Memory({k: (not t.is_floating_point(), size(t) < CACHED) for k, t in enumerate(tensors)})
    walk = Walk(ins, labels, words, memory)
    n = math.prod(launch.grid)
    picks = sorted({round(i*(n-1)/(SAMPLES-1)) for i in range(SAMPLES)})
    dims = (*launch.grid, 1, 1)
    costs = [walk.run((p % dims[0], p//dims[0] % dims[1], p//(dims[0]*dims[1]))) for p in picks]
    mean = lambda f: sum(map(f, costs))/len(costs)
    warps = res.threads//32
    touched = {p for c in costs for p in (*c.read, *c.written)}
    if res.bulk_copies: touched = set(range(len(tensors)))
    unique = {id(tensors[p]): tensors[p] for p in touched if 0 <= p < len(tensors)}
    again = Counter()
    for c in costs:
        for k, v in c.again.items(): again[k] += v*warps*n/len(costs)
    out = Features(launch.name, n, warps, res.registers, res.shared, mean(lambda c: c.cycles), max(c.cycles for c in costs),
        mean(lambda c: c.issued), *(mean(lambda c: c.pipes[k]) for k in ("alu","imad","fp32","special")), mean(lambda c: c.matrix_fma),
        mean(lambda c: c.shared_bytes), mean(lambda c: c.barriers), sum(map(size, unique.values())),
        sum(size(t) for t in unique.values() if id(t) in written), mean(lambda c: sum(c.read.values())+sum(c.written.values()))*warps*n, dict(again),
        sum(sum(c.unknown.values()) for c in costs))
    for p in {p for c in costs for p in c.written}:
        written[id(tensors[p])] = tensors[p]
    return out

def time_us(f, card, k):
    chip = chips.CHIPS[card.chip]
    resident = max(1, chip.blocks(f.registers, 32*f.warps, f.shared))
    sms = chip.multiprocessors
    dram = f.bytes
    if f.handed <= card.cache/2: dram -= f.handed
    for log, b in f.again.items():
        window = 2**int(log) * f.warps * min(f.programs, resident*sms)
        dram += b*(1-min(1, card.cache/2/window))
    clk = card.ghz*1e3 # cycles per us
    demands = [max(f.issued, f.alu, f.imad+f.fp32/2), f.special, f.matrix_fma/k.fma_per_cycle, f.shared_bytes/32]
    slots = resident*sms
    fulls, rest = divmod(f.programs, slots)
    mem_us = max(dram/card.terabytes_per_s/1e6, f.requested/k.cache_terabytes_per_s/1e6)
    mem_each = mem_us*clk*sms/f.programs  # cycles of a multiprocessor's share per program
    def wave(per_sm, cycles):
        n = per_sm*f.warps/4
        waits = [0.0]*len(demands)
        t = cycles
        for _ in range(200):
            r = [d+w for d, w in zip(demands, waits)]
            new = [d*max(0, n-1)/n*(n*(d+w)/t) for d, w in zip(demands, waits)]
            waits = [0.5*a+0.5*b for a, b in zip(waits, new)]
            t = cycles + sum(waits)
        return t
    total = 0.0
    parts = {}
    if fulls > 3:
        core = f.programs/slots*wave(resident, f.cycles)
    else:
        core = fulls*wave(resident, f.cycles if fulls>1 or rest else f.longest)
        if rest: core += wave(-(-rest//sms), f.cycles if fulls else f.longest)
    core /= clk
    return k.launch_us, core, mem_us, {"lat": f.cycles, "wave": wave(resident,f.cycles), "res": resident, "dem":[round(d) for d in demands], "dram":round(dram/1e6), "req":round(f.requested/1e6)}


def estimate(call, card="H200", arch="sm_90", constants=None):
    """(us, lines) of everything that ``call`` launches; tensors have no memory (device "meta")."""
    k, card, written, total, lines = constants or Constants(), CARDS[card], {}, 0.0, []
    for launch in capture.launches_of(call, arch):
        f = features(launch, arch, written)
        start, core, mem, info = time_us(f, card, k)
        us = start + max(core, mem)
        total += us
        lines.append(f"{f.kernel}: {us:.1f} us (core {core:.1f}, memory {mem:.1f}); {f.programs} programs x {f.warps} warps, "
                     f"{info['res']} resident, {f.registers} registers, {f.shared} B shared; alone {f.cycles:.0f} cycles; "
                     f"issue, special, matrix, shared {info['dem']} cycles a warp; {f.barriers:.0f} barriers; DRAM {info['dram']} MB, from cache {info['req']} MB"
                     + (f"; {f.unknown} instructions not understood" if f.unknown else ""))
    return total, lines
