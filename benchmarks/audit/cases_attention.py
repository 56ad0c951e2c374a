"""Cases of the attention ops: single pass over the keys, with a gated or a shared prefix, forward and backward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from .case import Case, Maker, Op, launcher


def visible_pairs(case: Case) -> int:
    """Query and key positions that see each other, of one row and head."""
    s, options = case.sizes, case.options
    lengths = [s["q"] // s["seqs"]] * s["seqs"] if s.get("seqs") else [s["q"]]
    total = 0
    for q_len in lengths:
        kv_len = q_len if s.get("seqs") else s["s"]
        if not options.get("causal"):
            total += q_len * kv_len
            continue
        window = options.get("window") or q_len
        total += sum(min(i + 1, window, kv_len) for i in range(q_len))
    return total


def _run(case: Case, make: Maker) -> Any:
    s, options = case.sizes, case.options
    gated = case.op == "gated_prefix_attention"
    entries = max(s["n"], 1)
    query = make.activations(s["b"], s["h"], s["q"], s["d"])
    key, value = (make.activations(s["b"], s["kv"], s["s"], s["d"]) for _ in range(2))
    prefix = [make.weights(entries, s["kv"], s["p"], s["d"]) for _ in range(2)]
    gate = [make.fp32(entries, s["h"])] if gated else []
    mask = make.activations(1, 1, s["q"], s["s"]) if options.get("mask") else None
    if mask is not None:
        mask = mask.expand(s["b"], s["h"], s["q"], s["s"])
    offsets, ids = None, make.row_ids(s["b"], s["n"])
    if s.get("seqs"):
        offsets = make.integers([s["q"] // s["seqs"] * place for place in range(s["seqs"] + 1)])
        ids = make.row_ids(s["seqs"], s["n"])
    constants = (
        mask, offsets, ids, s["d"] ** -0.5, *(["tanh"] if gated else []), bool(options.get("causal")),
        options.get("window", 0), 30.0 if options.get("softcap") else 0.0,
    )  # fmt: skip
    run = launcher(case.op, case.direction)
    if case.direction == "forward":
        return run(query, key, value, *prefix, *gate, *constants, bool(options.get("save")))
    grad_out, base = (make.activations(s["b"], s["h"], s["q"], s["d"]) for _ in range(2))
    stats = [make.fp32(s["b"], s["h"], s["q"]) for _ in range(2 if gated else 1)]
    needs = (True, True, not options.get("frozen"), *([True] if gated else []))
    return run(grad_out, query, key, value, *prefix, *gate, base, *stats, *constants, *needs)


def _bytes(case: Case) -> int:
    """Forward reads query, key, value and writes out (and base and lse if saved).

    Backward reads grad_out, query, key, value, base and lse and writes three gradients. The prefix and its gradients
    on top, and a mask.
    """
    s, options, (activation, trained) = case.sizes, case.options, case.itemsizes
    gated = case.op == "gated_prefix_attention"
    query = s["b"] * s["h"] * s["q"] * s["d"] * activation
    keys = 2 * s["b"] * s["kv"] * s["s"] * s["d"] * activation
    prefix = 2 * max(s["n"], 1) * s["kv"] * s["p"] * s["d"] * trained
    gate = max(s["n"], 1) * s["h"] * 4 if gated else 0
    stats = s["b"] * s["h"] * s["q"] * 4 * (2 if gated else 1)
    mask = s["q"] * s["s"] * activation if options.get("mask") else 0
    if case.direction == "forward":
        saved = stats + (query if gated else 0) if options.get("save") else 0
        return 2 * query + keys + prefix + gate + mask + saved
    both = 1 if options.get("frozen") else 2
    return 4 * query + 2 * keys + both * prefix + 2 * gate + stats + mask


def _flops(case: Case) -> int:
    """Q K^T and P V forward; those of dQ, dK, dV, dP and P again backward; the same over the prefix."""
    s = case.sizes
    products = 2 if case.direction == "forward" else 5
    return 2 * products * s["b"] * s["h"] * s["d"] * (visible_pairs(case) + s["q"] * s["p"])


def _cases(op: str) -> Iterator[Case]:
    # 512 tokens is where one pass beats attention and epilogue on Hopper
    llama = {"b": 4, "h": 32, "kv": 8, "q": 512, "s": 512, "d": 128, "p": 10, "n": 0}
    causal = {"causal": True}
    for direction in ("forward", "backward"):
        options = causal | ({"save": True} if direction == "forward" else {})
        for d in (128, 64, 256):
            yield Case(op, direction, "bf16", llama | {"d": d}, options)
        yield Case(op, direction, "bf16", llama | {"q": 2048, "s": 2048}, options)
        yield Case(op, direction, "bf16", llama | {"b": 1, "q": 2048, "s": 2048, "seqs": 8, "n": 8}, options)
        for d in (40, 96):  # padded to a power of two
            yield Case(op, direction, "bf16", llama | {"d": d}, options)
        for dtype in ("fp32", "bf16+fp32"):
            for d in (128, 256):
                yield Case(op, direction, dtype, llama | {"d": d}, options)
        if op == "prefix_attention":
            continue  # the same kernels: what differs is in the cases above
        yield Case(op, direction, "fp16", llama, options)
        yield Case(op, direction, "fp32", llama | {"d": 64}, options)
        yield Case(op, direction, "bf16", llama | {"d": 80}, options)
        yield Case(op, direction, "bf16", llama | {"p": 128}, options)
        yield Case(op, direction, "bf16", llama, options | {"causal": False})
        yield Case(op, direction, "bf16", llama, options | {"causal": False, "mask": True})
        yield Case(op, direction, "bf16", llama | {"d": 256}, options | {"window": 128, "softcap": True})


def _small(op: str) -> Iterator[Case]:
    sizes = {"b": 2, "h": 4, "kv": 2, "q": 80, "s": 80, "d": 64, "p": 10, "n": 0}
    for direction in ("forward", "backward"):
        save = {"save": True} if direction == "forward" else {}
        for dtype in ("fp16", "fp32"):
            yield Case(op, direction, dtype, sizes, {"causal": True} | save)
        yield Case(op, direction, "fp16", sizes | {"p": 40}, save)


OPS = {
    op: Op(_run, _bytes, _flops, partial(_cases, op), partial(_small, op))
    for op in ("gated_prefix_attention", "prefix_attention")
}
