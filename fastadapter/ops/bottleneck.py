"""Bottleneck adapter: public function, registration, autograd.

The kernels sit behind one registered boundary, ``torch.ops.fastadapter.bottleneck`` and its backward, as those of
:mod:`fastadapter.ops.gated_prefix` do; there the tensors have one form, ``x (batch, seq, hidden)`` and every
parameter a bank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapter import reference
from fastadapter.ops import checks
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.registration import fake_bank_grad, fake_grad, only_needed, register

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "identity")
NORMS = ("layer_norm", "rms_norm")


class Norm(NamedTuple):
    """A normalisation of the adapter's input over its last dimension, computed in the same pass.

    Args:
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        weight, bias: ``(hidden,)``, or a bank ``(n, hidden)`` beside weights that are one; in the dtype of ``x`` or
            fp32. ``None`` leaves that step out.
        eps: added to the variance or mean square.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5


_NO_NORM = Norm("none", None, None, 0.0)


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float = 1.0,
    norm: Norm | None = None,
    row_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Down projection, activation, up projection and residual of a bottleneck adapter in one call.

    Equivalent to ``residual + scale * linear(act(linear(norm(x), down_weight, down_bias)), up_weight, up_bias)``
    (Houlsby et al., arXiv:1902.00751, section 2.1; with a scale, He et al., arXiv:2110.04366, section 3). An output
    channel whose row of ``up_weight`` and whose bias are zero has the bits of ``residual``, whatever the down
    projection holds. Deterministic, forward and backward.

    For backward, forward keeps the input of the activation: ``bottleneck_size / hidden`` of ``x``, on a GPU in the
    dtype of ``x`` (with ``row_ids`` it is computed again there), on a CPU in fp32 (fp64 with fp64).

    On a GPU, products are in the dtype of ``x`` with fp32 sums: fp32 weights beside half-precision ``x`` are rounded
    to it once per call, as under autocast, and get gradients in fp32. fp32 products that are ``bottleneck_size`` wide
    follow ``torch.backends.cuda.matmul.allow_tf32``.

    Args:
        x: ``(..., hidden)`` with at least 2 dims, fp32, bf16, fp16 or fp64; any strides.
        down_weight, up_weight: ``(bottleneck_size, hidden)`` and ``(hidden, bottleneck_size)`` as in ``nn.Linear``,
            or banks of them ``(n, bottleneck_size, hidden)`` and ``(n, hidden, bottleneck_size)``; in the dtype of
            ``x``, or fp32 beside half-precision ``x``.
        down_bias, up_bias: ``(bottleneck_size,)`` and ``(hidden,)``, or ``(n, bottleneck_size)`` and ``(n, hidden)``;
            dtype of the weights.
        residual: shape and dtype of ``x``, often ``x`` itself; ``None``: nothing is added.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        scale: factor of the adapter's term.
        norm: applied to ``x`` before the down projection, see :class:`Norm`; the residual is not normalised.
        row_ids: int32 ``(x.shape[0],)``, the bank entry of every row; -1 leaves a row its residual alone, or 0.
            Needed when the bank has more than one entry.
        backend: ``"auto"`` (C++ on CPU, Triton on GPU), ``"triton"``, ``"cpp"`` or ``"reference"``.
    Returns: shape and dtype of ``x``, and its strides where it has up to 3 dims. Gradients come in each argument's
        own dtype.
    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: wrong shape, device or option, a scale or ``eps`` that is not finite, ``row_ids`` out of range, a
            backend that cannot run.

    >>> x, down, up = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(8, 3)
    >>> expected = x + torch.nn.functional.gelu(x @ down.T) @ up.T
    >>> torch.allclose(bottleneck(x, down, up, residual=x), expected, atol=1e-5)
    True
    """
    if norm is None:
        _validate_plain(x, down_weight, up_weight, down_bias, up_bias, residual, row_ids, activation)
        checks.require_row_ids_in_range("bottleneck", row_ids, len(down_weight))
    else:
        _validate(x, down_weight, up_weight, down_bias, up_bias, residual, activation, norm, row_ids)
    if norm is None:
        norm = _NO_NORM
    residual_is_x = residual is x
    inner, others = _three_dims(x, None if residual_is_x else residual, row_ids is not None)
    residual_of_op = inner if residual_is_x else others
    tensors = (
        inner, down_weight, up_weight, down_bias, up_bias, residual_of_op, norm.weight, norm.bias
    )  # fmt: skip
    constants = (activation, norm.kind, float(norm.eps), checks.require_finite("bottleneck", "scale", scale))
    chosen = choose_backend(backend, x.device.type, x.dtype, "bottleneck")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if residual_is_x:  # one input, so that its two gradients are one pass
            tensors = (*tensors[:5], None, *tensors[6:])
        keeps = chosen == "cpp" or (chosen == "triton" and row_ids is None)
        keep_z = keeps and _needs_z(activation, *tensors[:4], norm.weight, norm.bias)
        out = _Bottleneck.apply(residual_is_x, chosen, keep_z, *tensors, row_ids, *constants)
    else:
        out = run_forward(chosen, *_as_banks(tensors), row_ids, *constants)
    return out if x.dim() == 3 else out.view(x.shape)


def _as_banks(tensors: tuple) -> tuple[Tensor | None, ...]:
    """The arguments of the registered op up to row_ids, with parameters of one entry as a bank of it."""
    x, down_weight, up_weight, down_bias, up_bias, residual, norm_weight, norm_bias = tensors
    if down_weight.dim() == 3:
        return tensors
    return (
        x,
        down_weight.unsqueeze(0),
        up_weight.unsqueeze(0),
        None if down_bias is None else down_bias.unsqueeze(0),
        None if up_bias is None else up_bias.unsqueeze(0),
        residual,
        None if norm_weight is None else norm_weight.unsqueeze(0),
        None if norm_bias is None else norm_bias.unsqueeze(0),
    )


def _needs_z(activation, x, down_weight, up_weight, *others) -> bool:
    """Whether backward will need the input of the activation; ``others`` have gradients through its derivative."""
    if down_weight.requires_grad or up_weight.requires_grad:
        return True
    return activation != "identity" and any(t is not None and t.requires_grad for t in (x, *others))


def _three_dims(x: Tensor, residual: Tensor | None, by_row: bool) -> tuple[Tensor, Tensor | None]:
    """``(batch, seq, hidden)`` with the batch that ``row_ids`` counts."""
    if x.dim() == 3:
        return x, residual
    if x.dim() == 2:  # without ids the rows may as well be one sequence
        dim = 1 if by_row else 0
        return x.unsqueeze(dim), None if residual is None else residual.unsqueeze(dim)
    return x.flatten(1, -2), None if residual is None else residual.flatten(1, -2)


@checks.once(tensors=7)
def _validate_plain(x, down_weight, up_weight, down_bias, up_bias, residual, row_ids, activation) -> None:
    """Without a norm, whose tensors are inside of it."""
    _validate(x, down_weight, up_weight, down_bias, up_bias, residual, activation, None, row_ids)


def _validate(x, down_weight, up_weight, down_bias, up_bias, residual, activation, norm, row_ids) -> None:
    op = "bottleneck"
    checks.require_tensor(op, x=x, down_weight=down_weight, up_weight=up_weight)
    optional = {"down_bias": down_bias, "up_bias": up_bias, "residual": residual}
    if norm is not None:
        if not isinstance(norm, Norm):
            raise TypeError(f"{op}: norm must be a Norm or None, got {type(norm).__name__}")
        if norm.kind not in NORMS:
            raise ValueError(f"{op}: norm.kind must be one of {', '.join(NORMS)}, got {norm.kind!r}")
        if checks.require_finite(op, "norm.eps", norm.eps) < 0:
            raise ValueError(f"{op}: norm.eps must be at least 0, got {norm.eps}")
        optional |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    checks.require_tensor(op, **given)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have at least 2 dims (..., hidden), got {tuple(x.shape)}")
    if down_weight.dim() not in (2, 3):
        raise ValueError(
            f"{op}: down_weight must be (bottleneck_size, hidden) or a bank (n, bottleneck_size, hidden), "
            f"got {tuple(down_weight.shape)}"
        )
    hidden, bank = x.shape[-1], tuple(down_weight.shape[:-2])
    size, num_entries = down_weight.shape[-2], bank[0] if bank else 1
    if hidden == 0 or size == 0 or num_entries == 0:
        raise ValueError(
            f"{op}: hidden, bottleneck_size and n must be at least 1, got x {tuple(x.shape)} and "
            f"down_weight {tuple(down_weight.shape)}"
        )
    prefix = "n, " if bank else ""
    expected = {
        "down_weight": ("bottleneck_size, hidden", (size, hidden)),
        "up_weight": ("hidden, bottleneck_size", (hidden, size)),
        "down_bias": ("bottleneck_size,", (size,)),
        "up_bias": ("hidden,", (hidden,)),
        "norm.weight": ("hidden,", (hidden,)),
        "norm.bias": ("hidden,", (hidden,)),
    }
    operands = {"down_weight": down_weight, "up_weight": up_weight, **given}
    for name, (axes, sizes) in expected.items():
        if name in operands and tuple(operands[name].shape) != (*bank, *sizes):
            axes = f"({prefix}{axes.rstrip(',') if bank else axes})"
            checks.require_shape(op, name, operands[name], axes, (*bank, *sizes))
    if residual is not None and residual.shape != x.shape:
        checks.require_shape(op, "residual", residual, "the shape of x", tuple(x.shape))

    checks.require_dtype(op, "x", x, checks.ACTIVATION_DTYPES)
    master = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name in ("down_weight", "norm.weight", "norm.bias"):
        if name in operands and operands[name].dtype not in (x.dtype, master):
            checks.require_dtype(op, name, operands[name], (x.dtype, master))
    for name in ("up_weight", "down_bias", "up_bias"):
        if name in operands and operands[name].dtype != down_weight.dtype:
            checks.require_dtype(op, name, operands[name], (down_weight.dtype,))
    if residual is not None and residual.dtype != x.dtype:
        checks.require_dtype(op, "residual", residual, (x.dtype,))
    for name, tensor in operands.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    checks.require_row_ids(op, row_ids, x.shape[0], num_entries)
    if row_ids is not None and row_ids.device != x.device:
        raise ValueError(f"{op}: row_ids must be on {x.device} like x, got {row_ids.device}")


class _Bottleneck(torch.autograd.Function):
    """Saves the inputs, and with ``keep_z`` the input of the activation; else that is computed again from ``x``."""

    @staticmethod
    def forward(ctx, residual_is_x, backend, keep_z, *args):
        """``args`` in the order of the registered op; ``residual`` is ``None`` where it is ``x``, parameters of one
        entry are no bank: made one in here, autograd does not see it.
        """
        x, down_weight, up_weight, down_bias, up_bias, residual, norm_weight, norm_bias = _as_banks(args[:8])
        row_ids, *constants = args[8:]
        ctx.constants = (*constants, residual_is_x)
        ctx.backend = backend
        ctx.banks = args[1].dim() == 3
        weights = (down_weight, up_weight, down_bias, up_bias)
        given = (x, *weights, x if residual_is_x else residual, norm_weight, norm_bias, row_ids, *constants)
        out, z = _run_saving(backend, *given) if keep_z else (run_forward(backend, *given), None)
        ctx.save_for_backward(x, down_weight, up_weight, down_bias, norm_weight, norm_bias, row_ids, z)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        need_x, *parameters, need_residual, need_norm_weight, need_norm_bias = ctx.needs_input_grad[3:11]
        need_weights, need_biases = parameters[0] or parameters[1], parameters[2] or parameters[3]
        need_norm = need_norm_weight or need_norm_bias
        grads: list[Tensor | None] = [None] * 7
        if need_x or need_weights or need_biases or need_norm:
            needs = (need_x, need_weights, need_biases, need_norm)
            computed = _run_backward(ctx.backend, grad_out, *ctx.saved_tensors, *ctx.constants, *needs)
            wanted = (need_x, *parameters, need_norm_weight, need_norm_bias)
            grads = [grad if want else None for grad, want in zip(computed, wanted, strict=True)]
            if not ctx.banks:
                grads[1:] = [grad if grad is None else grad.squeeze(0) for grad in grads[1:]]
        return (*[None] * 3, *grads[:5], grad_out if need_residual else None, *grads[5:], *[None] * 5)


def _reference_options(norm_weight, norm_bias, row_ids, activation, norm, norm_eps, scale) -> dict[str, Any]:
    """The tail of the schemas as keywords of a reference."""
    return {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "row_ids": row_ids,
        "activation": activation,
        "norm": norm,
        "norm_eps": norm_eps,
        "scale": scale,
    }


def _reference_forward(*args):
    *operands, residual = args[:6]
    return reference.bottleneck(*operands, residual=residual, **_reference_options(*args[6:]))


def _reference_backward(*args):
    *operands, norm_weight, norm_bias, row_ids, z = args[:9]
    *constants, add_grad_out, need_x, need_weights, need_biases, need_norm = args[9:]
    if z is not None:
        raise ValueError("bottleneck: z must be None for the reference backend, which computes it from x")
    options = _reference_options(norm_weight, norm_bias, row_ids, *constants)
    grads = reference.bottleneck_backward(*operands, add_grad_out=add_grad_out, **options)
    # an absent input has no gradient, which the schema writes as one of no elements
    present = tuple(args[1].new_empty(0) if grad is None else grad for grad in grads)
    return only_needed(
        present, (need_x, need_weights, need_weights, need_biases, need_biases, need_norm, need_norm)
    )


def _reference_saving(*args):
    raise ValueError("bottleneck_saving: the reference computes z from x, call bottleneck")


def _fake_forward(x, *args):
    return torch.empty_like(x)


def _fake_saving(x, down_weight, *args):
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
    return torch.empty_like(x), x.new_empty((*x.shape[:2], down_weight.shape[1]), dtype=dtype)


def _fake_backward(grad_out, x, down_weight, up_weight, down_bias, norm_weight, norm_bias, *rest):
    need_x, need_weights, need_biases, need_norm = rest[-4:]

    def gradient(parameter, need):
        return x.new_empty(0) if parameter is None else fake_bank_grad(parameter, need)

    return (
        fake_grad(x, need_x),
        gradient(down_weight, need_weights),
        gradient(up_weight, need_weights),
        gradient(down_bias, need_biases),
        up_weight.new_empty(up_weight.shape[:2] if need_biases else 0),
        gradient(norm_weight, need_norm),
        gradient(norm_bias, need_norm),
    )


_NORM = "Tensor? norm_weight, Tensor? norm_bias, Tensor? row_ids"
_CONSTANTS = "str activation, str norm, float norm_eps, float scale"
_FORWARD = (
    "(Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, Tensor? up_bias, Tensor? residual, "
    f"{_NORM}, {_CONSTANTS})"
)
# The forward of a resolved backend on arguments that are known to be right, without autograd.
run_forward = register(
    "bottleneck",
    "bottleneck",
    f"{_FORWARD} -> Tensor",
    reference=_reference_forward,
    fake=_fake_forward,
    launcher="bottleneck_forward",
)
_run_backward = register(
    "bottleneck",
    "bottleneck_backward",
    "(Tensor grad_out, Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, "
    f"{_NORM}, Tensor? z, {_CONSTANTS}, bool add_grad_out, bool need_x, bool need_weights, bool need_biases, "
    "bool need_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    launcher="bottleneck_backward",
)

# (out, z) with z (batch, seq, bottleneck_size), the input of the activation, for backward: out has the same bits with
# and without it. C++ keeps fp32 (fp64 with fp64), with zeros in rows without an adapter; Triton keeps the dtype of x,
# and has no such form with row ids.
_run_saving = register(
    "bottleneck",
    "bottleneck_saving",
    f"{_FORWARD} -> (Tensor, Tensor)",
    reference=_reference_saving,
    fake=_fake_saving,
    launcher="bottleneck_saving",
)
