"""FastAdapter's own format: one safetensors file with the tensors, the configuration and a digest of both."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadapter.checkpoints.about import FIELDS, about, read_about
from fastadapter.checkpoints.files import CheckpointError, Header, find, read_tensors, resolve, write_tensors
from fastadapter.checkpoints.fingerprint import fingerprint, unlike
from fastadapter.checkpoints.tensors import require_fitting_base, saved_tensors, set_tensors
from fastadapter.integrations.parts.sharding import is_sharded, require_whole, whole
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.choice import Choice
from fastadapter.integrations.verbs.attach import install
from fastadapter.integrations.verbs.record import attachments, require_unfolded
from fastadapter.methods import METHODS, MethodConfig

FORMATS = ("fastadapter",)
_VERSION = "1"
# Which kind of model an adapter was made for; a mismatch is named before its shapes are.
_BASE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def save(
    model: nn.Module, path: str | os.PathLike, name: str = "default", format: str = "fastadapter"
) -> Path:
    """Save one adapter; after a kill at any point the old or the new file is there, whole.

    What else is trainable in the model (embeddings of new tokens, LoRA) is saved with it. A model that is sharded over
    processes is saved by all of them together; the first one writes.

    Args:
        model: the adapted model, or a wrapper around it.
        path: a ``.safetensors`` file, or a folder that gets ``adapter.safetensors``.
        name: which adapter.
        format: ``"fastadapter"``.
    Returns: the file written.
    Raises:
        ValueError: no such adapter, or unknown format; a module around the model has trainable parameters, or FSDP
            or DeepSpeed hold the adapter in flattened parts.
        CheckpointError: the file cannot be written; an older one is intact.

    >>> save(model, "reviews")  # doctest: +SKIP
    PosixPath('reviews/adapter.safetensors')
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    tensors = saved_tensors(model, name)
    require_whole(tensors)
    return write_adapter(unwrap(model), path, name, tensors)


def write_adapter(model: nn.Module, path: str | os.PathLike, name: str, tensors: dict[str, Tensor]) -> Path:
    """Write ``tensors`` of adapter ``name`` with what tells where they belong.

    Where they are sharded every process must call this; the first one writes.
    """
    config = attachments(model).configs[name]
    facts = about(model, name)
    base = _base_description(model) | fingerprint(model)
    base["name"] = facts.pop("base_name", None) or base["name"]
    metadata = {
        "format": "fastadapter",
        "format_version": _VERSION,
        "method": config.method,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "base": json.dumps(base, sort_keys=True, default=str),
        "about": json.dumps(facts, sort_keys=True),
    }
    if any(is_sharded(each) for each in tensors.values()):
        return _write_together(path, {key: whole(each) for key, each in tensors.items()}, metadata)
    return write_tensors(path, tensors, metadata)


