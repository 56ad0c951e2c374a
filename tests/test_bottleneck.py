"""``bottleneck`` on every backend against the fp64 reference, by the budget of tests/support/budget.py.

The reference itself is checked against autograd through the plain modules, and by finite differences. Up
projections are random and non-zero unless a test says so: at zero, only their own gradient is non-zero.
"""

import pytest
import torch
import torch.nn.functional as F

from fastadapter.ops.bottleneck import ACTIVATIONS
from tests.support.bottleneck import GRADS, Shape, make_inputs, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


def plain(leaves, row_ids, activation, norm, scale):
    """What a user would write, row by row, with autograd's own gradients."""
    rows = []
    for b, x in enumerate(leaves["x"]):
        entry = 0 if row_ids is None else int(row_ids[b])
        of = {name: leaf[max(entry, 0)] for name, leaf in leaves.items() if name not in ("x", "residual")}
        y = x
        if norm == "layer_norm":
            y = F.layer_norm(x, x.shape[-1:], of["norm_weight"], of["norm_bias"])
        elif norm == "rms_norm":
            y = F.rms_norm(x, x.shape[-1:], of["norm_weight"], 1e-5)
        hidden = FUNCTIONS[activation](F.linear(y, of["down_weight"], of.get("down_bias")))
        term = scale * F.linear(hidden, of["up_weight"], of.get("up_bias")) * (entry >= 0)
        rows.append(term + (leaves["residual"][b] if "residual" in leaves else 0))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_reference_is_what_autograd_says(activation, norm, residual):
    """Against the plain modules in fp64, with and without biases, one entry and a bank."""
    for biases, num_entries in ((True, 1), (False, 3)):
        inputs = make_inputs(
            Shape(batch=5, num_entries=num_entries),
            torch.float64,
            biases=biases,
            residual=residual,
            norm=norm,
        )
        leaves = {
            name: getattr(inputs, name).detach().requires_grad_()
            for name in GRADS
            if getattr(inputs, name) is not None
        }
        if residual == "x":
            leaves["residual"] = leaves["x"]
        out = plain(leaves, inputs.row_ids, activation, norm, 0.7)
        out.backward(inputs.grad_out)
        expected = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
        actual = run(inputs, "reference", activation=activation, norm=norm, scale=0.7)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
