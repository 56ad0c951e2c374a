"""States of a trunk in files: a folder per trunk, a shard for every few hundred sequences.

A shard is named by the digest of its trunk and of the tokens of its sequences, so what lies there under another name is
of something else, and any run with the same sequences in the same order finds it. It is written whole or not at all;
whoever writes one holds a lock beside it, so that two runs share the work and neither waits for a dead one.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints.atomic import sweep, try_lock
from fastadapter.checkpoints.files import Header, map_tensors, write_tensors
from fastadapter.training.trunk.identity import digest_sequences
from fastadapter.training.trunk.start import NoTrunk

FORMAT = "fastadapter-trunk-1"
ABOUT_FILE = "trunk.json"
SHARD_SEQUENCES, SHARD_BYTES = 256, 64 << 20
_STATES = "states"
_TRUNK, _SHARD = re.compile(r"[0-9a-f]{24}"), re.compile(r"[0-9a-f]{32}\.safetensors")
_WAIT_SECONDS = 0.2
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Shard:
    """Sequences whose states are in one file, one behind another."""

    path: Path
    sequences: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


class Store:
    """The folder of one trunk.

    Args:
        root: folder of all trunks.
        digest: of the trunk.
        width: of a hidden state.
    """

    def __init__(self, root: Path, digest: str, width: int, dtype: torch.dtype):
        self.root, self.digest, self.width, self.dtype = root, digest, width, dtype
        self.folder = root / digest[:24]

    @property
    def token_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def shards(self, sequences: Sequence[tuple[int, ...]]) -> list[Shard]:
        """Cut sequences, in their order and each once, into shards."""
        most = max(1, SHARD_BYTES // self.token_bytes)
        cut: list[list[tuple[int, ...]]] = []
        tokens = 0
        for ids in dict.fromkeys(sequences):
            if not cut or len(cut[-1]) == SHARD_SEQUENCES or tokens + len(ids) > most:
                cut.append([])
                tokens = 0
            cut[-1].append(ids)
            tokens += len(ids)
        names = (digest_sequences(self.digest, each)[:32] for each in cut)
        return [
            Shard(self.folder / f"{name}.safetensors", tuple(each))
            for name, each in zip(names, cut, strict=True)
        ]

    def open(self, shard: Shard) -> Tensor | None:
        """The states of a shard, ``(tokens, width)``, mapped from its file; ``None``: there is no file.

        Raises: CheckpointError: it is damaged, or not what its name says.
        """

        def check(header: Header, metadata: dict[str, str]) -> None:
            expected = (_SAFETENSORS[self.dtype], (shard.tokens, self.width))
            if metadata.get("format") != FORMAT or metadata.get("trunk") != self.digest:
                raise ValueError("it holds no states of this trunk")
            if header != {_STATES: expected}:
                raise ValueError(f"it must hold {_STATES} {expected}, got {header}")

        if not os.path.lexists(shard.path):
            return None
        states = map_tensors(shard.path, check)[0][_STATES]
        with contextlib.suppress(OSError):  # of a folder that is only read
            os.utime(shard.path)
        return states

    def write(self, shard: Shard, states: Tensor) -> None:
        """Raises: CheckpointError: it cannot be written."""
        write_tensors(shard.path, {_STATES: states.to(self.dtype)}, {"format": FORMAT, "trunk": self.digest})

    def fill(
        self,
        shards: Sequence[Shard],
        compute: Callable[[Shard], Tensor],
        tell: Callable[[str], None],
        done: Callable[[int], None],
        first: int = 0,
    ) -> list[Tensor]:
        """The states of every shard: from its file, computed here, or by another process that is at it.

        What was computed is read back like all else, so that nothing depends on who did it.

        Args:
            tell: given a line for every damaged file, which is computed anew.
            done: given the tokens of each shard that is there.
            first: number of the shard to begin with; processes that share the work begin at different ones.
        Raises: CheckpointError: a file cannot be written.
        """
        with contextlib.suppress(OSError):
            sweep(self.folder)
        found: dict[Path, Tensor] = {}
        left = [*shards[first:], *shards[:first]]
        while left:
            later = []
            for shard in left:
                states = self._open_or_tell(shard, tell)
                if states is None:
                    with claim(shard.path) as mine:
                        # whoever held the claim a moment ago may have written it
                        states = self._open_or_tell(shard, tell) if mine else None
                        if mine and states is None:
                            self.write(shard, compute(shard))
                            states = self.open(shard)
                if states is None:  # another process is at it, or has made room just now
                    later.append(shard)
                    continue
                found[shard.path] = states
                done(shard.tokens)
            if len(later) == len(left):
                time.sleep(_WAIT_SECONDS)
            left = later
        return [found[shard.path] for shard in shards]

    def _open_or_tell(self, shard: Shard, tell: Callable[[str], None]) -> Tensor | None:
        try:
            return self.open(shard)
        except CheckpointError as error:
            tell(f"trunk cache: {error}; computed anew")
            with contextlib.suppress(OSError):
                shard.path.unlink()
            return None


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold the lock beside a file while the context lasts; yields whether it was free.

    It ends with the process. Where files cannot be locked two may do the same work, and the same file comes of it.

    Raises: CheckpointError: nothing can be written there.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        with contextlib.suppress(OSError):
            if not try_lock(descriptor):
                yield False
                return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Entry:
    """A shard in the folder of trunks, as a list or a clean-up sees it."""

    path: Path
    bytes: int
    used: float


def entries(root: Path) -> list[Entry]:
    """All shards under ``root``, the one that was not used for longest first; what is not ours is not among them."""
    found = []
    with contextlib.suppress(OSError):
        for folder in os.scandir(root):
            if not (_TRUNK.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False)):
                continue
            for file in os.scandir(folder.path):
                with contextlib.suppress(OSError):
                    if _SHARD.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                        info = file.stat()
                        found.append(Entry(Path(file.path), info.st_size, info.st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def remove(entry: Entry) -> int:
    """Remove a shard, and its folder with the last one; the bytes that are free now.

    Who has it mapped goes on reading it.
    """
    try:
        entry.path.unlink()
    except OSError:
        return 0
    folder = entry.path.parent
    if not any(_SHARD.fullmatch(each) for each in os.listdir(folder)):
        with contextlib.suppress(OSError):
            (folder / ABOUT_FILE).unlink(missing_ok=True)
            folder.rmdir()
    return entry.bytes


def make_room(root: Path, needed: int, budget: int, keep: Sequence[Path]) -> int:
    """Remove the shards that were not used for longest until ``needed`` more bytes fit; the bytes that were removed.

    Args:
        budget: most that all trunks together may take.
        keep: shards that are in use here.
    Raises: NoTrunk: they do not fit even so, or would take more than half of what is free.
    """
    kept = set(keep)
    found = entries(root)
    others = [entry for entry in found if entry.path not in kept]
    total = needed + sum(entry.bytes for entry in found if entry.path in kept)
    if total > budget:
        raise NoTrunk(
            f"its states take {size_text(total)}, and all of them together may take {size_text(budget)} "
            "(trunk_cache max_bytes)"
        )
    free = shutil.disk_usage(_existing(root)).free
    # Others go only where that is enough.
    if needed > (free + sum(entry.bytes for entry in others)) // 2:
        raise NoTrunk(
            f"its states take {size_text(needed)}, more than half of the {size_text(free)} free on {root}"
        )
    removed = 0
    total += sum(entry.bytes for entry in others)
    for entry in others:
        if total - removed <= budget and needed <= (free + removed) // 2:
            break
        removed += remove(entry)
    return removed


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def size_text(count: int) -> str:
    """
    >>> size_text(221_184_000), size_text(10 << 30)
    ('211 MiB', '10.0 GiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{-(-count // 2**20):,} MiB"
