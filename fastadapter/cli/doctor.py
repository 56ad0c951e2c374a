"""``fastadapter doctor``: what is installed, what this machine has, and which backend each op uses and why.

Needs torch alone. Nothing is changed and no network is used.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

import fastadapter
from fastadapter import _source_tree

Row = tuple[str, str, str]
MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 10)
# Package, lowest supported version, what it is for.
OPTIONAL = (
    ("transformers", (5, 3), "attach adapters to models, finetune, generate, demo"),
    ("accelerate", (1, 10), "training on one or more processes"),
    ("safetensors", (0, 5), "saving and loading adapters"),
    ("gguf", (0, 17), "the demo's model"),
    ("tqdm", (4, 66), "progress bars"),
    ("matplotlib", (3, 8), "the plots of compare and demo"),
    ("scikit-learn", (1, 4), "the row features of compare"),
    ("peft", (0, 18), "comparison in the benchmarks"),
)
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "asimd", "sve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the rows and the backends as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when Python or torch is too old to work, else 0."""
    rows = report()
    if args.json:
        from fastadapter import ops

        fields = [dict(zip(("name", "status", "detail"), row)) for row in rows]
        print(json.dumps({"rows": fields, "backends": ops.backends()}, indent=2))
    else:
        print(format_table(rows))
    required = {"Python", "torch"}
    return int(any(name in required and status == "missing" for name, status, _ in rows))


def report() -> list[Row]:
    """Rows ``(name, status, detail)`` with status ``ok``, ``missing`` or ``note``.

    ``missing``: absent or too old. ``note``: there, but something about it limits what runs.

    >>> {status for _, status, _ in report()} <= {"ok", "missing", "note"}
    True
    """
    rows = [_fastadapter(), _python(), _torch(), *_cpu(), _extension(), _triton(), *_gpus()]
    rows += [_package(name, minimum, purpose) for name, minimum, purpose in OPTIONAL]
    return rows + _backends()


def version_line() -> str:
    """What ``fastadapter --version`` prints: this package, what it stands on, and whether the extension is there.

    >>> version_line().startswith(f"fastadapter {fastadapter.__version__} (")
    True
    """
    from fastadapter.ops.backends import extension_error

    error = extension_error()
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("triton", "transformers", "accelerate", "safetensors"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    parts.append("C++ extension loaded" if error is None else f"no C++ extension: {error}")
    return f"fastadapter {fastadapter.__version__} ({', '.join(parts)})"


def format_table(rows: list[Row]) -> str:
    """The rows as aligned text.

    >>> format_table([("torch", "ok", "2.13.0")])
    'torch  ok       2.13.0'
    """
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {status:<7}  {detail}" for name, status, detail in rows)


def _at_least(version: str, minimum: tuple[int, int]) -> bool:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= minimum


def _fastadapter() -> Row:
    where = f"{fastadapter.__version__}, {_source_tree.PACKAGE}"
    if _source_tree.checkout() is None:
        return "fastadapter", "ok", where
    return "fastadapter", "ok", f"{where} (a checkout: changes there are seen at once)"


def _python() -> Row:
    status = "ok" if sys.version_info >= MINIMUM_PYTHON else "missing"
    return "Python", status, f"{platform.python_version()} ({sys.executable}); >= 3.10 needed"


def _torch() -> Row:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    fine = _at_least(torch.__version__, MINIMUM_TORCH)
    return "torch", "ok" if fine else "missing", f"{torch.__version__} ({build}); >= 2.10 needed"


def _cpu() -> list[Row]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""  # not Linux: the platform's name for it has to do
    if found := re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE):
        model = found.group(1)
    if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
        flags = set(found.group(1).split())
    features = " ".join(name for name in CPU_FEATURES if name in flags) or "features unknown"
    used = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    capped = os.environ.get("ATEN_CPU_CAPABILITY")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()}"
    limit = os.environ.get("OMP_NUM_THREADS")
    return [
        ("CPU", "ok", f"{model}; {features}"),
        (
            "CPU capability",
            "note" if capped else "ok",
            f"{used}, set by ATEN_CPU_CAPABILITY={capped}" if capped else used,
        ),
        ("threads", "ok", f"{threads} processors" + (f", OMP_NUM_THREADS={limit}" if limit else "")),
    ]


def _extension() -> Row:
    from fastadapter.ops.backends import extension_error

    error = extension_error()
    folder, _ = _source_tree.extension_folder()
    build = _source_tree.build_info(folder)
    if error is None:
        detail = f"loaded, built for torch {build.get('torch') or 'unknown'}"
        if folder != _source_tree.PACKAGE:
            detail += f", from the installed copy in {folder}, which has the same csrc/"
        return "C++ extension", "ok", detail
    if reason := build.get("reason"):
        error = f"not built: {reason}"
    elif build.get("torch") not in (None, torch.__version__):
        error += (
            f" (built for torch {build['torch']}, running {torch.__version__}: install fastadapter again)"
        )
    return "C++ extension", "missing", error


def _triton() -> Row:
    if importlib.util.find_spec("triton") is None:
        return "Triton", "missing", 'not installed (GPU kernels): pip install "fastadapter[triton]"'
    version = metadata.version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton", "note", f"{version}; TRITON_INTERPRET=1: kernels run slowly, in Python"
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton", "note", f"{version}; no device it can drive"
    return "Triton", "ok", version


def _gpus() -> list[Row]:
    if not torch.cuda.is_available():
        reason = (
            "none" if torch.version.cuda or torch.version.hip else "none that this build of torch can use"
        )
        return [("GPU", "note", reason)]
    from fastadapter.ops import self_check

    rows: list[Row] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if torch.version.cuda:
            detail += f", sm_{properties.major}{properties.minor}, driver {self_check.driver_version() or 'unknown'}"
        rows.append((f"GPU {index}", "ok", detail))
        rows += _hazards(index)
    return rows


def _hazards(index: int) -> list[Row]:
    """Known faults of the installed compilers on this GPU, and what is done about them."""
    if importlib.util.find_spec("triton") is None:
        return []
    from fastadapter.kernels import target, toolchain

    arch = target.arch(torch.device("cuda", index))
    found = toolchain.hazards(*toolchain.installed(arch), arch)
    return [
        (f"GPU {index} compilers", "note", f"{hazard.what} ({hazard.source}); {hazard.action}")
        for hazard in found
    ]


def _package(name: str, minimum: tuple[int, int], purpose: str) -> Row:
    needed = ".".join(map(str, minimum))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        extra = "bench" if name == "peft" else "hf"
        return name, "missing", f'not installed (for: {purpose}): pip install "fastadapter[{extra}]"'
    if not _at_least(version, minimum):
        return name, "missing", f"{version} is too old, >= {needed} needed (for: {purpose})"
    return name, "ok", f"{version}"


def _backends() -> list[Row]:
    from fastadapter import ops

    rows: list[Row] = []
    for entry in ops.backends():
        # The reference is right but slow: worth a look, not an error.
        status = "note" if entry["backend"] == "reference" else "ok"
        rows.append((f"{entry['op']} on {entry['device']}", status, f"{entry['backend']}: {entry['reason']}"))
    return rows
