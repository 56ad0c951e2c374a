"""What must hold for every drawn case: values, bits, isolation, layout of results, untouched inputs.

Values are judged by tests/support/budget.py. A drawn case may be one where eager has no error at all by luck, such
as a single prefix position, where the gradient of the scores cancels to an exact zero. What plain PyTorch achieves
is then measured on more draws of the same parameters and on slightly larger ones: the factor and the floor stay.
"""

import contextlib

import torch

from tests.search import attention, bottleneck
from tests.search.layouts import storage_bits
from tests.search.problems import BANKS, run
from tests.support.budget import assert_within_budget_of, same_bits
from tests.support.gated_prefix import device_of
from tests.support.interpreter import products_by_element

# Where a score has an ulp of 1e-3, a gradient depends on the order in which forward and backward summed it.
EXTREME = 100.0
GRADIENTS = {name for operands in attention.OPERANDS.values() for name in operands} - {"base"}
# the matrix products of the reference, and of a library on a GPU, round by alignment and batch size
EXACT_BITS = ("cpp", "triton")


def adapter_of(op):
    """The module that builds, calls and judges problems of an op."""
    return bottleneck if op == "bottleneck" else attention


def check(case, *backends):
    """All properties of ``case`` on every backend; call it with a printed case to reproduce a failure."""
    with products_by_element() if "triton" in backends else contextlib.nullcontext():
        _check(case, backends)


def _check(case, backends):
    adapter = adapter_of(case.op)
    problem = adapter.build(case)
    before = {name: storage_bits(x) for name, x in problem.tensors().items()}
    plain, exact = errors_of(problem)
    for backend in backends:
        actual = run(problem, adapter.call, backend)
        kept = adapter.saved(problem, backend)
        check_values(case, {**actual, **kept}, plain, exact, backend)
        check_form(problem, actual, backend)
        check_bits(case, problem, actual, backend)
        check_isolation(case, problem, actual, backend)
    for name, x in problem.tensors().items():
        assert torch.equal(storage_bits(x), before[name]), f"{name} was written to"


def errors_of(problem):
    """What plain PyTorch computes, and the truth."""
    truth = adapter_of(problem.op).truth
    exact = truth(problem, torch.float64)
    if problem.grad_out.dtype == torch.float64:
        return in_double(problem, exact), exact
    plain = truth(problem, problem.grad_out.dtype)
    if any(x[~torch.isinf(exact[name])].isfinite().logical_not().any() for name, x in plain.items()):
        plain = truth(problem, torch.float32)  # scores beyond fp16
    return plain, exact


def in_double(problem, exact):
    """The truth is fp64 itself, beside which eager fp64 has no error: that of eager fp32, in ulp, stands for it."""
    narrow = problem.replace(
        **{name: x.float() for name, x in problem.tensors().items() if x.is_floating_point()}
    )
    coarse, fine = errors_of(narrow)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {name: x + ratio * (coarse[name].double() - fine[name]) for name, x in exact.items()}


def check_values(case, actual, plain, exact, backend):
    pooled = None
    for name, value in actual.items():
        label = f"{backend} {name}"
        parts = finite_parts(name, value, plain[name], exact[name])
        if case.logits > EXTREME and name in GRADIENTS:
            assert value.isfinite().all(), f"{label} is not finite"
            continue

        def others(name=name, value=value):
            nonlocal pooled
            pooled = pooled or [errors_of(problem) for problem in neighbours(case)]
            return [finite_parts(name, e[name].to(value.dtype), p[name], e[name])[1:] for p, e in pooled]

        assert_within_budget_of(others, *parts, label)


def finite_parts(name, actual, plain, exact):
    """All three without the lse of queries that see nothing, after a look at whether it is infinite."""
    if not name.endswith("lse"):
        return actual, plain, exact
    visible = exact != float("-inf")
    if name == "lse":
        assert torch.equal(actual != float("-inf"), visible), "lse: which queries see a key"
    return actual[visible], plain[visible], exact[visible]


