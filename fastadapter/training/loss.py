"""The loss on supervised tokens, with logits for those tokens only, and never for more than a set size of them.

A vocabulary is large and a completion short: logits of all positions would cost more time and memory than the
rest of a small model. The hidden states are therefore selected just before the model's output head, inside
its own forward, so that whatever the model does to its logits afterwards (softcapping, scaling) still
happens. Where the logits of the supervised tokens alone are too large, they are made in pieces, each of which is
made again in backward, so that neither pass holds more than one.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastadapter.training.batching import Batch
from fastadapter.training.behind_head import (
    PROBE,
    BehindHead,
    doubt,
    head_of,
    prove,
    vocabulary,
    watching,
)

# Of the logits that exist at a time. In the precision that they are scored in: fp32, or fp64 of an fp64 model.
MAX_LOGIT_BYTES = 64 * 2**20
IGNORED = -100
# Devices on which Liger's fused loss takes the place of pieces, where it is installed.
_FUSED_ON = ("cuda",)


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits that predict ``batch.targets``, all at once.

    Args:
        model: a transformers causal language model.
        batch: on the model's device.
    Returns: ``(num_supervised, vocabulary)``, fp32, or fp64 of an fp64 model.
    Raises: TypeError: the model has no output head, or does not call it once on all hidden states.
    """
    head = head_of(model)
    return _whole(model, head, batch.model_inputs(), batch.input_ids.shape, batch.positions)


