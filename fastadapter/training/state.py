"""The training state: one file, written whole or not at all, from which a run continues bit for bit.

One safetensors file holds the adapter, AdamW's moments, every random generator and, as JSON in its metadata,
the position, the history and the identity of the run. A kill between any two instructions leaves the old file
or the new one. Nothing in it is ever executed.
"""

import hashlib
import json
import random
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints.about import versions
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.checkpoints.fingerprint import configuration, differences, sample, shared
from fastadapter.ops.backends import GPU_TYPES
from fastadapter.training.config import UserError, up_to_date
from fastadapter.training.data import Encoded

STATE_FILE = Path("last", "training_state.safetensors")
_FORMAT = "fastadapter-training-state-1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run is. ``epoch_*`` are sums over the steps of the epoch under way.

    Attributes:
        evaluations: ``step`` and the metrics that are one number, of each evaluation after the first step.
        metrics: all metrics of the last one.
        schedule_start: the step at which the schedule of the learning rate began: 0, unless it was begun anew.
        skipped: steps whose gradient was not finite in half precision and that changed nothing.
        scaler: state of the loss scaler of a run in half precision.
        trunk_cached: whether passes began from cached states of the trunk; ``None``: the run is from before there were.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    epoch_loss: float = 0.0
    epoch_supervised: float = 0
    epoch_tokens: int = 0
    epoch_seconds: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    schedule_start: int = 0
    skipped: int = 0
    scaler: dict[str, Any] | None = None
    trunk_cached: bool | None = None


