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
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from fastadapter.ops import self_check
from fastadapter.ops.backends import GPU_TYPES
from fastadapter.ops.registration import GPU_IMPLEMENTATIONS


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
        # a caller may ask autograd to stay on its thread, as tracing does
        if threading.current_thread() is self._thread or not torch._C._is_multithreading_enabled():
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


class Guard:
    """Stands for ``torch.cuda.device_of`` and ``torch.cuda.device``: whether this thread is inside of one."""

    _depth = threading.local()

    def __init__(self, _: Any) -> None:
        pass

    @classmethod
    def held(cls) -> bool:
        return getattr(cls._depth, "value", 0) > 0

    def __enter__(self) -> None:
        self._depth.value = getattr(self._depth, "value", 0) + 1

    def __exit__(self, *error: Any) -> None:
        self._depth.value -= 1


@contextlib.contextmanager
def cuda_standin(monkeypatch, cache) -> Iterator[SimpleNamespace]:
    """The stand-in; ``cache`` is an empty folder for the verdicts. The self-check's probes are made small.

    Yields what a test may look at or set: ``thread`` (how many backwards it ran), ``launches`` (names of kernels),
    ``unguarded`` (those launched on whatever device is current), ``capturing``, ``peak``, ``synchronised``.
    """
    from triton.runtime import interpreter

    state = SimpleNamespace(
        thread=DeviceThread(), launches=[], unguarded=[], capturing=False, peak=12345, synchronised=0
    )
    engine, launch, one = (
        torch.autograd._engine_run_backward,
        interpreter.GridExecutor.__call__,
        threading.Lock(),
    )
    generator = torch.Generator()

    def launch_alone(executor: Any, *args: Any, **options: Any) -> Any:
        state.launches.append(executor.fn.__name__)
        if not Guard.held():
            state.unguarded.append(executor.fn.__name__)
        with (
            one
        ):  # the interpreter replaces parts of triton.language while it runs; no backward starts in here
            return launch(executor, *args, **options)

    def synchronize(device: Any = None) -> None:
        state.synchronised += 1

    properties = SimpleNamespace(name="stand-in", total_memory=80 * 2**30, major=9, minor=0)
    with monkeypatch.context() as patch:
        patch.setenv("FASTADAPTER_CACHE", str(cache))
        patch.setattr(self_check, "_passed", set())
        patch.setattr(self_check, "_failed", {})
        patch.setattr(
            self_check, "PROBES", {op: list(map(_small, own)) for op, own in self_check.PROBES.items()}
        )
        patch.setattr(torch.autograd, "_engine_run_backward", lambda *a, **k: state.thread(engine, *a, **k))
        patch.setattr(interpreter.GridExecutor, "__call__", launch_alone)
        for name, fake in {
            "device_of": Guard,
            "device": Guard,
            "is_current_stream_capturing": lambda: state.capturing,
            "synchronize": synchronize,
            "max_memory_allocated": lambda device: state.peak,
            "device_count": lambda: 1,
            "get_device_name": lambda device: properties.name,
            "get_device_properties": lambda device: properties,
            "get_rng_state": lambda device: generator.get_state(),
            "set_rng_state": lambda new, device: generator.set_state(new),
        }.items():
            patch.setattr(torch.cuda, name, fake)
        state.generator = generator
        GPU_TYPES.add("cpu")
        dispatched = torch.library.Library("fastadapter", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # that it overrides the C++ ones, which come back
                for name, implementation in GPU_IMPLEMENTATIONS.items():
                    dispatched.impl(name, implementation, "CPU", allow_override=True)
            yield state
        finally:
            dispatched._destroy()
            GPU_TYPES.discard("cpu")
            state.thread.close()


def _small(probe: self_check._Probe) -> self_check._Probe:
    """The probe at sizes that the interpreter runs in no time."""
    sizes = {200: 5, 1024: 7, 128: 16, 100: 3, 256: 32, 24: 4}
    shapes = {name: tuple(sizes.get(n, n) for n in shape) for name, shape in probe.shapes.items()}
    return self_check._Probe(probe.name, probe.op, shapes, grad=probe.grad, **probe.options)


def first_call(op: str, dtype: torch.dtype = torch.float32, backend: str = "auto") -> dict[str, torch.Tensor]:
    """Forward and backward of the op's own first probe through the public function."""
    probe = self_check.PROBES[op][0]
    return probe.run(probe.inputs(torch.device("cpu"), dtype, torch.float32), backend)


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
