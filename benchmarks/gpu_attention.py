"""Goals on attention: the gated epilogue, one pass, decode, the shared softmax. Shapes are Llama-3-8B's unless said."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapter as fa

from .bench_gated_prefix import eager
from .gpu_tools import Bench, Cases, attention_backend, comparison, compiled, doubled, gradients

HEADS, KV_HEADS, HEAD_DIM, PREFIX = 32, 8, 128, 10


def _sizes(bench: Bench, tokens: int) -> tuple[int, int, int, int, int]:
    """Batch, query heads, kv heads, tokens, head size."""
    return (2, 4, 2, 24, 16) if bench.dry else (4, HEADS, KV_HEADS, tokens, HEAD_DIM)


def _prefix(
    bench: Bench, kv_heads: int, head_dim: int, *, entries: int = 1, grad: bool = False
) -> list[Tensor]:
    return [bench.draw(entries, kv_heads, PREFIX, head_dim, grad=grad) for _ in range(2)]


def _gate(bench: Bench, heads: int, *, entries: int = 1, grad: bool = False) -> Tensor:
    gate = torch.rand(entries, heads, device=bench.device) + 0.1
    return gate.requires_grad_(grad)


def _own(bench: Bench, op: Callable) -> Callable:
    return functools.partial(op, backend="reference" if bench.dry else "triton")


def _bthd(bench: Bench, batch: int, heads: int, tokens: int, head_dim: int, *, grad: bool = False) -> Tensor:
    """As transformers' attention hands it over: heads inside."""
    return bench.draw(batch, tokens, heads, head_dim).transpose(1, 2).requires_grad_(grad)


def epilogue(bench: Bench) -> Cases:
    """G1, G2: add the gated term to an attention output; forward, and backward alone."""
    b, h, kv, t, d = _sizes(bench, 2048)
    own = _own(bench, fa.ops.gated_prefix)
    reference = functools.partial(fa.ops.gated_prefix, backend="reference")
    size = b * h * t * d * bench.dtype.itemsize
    for direction in ("forward", "backward"):
        grad = direction == "backward"
        operands = [_bthd(bench, b, h, t, d, grad=grad) for _ in range(2)]
        operands += [*_prefix(bench, kv, d, grad=grad), _gate(bench, h, grad=grad)]
        grad_out = _bthd(bench, b, h, t, d)
        forms = {"fastadapter": own, "eager": eager, "eager-compiled": compiled(eager, bench.dry)}
        products = 5 if grad else 2
        flops = 2 * products * b * h * t * PREFIX * d
        if not grad:
            runs = {name: functools.partial(fn, *operands) for name, fn in forms.items()}
            exact = functools.partial(reference, *doubled(operands))
        else:
            runs = {name: _backward(fn, operands, grad_out) for name, fn in forms.items()}
            prepare, run = _backward(reference, doubled(operands), grad_out.double())
            exact = functools.partial(_in_one, prepare, run)
        goal = "G2 gated_prefix backward" if grad else "G1 gated_prefix forward"
        what = f"{b * t} tokens, prefix {PREFIX}"
        yield comparison(
            bench, goal, what, runs, floor="copy", bytes_moved=3 * size, flops=flops, exact=exact
        )


def _backward(fn: Callable, operands: list[Tensor], grad_out: Tensor) -> tuple[Callable, Callable]:
    """Backward alone. A forward of its own for every sample, untimed: compiled graphs go through theirs only once."""
    return lambda: fn(*operands), lambda out: torch.autograd.grad(out, operands, grad_out)


def _in_one(prepare: Callable, run: Callable) -> tuple[Tensor, ...]:
    return run(prepare())


