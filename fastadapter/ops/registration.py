"""The registered boundary of an op: schema, fake, and one implementation per device, the same way for all of them.

``torch.compile`` sees each registered op as one opaque call. Autograd stays outside, in the op's file, in a
:class:`torch.autograd.Function`, which costs less per call than autograd registered on the op.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fastadapter.ops import self_check
from fastadapter.ops.backends import GPU_TYPES, UNCHECKED, automatic_backend, extension_error, lack, library

# What the dispatcher runs on a GPU, by registered name: compiled graphs, modes and tracing come this way.
GPU_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
# The same operation in plain PyTorch, by registered op.
_REFERENCES: dict[Any, Callable[..., Any]] = {}


def register(
    op: str,
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    launcher: str | None,
    kernel_file: str | None = None,
    cpu: Callable | None = None,
) -> Callable[..., Any]:
    """Define ``fastadapter::<name>`` and return the function that runs it: ``run(backend, *args)``.

    The C++ extension implements the schema for CPU tensors, ``fastadapter.kernels.<kernel_file>.<launcher>`` for CUDA
    ones.
    ``backend`` is a resolved one (:func:`fastadapter.ops.backends.choose_backend`).

    Args:
        op: the public op that ``name`` belongs to.
        kernel_file: ``op`` unless given.
        schema: arguments and results, without the name. The first argument is an activation tensor.
        reference, fake: plain PyTorch and tracing implementations with the arguments of the schema.
        launcher: ``None`` where there is no kernel of that name: on a GPU the op is then the reference.
        cpu: what implements it for CPU tensors, from other registered ops; a kernel of the extension unless given.
    """
    library.define(f"{name}{schema}")
    qualified = f"fastadapter::{name}"
    file = f"fastadapter.kernels.{kernel_file or op}"

    kernels = None

    def triton(*args):
        nonlocal kernels
        if launcher is None:
            return reference(*args)
        if kernels is None:
            kernels = importlib.import_module(file)
        return getattr(kernels, launcher)(*args)

    def checked(*args):
        self_check.ensure(op, args[0])
        return triton(*args)

    def gpu(*args):
        backend, _ = automatic_backend(args[0].device.type, args[0].dtype, op, args[0].shape[-1])
        return checked(*args) if backend == "triton" and launcher is not None else reference(*args)

    error = None if cpu is not None else extension_error(name)
    if cpu is not None:
        library.impl(name, cpu, "CPU")
    if error:
        library.impl(name, reference, "CPU")
        lack(op, "cpp", error)
    if launcher is not None and importlib.util.find_spec(file) is None:
        lack(op, "triton", f"there is no Triton kernel of {op}")
    library.impl(name, gpu, "CUDA")
    GPU_IMPLEMENTATIONS[name] = gpu
    torch.library.register_fake(qualified, fake, lib=library)
    registered = getattr(torch.ops.fastadapter, name).default
    _REFERENCES[registered] = reference

    def run(backend: str, *args):
        if backend is UNCHECKED:
            return triton(*args)
        if backend == "reference" and not (error and args[0].device.type == "cpu"):
            return reference(*args)
        # Where the CPU has no kernel the registered op is the reference, and opaque to torch.compile.
        if backend == "triton":
            if args[0].is_cpu and "cpu" not in GPU_TYPES:
                return triton(*args)  # in Triton's interpreter; the registered op of a CPU is the C++ one
            if is_plain(args):
                return checked(*args)
        return registered(*args)

    return run


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What every registered op is in plain PyTorch operations, for programs that are to run without this library.

    An exported program calls ``torch.ops.fastadapter``, so it runs with the kernels wherever this library is imported.
    Taken apart it is PyTorch alone, slower, with results within rounding, and can become ONNX
    (``pip install "fastadapter[onnx]"``).

    Returns: a new table for ``torch.export.ExportedProgram.run_decompositions``.

    >>> from fastadapter.nn import Bottleneck
    >>> with torch.no_grad():
    ...     program = torch.export.export(Bottleneck(8, 2), (torch.randn(3, 8),))
    >>> program = program.run_decompositions(decompositions())
    >>> [node.target for node in program.graph.nodes if "fastadapter" in str(node.target)]
    []
    >>> torch.onnx.export(program, dynamo=True).save("adapter.onnx")  # doctest: +SKIP
    """
    return {op: functools.partial(_written_to_nothing, reference) for op, reference in _REFERENCES.items()}


def _written_to_nothing(reference: Callable[..., Any], *args: Any) -> Any:
    with _CopiesAsValues():
        return reference(*args)


class _CopiesAsValues(TorchFunctionMode):
    """References write results into a tensor with the strides that they promise; a graph must not write."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy.default(*args)
        return func(*args, **(kwargs or {}))


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), str, float, int, bool))


def is_plain(args: tuple) -> bool:
    """Whether nobody but eager PyTorch itself would see a call of a registered op with ``args``.

    The way through the dispatcher back into Python takes longer than a short kernel runs, so such a call goes without.
    """
    return (
        _PLAIN.issuperset(map(type, args))
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def only_needed(grads: tuple[torch.Tensor, ...], needed: tuple[bool, ...]) -> tuple[torch.Tensor, ...]:
    """What a backward returns: an unneeded gradient has shape ``(0,)``."""
    return tuple(grad if need else grad.new_empty(0) for grad, need in zip(grads, needed, strict=True))


def fake_grad(x: torch.Tensor, need: bool) -> torch.Tensor:
    """The fake of an activation's gradient, strided like it."""
    return torch.empty_like(x) if need else x.new_empty(0)


def fake_bank_grad(x: torch.Tensor, need: bool) -> torch.Tensor:
    """The fake of a bank's gradient, contiguous."""
    return x.new_empty(x.shape if need else 0)
