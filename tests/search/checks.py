"""What must hold for every drawn case: values, bits, isolation, layout of results, untouched inputs.

Values are judged by tests/support/budget.py. A drawn case may be one where eager has no error at all by luck, such
as a single prefix position, where the gradient of the scores cancels to an exact zero. What plain PyTorch achieves
is then measured on more draws of the same parameters and on slightly larger ones: the factor and the floor stay.
"""

import torch

from tests.search.layouts import storage_bits
from tests.search.problems import BANKS, build, only_row, poisoned_around, run, truth
from tests.support.budget import assert_within_budget, same_bits

EXACT_BITS = ("cpp", "triton")  # the matrix products of the reference round by alignment and batch size


def check(case, *backends):
    """All properties of ``case`` on every backend; call it with a printed case to reproduce a failure."""
    problem = build(case)
    before = {name: storage_bits(x) for name, x in problem.tensors().items()}
    plain, exact = errors_of(problem)
    for backend in backends:
        actual = run(problem, backend)
        check_values(case, actual, plain, exact, backend)
        check_form(problem, actual, backend)
        check_bits(case, problem, actual, backend)
        if case.batch:
            check_isolation(case, problem, actual, backend)
    for name, x in problem.tensors().items():
        assert torch.equal(storage_bits(x), before[name]), f"{name} was written to"


def errors_of(problem):
    """What plain PyTorch computes, and the truth."""
    exact = truth(problem, torch.float64)
    plain = truth(problem, problem.grad_out.dtype)
    if not all(x.isfinite().all() for x in plain.values()):  # scores beyond fp16: eager computes them in fp32
        plain = truth(problem, torch.float32)
    return plain, exact


def check_values(case, actual, plain, exact, backend):
    pooled = None
    for name, value in actual.items():
        label = f"{backend} {name}"
        try:
            assert_within_budget(value, plain[name], exact[name], label)
        except AssertionError:
            if not value.isfinite().all():
                raise
            pooled = pooled or [errors_of(build(other)) for other in neighbours(case)]
            # the values of the neighbours stand beside the case's own, with no error on our side
            parts = [(value, plain[name], exact[name])]
            parts += [(e[name].to(value.dtype), p[name], e[name]) for p, e in pooled]
            assert_within_budget(*(torch.cat([x.flatten().double() for x in part]).to(kind) for part, kind in
                zip(zip(*parts), (value.dtype, torch.float64, torch.float64))), label)  # fmt: skip


def neighbours(case):
    larger = case._replace(prefix_len=case.prefix_len + 3, head_dim=case.head_dim + 3)
    return [changed._replace(seed=case.seed + i) for i in (1, 2, 3) for changed in (case, larger)]


def check_form(problem, actual, backend):
    """Dtypes, shapes and strides."""
    first = next(iter(problem.operands.values()))
    assert actual["out"].dtype == first.dtype
    assert actual["out"].stride() == torch.empty_like(first).stride(), f"{backend}: strides of out"
    for name, x in problem.operands.items():
        grad = actual[name]
        assert grad.dtype == x.dtype and grad.shape == x.shape, f"{backend}: {name}"
        if name in BANKS:
            assert grad.is_contiguous(), f"{backend}: gradient of {name} has strides {grad.stride()}"
        elif name != "base":  # whose gradient is grad_out itself
            assert grad.stride() == torch.empty_like(x).stride(), (
                f"{backend}: strides of the gradient of {name}"
            )


def check_bits(case, problem, actual, backend):
    """Again, and with some inputs frozen: the same bits."""
    again = run(problem, backend, frozen=case.frozen)
    for name, value in actual.items():
        if name in case.frozen:
            assert again[name] is None, f"{backend} {name} is frozen"
        else:
            assert same_bits(again[name], value), f"{backend} {name} differs, frozen: {case.frozen}"


def check_isolation(case, problem, actual, backend):
    """A row is what it is alone, though its neighbours and their bank entries hold NaN."""
    row = case.row
    alone = run(only_row(problem, row), backend)
    mixed = run(poisoned_around(problem, row), backend)
    names = ["out", *(name for name in problem.operands if name not in BANKS)]
    for name in names:
        for other, where in ((mixed[name][row], "beside NaN"), (actual[name][row], "in the batch")):
            if backend in EXACT_BITS:
                assert same_bits(other, alone[name][0]), f"{backend} {name}: row {row} differs {where}"
            else:
                assert other.isfinite().all(), f"{backend} {name}: row {row} is not finite {where}"
    if case.ids is None or case.ids[row] < 0:
        return
    entry = case.ids[row]
    if case.ids.count(entry) == 1:  # its gradients come from this row alone
        for name in BANKS:
            if name not in problem.operands:
                continue
            if backend in EXACT_BITS:
                assert same_bits(mixed[name][entry], alone[name][entry]), f"{backend} {name}: entry {entry}"
            else:
                assert mixed[name][entry].isfinite().all(), f"{backend} {name}: entry {entry} is not finite"
    for unused in set(range(case.num_prefixes)) - {entry}:
        for name in BANKS:
            if name in problem.operands:
                assert not alone[name][unused].any(), (
                    f"{backend} {name}: unused entry {unused} has a gradient"
                )
