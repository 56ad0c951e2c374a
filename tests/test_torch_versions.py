"""The extension compiles against every torch that setup.py promises, not just against the one that is installed.

Headers come from wheels that pip downloads and nobody installs. Those for macOS have the same headers as all others in
a tenth of the bytes. They stay in the cache folder (``$FASTADAPTER_CACHE``), 9 MB a release.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from fastadapter.ops import self_check

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "2.10.0"
# The last release of each minor version that exists; .ci/run compiles against the first and the last.
PROMISED = (OLDEST, "2.11.0", "2.12.1", "2.13.0", "2.14.1")
# Everything of torch that csrc/ names and that is in the headers of the oldest release. Members of Tensor are not here:
# they are left to the compiler. A newer name needs a guard by TORCH_FEATURE_VERSION, a fallback and a line below.
STABLE_NAMES = {
    "AtenTensorHandle",
    "STABLE_TORCH_LIBRARY_FRAGMENT",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_cpu_addmm_out",
    "aoti_torch_cpu_mm_out",
    "aoti_torch_create_tensor_from_blob",
    "aoti_torch_empty_strided",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "torch::headeronly::ScalarType",
    "torch::headeronly::toString",
    "torch::stable::Tensor",
    "torch::stable::contiguous",
    "torch::stable::empty_like",
    "torch::stable::new_empty",
    "torch::stable::parallel_for",
    "torch::stable::transpose",
}
NAME = re.compile(r"\btorch::[\w:]*\w|\b\w*TORCH_\w+|\b(?:aoti_)?torch_\w+|\bAten\w+|\b(?:c10|at)::[\w:]*\w")
# In place of the compiler: host code is compiled by it, without what takes time; kernels and the link do nothing,
# since they use no header of torch and no library of that release is here.
STAND_IN = """#!/bin/sh
for word in "$@"; do
  case $word in *_kernel.cpp) kernel=1;; -c) compiling=1;; esac
  [ "$previous" = -o ] && output=$word
  previous=$word
done
if [ "$compiling" ] && [ ! "$kernel" ]; then exec {compiler} "$@" -O0; fi
: > "$output"
"""


def sources():
    return {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").iterdir())}


def without_comments(text):
    return re.sub(
        r"//.*|/\*.*?\*/", "", re.sub(r"#include.*", "", text), flags=re.DOTALL if "/*" in text else 0
    )


def headers(version, folder):
    """``torch`` folder of that release with headers and version.py, downloaded where the cache has none."""
    kept = self_check.cache_dir() / "torch-headers" / version / "torch"
    if kept.is_dir():
        return kept
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += [
        "--python-version",
        "3.11",
        "--platform",
        "macosx_11_0_arm64",
        "--platform",
        "macosx_14_0_arm64",
    ]
    command += ["--disable-pip-version-check", "--dest", folder, f"torch=={version}"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    wheels = list(folder.glob("torch-*.whl"))
    if process.returncode != 0 or not wheels:
        last = (process.stderr.strip() or "no wheel came").splitlines()[-1]
        pytest.skip(f"headers of torch {version} are not in the cache and pip cannot fetch them: {last}")
    kept.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent.parent) as fresh, zipfile.ZipFile(wheels[0]) as archive:
        wanted = ("torch/include/torch/", "torch/version.py")
        archive.extractall(f"{fresh}/whole", [name for name in archive.namelist() if name.startswith(wanted)])
        try:
            Path(fresh, "whole").rename(kept.parent)
        except OSError:  # another process was first
            assert kept.is_dir()
    wheels[0].unlink()
    return kept


def test_sources_name_only_what_the_oldest_torch_has():
    """2.13's STABLE_TORCH_ERROR_CODE_CHECK cost everybody with an older torch the extension, without an error."""
    used = {
        name
        for text in sources().values()
        for name in NAME.findall(without_comments(text))
        if not name.startswith("FASTADAPTER")
    }
    assert used == STABLE_NAMES


def test_the_oldest_promised_torch_is_that_of_the_build():
    found = re.search(r"TORCH_MINIMUM = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert OLDEST.startswith(f"{found[1]}.{found[2]}.")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={found[1]}.{found[2]}"' in project


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for the compiler is a shell script")
@pytest.mark.parametrize("version", PROMISED)
def test_extension_compiles_against(version, tmp_path):
    """By setup.py with its own flags. What the objects ask of torch's libraries, the oldest release declares."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    torch = headers(version, tmp_path)
    for name in ("csrc", "fastadapter"):
        junk = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "sources" / name, ignore=junk)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "sources" / name)
    stand_in = tmp_path / "compiler"
    stand_in.write_text(STAND_IN.format(compiler=compiler))
    stand_in.chmod(0o755)
    environment = {**os.environ, "CC": str(stand_in), "CXX": str(stand_in)}
    environment |= {"FASTADAPTER_BUILD": "1", "FASTADAPTER_TORCH": str(torch)}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "objects"]
    command += ["--build-lib", tmp_path / "library"]
    process = subprocess.run(
        command, cwd=tmp_path / "sources", env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert f'"torch": "{version}' in (tmp_path / "library/fastadapter/_build_info.json").read_text()
    objects = [path for path in (tmp_path / "objects").rglob("*.o") if path.stat().st_size]
    assert {path.stem for path in objects} == {
        path.stem for path in sources() if path.suffix == ".cpp" and not path.stem.endswith("_kernel")
    }
    if shutil.which("nm") is None:
        return
    listing = subprocess.run(["nm", "-uC", *objects], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" U (at|c10|torch)::", listing), "C++ symbols of torch are no stable ABI"
    needed = set(re.findall(r"\b_?((?:aoti_)?torch_\w+)", listing))
    assert "torch_library_impl" in needed
    # c_shim_cpu.h too: what models that AOTInductor compiled call, and go on calling with later releases
    shims = (headers(OLDEST, tmp_path) / "include/torch/csrc").rglob("*shim*.h")
    declared = {word for path in shims for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    assert not needed - declared


@pytest.mark.parametrize("name", [path.name for path in sources() if path.stem.endswith("_kernel")])
def test_kernels_are_free_of_torch(name):
    """Nor is what they include, so that their objects are the same for every release."""
    found, waiting = set(), [name]
    while waiting:
        text = (ROOT / "csrc" / waiting.pop()).read_text(encoding="utf-8")
        for include in re.findall(r'#include [<"](.*)[>"]', text):
            assert not include.startswith(("torch/", "ATen/", "c10/")), f"{include}, from {name}"
            if (ROOT / "csrc" / include).is_file() and include not in found:
                found.add(include)
                waiting.append(include)
