"""The attention ops as drawn problems: inputs, call, truth."""

import importlib
import inspect

import torch

from fastadapter import ops, reference
from fastadapter.ops.backends import choose_backend
from tests.search.problems import Problem, generator_of, ids_of, laid_out
from tests.support.gated_prefix import device_of, on_device

OPERANDS = {
    "gated_prefix": ("base", "query", "prefix_key", "prefix_value", "gate"),
    "gated_prefix_attention": ("query", "key", "value", "prefix_key", "prefix_value", "gate"),
    "prefix_attention": ("query", "key", "value", "prefix_key", "prefix_value"),
}
SAVED = {
    "gated_prefix": (),
    "gated_prefix_attention": ("base", "lse", "prefix_lse"),
    "prefix_attention": ("lse", "wide_out"),
}


def build(case):
    draw = generator_of(case)
    bank_dtype = torch.float32 if case.masters else getattr(torch, case.dtype)
    num_heads = case.num_kv_heads * case.group
    batch, q_len, kv_len = case.batch, case.q_len, case.kv_len
    if case.lengths is not None:
        batch, q_len, kv_len = 1, sum(case.lengths), sum(case.lengths)
    queries = (batch, num_heads, q_len, case.head_dim)
    keys = (batch, case.num_kv_heads, kv_len, case.head_dim)
    bank = (case.num_prefixes, case.num_kv_heads, case.prefix_len, case.head_dim)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    # scores of the size that was asked for, at any head_dim and scale
    factor = case.logits * min(1.0, 1 / (scale * case.head_dim**0.5))
    tensors = {
        "base": lambda: draw(*queries),
        "query": lambda: draw(*queries, times=factor),
        "key": lambda: draw(*keys),
        "value": lambda: draw(*keys),
        "prefix_key": lambda: draw(*bank, of=bank_dtype),
        "prefix_value": lambda: draw(*bank, of=bank_dtype),
        "gate": lambda: _gates(case, draw),
        "grad_out": lambda: draw(*queries),
    }
    drawn = laid_out(case, {name: tensors[name]() for name in (*OPERANDS[case.op], "grad_out")})
    options = {"softmax_scale": case.scale, "row_ids": ids_of(case)}
    if "gate" in drawn:
        options["gate_fn"] = case.gate_fn
    if "key" in drawn:
        options["is_causal"] = case.is_causal
        options["attn_mask"] = _mask(case, (batch, num_heads, q_len, kv_len))
        options["window"], options["softcap"] = case.window, case.softcap
        options["cu_seqlens"] = None
        if case.lengths is not None:
            options["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    return Problem(case.op, drawn, options, drawn.pop("grad_out"))


def _gates(case, draw):
    gate = draw(
        case.num_prefixes,
        case.num_kv_heads * case.group,
        of=torch.float64 if case.dtype == "float64" else torch.float32,
        times={"zero": 0.0, "tiny": 1e-6, "huge": 30.0}.get(case.gate, 1.0),
    )
    if case.gate == "one-zero":
        gate[:, 0] = 0.0
    return gate


def _mask(case, shape):
    """Of the shape and dtype that the name says, ``bool-bhts`` or ``float32-1ht1``; some queries see no key at all."""
    if case.mask is None:
        return None
    kind, axes = case.mask.split("-")
    sizes = [1 if axis == "1" else size for axis, size in zip(axes, shape)]
    generator = torch.Generator().manual_seed(case.seed + 1)
    visible = torch.rand(sizes, generator=generator) < 0.7
    if axes[2] != "1" and shape[2] > 1:
        visible[:, :, shape[2] // 2] = False
    if kind == "bool":
        return visible
    bias = torch.randn(sizes, generator=generator).masked_fill(~visible, float("-inf"))
    return bias.to(torch.float32 if kind == "float32" else getattr(torch, case.dtype))


def call(problem, backend):
    return getattr(ops, problem.op)(**problem.operands, **problem.options, backend=backend)


def saved(problem, backend):
    """What the forward keeps for backward, by name."""
    if not SAVED[problem.op]:
        return {}
    device = device_of(backend)
    problem = problem.replace(**{name: on_device(x, device) for name, x in problem.tensors().items()})
    options = problem.options
    query, mask = problem.operands["query"], options["attn_mask"]
    scale = options["softmax_scale"] or query.shape[-1] ** -0.5
    gate_fn = (options["gate_fn"],) if "gate_fn" in options else ()
    if mask is not None:
        mask = mask.expand(*query.shape[:3], problem.operands["key"].shape[2])
    forward = importlib.import_module(f"fastadapter.ops.{problem.op}").run_forward
    _, *kept = forward(
        choose_backend(backend, query.device.type, query.dtype, problem.op),
        *problem.operands.values(), mask, options["cu_seqlens"], options["row_ids"], scale, *gate_fn,
        options["is_causal"], options["window"] or 0, options["softcap"] or 0.0, True,
    )  # fmt: skip
    named = zip(SAVED[problem.op], (on_device(x, "cpu") for x in kept), strict=True)
    return {name: x for name, x in named if x.shape != (0,)}  # not kept


def truth(problem, compute_dtype):
    """Output, what is saved and gradients from the reference: in fp64 the truth, else what plain PyTorch achieves."""
    wide = compute_dtype == torch.float64
    operands = {name: x.double() if wide else x for name, x in problem.operands.items()}
    grad_out = problem.grad_out.double() if wide else problem.grad_out
    options = {**problem.options, "compute_dtype": compute_dtype}
    options["softmax_scale"] = options["softmax_scale"] or operands["query"].shape[-1] ** -0.5
    forward, backward = (getattr(reference, problem.op + suffix) for suffix in ("", "_backward"))
    out = forward(**operands, **options)
    kept = {}
    if SAVED[problem.op]:
        out, *rest = out
        kept = dict(zip(SAVED[problem.op], rest, strict=True))
    given = {**operands, **kept, "out": kept.get("wide_out", out)}
    names = inspect.signature(backward).parameters
    taken = [name for name in operands if name in names]
    grads = backward(grad_out, **{name: given[name] for name in names if name in given}, **options)
    found = dict(zip(taken, grads, strict=True))
    # the gradient of a base that is an operand is grad_out itself
    return {"out": out, **kept, **{name: found.get(name, grad_out) for name in operands}}
