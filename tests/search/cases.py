"""What is drawn: records of plain values, whose ``repr`` in a failure is the reproducer.

Sizes lean to where tiles, vectors and prefix buckets end. Their product is bounded: an example costs milliseconds.
"""

from typing import NamedTuple

from hypothesis import strategies as st

from fastadapter.ops.backends import MAX_FP32_HEAD_DIM
from tests.search.attention import OPERANDS as ATTENTION
from tests.search.bottleneck import OPERANDS as BOTTLENECK
from tests.search.layouts import LAYOUTS
from tests.support.gated_prefix import device_of

MOST_WORK = 400_000  # multiply-adds of one product
MOST_TILES = 6  # of the interpreter, which takes tens of milliseconds for each
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 130, 200, 256, 260)


class Case(NamedTuple):
    op: str
    seed: int = 0
    dtype: str = "float32"
    masters: bool = False  # fp32 prefix or weights beside half activations
    batch: int = 2
    num_kv_heads: int = 2
    group: int = 2
    q_len: int = 5
    kv_len: int = 5
    head_dim: int = 16
    prefix_len: int = 3
    num_prefixes: int = 1
    ids: tuple[int, ...] | None = None
    mask: str | None = None  # kind-axes: bool-b1ts, float-1hts ...
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] | None = None  # of packed sequences, instead of batch, q_len and kv_len
    gate: str = "random"
    gate_fn: str = "tanh"
    scale: float | None = None
    logits: float = 1.0  # how large the scores are, roughly
    layouts: tuple[str, ...] = ("dense",)  # of the operands in turn
    frozen: tuple[str, ...] = ()
    row: int = 0  # the one that is looked at alone

    def larger(self):
        """Slightly, in every size that is summed over."""
        sizes = ("q_len", "kv_len", "head_dim", "prefix_len")
        changes = {name: getattr(self, name) + 3 for name in sizes}
        if self.lengths is not None:
            changes["lengths"] = tuple(length + 3 for length in self.lengths)
        if self.window is not None:
            changes["window"] = self.window + 3
        return self._replace(**changes)


class BottleneckCase(NamedTuple):
    op: str = "bottleneck"
    seed: int = 0
    dtype: str = "float32"
    masters: bool = False  # fp32 weights beside half activations
    batch: int = 2
    q_len: int = 5
    hidden: int = 16
    size: int = 3
    num_prefixes: int = 1  # entries of the bank
    ids: tuple[int, ...] | None = None
    activation: str = "gelu"
    norm: str = "none"
    scale: float = 1.0
    absent: tuple[str, ...] = ("residual", "norm_weight", "norm_bias")
    tied: bool = False  # the residual is x itself
    zero_channels: bool = False
    logits: float = 1.0  # magnitude of x
    layouts: tuple[str, ...] = ("dense",)
    frozen: tuple[str, ...] = ()
    row: int = 0

    def larger(self):
        return self._replace(hidden=self.hidden + 3, size=self.size + 3)


def edges(*sizes, top):
    """A size: one of those worth trying, or any up to ``top``."""
    return st.sampled_from([size for size in sizes if size <= top]) | st.integers(1, top)


@st.composite
def banks(draw, rows):
    """The size of a bank and an entry (or none) for each row; mostly a shared prefix or a few entries."""
    num_prefixes = draw(st.sampled_from([1, 1, 2, 3, 5]))
    if num_prefixes == 1 and draw(st.booleans()):
        return {"num_prefixes": 1, "ids": None}
    ids = st.lists(st.integers(-1, num_prefixes - 1), min_size=rows, max_size=rows)
    return {"num_prefixes": num_prefixes, "ids": tuple(draw(ids))}


@st.composite
def values(draw, dtype, large=None):
    """Precision and magnitude. The truth is fp64 and cannot judge how fp64 rounds large scores."""
    half = dtype in ("bfloat16", "float16")
    large = (large or {"float16": 200.0, "bfloat16": 1e4, "float32": 1e4}).get(dtype, 1.0)
    return {
        "seed": draw(st.integers(0, 2**31)),
        "dtype": dtype,
        "masters": half and draw(st.booleans()),
        "logits": draw(st.sampled_from([1.0, 1.0, 1.0, large])),
    }


@st.composite
def memory(draw, operands):
    """Layouts of the operands and of grad_out, and which of them are frozen."""
    count = len(operands) + 1
    layouts = st.lists(st.sampled_from(list(LAYOUTS)), min_size=count, max_size=count).map(tuple)
    frozen = st.lists(st.sampled_from(operands), unique=True).map(tuple)
    return {"layouts": draw(st.just(("dense",)) | layouts), "frozen": draw(frozen)}


gating = st.fixed_dictionaries(
    {
        "gate": st.sampled_from(["random", "random", "random", "one-zero", "zero", "tiny", "huge"]),
        "gate_fn": st.sampled_from(["tanh", "identity"]),
    }
)


def is_interpreted(backends):
    """Whether Triton's kernels run in its interpreter, which is slow and computes bf16 wrongly, and not on a GPU."""
    return "triton" in backends and device_of("triton") == "cpu"


def dtypes(backends):
    every = ["float32", "float16", "bfloat16", "float64"]
    return every[: 2 if is_interpreted(backends) else 3 if "triton" in backends else 4]


