"""Which exceptions are somebody's mistake or a full disk, told in one line, and which are faults to report."""

import contextlib
import dis
import errno
import importlib.metadata
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

INTERRUPTED = 130
# What a shell reports of a program that wrote to a pipe nobody reads any more.
BROKEN_PIPE = 141
_PACKAGE = __name__.partition(".")[0]
# What a distribution is imported as, where that is another name.
_IMPORTED_AS = {"scikit-learn": "sklearn"}
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of ours as a line for a reader, without the place in the code that Python adds."""
    before = warnings.formatwarning

    def formatted(message: Any, *where: Any, **more: Any) -> str:
        text = str(message)
        return f"{text}\n" if text.startswith(f"{_PACKAGE}: ") else before(message, *where, **more)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def tell(error: BaseException) -> int:
    """Say on stderr what went wrong; the exit status: 2 for an expected fault, 1 for one to report."""
    if isinstance(error, KeyboardInterrupt):
        said = str(error)
        print(f"fastadapter: interrupted{f'; {said}' if said else ''}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python would complain once more when it flushes stdout at the end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    message = expected(error)
    if message is not None:
        print(f"fastadapter: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    traceback.print_exception(type(error), error, error.__traceback__)
    print(
        "fastadapter: this should not have happened; please report it, with the lines above and what "
        "`fastadapter doctor` prints",
        file=sys.stderr,
    )
    return 1


def expected(error: BaseException) -> str | None:
    """The message for the user, if the exception is one of ours or of the system's; ``None``: neither."""
    if type(error).__module__.partition(".")[0] == _PACKAGE or _is_ours(error):
        return str(error)
    if (memory := _out_of_memory(error)) is not None:
        return memory
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in _FULL:
            return f"{error.filename or 'the disk'}: {os.strerror(error.errno)}"
        return f"{error.filename}: {os.strerror(error.errno)}" if error.filename is not None else None
    # safetensors has a class of its own for what the system says
    if (found := re.search(r"\(os error (\d+)\)", str(error))) and int(found[1]) in _FULL:
        return f"the disk: {os.strerror(int(found[1]))}"
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` in this package made it: a library's ValueError must not pass under our name."""
    if not isinstance(error, ValueError | TypeError) or error.__traceback__ is None:
        return False
    last: TracebackType = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    frame = last.tb_frame
    name = frame.f_globals.get("__name__", "")
    raised = dis.opname[frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and name.partition(".")[0] == _PACKAGE


def _out_of_memory(error: BaseException) -> str | None:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        where = "the GPU's memory"
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    ):
        where = "this machine's memory"
    else:
        return None
    found = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    return (
        f"{where} is not enough{f' ({found[1]} more were asked for)' if found else ''}; a smaller --batch-size, "
        "shorter texts or --dtype bf16 need less"
    )


def _missing_package(error: ImportError) -> str | None:
    """What to install, where one of our extras brings the package."""
    module = (error.name or "").partition(".")[0]
    if not module or module == _PACKAGE:
        return None
    for requirement in importlib.metadata.requires(_PACKAGE) or []:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and _IMPORTED_AS.get(found[1], found[1]) == module:
            return f'this needs {found[1]}, which is not installed: pip install "{_PACKAGE}[{found[2]}]"'
    return None
