"""Inputs, runs and results of the two attention ops for tests, one record for both."""

import importlib
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from fastadapter import ops, reference
from fastadapter.ops import composed
from fastadapter.ops.attention import Options
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.base_attention import BASES, choose_base
from tests.support.budget import assert_within_budget, assert_within_budget_of
from tests.support.gated_prefix import device_of, on_device, where_kernels_run

GATED, SHARED = "gated_prefix_attention", "prefix_attention"
FEW = 128  # numbers that eager can get all right by luck
OPERANDS = {
    GATED: ("query", "key", "value", "prefix_key", "prefix_value", "gate"),
    SHARED: ("query", "key", "value", "prefix_key", "prefix_value"),
}
SAVED = {GATED: ("base", "lse", "prefix_lse"), SHARED: ("lse", "wide_out")}


class Shape(NamedTuple):
    """Sizes and options of one case; ``lengths`` packs sequences into a batch of one (``q_len == kv_len`` = sum)."""

    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    q_len: int = 7
    kv_len: int = 9
    head_dim: int = 16
    prefix_len: int = 5
    num_prefixes: int = 1
    mask: str = ""  # "", "causal", "bool", "float", "float32", or "empty": bool, and query 0 sees nothing
    window: int | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] = ()

    def __str__(self):
        sizes = (
            f"b{self.batch}-h{self.num_heads}-kv{self.num_kv_heads}-t{self.q_len}-s{self.kv_len}-d{self.head_dim}"
            f"-p{self.prefix_len}-n{self.num_prefixes}"
        )
        packed = "packed" + "_".join(map(str, self.lengths)) if self.lengths else ""
        window = f"window{self.window}" if self.window else ""
        softcap = f"softcap{self.softcap:g}" if self.softcap else ""
        return "-".join(filter(None, (sizes, self.mask, window, softcap, packed)))


def packed(*lengths, **sizes):
    """The shape of sequences of these ``lengths`` in one row."""
    total = sum(lengths)
    return Shape(batch=1, q_len=total, kv_len=total, lengths=lengths, **sizes)


class Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    gate: torch.Tensor
    grad_out: torch.Tensor
    attn_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    row_ids: torch.Tensor | None
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    softmax_scale: float | None = None
    gate_fn: str = "tanh"

    def map(self, function):
        """``function`` on every tensor."""
        return Inputs(*(function(x) if isinstance(x, torch.Tensor) else x for x in self))

    def cast(self, dtype):
        """Every float in ``dtype``, same values as far as it can hold them."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def rows(self, select):
        """Some rows of the batch, alone."""
        by_row = ("query", "key", "value", "grad_out", "attn_mask", "row_ids")
        chosen = {name: getattr(self, name) for name in by_row}
        return self._replace(**{name: x if x is None else x[select] for name, x in chosen.items()})

    def sequence(self, index):
        """One packed sequence as a batch of one."""
        start, stop = self.cu_seqlens[index : index + 2].tolist()
        names = ("query", "key", "value", "grad_out")
        return self._replace(
            **{name: getattr(self, name)[:, :, start:stop].contiguous() for name in names},
            cu_seqlens=None,
            row_ids=None if self.row_ids is None else self.row_ids[index : index + 1],
        )

    def options(self, op):
        """Keywords of the public function and of the reference."""
        names = ("is_causal", "attn_mask", "cu_seqlens", "window", "softcap", "row_ids", "softmax_scale")
        gate_fn = {"gate_fn": self.gate_fn} if op == GATED else {}
        return {name: getattr(self, name) for name in names} | gate_fn

    def operands(self, op):
        return [getattr(self, name) for name in OPERANDS[op]]

    def schema_options(self, op, *, softmax_scale=None):
        """Arguments after the operands of the registered forward; of its backward, after the saved tensors."""
        mask = self.attn_mask
        if mask is not None:
            mask = mask.expand(*self.query.shape[:3], self.key.shape[2])
        scale = softmax_scale or self.softmax_scale or self.query.shape[-1] ** -0.5
        gate_fn = (self.gate_fn,) if op == GATED else ()
        rest = (self.is_causal, self.window or 0, self.softcap or 0.0)
        return (mask, self.cu_seqlens, self.row_ids, scale, *gate_fn, *rest)


def make_inputs(shape, dtype, *, seed=0, gate="random", prefix_dtype=None, gate_fn="tanh"):
    """Inputs drawn in ``dtype``, so that every party sees the same rounded values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, of=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    queries = (shape.batch, shape.num_heads, shape.q_len, shape.head_dim)
    keys = (shape.batch, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    bank = (shape.num_prefixes, shape.num_kv_heads, shape.prefix_len, shape.head_dim)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    gates = draw(shape.num_prefixes, shape.num_heads, of=statistic)
    rows = len(shape.lengths) if shape.lengths else shape.batch
    row_ids = cu_seqlens = None
    if shape.num_prefixes > 1:  # every entry and the absence of one, in no order
        pool = torch.arange(-1, shape.num_prefixes).repeat(rows)[:rows]
        row_ids = pool[torch.randperm(rows, generator=generator)].to(torch.int32)
    if shape.lengths:
        cu_seqlens = torch.tensor([0, *shape.lengths]).cumsum(0).to(torch.int32)
    return Inputs(
        draw(*queries),
        draw(*keys),
        draw(*keys),
        draw(*bank, of=prefix_dtype or dtype),
        draw(*bank, of=prefix_dtype or dtype),
        gates if gate == "random" else torch.full_like(gates, gate),
        draw(*queries),
        _make_mask(shape, dtype, generator),
        cu_seqlens,
        row_ids,
        shape.mask == "causal",
        shape.window,
        shape.softcap,
        gate_fn=gate_fn,
    )


def _make_mask(shape, dtype, generator):
    if shape.mask in ("", "causal"):
        return None
    if shape.mask in ("bool", "empty"):  # one mask for all heads
        mask = torch.rand(shape.batch, 1, shape.q_len, shape.kv_len, generator=generator) < 0.7
        mask[..., 0] = True
        if shape.mask == "empty":
            mask[:, :, 0] = False
        return mask
    mask = torch.randn(1, shape.num_heads, shape.q_len, shape.kv_len, generator=generator)
    hidden = torch.rand(mask.shape, generator=generator) < 0.2
    hidden[..., 0] = False
    mask = mask.to(torch.float32 if shape.mask == "float32" else dtype)
    return mask.masked_fill(hidden, float("-inf"))


def module_of(op):
    """The op's file; ``fastadapter.ops`` has a function of the same name."""
    return importlib.import_module(f"fastadapter.ops.{op}")


def runs_here(op, backend):
    """Whether ``backend`` has kernels of ``op`` that can run on this machine."""
    try:
        choose_backend(backend, device_of(backend), torch.float32, op)
    except ValueError:
        return False
    return True


def backends_of(op, *, interpreted=pytest.mark.slow):
    """Parameters for ``pytest.mark.parametrize``: every backend, those that cannot run here skipped by name.

    ``interpreted`` marks Triton where there is no GPU: its interpreter takes seconds for a call.
    """
    parameters = []
    for name in ("reference", "cpp", "triton"):
        marks = [pytest.mark.skipif(not runs_here(op, name), reason=f"no {name} kernel of {op}")]
        if name == "triton" and device_of(name) == "cpu" and interpreted:
            marks.append(interpreted)
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def dtypes_of(backend):
    """What a backend can run here; Triton's interpreter computes bf16 wrongly, a GPU does not."""
    if backend != "triton":
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    return [torch.float32, torch.float16] + [torch.bfloat16] * (device_of("triton") == "cuda")


def run(op, inputs, backend="auto", *, frozen=()):
    """Output, saved statistics and gradients by name (``None`` for frozen inputs), where the backend runs."""
    device = device_of(backend)
    inputs = inputs.map(lambda x: on_device(x, device))
    leaves = {
        name: getattr(inputs, name).detach().requires_grad_(name not in frozen) for name in OPERANDS[op]
    }
    out = getattr(ops, op)(**leaves, **inputs.options(op), backend=backend)
    if out.requires_grad:
        out.backward(inputs.grad_out)
    results = {"out": out.detach(), **saved(op, inputs, backend)}
    results |= {name: leaf.grad for name, leaf in leaves.items()}
    return {name: x if x is None else on_device(x, "cpu") for name, x in results.items()}


def saved(op, inputs, backend="auto"):
    """What the forward keeps for backward, by name."""
    chosen = choose_backend(backend, inputs.query.device.type, inputs.query.dtype, op)
    if chosen == "triton":  # what the attention of torch and our term keep; no lse of the prefix alone
        options = Options(*inputs.schema_options(SHARED))
        base, _ = choose_base(inputs.query, inputs.key, options)
        if op == SHARED:
            return {"lse": composed._merged(base, chosen, *inputs.operands(op), options)[1]}
        return dict(zip(SAVED[op], BASES[base].forward(*inputs[:3], options)[:2]))
    forward = module_of(op).run_forward
    _, *kept = forward(chosen, *inputs.operands(op), *inputs.schema_options(op), True)
    named = zip(SAVED[op], kept, strict=True)
    return {name: x for name, x in named if x.shape != (0,)}  # not kept


@where_kernels_run
def eager(op, inputs, compute_dtype):
    """The reference formulas with every intermediate in ``compute_dtype``: fp64 for the truth, else plain PyTorch."""
    if compute_dtype == torch.float64:
        inputs = inputs.cast(torch.float64)
    options = inputs.options(op)
    options["softmax_scale"] = inputs.softmax_scale or inputs.query.shape[-1] ** -0.5
    options["compute_dtype"] = compute_dtype
    operands = inputs.operands(op)
    forward, backward = getattr(reference, op), getattr(reference, f"{op}_backward")
    out, *kept = forward(*operands, **options)
    grads = backward(inputs.grad_out, *operands, *for_backward(op, out, kept), **options)
    named = dict(zip(SAVED[op], kept, strict=True)) | dict(zip(OPERANDS[op], grads, strict=True))
    return {"out": out, **named}


def for_backward(op, out, kept):
    """Results of a forward as its backward takes them."""
    if op == GATED:
        return kept
    lse, wide_out = kept
    return (wide_out if wide_out.shape == out.shape else out), lse


def torch_alone(inputs, dtype):
    """Output and gradients of torch's attention without a prefix, by name; fp64 on the CPU, else where kernels run."""
    device = "cpu" if dtype == torch.float64 else device_of("triton")
    given = inputs.cast(dtype).map(lambda x: on_device(x, device))
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    out = F.scaled_dot_product_attention(
        *leaves,
        attn_mask=given.attn_mask,
        is_causal=given.is_causal,
        scale=given.softmax_scale,
        enable_gqa=True,
    )
    out.backward(given.grad_out)
    found = (out.detach(), *(leaf.grad for leaf in leaves))
    return {
        name: on_device(x, "cpu") for name, x in zip(("out", "query", "key", "value"), found, strict=True)
    }


def of_the_base(inputs):
    """Pairs of results of torch's attention in fp32 and exactly, by name, on a GPU: ours stands on it there, so that
    its error is a part of our error. Elsewhere, and where it has no such attention, nothing.
    """
    given = (inputs.window, inputs.softcap, inputs.cu_seqlens)
    if (
        device_of("triton") == "cpu"
        or inputs.query.dtype != torch.float32
        or any(x is not None for x in given)
    ):
        return {}
    plain, exact = (torch_alone(inputs, dtype) for dtype in (torch.float32, torch.float64))
    return {name: (x, exact[name]) for name, x in plain.items() if x.isfinite().all()}


def check(op, inputs, actual, label="", neighbours=()):
    """Output, ``lse`` and every gradient within the budget; infinite statistics in the same places.

    ``neighbours``: for long runs, inputs of the same shapes whose errors of eager count as well in results of ``FEW``.
    """
    dtype, base = inputs.query.dtype, of_the_base(inputs)
    plain, exact = eager(op, inputs, dtype), eager(op, inputs, torch.float64)
    pooled = []
    for name in ("out", *SAVED[op], *OPERANDS[op]):
        if actual.get(name) is None:
            continue
        parts = [results[name] for results in (actual, plain, exact)]

        def others(name=name):
            if not pooled:
                pooled.extend((eager(op, x, dtype), eager(op, x, torch.float64)) for x in neighbours)
            found = [(p[name], e[name]) for p, e in pooled]
            return [*found, base[name]] if name in base else found

        if name.endswith("lse"):
            visible = exact[name] != float("-inf")
            if name == "prefix_lse":  # unspecified where there is no adapter: nobody reads it
                parts = [x[visible] for x in parts]
            else:
                assert torch.equal(actual[name] != float("-inf"), visible), f"{label} {name}: visible queries"
                parts = [torch.where(visible, x, 0) for x in parts]
        few = neighbours and not name.endswith("lse") and parts[0].numel() <= FEW
        if few or name in base:
            assert_within_budget_of(others, *parts, f"{label} {name}".strip())
        else:
            assert_within_budget(*parts, f"{label} {name}".strip())
