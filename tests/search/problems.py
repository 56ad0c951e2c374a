"""From a drawn record to tensors, to the public op, and to the reference in any precision."""

import inspect
from typing import NamedTuple

import torch

from fastadapter import ops, reference
from tests.search.layouts import LAYOUTS
from tests.support.gated_prefix import device_of, on_device

BANKS = ("prefix_key", "prefix_value", "gate")


class Problem(NamedTuple):
    op: str
    operands: dict[str, torch.Tensor]  # differentiable, in the order of the public function
    options: dict[str, object]  # its other keyword arguments
    grad_out: torch.Tensor

    def replace(self, **tensors):
        """With other operands, options or grad_out, by name."""
        operands = {name: tensors.get(name, x) for name, x in self.operands.items()}
        options = {name: tensors.get(name, x) for name, x in self.options.items()}
        return self._replace(
            operands=operands, options=options, grad_out=tensors.get("grad_out", self.grad_out)
        )

    def tensors(self):
        every = {**self.operands, **self.options, "grad_out": self.grad_out}
        return {name: x for name, x in every.items() if isinstance(x, torch.Tensor)}

    def activations(self):
        """Names of the tensors whose first axis is the batch."""
        return [name for name in self.tensors() if name not in (*BANKS, "row_ids")]


def build(case):
    """Inputs drawn in the dtype of the case, so that every party sees the same rounded values."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    bank_dtype = torch.float32 if case.masters else dtype

    def draw(*size, of=dtype, times=1.0):
        return (times * torch.randn(*size, generator=generator, dtype=torch.float64)).to(of)

    num_heads = case.num_kv_heads * case.group
    activations = (case.batch, num_heads, case.q_len, case.head_dim)
    bank = (case.num_prefixes, case.num_kv_heads, case.prefix_len, case.head_dim)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    # scores of the size that was asked for, at any head_dim and scale
    operands = {
        "base": draw(*activations),
        "query": draw(*activations, times=case.logits * min(1.0, 1 / (scale * case.head_dim**0.5))),
        "prefix_key": draw(*bank, of=bank_dtype),
        "prefix_value": draw(*bank, of=bank_dtype),
        "gate": gates(case, draw),
    }
    grad_out = draw(*activations)
    names = [*operands, "grad_out"]
    tensors = {**operands, "grad_out": grad_out}
    for i, name in enumerate(names):
        tensors[name] = LAYOUTS[case.layouts[i % len(case.layouts)]](tensors[name])
    return Problem(
        case.op,
        {name: tensors[name] for name in operands},
        {"softmax_scale": case.scale, "gate_fn": case.gate_fn, "row_ids": ids_of(case)},
        tensors["grad_out"],
    )


def ids_of(case):
    return None if case.ids is None else torch.tensor(case.ids, dtype=torch.int32)


def gates(case, draw):
    gate = draw(
        case.num_prefixes,
        case.num_kv_heads * case.group,
        of=torch.float64 if case.dtype == "float64" else torch.float32,
        times={"zero": 0.0, "tiny": 1e-6, "huge": 30.0}.get(case.gate, 1.0),
    )
    if case.gate == "one-zero":
        gate[:, 0] = 0.0
    return gate


def run(problem, backend, frozen=()):
    """Output and gradients by name, from the public function; ``None`` where frozen."""
    device = device_of(backend)
    leaves = {
        name: on_device(x, device).detach().requires_grad_(name not in frozen)
        for name, x in problem.operands.items()
    }
    options = {
        name: on_device(x, device) if isinstance(x, torch.Tensor) else x
        for name, x in problem.options.items()
    }
    out = getattr(ops, problem.op)(**leaves, **options, backend=backend)
    results = {"out": out.detach(), **dict.fromkeys(leaves)}
    trained = [name for name in leaves if name not in frozen]
    if trained:  # as the op made them: backward() would copy them into the layout of the leaf
        grads = torch.autograd.grad(
            out, [leaves[name] for name in trained], on_device(problem.grad_out, device)
        )
        results.update(zip(trained, grads))
    return {name: on_device(x, "cpu") for name, x in results.items()}


def truth(problem, compute_dtype):
    """The same from the reference: fp64 is the truth, another dtype what plain PyTorch achieves in it."""
    wide = compute_dtype == torch.float64
    operands = {name: x.double() if wide else x for name, x in problem.operands.items()}
    grad_out = problem.grad_out.double() if wide else problem.grad_out
    options = {**problem.options, "compute_dtype": compute_dtype}
    if options["softmax_scale"] is None:
        options["softmax_scale"] = operands["query"].shape[-1] ** -0.5
    forward, backward = (getattr(reference, problem.op + suffix) for suffix in ("", "_backward"))
    out = forward(**operands, **options)
    taken = [name for name in inspect.signature(backward).parameters if name in operands]
    grads = dict(zip(taken, backward(grad_out, **{name: operands[name] for name in taken}, **options)))
    return {"out": out, **{name: grads.get(name, grad_out) for name in operands}}


def only_row(problem, row):
    """The problem of one batch row, as views: strides and alignment stay what they are."""
    changes = {name: problem.tensors()[name][row : row + 1] for name in problem.activations()}
    if problem.options["row_ids"] is not None:
        changes["row_ids"] = problem.options["row_ids"][row : row + 1]
    return problem.replace(**changes)


def poisoned_around(problem, row):
    """NaN in every other row and in every bank entry that ``row`` does not use."""
    changes = {}
    ids = problem.options["row_ids"]
    for name, x in problem.tensors().items():
        if name == "row_ids" or (name in BANKS and ids is None):
            continue
        kept = row if name not in BANKS else int(ids[row])
        changes[name] = poisoned(x, kept)
    return problem.replace(**changes)


def poisoned(x, kept):
    """A copy with the same strides; a broadcast axis cannot hold two values, so such a tensor stays as it is."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
        return x
    copy = same_layout(x)
    others = [i for i in range(x.shape[0]) if i != kept]
    copy[others] = float("nan")
    return copy


def same_layout(x):
    """A copy in a storage of its own, with the same strides, offset and gaps."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone())
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
