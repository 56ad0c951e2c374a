"""kernels/launch.py: what is worked out once per layout, and when a launch leaves Triton's own path.

Correct means: a launcher gets the addresses of the tensors of this call and all else of the layout's first one, and
nothing that Triton would compile anew for is skipped. The GPU's launcher is made up; kernels in the interpreter.
"""

import importlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
launch = importlib.import_module("fastadapter.kernels.launch")
target = importlib.import_module("fastadapter.kernels.target")


class Kernel:
    """Notes ordinary launches as a ``JITFunction`` would do them, and direct ones."""

    __name__ = "kernel"
    arg_names = ("out_ptr", "scale", "x_ptr", "STRIDES", "BLOCK")

    def __init__(self):
        self.ordinary, self.direct, self.pre_run_hooks = [], [], []

    def __getitem__(self, grid):
        def run(**arguments):
            self.ordinary.append((grid, arguments))
            return types.SimpleNamespace(
                run=lambda *args: self.direct.append(args), function="function", packed_metadata="metadata"
            )

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_can_be_direct", lambda compiled: True)
    monkeypatch.setattr(launch, "_current_device", lambda: -1)
    monkeypatch.setattr(launch, "_current_stream", lambda device: "stream")
    return Kernel()


def make(kernel):
    constants = {"scale": 2.0, "STRIDES": (4, 1), "BLOCK": 16, "num_warps": 4}
    return launch.Launch(kernel, (3,), ("out_ptr", "x_ptr"), constants)


def aligned(offset: int = 0) -> torch.Tensor:
    """A tensor whose address is ``offset`` bytes past a multiple of 16."""
    store = torch.zeros(64, dtype=torch.int8)
    start = -store.data_ptr() % 16 + offset
    return store[start : start + 16]


def test_the_first_launch_is_ordinary_and_the_next_direct(kernel):
    run = make(kernel)
    first, second = [aligned(), aligned()], [aligned(), aligned()]
    run(*first)
    assert kernel.ordinary == [
        (
            (3, 1, 1),
            {
                "out_ptr": first[0],
                "x_ptr": first[1],
                "scale": 2.0,
                "STRIDES": (4, 1),
                "BLOCK": 16,
                "num_warps": 4,
            },
        )
    ]
    run(*second)
    assert len(kernel.ordinary) == 1
    pointers = [x.data_ptr() for x in second]
    assert kernel.direct == [
        (3, 1, 1, "stream", "function", "metadata", None, None, None)
        + (pointers[0], 2.0, pointers[1], (4, 1), 16)
    ]


def test_pointers_that_are_aligned_otherwise_are_another_kernel(kernel):
    """Triton compiles wide loads for a pointer whose address is a multiple of 16 bytes."""
    run = make(kernel)
    run(aligned(), aligned())
    for offsets in ((4, 0), (0, 4), (4, 4)):
        run(*map(aligned, offsets))
    assert len(kernel.ordinary) == 4 and not kernel.direct
    run(aligned(8), aligned(0))
    assert len(kernel.ordinary) == 4 and len(kernel.direct) == 1


def test_no_tensor_and_an_empty_one(kernel):
    run = make(kernel)
    for _ in range(2):
        run(aligned(), None)
    run(torch.empty(0), None)
    assert [args[9:12] for args in kernel.direct] == [
        (kernel.direct[0][9], 2.0, 0),
        (0, 2.0, 0),
    ]


@pytest.mark.parametrize("hook", ["enter", "exit", "own", "replaced"])
def test_a_profiler_sees_every_launch(kernel, hook, monkeypatch):
    """With a hook Triton's own path is taken, which calls it."""
    run = make(kernel)
    run(aligned(), aligned())
    chain, noticed = {"enter": launch._ENTER, "exit": launch._EXIT}.get(hook), print
    if chain is not None:
        monkeypatch.setattr(chain, "calls", [noticed])
    elif hook == "own":
        kernel.pre_run_hooks.append(noticed)
    else:
        monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", noticed)
    run(aligned(), aligned())
    assert len(kernel.ordinary) == 2 and not kernel.direct


