"""What is in a file or a folder, by headers and records alone: no model, no weights but those of gates."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastadapter.checkpoints.about import read_about
from fastadapter.checkpoints.files import CheckpointError, Header, read_header, resolve
from fastadapter.checkpoints.native import read_base, read_config

_MAX_JSON_BYTES = 16 * 2**20
_STATE, _PARAMETERS = "fastadapter-training-state-1", "fastadapter-trained-parameters-1"
_OWN = {"fastadapter": "an adapter", _STATE: "the state of a training run", _PARAMETERS: "trained parameters"}
# Other libraries' files, by the names of their tensors; the first that fits.
_FOREIGN = (
    (r"(^|\.)adaption_(gate|prompt)$", "peft", "a LLaMA-Adapter of PEFT"),
    (r"^prompt_embeddings$", "peft", "a prefix or a soft prompt of PEFT"),
    (r"^base_model\.model\.", "peft", "an adapter of PEFT"),
    (r"^transformer\.h\.\d+\.attn\.(adapter_wte\.weight|gating_factor)$", "litgpt", "a LLaMA-Adapter of litgpt"),
    (r"\.adapter_(scale|bias)$", "litgpt", "a LLaMA-Adapter V2 of litgpt"),
    (r"^adapter_query\.weight$", "llama-adapter", "a LLaMA-Adapter of the authors"),
    (r"\.(adapters|prefix_tunings|prompt_tunings)\.\w+\.", "adapters", "an adapter of AdapterHub's adapters"),
)  # fmt: skip
_FLOATS = ("F64", "F32", "BF16", "F16")
_GATE = re.compile(r"(^|\.)(gate|gating_factor|adaption_gate)$")


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """What a safetensors file holds, as JSON (but for ``metadata``, the file's own).

    Every file has ``file``, ``bytes``, ``written`` (seconds since 1970), ``format``, ``what``, ``metadata``,
    ``tensors`` (name, dtype, shape), ``parameters`` and ``gates`` (range of the factors that the gates give, or null).
    An adapter of ours has ``method``, ``options``, ``base``, ``task``, ``labels``, ``template``, ``dtype`` and
    ``versions`` too, and a training state ``step`` and ``epochs``.

    Raises: CheckpointError: it is none, or malformed; the message names the file and the reason.
    """
    path = resolve(path)
    header, metadata = read_header(path)
    info = path.stat()
    kind, what = _kind(header, metadata)
    found: dict[str, Any] = {
        "file": str(path),
        "bytes": info.st_size,
        "written": info.st_mtime,
        "format": kind,
        "what": what,
        "metadata": metadata,
        "tensors": [{"name": n, "dtype": d, "shape": list(s)} for n, (d, s) in sorted(header.items())],
        "parameters": sum(math.prod(shape) for _, shape in header.values()),
    }
    try:
        if kind == "fastadapter":
            found |= _adapter(metadata)
        elif kind == _STATE:
            progress = json.loads(metadata["progress"])
            found |= {"step": int(progress["step"]), "epochs": len(progress["epochs"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"its record is damaged: {error!r}"
        raise CheckpointError(f"{path}: {reason}") from None
    found["gates"] = _gates(path, header, found.get("options") or {})
    return found


def describe_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """The adapters, trained parameters and state in a folder, and what configuration files of other libraries say.

    Raises: CheckpointError: a file in it is malformed; or there is nothing of the kind.
    """
    folder = Path(folder)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from error
    wanted = [
        each for each in names if re.fullmatch(r"(adapter(-[\w-]+|_model)?|weights)\.safetensors", each)
    ]
    below = [Path("best", "adapter.safetensors"), Path("last", "training_state.safetensors")]
    files = [folder / each for each in wanted] + [folder / each for each in below if (folder / each).exists()]
    found: dict[str, Any] = {"folder": str(folder), "files": [describe_file(each) for each in files]}
    if "adapter_config.json" in names:
        found["foreign"] = _foreign_config(folder / "adapter_config.json", names)
    if not files and "foreign" not in found:
        what = "a model, no adapter" if "config.json" in names else ", ".join(names[:5]) or "nothing"
        raise CheckpointError(f"{folder}: holds no adapter; there is {what}")
    return found


def _kind(header: Header, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    own = metadata.get("format")
    if own in _OWN:
        return own, _OWN[own]
    for pattern, library, words in _FOREIGN:
        if any(re.search(pattern, name) for name in header):
            return library, words
    return None, f"a safetensors file of {len(header)} tensors, none of an adapter that is known here"


def _adapter(metadata: dict[str, str]) -> dict[str, Any]:
    config, base, about = read_config(metadata), read_base(metadata), read_about(metadata)
    shown = {key: each for key, each in base.items() if key not in ("config", "weights")}
    fields = (
        "task",
        "labels",
        "template",
        "completion_template",
        "system_prompt",
        "chat",
        "dtype",
        "versions",
    )
    return {
        "format_version": metadata["format_version"],
        "method": config.method,
        "options": config.to_dict(),
        "base": shown,
        **{key: about.get(key) for key in fields},
    }


def _gates(path: Path, header: Header, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The range of what the gates let through; ``None`` where there are none. Any file is opened, to see it is whole.

    Raises: CheckpointError: it is not.
    """
    from safetensors import SafetensorError, safe_open

    found = [name for name in header if _GATE.search(name) and header[name][0] in _FLOATS]
    names = [name for name in found if not name.startswith("exp_avg")]  # the optimiser's moments of them
    try:
        with safe_open(path, framework="pt") as file:
            parts = [file.get_tensor(name).flatten().double() for name in sorted(names)]
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated or malformed: {error}") from error
    values = torch.cat(parts) if parts else torch.empty(0, device="cpu")
    if not values.numel():
        return None
    if options.get("gate") == "tanh":
        values = values.tanh()
    finite = bool(values.isfinite().all())
    span = (float(values.min()), float(values.max())) if finite else (None, None)
    return {"count": values.numel(), "min": span[0], "max": span[1]}


def _foreign_config(path: Path, names: list[str]) -> dict[str, Any]:
    """What ``adapter_config.json`` says: PEFT and AdapterHub both have one."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: it is no regular file, or has more than {_MAX_JSON_BYTES >> 20} MiB"
            )
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    if isinstance(config.get("peft_type"), str):
        library, method, base = "peft", config["peft_type"], config.get("base_model_name_or_path")
    else:
        inner = config.get("config")
        library, base = "adapters", config.get("model_name")
        method = inner.get("architecture") or "bottleneck" if isinstance(inner, dict) else None
    pickled = [each for each in names if re.fullmatch(r"(adapter_model|pytorch_adapter)\.bin", each)]
    return {
        "library": library,
        "method": method if isinstance(method, str) else None,
        "base": base if isinstance(base, str) else None,
        "pickled": pickled,
    }
