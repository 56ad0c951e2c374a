"""One safetensors file, written atomically and read with suspicion.

The same tensors and metadata give the same bytes. Reading checks the kind of file, the header and its claims before any
payload is touched, and a digest of the contents after; parsing itself is left to the safetensors library.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastadapter.checkpoints.atomic import CheckpointError, write_atomically

DEFAULT_NAME = "adapter.safetensors"
DIGEST = "digest"
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_TENSORS = 65_536
_MAX_RANK = 8
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_MAGIC = (
    (b"PK\x03\x04", "a zip archive or a PyTorch .pth file"),
    (b"\x80", "a Python pickle"),
    (b"GGUF", "a GGUF model"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself"),
    (b"<", "an HTML or XML page"),
    (b"\x1f\x8b", "a gzip archive"),
)

# Given to a check before the payload is read: dtype and shape of each tensor by name.
Header = dict[str, tuple[str, tuple[int, ...]]]


def resolve(path: str | os.PathLike) -> Path:
    """The file behind ``path``: itself when it ends in ``.safetensors``, else ``adapter.safetensors`` in it."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / DEFAULT_NAME


def named(folder: str | os.PathLike, name: str) -> Path:
    """The file of one adapter of several in a folder."""
    return Path(folder) / f"adapter-{name}.safetensors"


def find(path: str | os.PathLike, name: str) -> Path:
    """The file to read adapter ``name`` from: its own in a folder that has one, else as :func:`resolve`."""
    own = named(path, name)
    return own if os.path.exists(own) else resolve(path)


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write ``tensors`` and ``metadata`` (plus their digest) to one file, atomically.

    Args:
        path: a ``.safetensors`` file, or a folder that gets ``adapter.safetensors``; folders are made. A symbolic
            link is followed. The mode of a file that is replaced is kept.
    Returns: the file written.
    Raises: CheckpointError: it could not be written; an older file is then intact.
    """
    from safetensors.torch import save

    target = resolve(path)
    payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = _with_metadata(save(payload), {**metadata, DIGEST: _digest(payload, metadata)})
    write_atomically(target, data)
    return target


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A file of safetensors with metadata in the order of its fields; the library's own is another in every process."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    raw = json.dumps(
        {"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")
    ).encode()
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of eight bytes, as the format wants
    return len(raw).to_bytes(8, "little") + raw + data[end:]


def read_tensors(
    path: str | os.PathLike, check: Callable[[Header, dict[str, str]], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file made by :func:`write_tensors`.

    Args:
        path: as for :func:`write_tensors`.
        check: called with the tensors' dtypes and shapes and with the metadata before any payload is read; raises
            ``ValueError`` to refuse them.
    Returns: tensors by name, and the metadata without the digest.
    Raises: CheckpointError: not a regular file, foreign, truncated, malformed, refused by ``check`` or changed
        since it was written. The message names the file and the reason.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    target = resolve(path)
    with _named_errors(target, (ValueError, SafetensorError)):
        data = _read_regular_file(target)
        header, metadata = _parse_header(data)
        if check is not None:
            check(header, metadata)
        tensors = load(data)
    _require_whole(target, tensors, metadata)
    return tensors, metadata


def map_tensors(
    path: str | os.PathLike, check: Callable[[Header, dict[str, str]], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`read_tensors`, but the tensors stay in the file, mapped into memory: read what you need of them.

    The file may be replaced or removed while they are in use, not written to.
    """
    from safetensors import SafetensorError, safe_open

    target = resolve(path)
    with _named_errors(target, (ValueError, SafetensorError)):
        header, metadata = _parse_header(_read_regular_file(target, header_only=True))
        if check is not None:
            check(header, metadata)
        with safe_open(target, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in header}
    _require_whole(target, tensors, metadata)
    return tensors, metadata


def _require_whole(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Take the digest out of ``metadata`` and compare. Raises: CheckpointError: there is none, or another one."""
    digest = metadata.pop(DIGEST, None)
    if digest is None:
        raise CheckpointError(f"{target}: it holds no content digest, so it was not written by fastadapter")
    if digest != _digest(tensors, metadata):
        raise CheckpointError(f"{target}: its contents do not match its digest; the file is damaged")


def read_header(path: str | os.PathLike) -> tuple[Header, dict[str, str]]:
    """Dtypes and shapes of the tensors of any safetensors file, and its metadata; no payload is read.

    Raises: CheckpointError: as :func:`read_tensors`; only a change since it was written is not noticed.
    """
    target = resolve(path)
    with _named_errors(target):
        return _parse_header(_read_regular_file(target, header_only=True))


@contextlib.contextmanager
def _named_errors(target: Path, expected: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target}: {error.strerror or error}") from error
    except expected as error:
        raise CheckpointError(f"{target}: {error}") from error


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _read_regular_file(path: Path, header_only: bool = False) -> bytes:
    # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a regular file")
        start = file.read(32)
        header_bytes = int.from_bytes(start[:8], "little")
        plausible = 2 <= header_bytes <= min(_MAX_HEADER_BYTES, info.st_size - 8)
        # Magic numbers only explain a refusal: the first bytes of a good file are a length and can be any of them.
        if not plausible or start[8:9] != b"{":
            raise ValueError(_what_else(start, info.st_size))
        end = 8 + header_bytes if header_only else info.st_size
        return (start + file.read(max(0, end - len(start))))[:end]


def _what_else(start: bytes, size: int) -> str:
    for magic, words in _MAGIC:
        if start.startswith(magic):
            return f"it is {words}; expected a safetensors file"
    if size < 8:
        return f"it has {size} bytes, too few for a safetensors file"
    return f"its {size} bytes do not start with a safetensors header: truncated, or another kind of file"


def _parse_header(data: bytes) -> tuple[Header, dict[str, str]]:
    raw = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if raw.count(b'"dtype"') > _MAX_TENSORS:
        raise ValueError(f"its header lists more than {_MAX_TENSORS} tensors")
    try:
        header = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a map of strings")
    tensors: Header = {}
    for name, entry in header.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"a tensor has the name {name[:80]!r}; expected letters, digits, '_', '-' and '.'"
            )
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name} is not described by dtype, shape and data_offsets")
        shape = entry["shape"]
        if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(n) for n in shape):
            raise ValueError(
                f"tensor {name} has the shape {str(shape)[:80]}; expected at most {_MAX_RANK} sizes"
            )
        tensors[name] = (str(entry["dtype"]), tuple(shape))
    return tensors, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header names a field twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"its header holds {name}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
