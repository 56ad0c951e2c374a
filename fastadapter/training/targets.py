"""Which parameters a run trains, and the file they are saved to: an adapter's, or some of the model's own."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints import save as save_adapter
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.checkpoints.tensors import adapter_parameters
from fastadapter.integrations.parts.heads import find_heads, named_modules
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.channel_scale import CopyHost
from fastadapter.integrations.verbs.choose import trainable_parameters
from fastadapter.integrations.verbs.record import Attachments, attachments
from fastadapter.training.config import UserError

WEIGHTS_FILE = "weights.safetensors"
_FORMAT = "fastadapter-trained-parameters-1"


class AdapterTarget:
    """The trainable parameters, which must be those of the active adapter ``name``: no others are saved.

    Attributes:
        parameters: names and parameters.
        heads: the names of those that are copies of heads and of what ``modules_to_save`` names.
    """

    file = "adapter.safetensors"

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name
        record = _record(model)
        if record.active != name:
            raise UserError(f"name: adapter {name!r} is not the active one, which is {record.active!r}")
        if record.folded is not None:
            raise UserError(
                f"name: adapter {name!r} is folded into the model's weights; unfold it to train it"
            )
        saved = {id(parameter) for parameter in adapter_parameters(unwrap(model), name).values()}
        self.parameters = trainable_parameters(model)
        strays = [key for key, parameter in self.parameters if id(parameter) not in saved]
        if strays:
            raise UserError(
                f"{strays[0]} is trainable but not part of adapter {name!r}, all that is trained here; freeze it"
            )
        if not self.parameters:
            raise UserError(f"name: no parameter of adapter {name!r} is trainable")
        config = record.configs[name]
        inner = unwrap(model)
        copied = find_heads(inner).modules | named_modules(inner, config.modules_to_save or ())
        self.heads = {key for key, _ in self.parameters if key.partition(f".{CopyHost.CHILD}.")[0] in copied}
        self.identity: dict[str, Any] = {"method": config.method, **config.to_dict()}

    def save(self, folder: Path) -> None:
        save_adapter(self.model, folder, self.name)


class ParameterTarget:
    """Parameters of the model itself, in a model without an adapter; the others must be frozen.

    Saved as a plain safetensors file of the trained parameters by their names in the model.
    """

    file = WEIGHTS_FILE

    def __init__(self, model: nn.Module):
        self.model = model
        if attachments(model) is not None:
            raise UserError(
                "model: an adapter is attached to it; detach it to train the model's own parameters"
            )
        self.parameters = trainable_parameters(model)
        paths = find_heads(unwrap(model)).modules
        self.heads = {
            name for name, _ in self.parameters if any(name.startswith(f"{path}.") for path in paths)
        }
        names = "\n".join(name for name, _ in self.parameters)
        self.identity: dict[str, Any] = {
            "method": "parameters",
            "count": len(self.parameters),
            "names": hashlib.sha256(names.encode()).hexdigest(),
        }

    def save(self, folder: Path) -> None:
        write_tensors(folder / WEIGHTS_FILE, dict(self.parameters), {"format": _FORMAT})


Target = AdapterTarget | ParameterTarget


@contextmanager
def training_only(model: nn.Module, patterns: Sequence[str]) -> Iterator[list[str]]:
    """Make the parameters that ``patterns`` match the only trainable ones; afterwards all are as they were.

    Args:
        patterns: names of parameters, with ``*`` and ``?`` as in file names; as from :func:`last_layers`.
    Yields: the names of the parameters.
    Raises: UserError: a pattern matches nothing.

    >>> with training_only(model, ["classifier.*"]) as names:  # doctest: +SKIP
    ...     names
    ['classifier.weight', 'classifier.bias']
    """
    model = getattr(model, "_orig_mod", model)  # names are those that the caller sees
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
            raise UserError(f"no parameter of {type(model).__name__} has a name like {pattern!r}")
    chosen = [name for name in parameters if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    if not chosen:
        raise UserError("patterns must name at least one parameter")
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        yield chosen
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def last_layers(model: nn.Module, blocks: int = 0) -> list[str]:
    """Names of the parameters of the top ``blocks`` blocks and of all that comes after the blocks.

    Without blocks that is what turns hidden states into classes: the last two linear layers of BERT and
    DistilBERT, the last norm and the head of a decoder.

    Raises: UserError: the model has no stack of numbered blocks, or not so many.
    """
    names = [name for name, _ in unwrap(model).named_parameters()]
    stacks: dict[str, set[int]] = {}
    for name in names:
        if found := re.match(r"(.+?)\.(\d+)\.", name):
            stacks.setdefault(found[1], set()).add(int(found[2]))
    if not stacks:
        raise UserError(f"{type(model).__name__} has no numbered blocks, so its last layers are not defined")
    stack, numbers = max(stacks.items(), key=lambda item: len(item[1]))
    if not 0 <= blocks <= len(numbers):
        raise UserError(f"blocks must be between 0 and {len(numbers)}, the blocks of {stack}, got {blocks}")
    last = max(index for index, name in enumerate(names) if name.startswith(f"{stack}."))
    top = sorted(numbers)[len(numbers) - blocks :]
    inside = [name for name in names if any(name.startswith(f"{stack}.{number}.") for number in top)]
    return inside + names[last + 1 :]


def load_parameters(model: nn.Module, path: str | Path) -> None:
    """Put parameters that a run saved back into the model they were trained in.

    Raises: CheckpointError: the file is missing, foreign, damaged or of another model; the model is untouched.
    """
    path = Path(path) / WEIGHTS_FILE if Path(path).suffix != ".safetensors" else Path(path)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: holds no trained parameters (its format is {metadata.get('format')!r})"
        )
    parameters = dict(unwrap(model).named_parameters())
    for name, tensor in sorted(tensors.items()):
        if name not in parameters:
            raise CheckpointError(f"{path}: the model has no parameter {name}")
        wanted = parameters[name]
        if wanted.shape != tensor.shape or wanted.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name} must be {wanted.dtype} {tuple(wanted.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)


def _record(model: nn.Module) -> Attachments:
    record = attachments(model)
    if record is None:
        raise UserError("model: no adapter is attached to it; attach one first")
    return record
