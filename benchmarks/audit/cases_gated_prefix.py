"""Cases of gated_prefix and prefix_merge: the prefix is added to the output of any attention.

Backward has the base's part of the gradient of query as an operand, as the attention ops call it; "alone" is the call
without one.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from .case import Case, Maker, Op, launcher


def _run(case: Case, make: Maker) -> Any:
    s, merge, backward = case.sizes, case.op == "prefix_merge", case.direction == "backward"
    entries = max(s["n"], 1)
    # base and query, or grad_out and query
    first, query = (make.activations(s["b"], s["h"], s["q"], s["d"]) for _ in range(2))
    prefix = [make.weights(entries, s["kv"], s["p"], s["d"]) for _ in range(2)]
    row_ids, scale = make.row_ids(s["b"], s["n"]), s["d"] ** -0.5
    gate = None if merge else make.fp32(entries, s["h"])
    lse = make.fp32(s["b"], s["h"], s["q"]) if merge else None
    if not backward:
        run = launcher(case.op, "forward")
        return (
            run(first, lse, query, *prefix, row_ids, scale, 0.0)
            if merge
            else run(first, query, *prefix, gate, row_ids, scale, "tanh")
        )
    base_grad = None if case.options.get("alone") else make.activations(s["b"], s["h"], s["q"], s["d"])
    needs = (True, not case.options.get("frozen"))
    if merge:
        out = make.activations(s["b"], s["h"], s["q"], s["d"])
        return launcher(case.op, "backward")(
            first, query, *prefix, out, lse, base_grad, row_ids, scale, 0.0, *needs
        )
    return launcher(case.op, "backward_onto")(
        first, base_grad, query, *prefix, gate, row_ids, scale, "tanh", *needs, True
    )


def _bytes(case: Case) -> int:
    """Forward reads base and query and writes out; a merge reads and writes lse, too.

    Backward reads grad_out, query and base_grad and writes grad_query; a merge reads out and lse, too (and grad_out a
    second time, which an L2 cache has). The prefix and its gradients on top.
    """
    s, (activation, trained) = case.sizes, case.itemsizes
    merge, forward = case.op == "prefix_merge", case.direction == "forward"
    entries, rows = max(s["n"], 1), s["b"] * s["h"] * s["q"]
    tensors = 3 if forward else 3 + merge + (not case.options.get("alone"))
    stats = rows * 4 * (2 if forward else 1) if merge else 0
    prefix = 2 * entries * s["kv"] * s["p"] * s["d"] * trained
    gates = 0 if merge else entries * s["h"] * 4 * (1 if forward else 2)
    both = 1 if forward or case.options.get("frozen") else 2
    return tensors * rows * s["d"] * activation + stats + both * prefix + gates


def _flops(case: Case) -> int:
    """S and p V forward; S, dO V^T, dS K, dS^T Q and p^T dO backward."""
    s = case.sizes
    products = 2 if case.direction == "forward" else 3 if case.options.get("frozen") else 5
    return 2 * products * s["b"] * s["h"] * s["q"] * s["p"] * s["d"]


def _cases(op: str) -> Iterator[Case]:
    """What compiles to other code: head sizes, a padded one, blocks of the prefix, an adapter per row, dtypes."""
    llama = {"b": 4, "h": 32, "kv": 8, "q": 2048, "d": 128, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        yield Case(op, direction, "bf16", llama)
        yield Case(op, direction, "bf16", llama | {"d": 256})
        yield Case(op, direction, "bf16", llama | {"p": 128})
        yield Case(op, direction, "fp32", llama)
        if direction == "forward":
            # decoding: a token of each row, each with an adapter of its own
            yield Case(op, direction, "bf16", llama | {"b": 64, "q": 1, "n": 64})
            yield Case(op, direction, "bf16", llama | {"b": 256, "q": 1, "n": 256})
        if op == "prefix_merge":
            continue  # the same kernels: what differs is in the cases above
        for changed in ({"d": 64}, {"d": 80}, {"p": 32}, {"n": 4}):
            yield Case(op, direction, "bf16", llama | changed)
        yield Case(op, direction, "bf16+fp32", llama)
        if direction == "backward":
            yield Case(op, direction, "bf16", llama, {"alone": True})


def _small(op: str) -> Iterator[Case]:
    sizes = {"b": 2, "h": 4, "kv": 2, "q": 80, "d": 64, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        for dtype in ("fp16", "fp32"):
            yield Case(op, direction, dtype, sizes)
        yield Case(op, direction, "fp16", sizes | {"p": 40})
        yield Case(op, direction, "fp16", sizes | {"n": 2})


OPS = {
    op: Op(_run, _bytes, _flops, partial(_cases, op), partial(_small, op))
    for op in ("gated_prefix", "prefix_merge")
}
