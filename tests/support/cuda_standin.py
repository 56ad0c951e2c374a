"""CPU tensors that pass for a GPU's: what only a GPU executes otherwise runs in the default tests.

Inside :func:`cuda_standin`

- ops take their GPU route on CPU tensors: the self-check first, then kernels in Triton's interpreter;
- backwards run on one thread of the device, in turn, as autograd runs those of a GPU: what a thread-local said in the
  forward is not said there, and whoever waits there for another thread's backward waits for ever;
- ``torch.cuda`` answers as for a device that is there.

:func:`within` ends a test that hangs, with the stacks of all threads, instead of hanging the suite.
"""

import contextlib
import faulthandler
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from fastadapter.ops import self_check
from fastadapter.ops.backends import GPU_TYPES


class DeviceThread:
    """Runs what it is handed, in turn, on a thread of its own; what that hands over in turn runs in place."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self._thread.start()
        self.ran = 0

    def _loop(self) -> None:
        while (job := self._work.get()) is not None:
            job()

    def __call__(self, function: Callable, *args: Any, **options: Any) -> Any:
        if threading.current_thread() is self._thread:
            return function(*args, **options)
        done, answer = threading.Event(), SimpleNamespace(value=None, error=None)

        def job() -> None:
            try:
                answer.value = function(*args, **options)
            except BaseException as error:
                answer.error = error
            self.ran += 1
            done.set()

        self._work.put(job)
        done.wait()
        if answer.error is not None:
            raise answer.error
        return answer.value

    def close(self) -> None:
        self._work.put(None)


@contextlib.contextmanager
def cuda_standin(monkeypatch, cache) -> Iterator[SimpleNamespace]:
    """The stand-in; ``cache`` is an empty folder for the verdicts.

    Yields what a test may look at or set: ``thread`` (how many backwards it ran), ``capturing``.
    """
    from triton.runtime import interpreter

    state = SimpleNamespace(thread=DeviceThread(), capturing=False)
    engine, launch, one = (
        torch.autograd._engine_run_backward,
        interpreter.GridExecutor.__call__,
        threading.Lock(),
    )

    def launch_alone(*args: Any, **options: Any) -> Any:
        with (
            one
        ):  # the interpreter replaces parts of triton.language while it runs; no backward starts in here
            return launch(*args, **options)

    with monkeypatch.context() as patch:
        patch.setenv("FASTADAPTER_CACHE", str(cache))
        patch.setattr(self_check, "_passed", set())
        patch.setattr(self_check, "_failed", {})
        patch.setattr(self_check, "describe", lambda device: {"device": f"stand-in on {device}"})
        patch.setattr(torch.autograd, "_engine_run_backward", lambda *a, **k: state.thread(engine, *a, **k))
        patch.setattr(interpreter.GridExecutor, "__call__", launch_alone)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
        GPU_TYPES.add("cpu")
        try:
            yield state
        finally:
            GPU_TYPES.discard("cpu")
            state.thread.close()


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What ``function`` returns or raises; an AssertionError with every thread's stack if it takes longer.

    It then stays behind on a daemon thread.
    """
    answer = SimpleNamespace(value=None, error=None)

    def target() -> None:
        try:
            answer.value = function()
        except BaseException as error:
            answer.error = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            raise AssertionError(f"still running after {seconds} s:\n{file.read()}")
    if answer.error is not None:
        raise answer.error
    return answer.value
