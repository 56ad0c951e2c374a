"""One small case of an op against fp64 on the GPU itself, before its kernels are first used there.

Compilers have produced wrong products without a word (``fastadapter.kernels.toolchain`` lists what is known), so the
first call of an op on a device, in a dtype, runs :data:`PROBES` and compares output and gradients with the fp64
reference, by the same budget as the tests: at most twice the error of the reference in that dtype. A pass is noted in
``<cache>/self-check.json`` under device, driver and versions, and is not repeated; in a process it costs one look into
a set. A failure raises and is noted nowhere: nothing falls back in silence.

Nothing is checked in Triton's interpreter or on a CPU. While a CUDA graph is captured nothing can be compared, so a
capture before the check raises; ``fastadapter.warmup()`` or one call beforehand avoids it.

A check may start anywhere: in a forward, in a backward, inside the backward of another check. On a GPU autograd runs
all backwards of a device on one thread of its own, so nothing here ever waits for another thread: a check that waits in
a backward would hold up the thread that the other check needs. There is no lock; two threads at once check twice.
What lets the calls of a probe through is no state of a thread, which would be lost on the way to autograd's, but the
backend they name: :data:`fastadapter.ops.backends.UNCHECKED`, which an op hands from its forward to its backward. So
nobody else's call can slip through while a verdict is out.

=========  ===================================================================================================
a key is   when
=========  ===================================================================================================
unknown    at first, and after a check that could not be finished (device lost, out of memory): the next tries again
passed     in ``_passed`` until the process ends, on disk until one of the versions changes
failed     in ``_failed`` until the process ends: every call raises the same, nothing is run again
=========  ===================================================================================================
"""

import contextlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastadapter import reference
from fastadapter.ops.backends import UNCHECKED

Key = tuple[str, torch.device, torch.dtype]
# Units in the last place of the largest value, granted on top of twice the reference's error; as in the tests.
FLOOR_ULP = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}

_passed: set[Key] = set()
_failed: dict[Key, str] = {}


def ensure(op: str, tensor: Tensor) -> None:
    """Return if the kernels of ``op`` are known to be right on the device and in the dtype of ``tensor``.

    Raises:
        RuntimeError: they are not (with what was off, and the versions), the check could not be finished, or it would
            fall into the capture of a CUDA graph.
    """
    key = (op, tensor.device, tensor.dtype)
    if key not in _passed:
        _settle(key)


def check(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Check unless a pass is noted; whether it had to run. Raises as :func:`ensure`."""
    key = (op, device, dtype)
    return key not in _passed and _settle(key)


def _settle(key: Key) -> bool:
    """Find the verdict on ``key`` and note it; whether a check had to run for it."""
    op, device, dtype = key
    if key in _failed:
        raise RuntimeError(_failed[key])
    with _on(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{op}: its kernels have not been checked on {device} in {dtype} yet, which cannot be done while a "
                "CUDA graph is captured: call fastadapter.warmup() or the op once before"
            )
        versions = describe(device)
        name = "; ".join([op, str(dtype).removeprefix("torch."), *(f"{k} {v}" for k, v in versions.items())])
        noted = name in _load()
        if not noted:
            try:
                with _undisturbed(device):
                    wrong = compare(op, device, dtype, UNCHECKED)
            except torch.OutOfMemoryError:
                raise  # callers handle it by its type
            except RuntimeError as error:
                raise RuntimeError(
                    f"{op}: the check of its kernels on {device} in {dtype} could not be finished ({name}): {error}"
                ) from error
            if wrong:
                _failed[key] = (
                    f"{op}: the Triton kernels give wrong results on this device and are not used ({name}): "
                    f"{'; '.join(wrong)}. `fastadapter doctor` shows known faults of these versions"
                )
                raise RuntimeError(_failed[key])
            _note(name)
    _passed.add(key)
    return not noted


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Its current stream is the one that a call with tensors of ``device`` would run on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Plain eager PyTorch, whatever the caller runs in.

    Autocast would round the references too and so grant more error; hooks on saved tensors (activation checkpointing)
    would count the probes' among their own; modes would see operations that no model made.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield


def compare(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> list[str]:
    """What of ``backend`` misses the budget in the probes of ``op``; empty when all is well."""
    wrong = []
    for probe in PROBES[op]:
        for trained in dict.fromkeys((dtype, torch.float32)):
            inputs = probe.inputs(device, dtype, trained)
            exact = probe.plain({name: x.double() for name, x in inputs.items()}, torch.float64)
            plain = probe.plain(inputs, dtype)
            found = probe.run(inputs, backend)
            for name, value in found.items():
                if error := _over_budget(value, plain[name], exact[name]):
                    wrong.append(f"{probe.name}, {name} with weights in {trained}: {error}")
    return wrong


def _over_budget(value: Tensor, plain: Tensor, exact: Tensor) -> str:
    largest = exact.abs().max().item()
    ulp = (
        torch.finfo(value.dtype).eps
        * 2 ** torch.tensor(max(largest, 1e-30), device="cpu").log2().floor().item()
    )
    allowed = 2 * (plain.double() - exact).abs().max().item() + FLOOR_ULP[value.dtype] * ulp
    error = (value.double() - exact).abs().max().item()
    return "" if error <= allowed else f"off by {error:.3g} where {allowed:.3g} is allowed"


class _Probe:
    """A call of a public op: its tensors by name, and the rest of its arguments."""

    def __init__(
        self, name: str, op: str, shapes: dict[str, tuple[int, ...]], *, grad: bool = True, **options: Any
    ):
        self.name, self.op, self.shapes, self.grad, self.options = name, op, shapes, grad, options

    def inputs(self, device: torch.device, dtype: torch.dtype, trained: torch.dtype) -> dict[str, Tensor]:
        """Random operands; those of a bank in ``trained``, gate and lse in fp32 and nowhere near zero."""
        generator = torch.Generator().manual_seed(0)
        drawn = {}
        for name, shape in self.shapes.items():
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            if name in ("gate", "base_lse"):
                drawn[name] = (x.abs() + 0.2).to(device, torch.float32)
            elif name.endswith("_weight"):
                drawn[name] = (x * shape[-1] ** -0.5).to(device, trained)
            else:
                drawn[name] = x.to(device, trained if name.startswith("prefix_") else dtype)
        return drawn

    def run(self, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Output and gradients of the op by name."""
        from fastadapter import ops

        return self._results(inputs, partial(getattr(ops, self.op), **self.options, backend=backend))

    def plain(self, inputs: dict[str, Tensor], compute_dtype: torch.dtype) -> dict[str, Tensor]:
        """The same from plain PyTorch, with every intermediate in ``compute_dtype``."""
        options = dict(self.options)
        if "query" in inputs:
            options["softmax_scale"] = inputs["query"].shape[-1] ** -0.5
        return self._results(
            inputs, partial(getattr(reference, self.op), **options, compute_dtype=compute_dtype)
        )

    def _results(self, inputs: dict[str, Tensor], call: Callable[..., Any]) -> dict[str, Tensor]:
        leaves = {name: x.detach().clone().requires_grad_(self.grad) for name, x in inputs.items()}
        answer = call(**leaves)
        # the references of the attention ops return what their backward needs as well
        out = answer[0] if isinstance(answer, tuple) else answer
        if not self.grad:
            return {"output": out}
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu").to(
            out.device, out.dtype
        )
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
        return {"output": out.detach()} | {
            f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)
        }