def digest_examples(rows: Iterable[Sequence[Encoded]]) -> str:
    """SHA-256 over the tokens of rows of candidates."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr([(each.prompt_len, each.given, each.input_ids) for each in row]).encode())
    return sha.hexdigest()


def identify_model(model: Any) -> dict[str, Any]:
    """What tells one frozen model from another: class, dtypes, attention, configuration and weights."""
    sha, dtypes = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        values = sample(parameter, 256).to(torch.float64).cpu().numpy()
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + values.tobytes())
    return {
        "class": type(model).__name__,
        "dtype": ", ".join(sorted(dtypes)),
        "attention": str(model.config._attn_implementation),
        "config": json.loads(json.dumps(configuration(model), default=str)),
        "weights": sha.hexdigest(),
    }


def save_state(
    path: Path,
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: dict[str, Any],
    accelerator: Any,
) -> None:
    """Write the state. Every process must call this; the first one gathers the generators and writes.

    None returns before the file is there: a process that ended a run and resumed it would otherwise read the file of
    an earlier step while the first one still writes, and the two would wait for each other for ever.
    """
    tensors = {name: each[None] for name, each in random_states(accelerator.device).items()}
    if accelerator.num_processes > 1:  # processes exchange what is on their devices
        tensors = {
            name: accelerator.gather(each.to(accelerator.device)).cpu() for name, each in tensors.items()
        }
    if accelerator.is_main_process:
        _write(path, tensors, parameters, optimizer, progress, identity)
    accelerator.wait_for_everyone()


def _write(
    path: Path,
    tensors: dict[str, Tensor],
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: dict[str, Any],
) -> None:
    for name, parameter in parameters:
        tensors[f"adapter.{name}"] = parameter.detach().cpu()
        for moment in _MOMENTS if progress.step > progress.skipped else ():
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu()
    tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64, device="cpu")
    record = asdict(progress)
    del record["losses"]
    metadata = {
        "format": _FORMAT,
        "progress": json.dumps(record),
        "identity": json.dumps(identity, sort_keys=True),
        "versions": json.dumps(versions(), sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


def load_state(
    path: Path,
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    accelerator: Any,
    continued: Callable[[dict[str, Any], Progress], dict[str, Any]] | None = None,
) -> Progress:
    """Put a saved state back into the parameters, the optimiser and the random generators.

    A state of other versions of the libraries is taken; a line on stderr names them, since bits may differ then.

    Args:
        continued: given the identity that was saved and the position, the one that it must be, where that is not
            ``identity``; may raise UserError and change the position.

    Raises:
        UserError: the run was started with another configuration, model, data or number of processes; each
            difference is named.
        CheckpointError: the file is not a whole training state.
        Nothing is changed then.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a training state (its format is {metadata.get('format')!r})")
    try:
        progress = Progress(**json.loads(metadata["progress"]))
        if not isinstance(progress.step, int) or not isinstance(progress.epochs, list):
            raise ValueError("its position is no number")
        saved = json.loads(metadata["identity"])
        if "training" in saved:
            saved["training"] = up_to_date(saved["training"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its record of the run is damaged: {error!r}") from error
    if continued is not None:
        identity = continued(saved, progress)
    try:
        updated = differences(json.loads(metadata["versions"]), versions()) if "versions" in metadata else []
        different = differences(
            *_comparable(saved, json.loads(json.dumps(identity)), same_fields=not updated)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its record of the run is damaged: {error!r}") from error
    if different:
        raise UserError(f"cannot resume from {path}: {'; '.join(different)}")
    expected = {
        f"{kind}.{name}": p
        for name, p in parameters
        for kind in ("adapter", *_MOMENTS[: 2 * (progress.step > progress.skipped)])
    }
    generators = random_states(accelerator.device)
    names = set(expected) | set(generators) | {"losses"}
    if set(tensors) != names:
        raise CheckpointError(
            f"{path}: holds other tensors than this run: {sorted(set(tensors) ^ names)[:5]}"
        )
    for name, tensor in tensors.items():
        if name in expected:
            shape, dtype = tuple(expected[name].shape), expected[name].dtype
        elif name == "losses":
            shape, dtype = (progress.step,), torch.float64
        else:
            shape, dtype = (accelerator.num_processes, *generators[name].shape), generators[name].dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{path}: {name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or Inf")
    states = {name: tensors[name][accelerator.process_index] for name in generators}
    try:
        restore_random(states, accelerator.device)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: holds no state of a random generator: {error}") from error
    if updated and accelerator.is_main_process:
        print(
            f"fastadapter: {path} was saved with other versions ({'; '.join(updated)}); the run goes on, perhaps not "
            "with the same bits",
            file=sys.stderr,
        )
    progress.losses = tensors["losses"].tolist()
    for name, parameter in parameters:
        with torch.no_grad():
            parameter.copy_(tensors[f"adapter.{name}"])
        if progress.step > progress.skipped:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device, copy=True) for key in _MOMENTS}
            optimizer.state[parameter] = {
                "step": torch.tensor(float(progress.step - progress.skipped), device="cpu"),
                **moments,
            }
    return progress


def _comparable(
    saved: dict[str, Any], current: dict[str, Any], same_fields: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two identities in forms that can be compared.

    A state of an earlier release has a digest of the model's configuration in place of its fields. Releases of
    transformers add and remove fields: unless ``same_fields``, only those that both have count.
    """
    old, new = saved.get("model", {}).get("config"), current.get("model", {}).get("config")
    if isinstance(old, str) and isinstance(new, dict):
        new = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()
    elif isinstance(old, dict) and isinstance(new, dict) and not same_fields:
        old, new = shared(old, new), shared(new, old)
    else:
        return saved, current
    return (
        {**saved, "model": {**saved["model"], "config": old}},
        {**current, "model": {**current["model"], "config": new}},
    )


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Every random generator that a model on ``device`` may draw from, as tensors on the CPU."""
    _, words, deviate = random.getstate()
    python = [*words, deviate is not None, _bits(deviate or 0.0)]
    state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_deviate, spare = state
    numpy = [*keys.tolist(), position, has_deviate, _bits(spare)]
    states = {
        "generator.python": torch.tensor(python, dtype=torch.int64, device="cpu"),
        "generator.numpy": torch.tensor(numpy, dtype=torch.int64, device="cpu"),
        "generator.torch": torch.get_rng_state(),
    }
    if device.type in GPU_TYPES:
        states["generator.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(states: dict[str, Tensor], device: torch.device) -> None:
    *words, has_deviate, bits = states["generator.python"].tolist()
    random.setstate((3, tuple(words), _from_bits(bits) if has_deviate else None))
    *keys, position, has_deviate, bits = states["generator.numpy"].tolist()
    if not 0 <= position <= len(keys):
        raise ValueError(f"position {position} of {len(keys)}")  # numpy would read there without a look
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_deviate, _from_bits(bits)))
    # A fresh copy: torch reads a state with aligned loads, and crashes on a row of a larger tensor.
    torch.set_rng_state(states["generator.torch"].cpu().clone())
    if device.type in GPU_TYPES:
        torch.cuda.set_rng_state(states["generator.cuda"].cpu().clone(), device)


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _from_bits(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
