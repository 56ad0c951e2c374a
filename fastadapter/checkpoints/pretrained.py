"""Adapters beside the files of ``save_pretrained``, and so in the checkpoints of transformers' Trainer.

The active adapter (or the first) goes to ``adapter.safetensors``; where there are several, each also goes to
``adapter-<name>.safetensors``. The base's own files keep the adapters' parameters too: Trainer's
``resume_from_checkpoint`` and ``load_best_model_at_end`` read nothing else. ``from_pretrained`` reports them as
unexpected and gives the base.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastadapter.checkpoints.files import DEFAULT_NAME, named
from fastadapter.checkpoints.native import write_adapter
from fastadapter.checkpoints.tensors import saved_tensors
from fastadapter.integrations.parts.sharding import is_sharded, require_whole, whole
from fastadapter.integrations.parts.wrappers import plain, unwrap
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.verbs import save_pretrained
from fastadapter.integrations.verbs.record import attachments, require_unfolded

_log = logging.getLogger("fastadapter")


def write_beside(
    model: nn.Module, folder: str | os.PathLike, is_main_process: bool, state_dict: dict[str, Any] | None
) -> None:
    """Write the adapters of ``model`` to a folder that ``save_pretrained`` is about to write, and say so.

    Raises:
        ValueError: the weights hold an adapter, folded, so that the saved base would not be the base; or a parameter
            is trained that has no place in the file; or ``state_dict`` lacks what is sharded.
        CheckpointError: a file cannot be written.
    """
    record = attachments(model)
    if record is None:
        if any(isinstance(each, Host) for each in model.modules()):
            warnings.warn(
                f"fastadapter: save_pretrained of this {type(model).__name__} leaves out the adapters in it, which "
                "are attached to a model around it: save that one, or the adapters with fastadapter.save",
                stacklevel=3,
            )
        return
    require_unfolded(record)
    first = record.active or next(iter(record.configs))
    written = []
    for name in record.configs:
        own = named(folder, name)
        paths = [Path(folder) / DEFAULT_NAME] if name == first else []
        if len(record.configs) > 1 or own.exists():
            paths.append(own)
        tensors = _gathered(model, name, state_dict)
        for path in paths if is_main_process else ():
            write_adapter(unwrap(model), path, name, tensors)
            written.append(path.name)
    if is_main_process:
        message = (
            f"fastadapter: save_pretrained wrote the adapter to {', '.join(written)} in {os.fspath(folder)}; "
            "from_pretrained leaves it out, so call fastadapter.load(model, folder) after it"
        )
        _log.info(message)
        warnings.warn(message, stacklevel=3)


def _gathered(model: nn.Module, name: str, state_dict: dict[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of an adapter, whole: out of ``state_dict`` where the caller gathered the weights already.

    Such a caller may be alone, so that nothing can be gathered here.
    """
    tensors = saved_tensors(model, name)
    if state_dict is None:
        require_whole(tensors)
        return {key: whole(live) for key, live in tensors.items()}
    names = {id(parameter): plain(each) for each, parameter in model.named_parameters()}
    found = {}
    for key, live in tensors.items():
        given = state_dict.get(names.get(id(live), ""))
        if given is None and is_sharded(live):
            raise ValueError(
                f"state_dict: it lacks {names[id(live)]}, of which this process holds only a part"
            )
        if given is None:
            require_whole({key: live})
        found[key] = live if given is None else whole(given).to(live.dtype)
    return found


save_pretrained.writer = write_beside
