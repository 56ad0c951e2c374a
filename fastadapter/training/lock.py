"""One run per folder: a lock that ends with the process that holds it, however that ends.

The lock is the operating system's (``flock``), on a file in the folder that is there for as long as the run. A run that
was killed leaves the file, but not the lock. The first process of a run holds it for all of them, on every machine.

Network file systems: NFS since version 4 and Linux 2.6.12 grants such locks between machines; with ``nolock`` or
``local_lock=flock`` they hold on one machine only, and two machines are not kept apart. Some file systems (Lustre
without ``-o flock``, a few FUSE ones) know no locks: a run there says so, and goes on unprotected.
"""

import contextlib
import json
import os
import socket
import warnings
from pathlib import Path

from fastadapter.checkpoints.atomic import sweep, try_lock
from fastadapter.training.config import UserError

LOCK_FILE = ".run.lock"
# Where a run writes within its folder, and so may have left temporaries behind.
_WRITTEN = ("", "best", "last")


class FolderLock:
    """Keeps other runs out of a folder from :meth:`acquire` to :meth:`release`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Lock the folder, which exists, and sweep what dead runs left of their files.

        Raises: UserError: another run holds it; its process is named.
        """
        path = self.folder / LOCK_FILE
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from error
            try:
                locked = try_lock(descriptor)
            except OSError as error:
                os.close(descriptor)
                warnings.warn(
                    f"fastadapter: {self.folder} cannot be locked ({error.strerror or error}): nothing keeps a second "
                    "run out of it",
                    stacklevel=2,
                )
                return
            if not locked:
                os.close(descriptor)
                raise UserError(_in_use(self.folder))
            # Whoever held it before may have removed the file between our two calls: then it guards nothing.
            if _is_file_of(descriptor, path):
                break
            os.close(descriptor)
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # who it is only helps the reader of an error
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        for part in _WRITTEN:
            sweep(self.folder / part)

    def release(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.folder / LOCK_FILE)  # while it is locked, so that it is ours
        os.close(self._descriptor)
        self._descriptor = None


def require_unlocked(folder: str | Path) -> None:
    """Find out early, before a model is loaded, that a run goes on in ``folder``.

    Raises: UserError: it does.
    """
    try:
        with open(Path(folder) / LOCK_FILE, "r+b") as file:
            free = try_lock(file.fileno())
    except OSError:
        return  # no lock, or none that can be had: acquiring it says which
    if not free:
        raise UserError(_in_use(folder))


def _in_use(folder: str | Path) -> str:
    try:
        found = json.loads((Path(folder) / LOCK_FILE).read_bytes()[:4096])
        who = f" (process {int(found['pid'])} on {str(found['host'])[:80]})"
    except (OSError, ValueError, TypeError, KeyError):
        who = ""
    return f"{folder} is in use by another run{who}; wait for its end, or choose another output_dir"


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
