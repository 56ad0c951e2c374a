"""The build: a compiled abi3 wheel where that is possible, a pure Python one and a reason where it is not.

Every build starts from its own copy of the sources and uses the installed setuptools, so nothing is downloaded.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from fastadapter._source_tree import source_digest
from tests.support.builds import HAS_COMPILER, ROOT, build, copy_sources, python

TORCH = Path(torch.__file__).parent
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
pytestmark = pytest.mark.slow


@pytest.fixture
def sources(tmp_path):
    return copy_sources(tmp_path / "sources")


def build_wheel(sources, env=(), check=True):
    return build("wheel", sources, env, check)


def capability_of(wheel, folder):
    """Install the wheel into an empty folder and ask it which backend a CPU tensor takes, in a fresh process."""
    target = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    program = (
        "import json, torch, fastadapter; from fastadapter.ops.backends import automatic_backend\n"
        "base, key, gate = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8), torch.ones(1, 2)\n"
        "out = fastadapter.ops.gated_prefix(base, base, key, key, gate)\n"
        "assert not torch.equal(out, base)\n"
        "print(json.dumps([fastadapter.__file__, automatic_backend('cpu', torch.float32, 'gated_prefix')[0]]))"
    )
    output = python("-c", program, cwd=folder, env={"PYTHONPATH": str(target)}).stdout
    file, backend = json.loads(output)
    assert Path(file).is_relative_to(target)
    return backend


def build_info(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fastadapter/_build_info.json")), archive.namelist()


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_compiled_wheel(sources, tmp_path):
    """One wheel for every Python from 3.10 on; it finds torch's libraries without a run path."""
    process, (wheel,) = build_wheel(sources, {"FASTADAPTER_BUILD": "1"})
    assert "-cp310-abi3-" in wheel.name, process.stderr
    info, names = build_info(wheel)
    built = {"torch": torch.__version__, "sources": source_digest(ROOT)}
    assert info == {"extension": True, "reason": "", **built}
    assert "fastadapter/_C.abi3.so" in names and "fastadapter/kernels/gated_prefix.py" in names
    assert {"fastadapter/benchmarks/audit/command.py", "fastadapter/benchmarks/results/cpu.jsonl"} <= set(
        names
    )
    assert capability_of(wheel, tmp_path) == "cpp"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (NO_COMPILER, "/bin/false"),
        ({"FASTADAPTER_BUILD": "0"}, "FASTADAPTER_BUILD=0"),
        ({"FASTADAPTER_TORCH": "nowhere"}, "no torch found in FASTADAPTER_TORCH=nowhere"),
    ],
    ids=["no-compiler", "switched-off", "no-torch"],
)
def test_pure_wheel_says_why(sources, tmp_path, env, reason):
    """Tagged for any platform, so that no cache can mistake it for a compiled one; the package works."""
    stale = sources / "build/lib/fastadapter/_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"left over from another build")
    process, (wheel,) = build_wheel(sources, env)
    assert wheel.name.endswith("-py3-none-any.whl")
    lines = [line for line in process.stderr.splitlines() if line.startswith("fastadapter: ")]
    assert len(lines) == 1 and reason in lines[0]
    info, names = build_info(wheel)
    assert not info["extension"] and reason in info["reason"]
    assert not any(name.endswith(".so") for name in names)
    assert capability_of(wheel, tmp_path) == "reference"


def test_failure_is_fatal_when_the_extension_is_required(sources):
    process, wheels = build_wheel(sources, {**NO_COMPILER, "FASTADAPTER_BUILD": "1"}, check=False)
    assert process.returncode != 0 and not wheels
    process, wheels = build_wheel(sources, {"FASTADAPTER_BUILD": "yes"}, check=False)
    assert "FASTADAPTER_BUILD must be 0, 1 or unset, got 'yes'" in process.stderr and not wheels


def test_old_torch_is_refused(sources, tmp_path):
    """The version is read from the torch found, without importing it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    _, (wheel,) = build_wheel(sources, {"FASTADAPTER_TORCH": str(tmp_path / "torch")})
    assert build_info(wheel)[0]["reason"] == "torch 2.9.1+cpu is installed, 2.10 or newer is needed"


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_in_place_build_and_its_failure(sources):
    """In the source tree, as editable installs use it: a later build that fails takes the old extension away."""
    python("setup.py", "build_ext", "--inplace", cwd=sources, env={"FASTADAPTER_TORCH": str(TORCH)})
    extension, info = sources / "fastadapter/_C.abi3.so", sources / "fastadapter/_build_info.json"
    assert extension.exists() and json.loads(info.read_text())["extension"]
    python("setup.py", "build_ext", "--inplace", cwd=sources, env=NO_COMPILER)
    assert not extension.exists() and not json.loads(info.read_text())["extension"]


def test_source_distribution_can_be_built(sources):
    """It carries what setup.py compiles and nothing that was built."""
    python("setup.py", "build_ext", "--inplace", cwd=sources, env={"FASTADAPTER_BUILD": "0"})
    _, (archive,) = build("sdist", sources)
    shutil.unpack_archive(archive, sources / "unpacked")
    (root,) = (sources / "unpacked").iterdir()
    shipped = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= shipped
    assert "kernels/gated_prefix.py" in shipped
    assert not any(name.endswith((".so", "_build_info.json")) for name in shipped)