def test_what_is_not_known_stays_ordinary(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_can_be_direct", lambda compiled: False)
    run = make(kernel)
    for _ in range(3):
        run(aligned(), aligned())
    assert len(kernel.ordinary) == 3


def test_another_current_device_is_left_as_it_was(kernel, monkeypatch):
    run, entered = make(kernel), []
    run(aligned(), aligned())

    class Guard:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            monkeypatch.setattr(launch, "_current_device", lambda: -1)

        def __exit__(self, *error):
            monkeypatch.setattr(launch, "_current_device", lambda: 5)

    monkeypatch.setattr(launch, "_current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    run(aligned(), aligned())
    assert entered == [-1] and len(kernel.direct) == 1


def test_a_missing_argument_is_named(kernel):
    with pytest.raises(TypeError, match="launch of kernel: no value for STRIDES, BLOCK"):
        launch.Launch(kernel, (1,), ("out_ptr", "x_ptr"), {"scale": 1.0})


@pytest.mark.parametrize(
    "version, known",
    [("3.5.1", False), ("3.6.0", True), ("3.9.0", True), ("3.9.1+git", True), ("3.10.0", False)],
)
def test_versions_that_were_read(version, known, monkeypatch):
    launch._known_version.cache_clear()
    monkeypatch.setattr(triton, "__version__", version)
    assert launch._known_version() is known
    launch._known_version.cache_clear()


def test_the_installed_triton_launches_as_assumed():
    """Order of arguments from the compiled kernel to its launcher; a Triton that changes it must be read first."""
    if not launch._known_version():
        pytest.skip("a Triton that no direct launch is done with")
    source = inspect.getsource(importlib.import_module("triton.runtime.jit").JITFunction.run)
    words = "".join(source.split())
    assert (
        "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())" in words
    )
    driver = importlib.import_module("triton.backends.nvidia.driver")
    parameters = list(inspect.signature(driver.CudaLauncher.__call__).parameters)
    assert parameters[:6] == ["self", "gridX", "gridY", "gridZ", "stream", "function"]


def _plain_kernel(out_ptr, scale, x_ptr, STRIDES, n, BLOCK: tl.constexpr, LAST: tl.constexpr):
    pass


def test_arguments_are_those_that_triton_binds(kernel):
    """In number and order, tuples and compile-time values included; options such as num_warps are none of them."""
    jit = importlib.import_module("triton.runtime.jit")
    compiler = importlib.import_module("triton.compiler.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    function = jit.JITFunction(_plain_kernel)
    backend = compiler.make_backend(backends.GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(function.signature, function.params, backend)
    tensors = [aligned(), aligned()]
    constants = {"scale": 0.5, "STRIDES": (4, 1), "n": 7, "BLOCK": 16, "LAST": True}
    bound, *_ = bind(out_ptr=tensors[0], x_ptr=tensors[1], num_warps=4, **constants)
    kernel.arg_names = function.arg_names
    run = launch.Launch(kernel, (1, 2), ("out_ptr", "x_ptr"), {**constants, "num_warps": 4})
    for _ in range(2):
        run(*tensors)
    (arguments,) = kernel.direct
    assert arguments[:3] == (1, 2, 1)
    assert list(arguments[9:]) == [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in bound.values()]


@pytest.fixture
def kept(monkeypatch):
    """Layouts are kept, as they are outside the interpreter."""
    monkeypatch.setattr(launch, "_interpreted", lambda: False)
    yield
    launch.forget()


def counted(monkeypatch):
    asked = []

    @launch.prepared(tensors=2)
    def twice(x, y, factor):
        asked.append((tuple(x.shape), factor))
        if factor == 0:
            raise ValueError("factor must not be 0")
        return lambda x, y: x * factor if y is None else x * factor + y

    return twice, asked


def test_a_layout_is_worked_out_once(kept, monkeypatch):
    twice, asked = counted(monkeypatch)
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(twice(x, None, 2.0), x * 2)
    assert torch.equal(twice(x + 1, None, 2.0), (x + 1) * 2) and len(asked) == 1


def test_whatever_differs_is_another_layout(kept, monkeypatch):
    twice, asked = counted(monkeypatch)
    x = torch.randn(4, 4)
    calls = [
        (x, None, 2.0),
        (x.T, None, 2.0),
        (x[:2], None, 2.0),
        (x.double(), None, 2.0),
        (x.to("meta"), None, 2.0),
        (x, x, 2.0),
        (x, x.T, 2.0),
        (x, None, 3.0),
    ]
    for _ in range(2):
        for call in calls:
            twice(*call)
    assert len(asked) == len(calls)
    with target.assume("sm_90"):
        twice(*calls[0])
    assert len(asked) == len(calls) + 1


def test_an_error_is_raised_every_time_and_layouts_do_not_pile_up(kept, monkeypatch):
    twice, asked = counted(monkeypatch)
    for _ in range(2):
        with pytest.raises(ValueError, match="factor must not be 0"):
            twice(torch.ones(2), None, 0)
    assert len(asked) == 2
    monkeypatch.setattr(launch, "LIMIT", 3)
    for size in range(10):
        twice(torch.ones(size), None, 1)
    assert len(launch._kept[-1]) <= 3
    launch.forget()
    assert not launch._kept[-1]


def test_the_interpreter_keeps_nothing(monkeypatch):
    monkeypatch.setattr(launch, "_interpreted", lambda: True)
    twice, asked = counted(monkeypatch)
    for _ in range(2):
        twice(torch.ones(2), None, 1)
    assert len(asked) == 2


def test_the_cost_on_the_host_is_measured_without_a_gpu():
    """``benchmarks.host_cost`` in a process of its own, with kernels that are not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host_cost", "--calls", "1", "--op", "gated_prefix"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows == ["gated_prefix"] * 4 and " calls" in done.stdout
