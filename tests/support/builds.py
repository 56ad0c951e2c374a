"""Copies of the sources and installations made from them, without a download."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JUNK = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None


def copy_sources(folder):
    """The files that a build reads, without anything that was built before."""
    folder.mkdir()
    for name in ("benchmarks", "csrc", "fastadapter", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=JUNK)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def python(*arguments, cwd, env=(), check=True, interpreter=sys.executable):
    """A fresh process that knows nothing of this one's settings."""
    hidden = ("FASTADAPTER_", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment.update(env)
    return subprocess.run(
        [str(interpreter), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=check,
    )


def build(kind, sources, env=(), check=True):
    """``kind``: ``wheel`` or ``sdist``; by the installed setuptools. Returns: the process and the files made."""
    program = f"import setuptools.build_meta as build; build.build_{kind}('dist')"
    process = python("-c", program, cwd=sources, env=dict(env), check=check)
    return process, list((sources / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def environment(folder, pip=False):
    """A new virtual environment in which everything that the tests' own environment holds can be imported.

    Its files alone, not its .pth files: an editable fastadapter there does not come along.

    Args:
        pip: whether it gets a pip of its own.
    Returns: its interpreter.
    """
    python("-m", "venv", *([] if pip else ["--without-pip"]), folder, cwd=folder.parent)
    interpreter = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(python("-c", ask, cwd=folder, interpreter=interpreter).stdout.strip())
    shared = dict.fromkeys(
        [sysconfig.get_path("purelib"), *(path for path in sys.path if "site-packages" in path)]
    )
    (own / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    return interpreter


def install(wheel, folder):
    """An environment of :func:`environment` with this wheel in it.

    Returns: its interpreter.
    """
    interpreter = environment(folder)
    options = ["-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    python("-m", "pip", "--python", interpreter, "install", *options, "--force-reinstall", wheel, cwd=folder)
    return interpreter
