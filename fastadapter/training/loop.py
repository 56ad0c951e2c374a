"""Fine-tune the adapter of a frozen model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.packed import attending_packed
from fastadapter.integrations.passes.products import fast_products
from fastadapter.training import metrics, report
from fastadapter.training.classification import ClassificationTask
from fastadapter.training.config import TrainingConfig, UserError
from fastadapter.training.data import Example
from fastadapter.training.regression import RegressionTask
from fastadapter.training.run import Run
from fastadapter.training.targets import AdapterTarget, ParameterTarget, training_only
from fastadapter.training.tasks import GenerationTask, Task
from fastadapter.training.trunk.options import Asked, resolve
from fastadapter.training.trunk.prepare import cached_trunk

TASKS: dict[str, Callable[..., Task]] = {
    "generation": GenerationTask,
    "classification": ClassificationTask,
    "regression": RegressionTask,
}


def finetune(
    model: nn.Module,
    tokenizer: Any,
    train: Sequence[Example],
    evaluation_data: Sequence[Example] | None = None,
    config: TrainingConfig | None = None,
    *,
    output_dir: str | Path,
    task: str = "generation",
    name: str = "default",
    trainable: Sequence[str] | None = None,
    resume: bool = False,
    restart_schedule: bool = False,
    save_steps: int = 50,
    progress: bool = True,
    accelerator: Any = None,
    details: Mapping[str, Any] | None = None,
    trunk_cache: Asked = None,
) -> report.FinetuneResult:
    """Train the adapter ``name`` of ``model`` on the completions, the classes or the numbers of ``train``.

    ``output_dir`` gets ``adapter.safetensors`` (the weights at the end), ``best/adapter.safetensors`` (those
    with the best held-out accuracy for labels, the lowest held-out loss for other completions and numbers),
    ``last/training_state.safetensors``, which ``resume`` continues from, and ``log.jsonl``, a line for every step
    and evaluation. With the same arguments, on the same machine, the result of a resumed run is bit for bit that of
    one without interruption, whenever it was killed. SIGINT, SIGTERM and SIGHUP end the run after the current step
    and a save.

    A finished run that is resumed with a higher ``num_train_epochs`` or ``max_steps`` goes on. Where the steps taken
    so far would have had other learning rates in the longer run, that is an error, unless ``restart_schedule`` asks
    for a schedule of its own, warm-up and all, over the steps that are left.

    A base model in fp16, and an accelerator with ``mixed_precision="fp16"``, get their loss scaled, dynamically, as
    by ``torch.amp.GradScaler``; a step whose gradient overflows is skipped.

    ``run.json`` says what was asked and what came of it, epoch by epoch, and ``README.md`` how to use the adapter.
    While the run lasts, the folder is locked: a second run in it is refused.

    A classification run also leaves ``labels.json``, the names of the classes. Without an adapter, ``trainable``
    names parameters of the model itself; they are saved as ``weights.safetensors``.

    Under ``torchrun`` or ``accelerate launch`` every process calls this with the same arguments and a model
    with the same weights; the rows of each step are shared out, the loss and its gradient are those of one
    process, and the first process writes.

    Args:
        model: a transformers causal language model, or a model for sequence classification, with an adapter
            attached; moved to the accelerator's device.
        tokenizer: the model's.
        train: examples, as from :func:`read_examples`.
        evaluation_data: held-out examples, evaluated before the first step and after each epoch.
        config: what decides the numbers.
        task: ``"generation"``; or, given the prompts, ``"classification"`` by the labels of the examples, or
            ``"regression"``, where labels are numbers.
        name: the adapter to train; it must be the active one and hold every trainable parameter.
        trainable: names of the model's own parameters (``*`` matches anything) to train in place of an adapter;
            the others are frozen for the duration.
        resume: continue the run in ``output_dir``, or start one if nothing of a run is there; one whose state is gone
            is an error. Otherwise a folder with a run is refused.
        restart_schedule: when a run is resumed with another length, begin the learning rate's schedule anew.
        save_steps: optimiser steps between two saves; the state is also saved at the start and after each
            epoch.
        progress: bars and lines on stderr.
        accelerator: an ``accelerate.Accelerator``; one is made if ``None``. Its trackers (``log_with``) get what
            ``log.jsonl`` gets.
        details: what the caller alone knows, for ``run.json``: some of
            :data:`fastadapter.training.run_record.DETAILS`.
        trunk_cache: keep the hidden states behind the blocks that are below all that is trained in files, computed
            once per row for all epochs, evaluations and later runs with the same rows: ``None``, where that pays by
            far; ``True``, or the folder for them, or a :class:`fastadapter.training.TrunkCache`: it is an error where
            it cannot be had, for example with dropout below; ``False``: not at all. Losses are those of whole passes
            but for round-off.
    Returns: history, accuracies, memory.
    Raises:
        UserError: before anything is written, what is wrong with data, configuration, folder or a run to
            resume.
        CheckpointError: a file cannot be written or read; the previous one is intact.
        NonFiniteError: NaN or Inf in the loss or gradient, naming the step; the last save is from before it.
        TrainingInterrupted: a signal came; the state is saved, ``exit_code`` is 130, 143 or 129.

    >>> result = finetune(model, tokenizer, train, held_out, output_dir="out")  # doctest: +SKIP
    >>> result.eval["accuracy_after"]  # doctest: +SKIP
    0.88
    """
    from accelerate import Accelerator

    if not isinstance(save_steps, int) or isinstance(save_steps, bool) or save_steps < 1:
        raise UserError(f"save_steps must be an int, at least 1, got {save_steps!r}")
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    options, asked = resolve(trunk_cache)
    accelerator, config = accelerator or Accelerator(), config or TrainingConfig()
    if restart_schedule and not resume:
        raise UserError("restart_schedule goes with resume")
    if evaluation_data and (task != "generation" or evaluation_data[0].label is not None):
        metrics.require_packages()
    rows = TASKS[task](unwrap(model), tokenizer, train, evaluation_data, config)
    model.to(accelerator.device)
    with (
        nullcontext() if trainable is None else training_only(model, trainable),
        attending_packed() if config.packing else nullcontext(),
        fast_products(model),
    ):
        target = AdapterTarget(model, name) if trainable is None else ParameterTarget(model)
        run = Run(model, rows, target, config, Path(output_dir), accelerator, details)
        if options.dtype != "base":  # what rounds the states is another run
            run.identity["trunk_cache"] = options.dtype
        with run.folder:
            run.begin(resume, save_steps, progress, restart_schedule)
            try:
                with cached_trunk(run, options, asked):
                    return run.go()
            finally:
                run.close()
                run.buffer.release()
                unwrap(model).eval()
