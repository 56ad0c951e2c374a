"""Notes what the launchers would launch, and compiles it as Triton would."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Triton 3.9 warns unless it is told; fused multiply-add is what the error budget was met with.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from fastadapter.kernels import target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One ``kernel[grid](*args, **kwargs)`` that did not take place."""

    kernel: Any
    args: tuple
    kwargs: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments, which tell one route from another."""
        names = {param.name for param in self.kernel.params if param.is_constexpr}
        return {name: value for name, value in self.kwargs.items() if name in names}


@dataclass(frozen=True)
class Compiled:
    launch: Launch
    arch: str
    kernel: Any  # triton's CompiledKernel
    signature: dict[str, Any]
    seconds: float  # of processor time, ptxas included


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block, launches of Triton kernels are noted instead of done."""
    launches: list[Launch] = []

    def note(kernel, *args, grid, warmup, **kwargs):
        grid = grid(kwargs) if callable(grid) else grid
        launches.append(Launch(kernel, args, kwargs, tuple(int(size) for size in grid)))

    run = jit.JITFunction.run
    jit.JITFunction.run = note
    try:
        yield launches
    finally:
        jit.JITFunction.run = run


def launches_of(call: Callable[[], Any], arch: str) -> list[Launch]:
    """What ``call`` launches on ``arch``, in order.

    Raises: RuntimeError: under the interpreter, or when nothing is launched.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the audit compiles kernels: unset TRITON_INTERPRET")
    with recording() as launches, target.assume(arch):
        call()
    if not launches:
        raise RuntimeError(f"nothing was launched for {arch}")
    return launches


def specialise(launch: Launch, arch: str):
    """Source and options that Triton's own launch would compile for ``launch``."""
    kernel = launch.kernel
    backend = make_backend(TARGETS[arch])
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **launch.kwargs}
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options, signature


def identity(launch: Launch, arch: str) -> str:
    """Equal for launches that compile to the same kernel."""
    source, options, _ = specialise(launch, arch)
    return f"{arch} {source.hash()} {options.hash()}"


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile afresh, whatever Triton's cache holds, so that the time means something."""
    source, options, signature = specialise(launch, arch)
    before = _processor_seconds()
    with fresh_compilation():
        kernel = triton.compile(source, target=TARGETS[arch], options=options.__dict__)
    return Compiled(launch, arch, kernel, signature, _processor_seconds() - before)


@contextlib.contextmanager
def fresh_compilation() -> Iterator[None]:
    before = triton.knobs.compilation.always_compile
    triton.knobs.compilation.always_compile = True
    try:
        yield
    finally:
        triton.knobs.compilation.always_compile = before


def _processor_seconds() -> float:
    """Of this process and its finished children: wall time would measure what else the machine does."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
