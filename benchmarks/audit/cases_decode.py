"""Cases of decode: one new token per row over a cache, the prefix folded into the merge of the splits."""

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from .case import Case, Maker, Op


def _run(case: Case, make: Maker) -> Any:
    s = case.sizes
    gated = case.op == "gated_prefix_attention_decode"
    entries = max(s["n"], 1)
    query = make.activations(s["b"], s["h"], s["q"], s["d"])
    key, value = (make.activations(s["b"], s["kv"], s["s"], s["d"]) for _ in range(2))
    prefix = [make.weights(entries, s["kv"], s["p"], s["d"]) for _ in range(2)]
    gate = [make.fp32(entries, s["h"])] if gated else []
    mask = make.activations(1, 1, s["q"], s["s"]) if case.options.get("mask") else None
    if mask is not None:
        mask = mask.expand(s["b"], s["h"], s["q"], s["s"])
    constants = (
        mask, make.row_ids(s["b"], s["n"]), s["d"] ** -0.5, *(["tanh"] if gated else []), False, 0,
        30.0 if case.options.get("softcap") else 0.0,
    )  # fmt: skip
    run = getattr(importlib.import_module("fastadapter.kernels.decode"), case.op)
    return run(query, key, value, *prefix, *gate, *constants)


def _bytes(case: Case) -> int:
    """The cache, and little else: query and output, prefix and gate, a mask."""
    s, (activation, trained) = case.sizes, case.itemsizes
    gate = max(s["n"], 1) * s["h"] * 4 if case.op == "gated_prefix_attention_decode" else 0
    keys = 2 * s["b"] * s["kv"] * s["s"] * s["d"] * activation
    prefix = 2 * max(s["n"], 1) * s["kv"] * s["p"] * s["d"] * trained
    mask = s["q"] * s["s"] * activation if case.options.get("mask") else 0
    return 2 * s["b"] * s["h"] * s["q"] * s["d"] * activation + keys + prefix + gate + mask


def _flops(case: Case) -> int:
    s = case.sizes
    return 4 * s["b"] * s["h"] * s["q"] * s["d"] * (s["s"] + s["p"])


def _cases(op: str) -> Iterator[Case]:
    llama = {"b": 8, "h": 32, "kv": 8, "q": 1, "s": 2048, "d": 128, "p": 10, "n": 0}
    for d in (128, 64, 80, 256, 40, 96):  # the last two are padded to a power of two
        yield Case(op, "forward", "bf16", llama | {"d": d})
    yield Case(op, "forward", "fp16", llama)
    for dtype in ("fp32", "bf16+fp32"):
        for d in (128, 256):
            yield Case(op, "forward", dtype, llama | {"d": d})
    for option in ("softcap", "mask"):
        yield Case(op, "forward", "bf16", llama, {option: True})
    yield Case(op, "forward", "bf16", llama | {"b": 64, "n": 64})
    yield Case(op, "forward", "bf16", llama | {"q": 16})
    yield Case(op, "forward", "bf16", llama | {"kv": 32})


def _small(op: str) -> Iterator[Case]:
    sizes = {"b": 2, "h": 4, "kv": 2, "q": 1, "s": 512, "d": 64, "p": 10, "n": 0}
    for dtype in ("fp16", "fp32"):
        yield Case(op, "forward", dtype, sizes)
    yield Case(op, "forward", "fp16", sizes | {"n": 2})


OPS = {
    op: Op(_run, _bytes, _flops, partial(_cases, op), partial(_small, op))
    for op in ("gated_prefix_attention_decode", "prefix_attention_decode")
}
