"""Cases of gated_prefix and prefix_merge: the prefix is added to the output of any attention."""

import importlib
from collections.abc import Iterator
from typing import Any

from .case import DTYPES, Case, Maker, Op, launcher


def _run(case: Case, make: Maker) -> Any:
    s = case.sizes
    query, base = (make.activations(s["b"], s["h"], s["q"], s["d"]) for _ in range(2))
    key, value = (make.weights(max(s["n"], 1), s["kv"], s["p"], s["d"]) for _ in range(2))
    gate, row_ids = make.fp32(max(s["n"], 1), s["h"]), make.row_ids(s["b"], s["n"])
    constants = (row_ids, s["d"] ** -0.5, "tanh")
    run = launcher("gated_prefix", case.direction)
    if case.direction == "forward":
        return run(base, query, key, value, gate, *constants)
    needs = (True, not case.options.get("query_only"), True)
    return run(base, query, key, value, gate, *constants, *needs)


def _bytes(case: Case) -> int:
    """Forward reads base and query and writes out; backward reads grad_out and query and writes grad_query."""
    s, (activation, trained) = case.sizes, case.itemsizes
    prefix = 2 * max(s["n"], 1) * s["kv"] * s["p"] * s["d"] * trained
    gate = max(s["n"], 1) * s["h"] * 4
    both = 1 if case.direction == "forward" or case.options.get("query_only") else 2
    gates = 1 if case.direction == "forward" else 2
    return 3 * s["b"] * s["h"] * s["q"] * s["d"] * activation + both * prefix + gates * gate


def _flops(case: Case) -> int:
    """S and p V forward; S, dO V^T, dS K, dS^T Q and p^T dO backward."""
    s = case.sizes
    products = 2 if case.direction == "forward" else 3 if case.options.get("query_only") else 5
    return 2 * products * s["b"] * s["h"] * s["q"] * s["p"] * s["d"]


def _cases() -> Iterator[Case]:
    llama = {"b": 4, "h": 32, "kv": 8, "q": 2048, "d": 128, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            for d in (128, 64):
                yield Case("gated_prefix", direction, dtype, llama | {"d": d})
        for d in (32, 40, 80, 96, 256):
            yield Case("gated_prefix", direction, "bf16", llama | {"d": d})
        for p in (32, 128):
            yield Case("gated_prefix", direction, "bf16", llama | {"p": p})
        for dtype in ("fp32", "bf16+fp32"):
            yield Case("gated_prefix", direction, dtype, llama | {"d": 256})
            yield Case("gated_prefix", direction, dtype, llama | {"p": 128})
        yield Case("gated_prefix", direction, "bf16", llama | {"d": 256, "p": 128})
        # an adapter per row, and one token of each
        yield Case("gated_prefix", direction, "bf16", llama | {"n": 4})
        if direction == "forward":
            yield Case("gated_prefix", direction, "bf16", llama | {"b": 64, "q": 1, "n": 64})
    yield Case("gated_prefix", "backward", "bf16", llama, {"query_only": True})


def _small() -> Iterator[Case]:
    sizes = {"b": 2, "h": 4, "kv": 2, "q": 80, "d": 64, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        for dtype in ("fp16", "fp32"):
            yield Case("gated_prefix", direction, dtype, sizes)
        yield Case("gated_prefix", direction, "fp16", sizes | {"p": 40})
        yield Case("gated_prefix", direction, "fp16", sizes | {"n": 2})


OP = Op(_run, _bytes, _flops, _cases, _small)


def _merge(case: Case, make: Maker) -> Any:
    s = case.sizes
    base, query = (make.activations(s["b"], s["h"], s["q"], s["d"]) for _ in range(2))
    prefix = [make.weights(max(s["n"], 1), s["kv"], s["p"], s["d"]) for _ in range(2)]
    run = importlib.import_module("fastadapter.kernels.prefix_attention").prefix_merge_forward
    lse = make.fp32(s["b"], s["h"], s["q"])
    return run(base, lse, query, *prefix, make.row_ids(s["b"], s["n"]), s["d"] ** -0.5, 0.0)


def _merge_bytes(case: Case) -> int:
    """Reads base, query and lse, writes the merged ones."""
    s, (activation, trained) = case.sizes, case.itemsizes
    rows = s["b"] * s["h"] * s["q"]
    prefix = 2 * max(s["n"], 1) * s["kv"] * s["p"] * s["d"] * trained
    return 3 * rows * s["d"] * activation + 2 * rows * 4 + prefix


def _merge_cases() -> Iterator[Case]:
    llama = {"b": 4, "h": 32, "kv": 8, "q": 2048, "d": 128, "p": 10, "n": 0}
    for dtype in ("bf16", "fp16", "fp32", "bf16+fp32"):
        yield Case("prefix_merge", "forward", dtype, llama)
    for d in (40, 64, 96, 256):
        yield Case("prefix_merge", "forward", "bf16", llama | {"d": d})
    for dtype in ("fp32", "bf16+fp32"):
        yield Case("prefix_merge", "forward", dtype, llama | {"d": 256})
    yield Case("prefix_merge", "forward", "bf16", llama | {"p": 128})


def _merge_small() -> Iterator[Case]:
    sizes = {"b": 2, "h": 4, "kv": 2, "q": 80, "d": 64, "p": 10, "n": 0}
    for dtype in ("fp16", "fp32"):
        yield Case("prefix_merge", "forward", dtype, sizes)


MERGE = Op(_merge, _merge_bytes, _flops, _merge_cases, _merge_small)
