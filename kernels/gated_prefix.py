"""Gated prefix: the adapter term of LLaMA-Adapter's zero-init attention (arXiv:2303.16199, eq. 6-8).

    O  = base + f * softmax(softmax_scale * Q Kp^T) Vp,    f = tanh(gate_h) or gate_h

Kernels: prefix_term.py and prefix_term_backward.py, in the form of the gate. Nothing is saved for backward: p costs
less to recompute than to read.
"""

from fastadapter.kernels.prefix_term import prefix_term_forward
from fastadapter.kernels.prefix_term_backward import prefix_term_backward
from torch import Tensor

_OP = "gated_prefix"


def gated_prefix_forward(
    base: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor,
    row_ids: Tensor | None, softmax_scale: float, gate_fn: str,
) -> Tensor:  # fmt: skip
    """``base`` plus the gated prefix term, in the dtype and strides of ``base``; see :func:`prefix_term_forward`."""
    operands = (base, None, query, prefix_key, prefix_value, gate, row_ids)
    return prefix_term_forward(*operands, _OP, softmax_scale, 0.0, gate_fn)[0]


def gated_prefix_backward(grad_out: Tensor, *rest) -> tuple[Tensor, ...]:
    """Gradients of query, prefix_key, prefix_value and gate: :func:`gated_prefix_backward_onto` without a base's."""
    return gated_prefix_backward_onto(grad_out, None, *rest)


def gated_prefix_backward_onto(
    grad_out: Tensor, base_grad: Tensor | None, query: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    gate: Tensor, row_ids: Tensor | None, softmax_scale: float, gate_fn: str, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query (added to ``base_grad``, the base's part), prefix_key, prefix_value and gate.

    ``needs`` are those of query, the prefix and the gate. See :func:`prefix_term_backward`.
    """
    operands = (grad_out, query, prefix_key, prefix_value, gate, None, None, base_grad, row_ids)
    return prefix_term_backward(*operands, _OP, softmax_scale, 0.0, gate_fn, *needs)
