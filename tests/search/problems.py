"""From a drawn record to tensors, to the public op, and to the reference in any precision."""

from typing import NamedTuple

import torch

from tests.search.layouts import LAYOUTS
from tests.support.gated_prefix import device_of, on_device

BANKS = (
    "prefix_key", "prefix_value", "gate",
    "down_weight", "up_weight", "down_bias", "up_bias", "norm_weight", "norm_bias",
)  # fmt: skip


class Problem(NamedTuple):
    """What one call takes. Rows are those of the batch, or the sequences of a packed one."""

    op: str
    operands: dict[str, torch.Tensor]  # differentiable, named as in the public function
    options: dict[str, object]  # its other keyword arguments
    grad_out: torch.Tensor

    def tensors(self):
        every = {**self.operands, **self.options, "grad_out": self.grad_out}
        return {name: x for name, x in every.items() if isinstance(x, torch.Tensor)}

    def replace(self, **tensors):
        """With other operands, options or grad_out, by name."""
        operands = {name: tensors.get(name, x) for name, x in self.operands.items()}
        options = {name: tensors.get(name, x) for name, x in self.options.items()}
        grad_out = tensors.get("grad_out", self.grad_out)
        return self._replace(operands=operands, options=options, grad_out=grad_out)

    def by_row(self):
        """The tensors that hold something of every row."""
        rest = (*BANKS, "row_ids", "cu_seqlens")
        found = {name: x for name, x in self.tensors().items() if name not in rest}
        mask = found.get("attn_mask")
        if mask is not None and mask.shape[0] != self.grad_out.shape[0]:  # one mask for all rows
            del found["attn_mask"]
        return found

    def row_of(self, x, row):
        """The part of ``x`` that belongs to a row, a view."""
        offsets = self.options.get("cu_seqlens")
        if offsets is None:
            return x[row : row + 1]
        return x[:, :, int(offsets[row]) : int(offsets[row + 1])]

    def only_row(self, row):
        """The problem of one row, as views: strides and alignment stay what they are."""
        changes = {name: self.row_of(x, row) for name, x in self.by_row().items()}
        if self.options["row_ids"] is not None:
            changes["row_ids"] = self.options["row_ids"][row : row + 1]
        if self.options.get("cu_seqlens") is not None:
            changes["cu_seqlens"] = torch.tensor([0, changes["grad_out"].shape[2]], dtype=torch.int32)
        return self.replace(**changes)

    def poisoned_around(self, row):
        """NaN in every other row and in every bank entry that ``row`` does not use."""
        changes = {}
        for name, x in self.by_row().items():
            if x.is_floating_point() and not has_shared_memory(x):
                changes[name] = copy = same_layout(x)
                kept = self.row_of(copy, row).clone()
                copy.fill_(float("nan"))
                self.row_of(copy, row).copy_(kept)
        ids = self.options["row_ids"]
        for name, x in self.operands.items():
            if ids is not None and name in BANKS and not has_shared_memory(x):
                changes[name] = copy = same_layout(x)
                copy[[entry for entry in range(x.shape[0]) if entry != int(ids[row])]] = float("nan")
        return self.replace(**changes)


def has_shared_memory(x):
    """A broadcast axis cannot hold two values."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape))


def same_layout(x):
    """A copy in a storage of its own, with the same strides, offset and gaps."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone())
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def generator_of(case):
    """``draw(*size, of=dtype, times=1.0)`` of normal values rounded to ``dtype``, so that all parties see the same."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*size, of=None, times=1.0):
        values = torch.randn(*size, generator=generator, dtype=torch.float64)
        return (times * values).to(of or getattr(torch, case.dtype))

    return draw


def laid_out(case, tensors):
    """The tensors in the drawn layouts, in turn."""
    layouts = [LAYOUTS[case.layouts[i % len(case.layouts)]] for i in range(len(tensors))]
    return {name: layout(x) for layout, (name, x) in zip(layouts, tensors.items())}


def ids_of(case):
    return None if case.ids is None else torch.tensor(case.ids, dtype=torch.int32)


def run(problem, call, backend, frozen=()):
    """Output and gradients by name from ``call(problem, backend)``; ``None`` where frozen."""
    device = device_of(backend)
    moved = {name: on_device(x, device) for name, x in problem.tensors().items()}
    leaves = {name: moved[name].detach().requires_grad_(name not in frozen) for name in problem.operands}
    out = call(problem.replace(**{**moved, **leaves}), backend)
    results = {"out": out.detach(), **dict.fromkeys(leaves)}
    trained = [name for name in leaves if name not in frozen]
    if trained:  # as the op made them: backward() would copy them into the layout of the leaf
        results.update(
            zip(trained, torch.autograd.grad(out, [leaves[name] for name in trained], moved["grad_out"]))
        )
    return {name: on_device(x, "cpu") for name, x in results.items()}