def _write_together(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write what every process has in one of them; none returns before the file is there, all raise what it raises."""
    error: list[CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            write_tensors(path, tensors, metadata)
        except CheckpointError as raised:
            error = [raised]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
    return resolve(path)


def load(
    model: nn.Module,
    path: str | os.PathLike,
    name: str = "default",
    *,
    activate: bool = True,
    allow_nonfinite: bool = False,
    strict_base: bool = True,
) -> nn.Module:
    """Load an adapter into ``model``, attaching it as ``name`` first unless one of the same shape is there.

    Strict: every tensor of the file must be expected and every expected one there. The adapter becomes the active
    one for calls from this thread; other threads that chose none go on with what the model had, its default, which is
    this adapter only if it is the first. Parameters of the base model that were trained beside the adapter are written
    to the model's own, in its dtype; :func:`detach` of the last adapter restores them.

    The base model must be the one that the adapter was made on, as far as its configuration and some weights tell. It
    may be in another dtype, quantised, sharded, offloaded, resized, or have another head for its task. Weights that
    were quantised and widened again (GGUF), fine-tuned or merged are others. A file from before there was a record of
    the base is loaded with a warning.

    Args:
        model: the model, or a wrapper around it.
        path: what :func:`save` or ``save_pretrained`` was given.
        name: what to call the adapter. In a folder where ``save_pretrained`` wrote several, which to load.
        activate: ``False``: what acts stays what it is.
        allow_nonfinite: accept weights that hold NaN or Inf.
        strict_base: ``False``: warn about another base model, as long as all sizes fit, in place of an error.
    Returns: ``model``.
    Raises:
        CheckpointError: the file is missing, foreign, damaged or made for another model; the model is untouched.
        ValueError: malformed ``name``, an adapter with another configuration is attached under it, or the model's
            weights hold a folded adapter.
        TypeError: the model cannot be hooked, or it is in DDP or FSDP and the adapter is not attached yet.
    """
    outer, model, path = model, unwrap(model), find(path, name)
    require_unfolded(attachments(model))
    found: dict[str, Any] = {}

    def check(header: Header, metadata: dict[str, str]) -> None:
        found["config"] = read_config(metadata)
        base = read_base(metadata)
        facts = read_about(metadata)
        found["about"] = {key: each for key, each in facts.items() if key in FIELDS}
        if base.get("name"):
            found["about"]["base_name"] = base["name"]
        if strict_base:
            _check_base(base, _base_description(model))
        require_fitting_base(model, header)
        found["warning"] = _other_base(base, model, header, strict_base)
        field = "prompt_len" if hasattr(found["config"], "prompt_len") else "prefix_len"
        length = getattr(found["config"], field, None)
        sizes = {shape for key, (_, shape) in header.items() if f".{key}".endswith(".prompt")}
        if any(len(shape) != 2 or shape[0] != length for shape in sizes):
            raise ValueError(
                f"its prompts have the shapes {sorted(sizes)} where its config says {field} {length}"
            )

    tensors, _ = read_tensors(path, check)
    config = found["config"]
    record = attachments(model)
    attached = record is not None and name in record.configs
    if attached and record.configs[name] != config:
        raise ValueError(
            f"name: adapter {name!r} is attached with {record.configs[name]}, but {path} holds {config}; "
            "detach it first"
        )

    def fill() -> None:
        set_tensors(model, name, tensors, allow_nonfinite=allow_nonfinite)

    try:
        if attached:
            with record.state.traffic.changing():
                fill()
            if activate and record.active != name:
                record.state.choose(Choice(name))
        else:
            # the fresh prompt is overwritten: draw nothing from the caller's generator
            with torch.random.fork_rng(devices=[]):
                install(outer, config, name, activate=activate, fill=fill)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    attachments(model).about[name] = found["about"]
    if found["warning"]:
        warnings.warn(f"fastadapter: {path}: {found['warning']}", stacklevel=2)
    return outer


def _other_base(base: dict[str, Any], model: nn.Module, header: Header, strict: bool) -> str | None:
    """What to warn of about the base model of a file.

    Raises: ValueError: it is another than ``model``, and ``strict``.
    """
    brought = [key.replace(".own.", ".", 1) for key in header if ".own." in key]
    different = unlike(base, model, brought)
    if not different:
        return None if "weights" in base else "it does not tell which base model it was made on"
    what = f"it was made on another base model{_named(base)}: {'; '.join(different)}"
    if strict:
        raise ValueError(f"{what} (strict_base=False, on the command line --any-base, loads it all the same)")
    return f"{what}; its adapter may not do here what it was trained for"


def _named(base: dict[str, Any]) -> str:
    revision = f" at {base['revision']}" if base.get("revision") else ""
    return f" ({base['name']}{revision})" if base.get("name") else ""


def _base_description(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    values = {field: getattr(config, field, None) for field in _BASE_FIELDS}
    return {field: value for field, value in values.items() if isinstance(value, int | str)}


def read_base(metadata: dict[str, str]) -> dict[str, Any]:
    """What a file says of its base model.

    Raises: ValueError: it is malformed.
    """
    base = _read_json(metadata, "base")
    if not isinstance(base, dict):
        raise ValueError("its metadata field 'base' is not a JSON object")
    for field in ("name", "revision", "fingerprint", "weights_digest"):
        if not isinstance(base.get(field), str | None):
            raise ValueError(f"its record of the base model is malformed: {field} is no text")
    return base


def _check_base(saved: dict[str, Any], own: dict[str, Any]) -> None:
    for field in _BASE_FIELDS:
        if field in saved and field in own and saved[field] != own[field]:
            raise ValueError(
                f"it was made for a model with {field} {saved[field]!r}, this one has {own[field]!r}"
            )


def _read_json(metadata: dict[str, str], field: str) -> Any:
    try:
        return json.loads(metadata[field])
    except KeyError:
        raise ValueError(f"its metadata has no field {field!r}") from None
    except RecursionError:
        raise ValueError(f"its metadata field {field!r} is nested too deeply") from None


def read_config(metadata: dict[str, str]) -> MethodConfig:
    """The configuration that a file holds.

    Raises: ValueError: the file is foreign, of another version, or malformed.
    """
    if metadata.get("format") != "fastadapter":
        raise ValueError("it is a safetensors file, but not one of fastadapter's adapters")
    if metadata.get("format_version") != _VERSION:
        raise ValueError(
            f"it has format version {metadata.get('format_version')!r}; this release reads {_VERSION}"
        )
    method = metadata.get("method")
    if method not in METHODS:
        raise ValueError(f"it holds the method {method!r}; this release knows {', '.join(METHODS)}")
    fields = _read_json(metadata, "config")
    try:
        return METHODS[method](**fields)
    except TypeError as error:
        raise ValueError(f"its configuration is malformed: {error}") from None