def _attention(q_len: int, kv_len: int, head_dim: int, prefix_len: int) -> dict[str, tuple[int, ...]]:
    keys, prefix = (1, 2, kv_len, head_dim), (1, 2, prefix_len, head_dim)
    query = (1, 4, q_len, head_dim)
    return {"query": query, "key": keys, "value": keys, "prefix_key": prefix, "prefix_value": prefix}


_GATE = {"gate": (1, 4)}
# Sizes for which wide tiles and every loop are used, with a part of a tile at the end.
_LONG, _TOKEN = _attention(200, 200, 128, 10), _attention(1, 1024, 128, 10)
_QUERY = _LONG["query"]
PROBES: dict[str, list[_Probe]] = {
    "gated_prefix": [
        _Probe(
            f"prefix {prefix_len}",
            "gated_prefix",
            {"base": _QUERY, "query": _QUERY, "prefix_key": prefix, "prefix_value": prefix} | _GATE,
        )
        for prefix_len, prefix in ((10, (1, 2, 10, 128)), (100, (1, 2, 100, 128)))
    ],
    "gated_prefix_attention": [
        _Probe("causal", "gated_prefix_attention", _LONG | _GATE, is_causal=True),
        _Probe("one token", "gated_prefix_attention", _TOKEN | _GATE, grad=False),
    ],
    "prefix_attention": [
        _Probe("causal", "prefix_attention", _LONG, is_causal=True),
        _Probe("one token", "prefix_attention", _TOKEN, grad=False),
    ],
    "prefix_merge": [
        _Probe(
            "merge",
            "prefix_merge",
            {"base": _QUERY, "base_lse": _QUERY[:3], "query": _QUERY}
            | dict.fromkeys(("prefix_key", "prefix_value"), (1, 2, 10, 128)),
        )
    ],
    "bottleneck": [
        _Probe(
            f"{size} columns",
            "bottleneck",
            {"x": (2, 100, 256), "down_weight": (1, size, 256), "up_weight": (1, 256, size)},
        )
        for size in (24, 200)
    ],
}


def describe(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: device, driver, and every compiler in between."""
    import triton

    from fastadapter import __version__
    from fastadapter.kernels import target, toolchain

    arch = target.arch(device)
    found = {"device": torch.cuda.get_device_name(device), "driver": driver_version() or "unknown"}
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    if ptxas := toolchain.installed(arch).ptxas:
        found["ptxas"] = ptxas
    return found | {"fastadapter": __version__}


def driver_version() -> str:
    """Of NVIDIA's kernel module; "" where the system does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""  # AMD, Windows, or a sandbox that hides the file
    found = re.search(r"\s(\d+\.[\d.]+)\s", text)
    return found.group(1) if found else ""


def cache_dir() -> Path:
    """``$FASTADAPTER_CACHE``, else ``fastadapter`` in the user's cache folder; not created here."""
    if chosen := os.environ.get("FASTADAPTER_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastadapter"


def verdicts() -> Path:
    return cache_dir() / "self-check.json"


def _load() -> set[str]:
    """The noted passes; a file that is no list of names is as good as none."""
    try:
        names = json.loads(verdicts().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _note(name: str) -> None:
    """Add a pass, whole or not at all; two writers at once lose at most a note, which costs a check."""
    path = verdicts()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(sorted(_load() | {name}), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"the self-check of the kernels will run again: {path}: {error}", stacklevel=2)
