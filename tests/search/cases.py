"""What is drawn: records of plain values, whose ``repr`` in a failure is the reproducer.

Sizes lean to where tiles, vectors and prefix buckets end. Their product is bounded: an example costs milliseconds.
"""

from typing import NamedTuple

from hypothesis import strategies as st

from tests.search.layouts import LAYOUTS

GATED = ("gated_prefix",)
ATTENTION = ()
MOST_WORK = 400_000  # multiply-adds of one product
MOST_TILES = 6  # of the interpreter, which takes tens of milliseconds for each


class Case(NamedTuple):
    op: str
    seed: int = 0
    dtype: str = "float32"
    masters: bool = False  # fp32 prefix or weights beside half activations
    batch: int = 2
    num_kv_heads: int = 2
    group: int = 2
    q_len: int = 5
    kv_len: int = 0
    head_dim: int = 16
    prefix_len: int = 3
    num_prefixes: int = 1
    ids: tuple[int, ...] | None = None
    gate: str = "random"
    gate_fn: str = "tanh"
    scale: float | None = None
    logits: float = 1.0  # how large the scores are, roughly
    layouts: tuple[str, ...] = ("dense",)  # of the operands in turn
    frozen: tuple[str, ...] = ()
    row: int = 0  # the one that is looked at alone


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
def values(draw, dtype):
    """Precision and magnitude. The truth is fp64 and cannot judge how fp64 rounds large scores."""
    half = dtype in ("bfloat16", "float16")
    large = {"float64": 1.0, "float16": 200.0}.get(dtype, 1e4)
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


def dtypes(backends):
    """Triton has no fp64, and its interpreter computes bf16 wrongly."""
    return ["float32", "float16"] if "triton" in backends else ["float32", "bfloat16", "float16", "float64"]


class Sizes(NamedTuple):
    batch: int
    num_kv_heads: int
    group: int
    q_len: int
    head_dim: int
    prefix_len: int


@st.composite
def sizes(draw, backends):
    interpreted = "triton" in backends
    batch = draw(st.sampled_from([1, 2, 3, 0] if interpreted else [2, 1, 3, 5, 9, 0]))
    num_kv_heads = draw(st.sampled_from([1, 1, 2] if interpreted else [1, 1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 3] if interpreted else [1, 2, 3, 4, 7]))
    head_dim = draw(edges(1, 8, 16, 17, 40, 60, 64, 80, 128, 129, 200, 256, top=256))
    rows = max(batch, 1) * num_kv_heads * group
    top = min(128, 16 * max(1, MOST_TILES // rows)) if interpreted else 128
    prefix_len = draw(edges(1, 2, 10, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, top=top))
    if interpreted:
        top = 16 * (MOST_TILES // (rows * -(-prefix_len // 16)))
    else:
        top = MOST_WORK // (rows * head_dim * prefix_len)
    edge = (1, 2, 7, 8, 9, 31, 32, 33, 63, 65, 130, 260)
    q_len = draw(edges(*edge, top=min(max(top, 1), 300)) | st.just(0))
    return Sizes(batch, num_kv_heads, group, q_len, head_dim, prefix_len)


@st.composite
def gated_prefix_cases(draw, backends):
    dtype = draw(st.sampled_from(dtypes(backends)))
    size = draw(sizes(backends))
    return Case(
        "gated_prefix",
        **size._asdict(),
        **draw(values(dtype)),
        **draw(banks(size.batch)),
        **draw(memory(("base", "query", "prefix_key", "prefix_value", "gate"))),
        **draw(gating),
        scale=draw(st.none() | st.sampled_from([0.05, 0.7])),
        row=draw(st.integers(0, max(size.batch - 1, 0))),
    )


STRATEGIES = {"gated_prefix": gated_prefix_cases}
