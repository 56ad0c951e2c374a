"""Which launchers of Triton kernels the tests call, so that the compiler can see the same calls afterwards.

The interpreter runs what no compiler takes: a product over 8 positions in fp32, for one. So every distinct call of a
launcher that launches something is noted, one line of JSON each, in a file per process; workers of one run share
the folder. A call is noted as shapes, strides and dtypes; :mod:`tests.support.compile_launches` makes it again
with tensors that have no memory, on each architecture, with the tiles of that architecture.
"""

import atexit
import contextlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

KERNELS = "fastadapter.kernels."


def folder() -> Path:
    """Of this run; the same in all of its workers, and in runs that a test starts with the variable set."""
    name = os.environ.get("FASTADAPTER_TEST_LAUNCHES")
    if name is None:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
        name = str(Path(tempfile.gettempdir()) / f"fastadapter-launches-{os.getuid()}-{run}")
    return Path(name)


def describe(value):
    """A value of a launcher's argument as JSON; TypeError for one that is none."""
    if isinstance(value, torch.Tensor):
        aligned = value.data_ptr() % 16 == 0 or value.numel() == 0
        dtype = str(value.dtype).removeprefix("torch.")
        return {
            "shape": list(value.shape),
            "strides": list(value.stride()),
            "dtype": dtype,
            "aligned": aligned,
        }
    if isinstance(value, torch.dtype):
        return {"is": str(value).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"no launcher takes a {type(value)}")


class Recorder:
    def __init__(self):
        self.seen: set[str] = set()
        if not {"FASTADAPTER_TEST_LAUNCHES", "PYTEST_XDIST_TESTRUNUID"} & os.environ.keys():
            shutil.rmtree(folder(), ignore_errors=True)  # of an earlier process with this number
            atexit.register(shutil.rmtree, folder(), ignore_errors=True)

    def note(self) -> None:
        """The call that launches: of the frames on the stack, the outermost function of the kernels' package."""
        frame, outermost = sys._getframe(2), None
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(KERNELS):
                outermost = frame
            frame = frame.f_back
        if outermost is None:  # a kernel of a test's own
            return
        line = json.dumps(_call(outermost), sort_keys=True)
        if line not in self.seen:
            self.seen.add(line)
            folder().mkdir(exist_ok=True)
            with (folder() / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _call(frame) -> dict:
    """Of a function's frame; with "unclear" where the call cannot be made again from what is written down."""
    module, code = frame.f_globals["__name__"], frame.f_code
    function = inspect.unwrap(getattr(sys.modules[module], code.co_name, None) or _call)
    if getattr(function, "__code__", None) is not code:
        return {"module": module, "function": code.co_name, "unclear": "no function of its module"}
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        arguments = {name: describe(frame.f_locals[name]) for name in names}
        rest = []
        if code.co_flags & inspect.CO_VARARGS:
            rest = describe(frame.f_locals[code.co_varnames[len(names)]])
    except (KeyError, TypeError) as error:
        return {"module": module, "function": code.co_name, "unclear": str(error)}
    return {"module": module, "function": code.co_name, "arguments": arguments, "rest": rest}


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Inside the block, launches in the interpreter are noted, and done."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    run = interpreter.InterpretedFunction.run

    def noting(self, *args, **kwargs):
        recorder.note()
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", noting)
        yield


def calls() -> list[dict]:
    """Everything noted in this run so far, each call once."""
    lines = {
        line for path in folder().glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()
    }
    return [json.loads(line) for line in sorted(lines)]
