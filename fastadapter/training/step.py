"""The pieces of one optimiser step: optimiser, gradient buffer, and the signals that end a run after it."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.training.config import STOP_SIGNALS, TrainingConfig, UserError
from fastadapter.training.targets import Target


class GradientBuffer:
    """The gradients of all trainable parameters as views of one flat tensor, with a few sums behind them.

    Adapters are small, so one sum over processes at the end of a step is cheaper than
    DistributedDataParallel's hooks; a process with no rows in a short step adds zeros; and since each process
    divides its loss by the number of supervised tokens of the whole step, the sum is the gradient, with no
    mean over processes to undo.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], num_sums: int):
        first = parameters[0][1]
        for name, parameter in parameters:
            if parameter.dtype != torch.float32 or parameter.device != first.device:
                raise UserError(
                    f"{name} must be float32 on {first.device} like the other trainable parameters, "
                    f"got {parameter.dtype} on {parameter.device}"
                )
        size = sum(parameter.numel() for _, parameter in parameters)
        self._flat = torch.zeros(size + num_sums, device=first.device)
        self.gradient, self.sums = self._flat.split([size, num_sums])
        self._parameters = parameters
        offset = 0
        for _, parameter in parameters:
            parameter.grad = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def clear(self) -> None:
        self._flat.zero_()

    def reduce(self, accelerator: Any) -> None:
        """Sum over all processes."""
        if accelerator.num_processes > 1:
            self._flat.copy_(accelerator.reduce(self._flat, "sum"))

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradient)

    def non_finite(self) -> list[str]:
        """Names of the parameters whose gradient holds NaN or Inf."""
        return [
            name for name, p in self._parameters if p.grad is not None and not bool(p.grad.isfinite().all())
        ]

    def release(self) -> None:
        for _, parameter in self._parameters:
            parameter.grad = None


def make_optimizer(target: Target, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; the heads are a group of their own where they have a learning rate of their own.

    Raises: UserError: they have, and there are none.
    """
    heads = [each for name, each in target.parameters if name in target.heads]
    others = [each for name, each in target.parameters if name not in target.heads]
    groups = [{"params": [each for _, each in target.parameters], "peak": config.learning_rate}]
    if config.head_learning_rate is not None:
        if not heads:
            raise UserError("head_learning_rate: no head is trained")
        groups = [
            {"params": others, "peak": config.learning_rate},
            {"params": heads, "peak": config.head_learning_rate},
        ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def make_scaler(model: nn.Module, accelerator: Any) -> torch.amp.GradScaler | None:
    """A scaler of the loss where gradients pass through half precision of five exponent bits; ``None`` elsewhere."""
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return (
        torch.amp.GradScaler(accelerator.device.type)
        if half or accelerator.mixed_precision == "fp16"
        else None
    )


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP instead of dying of them, while the context lasts; a second SIGINT
    interrupts at once.

    Signals reach the main thread only: elsewhere this changes nothing, and ``received`` stays ``None``. A SIGHUP that
    is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)
            self._previous = {
                number: signal.signal(number, self._note)
                for number in STOP_SIGNALS
                if number != hangup or signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Launchers send SIGTERM after the terminal's SIGINT; only a second SIGINT means that waiting is over.
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = self.received or number
