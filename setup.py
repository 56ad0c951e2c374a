"""Builds ``fastadapter/_C.abi3.so`` against the torch that is already installed, or explains why it did not.

Plain ``pip install .`` works: torch is not a build requirement and is never imported here, only its headers
and libraries are used. Without a compiler or torch the result is a pure Python package; the reason goes to
stderr and to ``fastadapter/_build_info.json``. FASTADAPTER_BUILD=1 makes a failure fatal, =0 skips it.
"""

import importlib.util
import json
import os
import platform
import re
import runpy
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

TORCH_MINIMUM = (2, 10)  # the first with parallel_for in the stable ABI
PYTHON_MINIMUM = (3, 10)
ABI3 = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
SOURCES = sorted(glob("csrc/*.cpp"))
# The kernels are compiled once per instruction set and chosen at run time.
KERNELS = [source for source in SOURCES if source.endswith("_kernel.cpp")]
ISAS = {"isa_default": []}
# By path: importing the package would import torch.
SOURCE_DIGEST = runpy.run_path("fastadapter/_source_tree.py")["source_digest"]
if X86:
    ISAS["isa_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["isa_avx512"] = [*ISAS["isa_avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


class Unavailable(Exception):
    """The extension cannot be built here; the message says why."""


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch to build against.

    A folder named by FASTADAPTER_TORCH, else the importable torch, else the one of the environment that pip
    installs into: in pip's isolated build torch is not importable, but sys.prefix is still that environment.
    """
    named = os.environ.get("FASTADAPTER_TORCH")
    if named:
        candidates = [Path(named), Path(named, "torch")]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(path) for path in (spec and spec.submodule_search_locations) or ()]
        candidates += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    for folder in candidates:
        if (folder / "version.py").is_file():
            break
    else:
        where = f"in FASTADAPTER_TORCH={named}" if named else "(set FASTADAPTER_TORCH to its folder)"
        raise Unavailable(f"no torch found {where}")
    text = (folder / "version.py").read_text(encoding="utf-8")
    match = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    if match is None or (int(match[2]), int(match[3])) < TORCH_MINIMUM:
        found = match[1] if match else "of unknown version"
        raise Unavailable(
            f"torch {found} is installed, {'.'.join(map(str, TORCH_MINIMUM))} or newer is needed"
        )
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise Unavailable(f"torch {match[1]} is installed without its C++ headers")
    return folder, match[1]


class BuildExtension(build_ext):
    """One extension from the sources in csrc/, or none and a reason."""

    def build_extensions(self):
        wanted = os.environ.get("FASTADAPTER_BUILD", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"FASTADAPTER_BUILD must be 0, 1 or unset, got {wanted!r}")
        info = {"extension": False, "reason": "", "torch": None, "sources": None}
        (extension,) = self.extensions
        try:
            if wanted == "0":
                raise Unavailable("FASTADAPTER_BUILD=0")
            if not ABI3:
                raise Unavailable("this Python has no stable ABI (free-threaded, or not CPython)")
            torch, info["torch"] = find_torch()
            self.compile_and_link(extension, torch)
            info["extension"] = True
            info["sources"] = SOURCE_DIGEST(Path("."))
        except (Unavailable, BaseError, CCompilerError) as error:
            if wanted == "1":
                raise
            info["reason"] = str(error) if isinstance(error, Unavailable) else self.describe(error)
            self.make_pure()
            print(f"fastadapter: installing without the C++ extension: {info['reason']}", file=sys.stderr)
        self.write_info(info)

    def compile_and_link(self, extension, torch):
        common = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
        jobs = [(source, Path(source).stem, common, []) for source in extension.sources]
        jobs += [
            # Contraction: fused multiply-adds, also where -std=c++17 would switch them off.
            (
                source,
                isa,
                [*common, "-ffp-contract=fast", "-Wno-psabi", *flags],
                [("FASTADAPTER_ISA", isa)],
            )
            for source in KERNELS
            for isa, flags in ISAS.items()
        ]

        def compile_one(job):
            source, name, flags, macros = job
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, name),
                macros=[*extension.define_macros, *macros],
                include_dirs=[str(torch / "include")],
                extra_postargs=flags,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        # No run path: torch is imported before the extension is loaded, so its libraries are found by name.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            target_lang="c++",
        )

    def describe(self, error):
        """A compiler that ran has already printed its complaint; the command line is no help to anyone."""
        if "exit status" not in str(error):
            return " ".join(str(error).split())
        command = (getattr(self.compiler, "compiler_cxx", None) or ["the compiler"])[0]
        return f"{command} failed (FASTADAPTER_BUILD=1 pip install -v shows why)"

    def make_pure(self):
        """Leave no trace of an extension, so that the wheel is tagged py3-none-any."""
        file = os.path.basename(self.get_ext_fullpath("fastadapter._C"))
        for folder in self.output_folders():
            (folder / file).unlink(missing_ok=True)
        self.extensions = []
        self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = True

    def output_folders(self):
        """Where the package is built, and its place in the source tree when building in place."""
        folders = [Path(self.build_lib, "fastadapter")]
        if self.in_place:
            folders.append(Path(self.get_finalized_command("build_py").get_package_dir("fastadapter")))
        return folders

    def write_info(self, info):
        """The outcome, for `fastadapter doctor`."""
        text = json.dumps(info, indent=2) + "\n"
        for folder in self.output_folders():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.json").write_text(text, encoding="utf-8")

    def run(self):
        # setuptools clears self.inplace while it builds.
        self.in_place = self.inplace or self.editable_mode
        super().run()


if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")  # torch has one architecture per wheel

setup(
    ext_modules=[
        Extension(
            "fastadapter._C",
            [source for source in SOURCES if source not in KERNELS],
            depends=[*KERNELS, *sorted(glob("csrc/*.h"))],
            define_macros=[
                ("Py_LIMITED_API", "0x{:02x}{:02x}0000".format(*PYTHON_MINIMUM)),
                ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH_MINIMUM)),
                *([("FASTADAPTER_X86", "1")] if X86 else []),
            ],
            py_limited_api=ABI3,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*PYTHON_MINIMUM)}} if ABI3 else {},
)
