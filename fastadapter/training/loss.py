"""The loss on supervised tokens, with logits for those tokens only.

A vocabulary is large and a completion short: logits of all positions would cost more time and memory than the
rest of a small model. The hidden states are therefore selected just before the model's output head, inside
its own forward, so that whatever the model does to its logits afterwards (softcapping, scaling) still
happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapter.training.batching import Batch


@contextmanager
def _only_positions(head: nn.Module, shape: torch.Size, positions: Tensor) -> Iterator[None]:
    calls = 0

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        nonlocal calls
        calls += 1
        name, hidden = (None, args[0]) if args else next(iter(kwargs.items()))
        if hidden.shape[:-1] != shape:
            raise TypeError(
                f"the output head was given {tuple(hidden.shape)} states for input_ids {tuple(shape)}; "
                "supervised tokens cannot be told apart in them"
            )
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).unsqueeze(0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, str(name): hidden})

    # First in line: hooks of others (quantisation, device placement) then see what the head will see.
    handle = head.register_forward_pre_hook(select, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise TypeError(f"the output head was called {calls} times in one forward pass, expected once")


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits that predict ``batch.targets``.

    Args:
        model: a transformers causal language model.
        batch: on the model's device.
    Returns: ``(num_supervised, vocabulary)``, fp32, or fp64 of an fp64 model.
    Raises: TypeError: the model has no output head, or does not call it once on all hidden states.
    """
    causal_lm: Any = model
    head = causal_lm.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings, expected a causal language model")
    with _only_positions(head, batch.input_ids.shape, batch.positions):
        logits = model(**batch.model_inputs(), use_cache=False).logits
    logits = logits.squeeze(0)
    return logits if logits.dtype == torch.float64 else logits.float()


def supervised_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropy over the supervised tokens, a scalar; ``label_smoothing`` as of torch's.

    A sum, because the mean is over all supervised tokens of a step: the caller divides by their number in all
    micro-batches and processes. A mean of means would weigh tokens by the company they keep.
    """
    logits = supervised_logits(model, batch)
    return F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)