def one_pass(bench: Bench) -> Cases:
    """G3, G4: attention with the gated term, causal; one kernel against attention and epilogue, and against peers."""
    for goal, tokens in (("G3 gated attention forward", 2048), ("G4 gated attention forward", 512)):
        b, h, kv, t, d = _sizes(bench, tokens)
        query, key, value = (_bthd(bench, b, heads, t, d) for heads in (h, kv, kv))
        prefix, gate = _prefix(bench, kv, d), _gate(bench, h)
        own, term = _own(bench, fa.ops.gated_prefix_attention), _own(bench, fa.ops.gated_prefix)

        def base(name: str, query=query, key=key, value=value) -> Tensor:
            with attention_backend(name, bench.dry):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        added = compiled(eager, bench.dry)
        adapter = (query, *prefix, gate)
        forms = {
            "(cudnn attention alone)": lambda base=base: base("cudnn"),
            "(flash attention alone)": lambda base=base: base("flash"),
            "(fastadapter one pass, no adapter)": lambda own=own, q=query, k=key, v=value, p=prefix, g=gate: (
                own(q, k, v, *p, g, is_causal=True, row_ids=_nobody(q))
            ),
            "fastadapter one pass": lambda own=own, q=query, k=key, v=value, p=prefix, g=gate: own(
                q, k, v, *p, g, is_causal=True
            ),
            "cudnn + fastadapter epilogue": lambda base=base, term=term, a=adapter: term(base("cudnn"), *a),
            "cudnn + compiled epilogue": lambda base=base, added=added, a=adapter: added(base("cudnn"), *a),
            "flash + compiled epilogue": lambda base=base, added=added, a=adapter: added(base("flash"), *a),
            "flash + eager epilogue": lambda base=base, a=adapter: eager(base("flash"), *a),
        }
        exact = functools.partial(
            fa.ops.gated_prefix_attention,
            *doubled([query, key, value, *prefix, gate]),
            is_causal=True,
            backend="reference",
        )
        size, keys = query.numel() * bench.dtype.itemsize, key.numel() * bench.dtype.itemsize
        flops = 4 * b * h * d * (t * (t + 1) // 2 + t * PREFIX)
        yield comparison(
            bench, goal, f"{b}x{t} tokens, causal", forms, floor=_first_running(forms),
            bytes_moved=2 * size + 2 * keys, flops=flops, exact=exact,
        )  # fmt: skip


def _first_running(forms: dict[str, Callable]) -> str:
    """The attention alone by the backend that is there: cuDNN has no kernel for some cards and shapes."""
    try:
        forms["(cudnn attention alone)"]()
    except RuntimeError:
        return "(flash attention alone)"
    return "(cudnn attention alone)"


def _nobody(query: Tensor) -> Tensor:
    return torch.full((query.shape[0],), -1, dtype=torch.int32, device=query.device)


def decode(bench: Bench) -> Cases:
    """G8: one token of batch 1 through the products and the attention of four layers, in a CUDA graph.

    G9: the attention of one layer alone, a prefix of its own in every row.
    """
    _, h, kv, _, d = _sizes(bench, 1)
    cache, hidden, inner, layers = (64, h * d, 32, 2) if bench.dry else (2048, 4096, 14336, 4)
    own, term = _own(bench, fa.ops.gated_prefix_attention), _own(bench, fa.ops.gated_prefix)
    keys = [[bench.draw(1, kv, cache, d) for _ in range(2)] for _ in range(layers)]
    adapters = [(*_prefix(bench, kv, d), _gate(bench, h)) for _ in range(layers)]
    shapes = ((hidden + 2 * kv * d, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    weights = [[bench.draw(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(layers)]
    x = bench.draw(1, hidden)

    def token(attend: Callable) -> Tensor:
        y = x
        for layer in range(layers):
            fused, out, up, down = weights[layer]
            query = F.linear(y, fused)[:, :hidden].view(1, h, 1, d)
            y = y + F.linear(attend(layer, query).reshape(1, hidden), out)
            gate_part, up_part = F.linear(y, up).chunk(2, -1)
            y = y + F.linear(F.silu(gate_part) * up_part, down)
        return y

    def plain(layer: int, query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, *keys[layer], enable_gqa=True)

    def by_epilogue(layer: int, query: Tensor) -> Tensor:
        return term(plain(layer, query), query, *adapters[layer])

    def by_eager(layer: int, query: Tensor) -> Tensor:
        return eager(plain(layer, query), query, *adapters[layer])

    forms = {
        "(base model)": lambda: token(plain),
        "fastadapter in the merge of the splits": lambda: token(lambda i, q: own(q, *keys[i], *adapters[i])),
        "sdpa + fastadapter epilogue": lambda: token(by_epilogue),
        "sdpa + eager epilogue": lambda: token(by_eager),
    }
    size = sum(w.numel() for layer in weights for w in layer) + sum(x.numel() for pair in keys for x in pair)
    with torch.no_grad():
        yield comparison(
            bench, "G8 decode", f"batch 1, {cache} keys, {layers} layers, in a graph", forms,
            floor="(base model)", bytes_moved=size * bench.dtype.itemsize, graph=True,
        )  # fmt: skip
        for batch in (3,) if bench.dry else (64, 256):
            yield _own_prefix_each(bench, own, batch, cache)


def _own_prefix_each(bench: Bench, own: Callable, batch: int, cache: int):
    _, h, kv, _, d = _sizes(bench, 1)
    query, key, value = (
        bench.draw(batch, h, 1, d),
        bench.draw(batch, kv, cache, d),
        bench.draw(batch, kv, cache, d),
    )
    bank, gate = _prefix(bench, kv, d, entries=batch), _gate(bench, h, entries=batch)
    ids = torch.arange(batch, dtype=torch.int32, device=bench.device)
    same = torch.zeros_like(ids)

    def loop() -> Tensor:
        rows = [
            own(
                query[i : i + 1],
                key[i : i + 1],
                value[i : i + 1],
                *(x[i : i + 1] for x in bank),
                gate[i : i + 1],
            )
            for i in range(batch)
        ]
        return torch.cat(rows)

    forms = {
        "(one adapter for all)": lambda: own(query, key, value, *bank, gate, row_ids=same),
        "fastadapter, an adapter per row": lambda: own(query, key, value, *bank, gate, row_ids=ids),
        "loop over adapters": loop,
    }
    exact = functools.partial(
        fa.ops.gated_prefix_attention,
        *doubled([query, key, value, *bank, gate]),
        row_ids=ids,
        backend="reference",
    )
    size = (key.numel() * 2 + query.numel() * 2 + bank[0].numel() * 2) * bench.dtype.itemsize
    return comparison(
        bench, "G9 decode, mixed adapters", f"batch {batch}, {cache} keys, in a graph", forms,
        floor="(one adapter for all)", bytes_moved=size, exact=exact, graph=True,
    )  # fmt: skip


def shared_softmax(bench: Bench) -> Cases:
    """G10: prefix tuning, forward and backward; own pass against attention on concatenated keys."""
    b, h, _, t, d = _sizes(bench, 2048)
    own = _own(bench, fa.ops.prefix_attention)
    for kv in (h // 4, h) if not bench.dry else (2,):
        operands = [_bthd(bench, b, heads, t, d, grad=True) for heads in (h, kv, kv)]
        operands += _prefix(bench, kv, d, grad=True)
        grad_out = _bthd(bench, b, h, t, d)

        def concatenated(query, key, value, prefix_key, prefix_value, backend="cudnn", b=b, t=t):
            key = torch.cat([prefix_key.expand(b, -1, -1, -1), key], 2)
            value = torch.cat([prefix_value.expand(b, -1, -1, -1), value], 2)
            with attention_backend(backend, bench.dry):
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        forms = {
            "fastadapter one pass": own,
            "concat + cudnn": concatenated,
            "concat + flash": functools.partial(concatenated, backend="flash"),
        }
        runs = {name: gradients(fn, operands, grad_out) for name, fn in forms.items()}
        # full attention: neither backend has a causal mask that leaves the prefix visible
        flops = 14 * b * h * d * t * (t + PREFIX)
        size = sum(x.numel() for x in operands) * bench.dtype.itemsize
        exact = gradients(
            functools.partial(fa.ops.prefix_attention, backend="reference"),
            doubled(operands),
            grad_out.double(),
        )
        yield comparison(
            bench, "G10 prefix tuning forward+backward", f"{b}x{t} tokens, {kv} kv heads", runs, floor="copy",
            bytes_moved=3 * size, flops=flops, exact=exact,
        )  # fmt: skip
