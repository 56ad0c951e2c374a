"""Files that are there whole or not at all, and what a process that died in between has left behind.

Writing goes to a temporary name in the same folder, is synced, renamed over the target, and the folder is synced: after
a kill at any point the old or the new file is there. The writer holds a lock on its temporary, which ends with the
process however that ends; a temporary that nobody holds is swept by whoever writes or trains there next.
"""

import contextlib
import errno
import importlib
import os
import re
import secrets
import stat
import sys
import time
from pathlib import Path
from typing import Any

# Between making a temporary and locking it lie microseconds; releases before the lock wrote without one.
_YOUNG_SECONDS = 60.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.fastadapter-\w{8}")


class CheckpointError(Exception):
    """A file that cannot be trusted, read or written; the message names the file and the reason."""


def write_atomically(target: Path, data: bytes) -> None:
    """Replace ``target`` by ``data``, so that a crash leaves the old file or the new one.

    Temporaries of dead writers of the same file are removed first: they may be what fills the disk.

    Raises: CheckpointError: it could not be written; the old file is intact.
    """
    try:
        target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                with contextlib.suppress(OSError):  # where files cannot be locked, none is swept either
                    try_lock(file.fileno())
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)  # while it is locked
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process and whom it forks, without waiting; ``False``: somebody else holds it.

    The lock ends with the last of them, or when the file is closed. Raises: OSError: it cannot be locked there.
    """
    if sys.platform == "win32":
        return _try_lock_windows(descriptor)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock_windows(descriptor: int) -> bool:
    msvcrt: Any = importlib.import_module("msvcrt")
    os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte that nobody reads: such locks keep others from reading
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            return False
        raise
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Remove temporaries that no living process writes: of the file ``name`` in ``folder``, or of any.

    One is dead when nobody holds its lock and it has not changed for a minute; on a file system without locks nothing
    is dead. Returns: what was removed.
    """
    swept = []
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            of_name = name is None or entry.name.startswith(f".{name}.")
            if of_name and _TEMPORARY.fullmatch(entry.name) and _is_dead(entry):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
                    swept.append(Path(entry.path))
    return swept


def _is_dead(entry: os.DirEntry) -> bool:
    try:
        info = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode) or abs(time.time() - info.st_mtime) < _YOUNG_SECONDS:
            return False
        # Network file systems grant a lock of this kind only on what is open for writing.
        with open(entry.path, "r+b") as file:
            return try_lock(file.fileno())
    except OSError:
        return False
