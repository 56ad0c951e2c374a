"""GPU cases of the attention ops: the two epilogues, whole attention with each, decoding.

Shapes are Llama-3-8B's unless a name says otherwise: 4 x 2048 tokens, 32 query heads, 8 kv heads, head_dim 128,
prefix 10, bf16, heads inside as transformers hands them over. What another library offers is measured beside it:
cuDNN and flash attention alone (in brackets: no adapter), and with the epilogue that a user would write.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapter as fa
from fastadapter.ops.backends import automatic_backend

from .bench_gated_prefix import eager
from .gpu_tools import (
    Bench,
    Rows,
    attention_backend,
    backward,
    compare,
    compiled,
    doubled,
    gradients,
)


class Shape(NamedTuple):
    batch: int = 4
    heads: int = 32
    kv_heads: int = 8
    tokens: int = 2048
    head_dim: int = 128
    prefix: int = 10

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"{self.batch}x{self.tokens}, {heads}, prefix {self.prefix}"


LLAMA = Shape()
SMOLLM2 = Shape(8, 9, 3, 512, 64)


def _shape(bench: Bench, shape: Shape) -> Shape:
    if not bench.dry:
        return shape
    return Shape(2, 4, 2, 24 if shape.tokens > 1 else 1, min(16, shape.head_dim), shape.prefix)


def _backend(bench: Bench, op: str, dtype: torch.dtype | None = None) -> str:
    return automatic_backend(bench.device, dtype or bench.dtype, op)[0]


def _bthd(
    bench: Bench, s: Shape, heads: int, *, grad: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """As transformers' attention hands it over: heads inside."""
    x = bench.draw(s.batch, s.tokens, heads, s.head_dim, dtype=dtype)
    return x.transpose(1, 2).detach().requires_grad_(grad)


