"""Cases of bottleneck: the residual is x itself, as adapters have it, so it costs no bytes of its own."""

from collections.abc import Iterator
from typing import Any

from .case import Case, Maker, Op, launcher


def _run(case: Case, make: Maker) -> Any:
    s, options = case.sizes, case.options
    entries = max(s["n"], 1)
    x = make.activations(s["b"], s["q"], s["c"])
    down, up = make.weights(entries, s["r"], s["c"]), make.weights(entries, s["c"], s["r"])
    biases = (
        [make.weights(entries, s["r"]), make.weights(entries, s["c"])] if options.get("bias") else [None] * 2
    )
    norm = options.get("norm", "none")
    norm_weight = make.weights(entries, s["c"]) if norm != "none" else None
    norm_bias = make.weights(entries, s["c"]) if norm == "layer_norm" else None
    row_ids = make.row_ids(s["b"], s["n"])
    constants = ("gelu", norm, 1e-5, 1.0)
    run = launcher("bottleneck", case.direction)
    if case.direction == "forward":
        return run(x, down, up, *biases, x, norm_weight, norm_bias, row_ids, *constants)
    grad_out = make.activations(s["b"], s["q"], s["c"])
    needs = (True, not options.get("frozen"), bool(options.get("bias")), norm != "none")
    return run(
        grad_out, x, down, up, biases[0], norm_weight, norm_bias, row_ids, None, *constants, True, *needs
    )


def _weights(case: Case) -> int:
    """Elements of everything that is trained."""
    s = case.sizes
    biases = s["r"] + s["c"] if case.options.get("bias") else 0
    norms = {"layer_norm": 2, "rms_norm": 1}.get(case.options.get("norm", "none"), 0) * s["c"]
    return max(s["n"], 1) * (2 * s["c"] * s["r"] + biases + norms)


def _bytes(case: Case) -> int:
    """Forward reads x and writes out; backward reads grad_out and x and writes grad_x, as much for the weights."""
    s, (activation, trained) = case.sizes, case.itemsizes
    passes = 2 if case.direction == "forward" else 3
    weights = _weights(case) * trained
    if case.direction == "backward" and not case.options.get("frozen"):
        weights *= 2
    return passes * s["b"] * s["q"] * s["c"] * activation + weights


def _flops(case: Case) -> int:
    """Down and up forward; both gradients of the hidden layer's sides and of weights, backward, which has no z here."""
    s = case.sizes
    products = 2 if case.direction == "forward" else 3 if case.options.get("frozen") else 5
    return 2 * products * s["b"] * s["q"] * s["c"] * s["r"]


def _cases() -> Iterator[Case]:
    llama = {"b": 4, "q": 2048, "c": 4096, "r": 64, "n": 0}
    for direction in ("forward", "backward"):
        for r in (64, 256):
            yield Case("bottleneck", direction, "bf16", llama | {"r": r})
        for dtype in ("fp32", "bf16+fp32"):
            yield Case("bottleneck", direction, dtype, llama)
        yield Case(
            "bottleneck", direction, "bf16", llama | {"c": 768, "r": 48}, {"bias": True, "norm": "layer_norm"}
        )
        yield Case("bottleneck", direction, "bf16", llama | {"n": 4})
        if direction == "forward":
            yield Case("bottleneck", direction, "bf16", llama | {"b": 64, "q": 1, "n": 64})


def _small() -> Iterator[Case]:
    sizes = {"b": 2, "q": 96, "c": 256, "r": 24, "n": 0}
    for direction in ("forward", "backward"):
        for dtype in ("fp16", "fp32"):
            yield Case("bottleneck", direction, dtype, sizes)
        yield Case("bottleneck", direction, "fp16", sizes | {"r": 160})
        # a norm is the library's, whose reading is not seen
        yield Case("bottleneck", direction, "fp16", sizes | {"n": 2}, {"bias": True})


OP = Op(_run, _bytes, _flops, _cases, _small)
