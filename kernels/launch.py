"""Launches that are worked out once: what a call costs on the host, when the GPU is faster than that.

``kernel[grid](**arguments)`` binds and examines some forty arguments a call, which takes longer than a short kernel
runs. All but the addresses follow from shapes, strides and dtypes. So a launcher is written in two parts, what follows
from layouts and what is done with tensors:

    @prepared(tensors=3)
    def scaled_sum(x, y, out_like, scale):
        # once per layout: checks, tiles, grid, strides
        launch = Launch(_kernel, (triton.cdiv(x.numel(), 1024),), ("out_ptr", "x_ptr", "y_ptr"),
                        dict(scale=scale, X_STRIDES=x.stride(), BLOCK=1024, num_warps=4))

        def run(x, y, out_like):
            # every call: allocate and launch
            out = torch.empty_like(out_like)
            launch(out, x, y)
            return out

        return run

    scaled_sum(x, y, out_like, 2.0)

``run`` gets the same tensors as a call does and works with them alone: what it takes from ``scaled_sum`` belongs to
the first call with that layout. It may make several launches.

A launch goes through Triton's own path the first time and whenever something is unfamiliar (:func:`_can_be_direct`);
after that, where its pointers are aligned as then, straight to the launcher that Triton compiled. Read in the sources
of Triton 3.6, 3.7, 3.8 and 3.9, which call it alike.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from fastadapter.kernels import target
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

# Layouts kept per launcher: lengths of prompts differ without end.
LIMIT = 4096
_KNOWN = ((3, 6), (3, 10))
_ALIGNMENT = 16  # of a pointer, in bytes: part of what Triton compiles for
_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
_kept: list[dict] = []

# What Triton's own path asks; a build without CUDA lacks both.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Launch:
    """One launch of ``kernel``, of which only the tensors' addresses are open.

    Args:
        kernel: a ``triton.jit`` function.
        grid: one to three numbers of programs.
        tensors: names of the kernel's pointers, in the order of the tensors in a call; ``None`` for a tensor is
            allowed where it is one in every call. Dtypes, too, have to be the same in every call.
        constants: all other arguments of the kernel, and options such as ``num_warps``.
    """

    __slots__ = ("_arguments", "_constants", "_device", "_direct", "_grid", "_kernel", "_names", "_places")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], tensors: tuple[str, ...], constants: dict[str, Any]
    ):
        self._kernel, self._grid, self._names, self._constants = kernel, (*grid, 1, 1)[:3], tensors, constants
        self._device: int | None = None
        # by alignment of the pointers
        self._direct: dict[int | tuple[bool, ...], tuple[Callable, Any, Any] | None] = {}
        parameters = list(kernel.arg_names)
        if missing := [name for name in parameters if name not in tensors and name not in constants]:
            raise TypeError(f"launch of {kernel.__name__}: no value for {', '.join(missing)}")
        self._arguments = [constants.get(name) for name in parameters]
        self._places = [parameters.index(name) for name in tensors]

    def __call__(self, *tensors: Tensor | None) -> None:
        arguments, joint = self._arguments.copy(), 0
        for place, x in zip(self._places, tensors):
            if x is None:
                arguments[place] = 0
            else:
                arguments[place] = pointer = x.data_ptr()
                joint |= pointer
        alignment: int | tuple[bool, ...] = 0
        if joint % _ALIGNMENT:
            alignment = tuple(arguments[place] % _ALIGNMENT == 0 for place in self._places)
        found = self._direct.get(alignment)
        if found is None or _watched(self._kernel):
            return self._ordinary(alignment, tensors)
        if _current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(*tensors)
        run, function, metadata = found
        # no metadata and no hooks: nobody watches
        run(*self._grid, _current_stream(self._device), function, metadata, None, None, None, *arguments)
        return None

    def _ordinary(self, alignment: int | tuple[bool, ...], tensors: tuple[Tensor | None, ...]) -> None:
        first = next(x for x in tensors if x is not None)
        with torch.cuda.device_of(first):
            compiled = self._kernel[self._grid](
                **dict(zip(self._names, tensors, strict=True)), **self._constants
            )
        if alignment not in self._direct and _can_be_direct(compiled):
            self._device = first.get_device()
            self._direct[alignment] = (compiled.run, compiled.function, compiled.packed_metadata)


def _watched(kernel: Any) -> bool:
    """Whether somebody wants to see launches (a profiler): Triton's own path tells them."""
    runtime = knobs.runtime
    return bool(
        runtime.launch_enter_hook is not _ENTER
        or runtime.launch_exit_hook is not _EXIT
        or _ENTER.calls
        or _EXIT.calls
        or kernel.pre_run_hooks
    )


def _can_be_direct(compiled: Any) -> bool:
    """A kernel on NVIDIA's launcher of a Triton that is known; not the interpreter, AMD, or a launch only recorded."""
    if type(compiled) is not CompiledKernel or _current_device is None or not _known_version():
        return False
    launcher = type(compiled.run)
    return (launcher.__module__, launcher.__name__) == ("triton.backends.nvidia.driver", "CudaLauncher")


def _interpreted() -> bool:
    return knobs.runtime.interpret


@functools.cache
def _known_version() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return _KNOWN[0] <= version < _KNOWN[1]


def prepared(tensors: int) -> Callable[[Callable], Callable]:
    """Call the decorated function once per layout of its first ``tensors`` arguments and values of all others.

    It gets the arguments of a call and returns what is done with tensors of that layout. What it raises is raised, and
    it is asked again. A layout is device, shape, strides and dtype of each tensor, and which are ``None``.

    Under Triton's interpreter it is asked at every call: kernels and tables are replaced there.
    """

    def decorate(prepare: Callable) -> Callable:
        plans: dict[tuple, Callable] = {}
        _kept.append(plans)

        @functools.wraps(prepare)
        def call(*args: Any) -> Any:
            operands = args[:tensors]
            layouts = [None if x is None else (x.shape, x.stride(), x.dtype) for x in operands]
            key = (args[0].device, target.assumed(), *layouts, *args[tensors:])
            run = plans.get(key)
            if run is None:
                run = prepare(*args)
                if not _interpreted():
                    if len(plans) >= LIMIT:
                        plans.clear()
                    plans[key] = run
            return run(*operands)

        return call

    return decorate


def forget() -> None:
    """Drop every layout that was worked out, for whoever replaces a kernel or a table."""
    for plans in _kept:
        plans.clear()