def _adapter(
    bench: Bench, s: Shape, *, entries: int = 1, grad: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Keys and values of the prefix, and gates that are nowhere zero."""
    bank = [bench.draw(entries, s.kv_heads, s.prefix, s.head_dim, dtype=dtype, grad=grad) for _ in range(2)]
    return [*bank, (torch.rand(entries, s.heads, device=bench.device) + 0.1).requires_grad_(grad)]


def _epilogue(bench: Bench, shape: Shape, direction: str) -> Rows:
    """``gated_prefix``: add the gated term to the output of any attention."""
    s, grad = _shape(bench, shape), direction == "backward"
    operands = [_bthd(bench, s, s.heads, grad=grad) for _ in range(2)] + _adapter(bench, s, grad=grad)
    forms: dict[str, Callable] = {"fastadapter": fa.ops.gated_prefix, "eager": eager}
    if bench.compile:
        forms["eager-compiled"] = compiled(eager, bench)
    reference = functools.partial(fa.ops.gated_prefix, backend="reference")
    numbers = s.batch * s.heads * s.tokens * s.head_dim
    cost = {
        "bytes_moved": 3 * numbers * bench.dtype.itemsize,
        "flops": 2 * (5 if grad else 2) * numbers * s.prefix,
        "backend": _backend(bench, "gated_prefix"),
    }
    entry = f"gated_prefix {direction}"
    if grad:
        grad_out = _bthd(bench, s, s.heads)
        runs = {name: backward(fn, operands, grad_out) for name, fn in forms.items()}
        exact = gradients(reference, doubled(operands), grad_out.double())
        yield from compare(bench, entry, str(s), runs, exact=exact, **cost)
        return
    masters = [operands[0], operands[1], *(x.float() for x in operands[2:])]
    with torch.no_grad():
        runs = {name: functools.partial(fn, *operands) for name, fn in forms.items()}
        runs["fastadapter, fp32 masters"] = functools.partial(fa.ops.gated_prefix, *masters)
        exact = functools.partial(reference, *doubled(operands, first=1))
        yield from compare(bench, entry, str(s), runs, exact=exact, **cost)


def _merge(bench: Bench, direction: str) -> Rows:
    """``prefix_merge``: extend the softmax of any attention that returns its lse."""
    s, grad = _shape(bench, LLAMA), direction == "backward"
    base, query = (_bthd(bench, s, s.heads, grad=grad) for _ in range(2))
    lse = (torch.randn(s.batch, s.heads, s.tokens, device=bench.device) + 5).requires_grad_(grad)
    operands = [base, lse, query, *_adapter(bench, s, grad=grad)[:2]]

    def written(
        base: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
        merged = torch.logaddexp(lse, scores.logsumexp(-1))
        term = torch.exp(scores - merged[..., None]).to(query.dtype) @ value
        return base * torch.exp(lse - merged)[..., None].to(base.dtype) + term, merged

    reference = functools.partial(fa.ops.prefix_merge, backend="reference")
    numbers = query.numel()
    cost = {
        "bytes_moved": (5 if grad else 3) * numbers * bench.dtype.itemsize,
        "flops": 2 * (5 if grad else 2) * numbers * s.prefix,
        "backend": _backend(bench, "prefix_merge"),
    }
    forms = {"fastadapter": fa.ops.prefix_merge, "eager": written}
    if grad:
        grad_outs = (_bthd(bench, s, s.heads), torch.randn_like(lse))
        runs = {name: backward(fn, operands, grad_outs) for name, fn in forms.items()}
        exact = gradients(reference, doubled(operands), [x.double() for x in grad_outs])
        yield from compare(bench, f"prefix_merge {direction}", str(s), runs, exact=exact, **cost)
        return
    with torch.no_grad():
        runs = {name: functools.partial(fn, *operands) for name, fn in forms.items()}
        exact = functools.partial(reference, *doubled(operands, first=1))
        yield from compare(bench, f"prefix_merge {direction}", str(s), runs, exact=exact, **cost)


def _attention(
    bench: Bench,
    op: str,
    direction: str = "forward+backward",
    *,
    shape: Shape = LLAMA,
    masked: bool = False,
    dtype: torch.dtype | None = None,
) -> Rows:
    """Whole attention, causal, with an adapter; ``masked``: padded on the left, given as a boolean mask."""
    s, dtype, grad = _shape(bench, shape), dtype or bench.dtype, direction != "forward"
    operands = [_bthd(bench, s, n, grad=grad, dtype=dtype) for n in (s.heads, s.kv_heads, s.kv_heads)]
    gated = op == "gated_prefix_attention"
    operands += _adapter(bench, s, grad=grad, dtype=dtype)[: 3 if gated else 2]
    mask = _padded(s, bench.device) if masked else None
    options = {"attn_mask": mask} if masked else {"is_causal": True}
    plain = functools.partial(F.scaled_dot_product_attention, enable_gqa=True, **options)
    bases = {"sdpa": plain}
    if dtype.itemsize == 2 and not masked:
        bases = {name: functools.partial(_by, name, bench.dry, plain) for name in ("cudnn", "flash")}
    public = getattr(fa.ops, op)
    forms: dict[str, Callable] = {"fastadapter": functools.partial(public, **options)}
    for name, base in bases.items():
        forms[f"({name} alone)"] = functools.partial(_first_three, base)
        if gated:
            forms[f"{name} + fastadapter epilogue"] = functools.partial(_added, base, fa.ops.gated_prefix)
            forms[f"{name} + eager epilogue"] = functools.partial(_added, base, eager)
        else:
            # no kernel has a causal mask that leaves the prefix visible: full attention, or a mask of all pairs
            full = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
            joined = (
                full
                if mask is None
                else functools.partial(full, attn_mask=F.pad(mask, (s.prefix, 0), value=True))
            )
            run = functools.partial(_by, name, bench.dry, joined) if name != "sdpa" else joined
            label = f"concatenated keys, {name}" if masked else f"(concatenated keys, {name}, full)"
            forms[label] = functools.partial(_concatenated, run)
    pairs = s.tokens * (s.tokens + 1) // 2 + s.tokens * s.prefix
    cost = {
        "bytes_moved": (3 if grad else 1)
        * sum(x.numel() for x in (operands[0], *operands[:3]))
        * dtype.itemsize,
        # the product that was timed is one in half precision
        "flops": (14 if grad else 4) * s.batch * s.heads * s.head_dim * pairs * (dtype.itemsize == 2),
        "floor": f"({next(iter(bases))} alone)",
        "backend": _backend(bench, op, dtype),
        "dtype": dtype,
    }
    entry = f"{op} {direction}"
    what = f"{s}, {'left-padded, bool mask' if masked else 'causal'}"
    reference = functools.partial(public, backend="reference")
    if grad:
        grad_out = _bthd(bench, s, s.heads, dtype=dtype)
        runs = {name: gradients(fn, operands, grad_out) for name, fn in forms.items()}
        exact = gradients(functools.partial(reference, **options), doubled(operands), grad_out.double())
        yield from compare(bench, entry, what, runs, exact=exact, **cost)
        return
    with torch.no_grad():
        runs = {name: functools.partial(fn, *operands) for name, fn in forms.items()}
        if masked:
            options = {"attn_mask": mask[:1]}
        exact = functools.partial(reference, *doubled(operands, first=1), **options)
        yield from compare(bench, entry, what, runs, exact=exact, **cost)


def _by(name: str, dry: bool, attend: Callable, *operands: Tensor) -> Tensor:
    with attention_backend(name, dry):
        return attend(*operands)


def _first_three(base: Callable, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    return base(query, key, value)


def _added(
    base: Callable, epilogue: Callable, query: Tensor, key: Tensor, value: Tensor, *adapter: Tensor
) -> Tensor:
    return epilogue(base(query, key, value), query, *adapter)


def _concatenated(base: Callable, query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor) -> Tensor:
    joined = (torch.cat([x.expand(query.shape[0], -1, -1, -1), y], 2) for x, y in zip(prefix, (key, value)))
    return base(query, *joined)


def _padded(s: Shape, device: str) -> Tensor:
    """What transformers hands over for a batch padded on the left: ``(batch, 1, tokens, tokens)``, some rows blank."""
    order = torch.arange(s.tokens, device=device)
    padding = torch.arange(s.batch, device=device) * s.tokens // (2 * s.batch)
    visible = (order <= order[:, None]) & (order >= padding[:, None, None, None])
    return visible | torch.eye(
        s.tokens, dtype=torch.bool, device=device
    )  # kernels differ on a query without keys


def _decode(bench: Bench, batch: int) -> Rows:
    """One token a row against 2048 keys, a prefix of its own in every row."""
    s = _shape(bench, LLAMA._replace(batch=batch, tokens=1))
    cache = 64 if bench.dry else 2048
    query = bench.draw(s.batch, s.heads, 1, s.head_dim)
    key, value = (bench.draw(s.batch, s.kv_heads, cache, s.head_dim) for _ in range(2))
    adapter = _adapter(bench, s, entries=s.batch)
    ids = torch.arange(s.batch, dtype=torch.int32, device=bench.device)
    own = functools.partial(fa.ops.gated_prefix_attention, query, key, value, *adapter)
    first = min(4, s.batch)

    def base() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def gathered() -> Tensor:
        base_out, chosen = base(), ids.long()
        prefix_key, prefix_value = (
            x[chosen].repeat_interleave(s.heads // s.kv_heads, 1) for x in adapter[:2]
        )
        weights = torch.softmax((query @ prefix_key.mT).float() * s.head_dim**-0.5, -1).to(query.dtype)
        gate = torch.tanh(adapter[2][chosen])[..., None, None].to(query.dtype)
        return base_out + gate * (weights @ prefix_value)

    forms = {
        "fastadapter": functools.partial(own, row_ids=ids),
        "(fastadapter, one adapter for all)": functools.partial(own, row_ids=torch.zeros_like(ids)),
        "(sdpa alone)": base,
        "sdpa + fastadapter epilogue": lambda: fa.ops.gated_prefix(base(), query, *adapter, row_ids=ids),
        "sdpa + eager epilogue": gathered,
    }
    exact = functools.partial(
        fa.ops.gated_prefix_attention,
        *doubled([query[:first], key[:first], value[:first], *adapter]),
        row_ids=ids[:first],
        backend="reference",
    )
    size = sum(x.numel() for x in (query, query, key, value, *adapter[:2])) * bench.dtype.itemsize
    with torch.no_grad():
        yield from compare(
            bench, "gated_prefix_attention decode", f"batch {s.batch}, {cache} keys, an adapter per row", forms,
            bytes_moved=size, exact=exact, floor="(sdpa alone)", backend=_backend(bench, "gated_prefix_attention"),
        )  # fmt: skip


_gated = functools.partial(_attention, op="gated_prefix_attention")
_shared = functools.partial(_attention, op="prefix_attention")
CASES: dict[str, Callable[[Bench], Rows]] = {
    "gp_fwd": functools.partial(_epilogue, shape=LLAMA, direction="forward"),
    "gp_bwd": functools.partial(_epilogue, shape=LLAMA, direction="backward"),
    "pm_fwd": functools.partial(_merge, direction="forward"),
    "pm_bwd": functools.partial(_merge, direction="backward"),
    "ga_fwd": functools.partial(_gated, direction="forward"),
    "ga_fb": _gated,
    "ga_fwd_t512": functools.partial(_gated, direction="forward", shape=LLAMA._replace(tokens=512)),
    "pa_fwd": functools.partial(_shared, direction="forward"),
    "pa_fb": _shared,
    "dec64": functools.partial(_decode, batch=64),
    "dec256": functools.partial(_decode, batch=256),
    "ga_masked": functools.partial(_gated, masked=True),
    "pa_masked": functools.partial(_shared, masked=True),
    "ga_d64": functools.partial(_gated, shape=LLAMA._replace(head_dim=64)),
    "pa_d64": functools.partial(_shared, shape=LLAMA._replace(head_dim=64)),
    "ga_fp32": functools.partial(_gated, shape=LLAMA._replace(batch=2, tokens=1024), dtype=torch.float32),
    "pa_fp32": functools.partial(_shared, shape=LLAMA._replace(batch=2, tokens=1024), dtype=torch.float32),
    "gp_smol_fwd": functools.partial(_epilogue, shape=SMOLLM2, direction="forward"),
    "gp_smol_bwd": functools.partial(_epilogue, shape=SMOLLM2, direction="backward"),
}
