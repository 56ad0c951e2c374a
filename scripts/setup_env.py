"""Prepare the project's virtual environment; the Makefile calls it before every target.

The first run creates the environment, installs torch and then the project with its extras. Later runs compare
digests of the files that decide what is installed and start no pip at all when nothing changed, so they need
no network. A change of the C++ sources rebuilds the extension alone. Standard library only.

Environment variables:
    TORCH_INDEX: index to take torch from, such as the CPU index that PyTorch's installation page names.
    TORCH_ALLOW_CUDA: 1 accepts a CUDA build of torch (gigabytes) on a machine without an NVIDIA GPU.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINIMUM_PYTHON = (3, 10)
TORCH_RANGE = "torch>=2.10"
# Without a GPU a release is named: the newest one on a package index usually is a CUDA build.
TORCH_CPU = "torch==2.13.0"
# Before this release `pip install --dry-run` downloads the files that it reports.
MINIMUM_PIP = (25, 3)
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)[-_]", re.IGNORECASE)


class SetupError(Exception):
    """A condition the user has to resolve; the message says how."""


def log(text: str) -> None:
    print(f"setup: {text}", flush=True)


def digest(paths: list[Path]) -> str:
    """Digest over names and contents; files that are absent count as absent."""
    state = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file()):
        state.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


class Environment:
    """One virtual environment and the record of what was installed into it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.record_path = folder / "fastadapter-setup.json"

    def read_record(self) -> dict:
        try:
            return json.loads(self.record_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}  # never set up, or cut off while writing: set up again

    def write_record(self, record: dict) -> None:
        temporary = self.record_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(self.record_path)

    def works(self) -> bool:
        if not self.python.exists():
            return False
        return subprocess.run([self.python, "-c", "import pip"], capture_output=True).returncode == 0

    def create(self) -> None:
        log(f"creating {self.folder.name} with Python {sys.version.split()[0]}")
        clear = ["--clear"] if self.folder.exists() else []
        made = subprocess.run(
            [sys.executable, "-m", "venv", *clear, self.folder], capture_output=True, text=True
        )
        if made.returncode != 0:
            raise SetupError(f"python -m venv failed:\n{made.stdout}{made.stderr}")

    def query(self, code: str) -> str:
        """Last line that ``code`` prints in the environment; empty when it fails."""
        result = subprocess.run([self.python, "-c", code], capture_output=True, text=True, cwd=self.folder)
        lines = result.stdout.split()
        return lines[-1] if result.returncode == 0 and lines else ""

    def install(self, *arguments: object, what: str) -> None:
        log(what)
        start = time.monotonic()
        # Errors only. No bytecode: for all of torch it takes half a minute, and little of it is used.
        options = ["-qq", "--disable-pip-version-check", "--no-input", "--no-compile"]
        command = [self.python, "-m", "pip", "install", *options, *arguments]
        if subprocess.run([str(part) for part in command], cwd=ROOT).returncode != 0:
            raise SetupError(f"pip failed while {what} (its message is above)")
        log(f"  done in {time.monotonic() - start:.0f} s")

    def torch_version(self) -> str:
        return self.query("import torch; print(torch.__version__)")

    def install_torch(self) -> None:
        index = os.environ.get("TORCH_INDEX", "")
        if index:
            self.install("--index-url", index, TORCH_RANGE, what="installing torch from TORCH_INDEX")
        elif has_nvidia_gpu():
            self.install(TORCH_RANGE, what="installing torch for the NVIDIA GPU found here (several GB)")
        else:
            if os.environ.get("TORCH_ALLOW_CUDA") != "1":
                self.refuse_cuda_packages()
            self.install(TORCH_CPU, what=f"installing {TORCH_CPU}")

    def refuse_cuda_packages(self) -> None:
        """Ask pip what it would install; raise if that includes CUDA libraries; no GPU is here."""
        version = self.query("import pip; print(pip.__version__)")
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_PIP:
            minimum = ".".join(map(str, MINIMUM_PIP))
            self.install(f"pip>={minimum}", what=f"updating pip {version} inside the environment")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            self.install("--dry-run", "--report", report, TORCH_CPU, what=f"looking up {TORCH_CPU}")
            planned = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        cuda = sorted(item["name"] for item in planned if CUDA_PACKAGE.match(item["name"]))
        if cuda:
            raise SetupError(
                f"{TORCH_CPU} from the package index in use brings {len(cuda)} CUDA packages, several GB: "
                f"{', '.join(cuda[:3])}, ... This machine has no NVIDIA GPU, so nothing was installed.\n"
                "  Name the CPU index given on PyTorch's installation page:  make test TORCH_INDEX=<url>\n"
                "  or take the CUDA build all the same:                      make test TORCH_ALLOW_CUDA=1"
            )


def prepare(environment: Environment, extras: set[str]) -> None:
    """Bring the environment to the state that the project files ask for.

    Raises:
        SetupError: with the way out in its message.
    """
    record = environment.read_record()
    extras |= set(record.get("extras", []))
    wanted = {
        "dependencies": digest([ROOT / "pyproject.toml", Path(__file__)]),
        "build": digest([ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]),
        "extras": sorted(extras),
    }
    if record == wanted and environment.python.exists():
        return
    start = time.monotonic()
    if not environment.works():
        environment.create()
        record = {}
    torch = environment.torch_version()
    if torch:
        log(f"keeping torch {torch}")
    else:
        environment.install_torch()
        torch = environment.torch_version()
        if not torch:
            raise SetupError(
                f"torch was installed but does not import: run {environment.python} -c 'import torch'"
            )
    same_dependencies = all(record.get(key) == wanted[key] for key in ("dependencies", "extras"))
    # No build isolation: the extension is compiled against this torch, and a rebuild needs no network.
    project = ["--no-build-isolation", "--editable"]
    if same_dependencies:
        environment.install(*project, ".", "--no-deps", what="rebuilding the extension")
    else:
        # Pinned, so that no other package's requirement swaps the torch chosen above for another build.
        constraint = environment.folder / "torch-constraint.txt"
        constraint.write_text(f"torch=={torch}\n")
        environment.install("setuptools>=77", "ninja", what="installing build tools")
        target = f".[{','.join(sorted(extras))}]"
        environment.install(
            *project, target, "--constraint", constraint, what=f"installing fastadapter {target[1:]}"
        )
    environment.write_record(wanted)
    log(f"ready in {time.monotonic() - start:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    parser.add_argument(
        "--extras", default="triton,hf,compare,dev", help="comma-separated extras of pyproject.toml"
    )
    arguments = parser.parse_args()
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        print(
            f"setup: Python >= 3.10 is needed, got {found}: make PYTHON=/path/to/python3 ...", file=sys.stderr
        )
        return 1
    try:
        prepare(Environment(arguments.venv.resolve()), set(arguments.extras.split(",")))
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
