"""The bottleneck adapter as a drawn problem: inputs, call, truth."""

import torch

from tests.search.problems import Problem, generator_of, ids_of, laid_out
from tests.support import bottleneck as support

OPERANDS = ("x", "down_weight", "up_weight", "down_bias", "up_bias", "residual", "norm_weight", "norm_bias")


def build(case):
    draw = generator_of(case)
    weights = torch.float32 if case.masters else getattr(torch, case.dtype)
    activations, n = (case.batch, case.q_len, case.hidden), case.num_prefixes
    tensors = {
        "x": draw(*activations, times=case.logits),
        "down_weight": draw(n, case.size, case.hidden, of=weights, times=case.hidden**-0.5),
        "up_weight": draw(n, case.hidden, case.size, of=weights, times=case.size**-0.5),
        "down_bias": draw(n, case.size, of=weights, times=0.5),
        "up_bias": draw(n, case.hidden, of=weights, times=0.5),
        "residual": draw(*activations),
        "norm_weight": draw(n, case.hidden, of=weights),
        "norm_bias": draw(n, case.hidden, of=weights, times=0.3),
        "grad_out": draw(*activations),
    }
    if case.zero_channels:
        tensors["up_weight"][:, ::2] = 0.0
        tensors["up_bias"][:, ::2] = 0.0
    present = laid_out(case, {name: x for name, x in tensors.items() if name not in case.absent})
    options = {
        "row_ids": ids_of(case), "activation": case.activation, "scale": case.scale,
        "norm": case.norm, "tied": case.tied,
    }  # fmt: skip
    return Problem(case.op, present, options, present.pop("grad_out"))


def _inputs(problem):
    """The record of tests/support/bottleneck.py."""
    given = {name: problem.operands.get(name) for name in OPERANDS}
    if problem.options["tied"]:
        given["residual"] = given["x"]
    return support.Inputs(**given, row_ids=problem.options["row_ids"], grad_out=problem.grad_out)


def _constants(problem):
    return {name: problem.options[name] for name in ("activation", "norm", "scale")}


def call(problem, backend):
    return support.call(_inputs(problem), backend, **_constants(problem))


def saved(problem, backend):
    return {}


def truth(problem, compute_dtype):
    return support.eager(_inputs(problem), compute_dtype, **_constants(problem))
