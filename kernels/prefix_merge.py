"""Prefix merge: extends the softmax of another attention by a learned prefix (prefix tuning, arXiv:2101.00190).

    lse = log(exp(b) + sum exp(S)),    O = exp(b - lse) base + exp(S - lse) Vp,    S = softmax_scale * Q Kp^T, capped

with the base's output and natural ``lse`` b of the same queries. Kernels: prefix_term.py and prefix_term_backward.py.
Saved for backward: the merged O and lse.
"""

from fastadapter.kernels.prefix_term import prefix_term_forward
from fastadapter.kernels.prefix_term_backward import prefix_term_backward
from torch import Tensor

_OP = "prefix_merge"


def prefix_merge_forward(
    base: Tensor, base_lse: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    row_ids: Tensor | None, softmax_scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, like ``base``, and lse; ``base_lse`` fp32 ``(batch, num_heads, q_len)``, -inf where no key was seen.

    An id of -1 leaves the bits of both; one outside the bank makes them NaN. See :func:`prefix_term_forward`.
    """
    operands = (base, base_lse, query, prefix_key, prefix_value, None, row_ids)
    return prefix_term_forward(*operands, _OP, softmax_scale, softcap, "merge")


def prefix_merge_backward(
    grad_out: Tensor, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, out: Tensor, lse: Tensor,
    base_grad: Tensor | None, row_ids: Tensor | None, softmax_scale: float, softcap: float,
    need_query: bool, need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The prefix's part of the gradients of query (``base_grad`` added), prefix_key and prefix_value.

    ``out`` and ``lse`` are the merged ones. See :func:`prefix_term_backward`.
    """
    operands = (grad_out, query, prefix_key, prefix_value, None, out, lse, base_grad, row_ids)
    needs = (need_query, need_prefix, False)
    return prefix_term_backward(*operands, _OP, softmax_scale, softcap, "merge", *needs)[:3]