@st.composite
def sizes(draw, backends, *, keys):
    """Head counts and lengths of an attention op, as small as the backends are slow."""
    interpreted = is_interpreted(backends)
    batch = draw(st.sampled_from([1, 2, 3, 0] if interpreted else [2, 1, 3, 5, 9, 0]))
    num_kv_heads = draw(st.sampled_from([1, 1, 2] if interpreted else [1, 1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 3] if interpreted else [1, 2, 3, 4, 7]))
    head_dim = draw(edges(1, 8, 16, 17, 40, 60, 64, 80, 128, 129, 200, 256, top=256))
    rows = max(batch, 1) * num_kv_heads * group
    left = MOST_TILES // rows if interpreted else MOST_WORK // (rows * head_dim)
    unit = 16 if interpreted else 1  # tiles, or positions
    prefix_len = draw(edges(1, 10, *EDGES, top=min(128, max(unit * left, unit))))
    left //= -(-prefix_len // unit)
    kv_len = draw(edges(*EDGES, top=min(600, max(unit * left, unit))) | st.just(0)) if keys else 0
    if kv_len > prefix_len:
        left = left * -(-prefix_len // unit) // -(-kv_len // unit)
    # one query on many keys is decoding
    q_len = draw(edges(*EDGES, top=min(300, max(unit * left, unit))) | st.sampled_from([1, 0]))
    return {
        "batch": batch,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": head_dim,
        "prefix_len": prefix_len,
    }


@st.composite
def visibility(draw, size):
    """A mask, or causality with or without a window, or packed sequences; and a soft cap."""
    kind = draw(st.sampled_from(["full", "causal", "window", "mask", "mask", "packed", "packed"]))
    found = {"softcap": draw(st.none() | st.sampled_from([0.5, 5.0]))}
    if kind == "mask":
        kinds, axes = ("bool", "bool", "float", "float32"), ("b1ts", "bhts", "1hts", "11ts", "b11s", "1111")
        found["mask"] = "-".join([draw(st.sampled_from(kinds)), draw(st.sampled_from(axes))])
    if kind == "packed":
        top = max(1, min(size["q_len"], size["kv_len"]))
        found["lengths"] = tuple(draw(st.lists(st.just(0) | st.integers(1, top), min_size=0, max_size=4)))
        kind = draw(st.sampled_from(["full", "causal", "window"]))
    found["is_causal"] = kind in ("causal", "window")
    if kind == "window":
        found["window"] = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 40]))
    return found


@st.composite
def attention_cases(draw, op, operands, backends):
    dtype = draw(st.sampled_from(dtypes(backends)))
    keys = "key" in operands
    found = draw(sizes(backends, keys=keys))
    if "triton" in backends and dtype == "float32":  # which has no more than that
        found["head_dim"] = min(found["head_dim"], MAX_FP32_HEAD_DIM)
    if keys:
        found |= draw(visibility(found))
    rows = found["batch"] if found.get("lengths") is None else len(found["lengths"])
    if "gate" in operands:
        found |= draw(gating)
    return Case(
        op,
        **found,
        **draw(values(dtype)),
        **draw(banks(rows)),
        **draw(memory(operands)),
        scale=draw(st.none() | st.sampled_from([0.05, 0.7])),
        row=draw(st.integers(0, max(rows - 1, 0))),
    )


@st.composite
def bottleneck_cases(draw, backends):
    interpreted = is_interpreted(backends)
    dtype = draw(st.sampled_from(dtypes(backends)))
    batch = draw(st.sampled_from([1, 2, 3, 0] if interpreted else [2, 1, 3, 5, 9, 0]))
    hidden = draw(edges(1, 8, 24, 60, 64, 100, 128, 129, 200, 257, 384, top=150 if interpreted else 400))
    size = draw(edges(1, 3, 8, 16, 17, 24, 32, 64, 65, 100, 128, 130, 200, top=80 if interpreted else 256))
    top = min(20, 2**14 // (hidden * size)) if interpreted else MOST_WORK // (max(batch, 1) * hidden * size)
    q_len = draw(edges(*EDGES, top=min(max(top, 1), 300)) | st.just(0))
    norm = draw(st.sampled_from(["none", "layer_norm", "rms_norm"]))
    residual = draw(st.sampled_from(["none", "x", "other"]))
    absent = set() if residual == "other" else {"residual"}
    absent |= draw(st.sets(st.sampled_from(["down_bias", "up_bias", "norm_weight", "norm_bias"])))
    absent |= {"norm_weight", "norm_bias"} if norm == "none" else set()
    present = tuple(name for name in BOTTLENECK if name not in absent)
    return BottleneckCase(
        batch=batch,
        q_len=q_len,
        hidden=hidden,
        size=size,
        norm=norm,
        absent=tuple(sorted(absent)),
        tied=residual == "x",
        activation=draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"])),
        scale=draw(st.sampled_from([1.0, 1.0, 0.3, -2.0, 0.0])),
        zero_channels=draw(st.booleans()),
        **draw(values(dtype, large={"float16": 30.0, "bfloat16": 30.0, "float32": 100.0})),
        **draw(banks(batch)),
        **draw(memory(present)),
        row=draw(st.integers(0, max(batch - 1, 0))),
    )


def strategy(op, backends):
    """Cases of an op that all of these backends can run."""
    if op == "bottleneck":
        return bottleneck_cases(backends)
    return attention_cases(op, ATTENTION[op], backends)
