"""What is wrong with the files of a model, found before transformers stumbles over it in words of its own."""

import json
from pathlib import Path
from typing import Any

from fastadapter.training import UserError

_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip


def require_model_files(name: str, folder: str | Path, gguf_file: str | None = None) -> None:
    """Look at a folder's configuration, weights and tokenizer, as far as that costs nothing.

    Args:
        name: what the model was called, for the message.
        gguf_file: the file in the folder that holds all of these.
    Raises: UserError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise UserError(f"--model {name}: cannot be loaded: it has no file {gguf_file} (--gguf-file)")
        return
    _require_config(name, folder)
    if not any((folder / each).is_file() for each in _WEIGHTS):
        hint = (
            "; its weights are in GGUF: name the file with --gguf-file" if any(folder.glob("*.gguf")) else ""
        )
        raise UserError(
            f"--model {name}: cannot be loaded: it has no weights ({' or '.join(_WEIGHTS[::2])}){hint}"
        )
    for file in _safetensors_files(name, folder):
        _require_whole(name, file)
    if not any((folder / each).is_file() for each in _TOKENIZERS):
        raise UserError(f"--model {name}: cannot be loaded: it has no tokenizer (such as tokenizer.json)")


def _require_config(name: str, folder: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if not path.is_file():
        hint = "; it holds an adapter, which goes to --adapter" if _holds_adapter(folder) else ""
        raise UserError(f"--model {name}: cannot be loaded: it has no config.json{hint}")
    config = _read_json(name, path)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"--model {name}: cannot be loaded: {path.name} names no model_type")
    if kind not in CONFIG_MAPPING:
        import transformers

        raise UserError(
            f"--model {name}: cannot be loaded: {path.name} has model_type {kind!r}, which transformers "
            f"{transformers.__version__} does not have; code that comes with a model is not run"
        )


def _holds_adapter(folder: Path) -> bool:
    return any((folder / each).is_file() for each in ("adapter.safetensors", "adapter_config.json"))


def _safetensors_files(name: str, folder: Path) -> list[Path]:
    if (whole := folder / _WEIGHTS[0]).is_file():
        return [whole]
    if not (folder / _INDEX).is_file():
        return []
    parts = _read_json(name, folder / _INDEX).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(each, str) for each in parts.values()):
        raise UserError(f"--model {name}: cannot be loaded: {_INDEX} has no weight_map")
    files = [folder / each for each in sorted(set(parts.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"--model {name}: cannot be loaded: {_INDEX} names {file.name}, which is not there"
            )
    return files


def _require_whole(name: str, file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):  # reads the header and compares what it claims with the size of the file
            pass
    except SafetensorError as error:
        raise UserError(
            f"--model {name}: cannot be loaded: {file.name} is damaged or cut short ({error})"
        ) from error


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--model {name}: cannot be loaded: {path.name} is malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"--model {name}: cannot be loaded: {path.name} is not a JSON object")
    return value