def supervised_logit_parts(
    model: nn.Module, batch: Batch, *, max_logit_bytes: int = MAX_LOGIT_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of :func:`supervised_logits` in pieces of at most ``max_logit_bytes``, or of one token.

    Returns: for each piece, which of the supervised tokens it is of, and their logits.
    """
    head = head_of(model)
    shape, positions, inputs = batch.input_ids.shape, batch.positions, batch.model_inputs()
    most = _tokens(model, head, max_logit_bytes)
    found = _to_head(model, head, inputs, shape, positions) if len(positions) > most else None
    if found is None:
        yield slice(0, len(positions)), _whole(model, head, inputs, shape, positions)
        return
    states, behind = found
    for start in range(0, len(states), most):
        part = slice(start, start + most)
        yield part, _scored(behind(states[part]))


def supervised_loss(
    model: nn.Module,
    batch: Batch,
    label_smoothing: float = 0.0,
    *,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> Tensor:
    """Sum of the cross-entropy over the supervised tokens, a scalar; ``label_smoothing`` as of torch's.

    A sum, because the mean is over all supervised tokens of a step: the caller divides by their number in all
    micro-batches and processes. A mean of means would weigh tokens by the company they keep.

    Args:
        max_logit_bytes: no tensor with a row for a token and a column for a word of the vocabulary gets larger, in
            forward and backward, unless it is that of one token. Whatever it is, the loss is the same to round-off.
            A model whose logits cannot be made in pieces is given them in one, which a warning says once.
    """
    return _loss(
        model,
        batch.model_inputs(),
        batch.input_ids.shape,
        batch.positions,
        batch.targets,
        label_smoothing,
        max_logit_bytes,
    )


def causal_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> Tensor:
    """The loss that a transformers causal language model gives for ``labels``, without the logits nobody asked for.

    For a training loop of your own, and for transformers' ``Trainer`` and those that build on it, in place of its
    method ``compute_loss``. Its option ``compute_loss_func`` comes too late: it is given the logits of all positions.
    What a mixture of experts adds for the balance of its routers is not part of it.

    Args:
        model: with or without adapters; may be wrapped.
        inputs: what the model is called with, and ``labels``, int64 ``(batch, seq)``: the tokens themselves, not moved
            by one, and -100 where there is nothing to learn.
        num_items_in_batch: what the sum over the tokens is divided by, as ``Trainer`` counts them over all
            micro-batches of a step; ``None``: their number here, so that the result is their mean.
        label_smoothing, max_logit_bytes: as of :func:`supervised_loss`.
    Returns: a scalar, fp32, or fp64 of an fp64 model.
    Raises:
        TypeError: there are no labels, or the model has no output head that is called once on all hidden states.
        ValueError: labels of another shape than the tokens, or no token to learn from and nothing to divide by.

    >>> class SupervisedTrainer(Trainer):  # doctest: +SKIP
    ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    ...         loss = causal_lm_loss(model, inputs, num_items_in_batch)
    ...         return (loss, {"loss": loss}) if return_outputs else loss
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    if not torch.is_tensor(labels):
        raise TypeError(f"inputs must hold labels, a tensor, got {type(labels).__name__}")
    tokens, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if tokens is None and embeds is None:
        raise TypeError(f"inputs must hold input_ids or inputs_embeds, got {', '.join(inputs) or 'nothing'}")
    shape = tokens.shape if embeds is None else embeds.shape[:-1]
    if labels.shape != shape:
        raise ValueError(
            f"labels must be {tuple(shape)} like the tokens of inputs, got {tuple(labels.shape)}"
        )
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    positions = (targets != IGNORED).nonzero().squeeze(1)
    if num_items_in_batch is None:
        num_items_in_batch = len(positions)
        if not num_items_in_batch:
            raise ValueError(
                f"labels must hold a token to learn from behind the first of a row, all are {IGNORED}"
            )
    total = _loss(model, inputs, shape, positions, targets[positions], label_smoothing, max_logit_bytes)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _loss(
    model: nn.Module,
    inputs: dict[str, Any],
    shape: torch.Size,
    positions: Tensor,
    targets: Tensor,
    label_smoothing: float,
    max_logit_bytes: int,
) -> Tensor:
    head = head_of(model)
    most = _tokens(model, head, max_logit_bytes)
    found = _to_head(model, head, inputs, shape, positions) if len(positions) > most else None
    if found is None:
        return _cross_entropy(_whole(model, head, inputs, shape, positions), targets, label_smoothing)
    states, behind = found
    if _liger_does(behind, states):
        return _liger_loss(head, states, targets, label_smoothing)

    def of_part(states: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(_scored(behind(states)), targets, label_smoothing)

    losses = [
        checkpoint(of_part, *part, use_reentrant=False)
        for part in zip(states.split(most), targets.split(most), strict=True)
    ]
    return torch.stack(losses).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def _scored(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _whole(
    model: nn.Module, head: nn.Module, inputs: dict[str, Any], shape: torch.Size, positions: Tensor
) -> Tensor:
    with watching(model, head, shape, positions):
        return _scored(model(**{**inputs, "use_cache": False}).logits.squeeze(0))


def _to_head(
    model: nn.Module, head: nn.Module, inputs: dict[str, Any], shape: torch.Size, positions: Tensor
) -> tuple[Tensor, BehindHead] | None:
    """The states of the supervised tokens, and what makes logits of them; ``None``: the model alone can."""
    reason = doubt(model, head)
    if not reason:
        generators = _generators(positions.device) if reason is None else []
        with watching(model, head, shape, positions, PROBE) as seen:
            logits = model(**{**inputs, "use_cache": False}).logits.squeeze(0)
        behind = BehindHead(model, head, seen)
        if reason is None:
            reason = prove(behind, seen.states[:PROBE].detach(), logits.detach())
        if not reason:
            return seen.states, behind
        # The model runs once more, with the same dropout: a resumed run, which knows no more, does as this one.
        _restore(generators, positions.device)
    warnings.warn(
        f"the logits of {type(model).__name__} are made in one piece, whatever max_logit_bytes is: {reason}",
        stacklevel=4,
    )
    return None


def _generators(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore(states: list[Tensor], device: torch.device) -> None:
    if states:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)


def _tokens(model: nn.Module, head: nn.Module, max_logit_bytes: int) -> int:
    """Tokens whose logits fit."""
    if not isinstance(max_logit_bytes, int) or isinstance(max_logit_bytes, bool):
        raise TypeError(f"max_logit_bytes must be an int, got {max_logit_bytes!r}")
    if max_logit_bytes < 1:
        raise ValueError(f"max_logit_bytes must be at least 1, got {max_logit_bytes}")
    double = (
        next((each.dtype for each in model.parameters() if each.is_floating_point()), None) == torch.float64
    )
    return max(1, max_logit_bytes // (vocabulary(model, head) * (8 if double else 4)))


def _liger_does(behind: BehindHead, states: Tensor) -> bool:
    """Whether Liger's fused loss is there and gives what the model would.

    It knows a plain linear head with nothing behind it. It makes gradients in forward, before their sum is scaled,
    which fp16 cannot hold.
    """
    head = behind.head
    if states.device.type not in _FUSED_ON or states.dtype == torch.float16 or type(head) is not nn.Linear:
        return False
    if torch.is_autocast_enabled(states.device.type) or "forward" in vars(head) or len(states) == 0:
        return False
    if head._forward_hooks or head._forward_pre_hooks or not torch.is_grad_enabled():
        return False
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    return behind.adds_nothing(states[:PROBE].detach())


def _liger_loss(head: Any, states: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing)
    return loss(head.weight, states, targets, head.bias)