def neighbours(case):
    """Problems that differ in values and sizes. The gates stay: their slope scales the error of their gradient."""
    adapter = adapter_of(case.op)
    gate = {name: x for name, x in adapter.build(case).operands.items() if name == "gate"}
    # of usual scores too: those of 1e4 leave one position, and no gradient of its score, in the larger case as well
    kinds = (case, case.larger(), case.larger()._replace(logits=1.0))
    return [
        adapter.build(other._replace(seed=case.seed + i)).replace(**gate)
        for i in (1, 2, 3)
        for other in kinds
    ]


def check_form(problem, actual, backend):
    """Dtypes, shapes and strides."""
    first = next(iter(problem.operands.values()))
    assert actual["out"].dtype == first.dtype
    assert same_strides(actual["out"], first), f"{backend}: strides of out"
    for name, x in problem.operands.items():
        grad = actual[name]
        assert grad.dtype == x.dtype and grad.shape == x.shape, f"{backend}: {name}"
        if name in BANKS:
            assert grad.is_contiguous(), f"{backend}: gradient of {name} has strides {grad.stride()}"
        elif name in ("key", "value") and device_of(backend) != "cpu":
            pass  # of torch's own attention, as it lays them out
        elif name not in ("base", "residual"):  # whose gradient is grad_out itself
            assert same_strides(grad, x), f"{backend}: strides of the gradient of {name}"


def same_strides(result, like):
    """Those that PyTorch gives a result like ``like``; of a dimension of one entry, or of none at all, any."""
    pairs = zip(result.shape, result.stride(), torch.empty_like(like).stride(), strict=True)
    return result.numel() == 0 or all(mine == theirs for size, mine, theirs in pairs if size > 1)


def check_bits(case, problem, actual, backend):
    """The same bits again, with some inputs frozen and with all of them."""
    call = adapter_of(case.op).call
    everything = tuple(problem.operands)
    for frozen in (case.frozen, everything):
        again = run(problem, call, backend, frozen=frozen)
        expected = actual
        if set(frozen) == set(everything) and case.op.endswith("attention"):
            # where no backward follows, a few query rows take a path of their own, with another order of sums
            expected = run(problem, call, backend, frozen=frozen)
        for name, value in expected.items():
            if name in frozen:
                assert again[name] is None, f"{backend} {name} is frozen"
            else:
                assert same_bits(again[name], value), f"{backend} {name} differs, frozen: {frozen}"


def check_isolation(case, problem, actual, backend):
    """A row is what it is alone, though its neighbours and their bank entries hold NaN."""
    rows = problem.grad_out.shape[0] if getattr(case, "lengths", None) is None else len(case.lengths)
    if rows == 0:
        return
    row, call = case.row, adapter_of(case.op).call
    alone = run(problem.only_row(row), call, backend)
    mixed = run(problem.poisoned_around(row), call, backend)
    exact = backend in EXACT_BITS and device_of(backend) == "cpu"
    for name in ("out", *(name for name in problem.operands if name not in BANKS)):
        for other, where in ((mixed[name], "beside NaN"), (actual[name], "in the batch")):
            other = problem.row_of(other, row)
            same = same_bits(other, alone[name]) if exact else other.isfinite().all()
            assert same, f"{backend} {name}: row {row} differs {where}"
    if case.ids is None or case.ids[row] < 0:
        return
    entry = case.ids[row]
    for name in (name for name in problem.operands if name in BANKS):
        if case.ids.count(entry) == 1:  # its gradients come from this row alone
            same = (
                same_bits(mixed[name][entry], alone[name][entry])
                if exact
                else mixed[name][entry].isfinite().all()
            )
            assert same, f"{backend} gradient of {name}: entry {entry} of row {row}"
        unused = [other for other in range(case.num_prefixes) if other != entry]
        assert not alone[name][unused].any(), f"{backend} {name}: an entry that no row uses has a gradient"
