"""Make the environments of the libraries that the recipe is measured against: ``python scripts/peer_environments.py``.

``adapters`` and ``litgpt`` want other releases of transformers and huggingface-hub than ours, so each gets a virtual
environment of its own under ``.venv-peers``, at pinned versions. torch is taken from the environment that runs this, so
that all parties compute with the same build of it. One that is there already is left as it is; PEFT needs none, it is
installed beside us. Standard library only.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each needs, and what to import to see that it works. transformers and huggingface-hub are the releases that
# theirs ask for; left out, those beside the shared torch would be found and not fit.
PEERS = {
    "adapters": (
        ["adapters==1.3.0", "transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1"],
        "import adapters",
    ),
    "litgpt": (
        ["litgpt==0.5.13", "transformers==4.56.2", "huggingface-hub==0.36.0", "lightning==2.6.1"],
        "import litgpt.adapter",
    ),
}
RECORD = "fastadapter-peer.json"


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a peer's environment."""
    return folder / name / "bin" / "python"


def is_ready(folder: Path, name: str) -> bool:
    """Whether the environment was made to its end, with the versions that are wanted now."""
    record = folder / name / RECORD
    return record.is_file() and json.loads(record.read_text()) == PEERS[name][0]


def folder_of_torch() -> Path:
    """Raises: ModuleNotFoundError: this environment has none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the environments share the torch of the one that makes them, which has none"
        )
    return Path(found.origin).parents[1]


def make(folder: Path, name: str) -> None:
    """Raises: subprocess.CalledProcessError: pip failed; its message is on stderr."""
    wanted, check = PEERS[name]
    target = folder / name
    print(f"peers: making {target.name}: {', '.join(wanted)}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", target], check=True)
    python = python_of(folder, name)
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # Behind its own packages on the path: what is installed there comes first, torch is found here.
    Path(where, "torch-from-here.pth").write_text(f"{folder_of_torch()}\n")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([python, "-c", check], check=True)
    (target / RECORD).write_text(json.dumps(wanted))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    args = parser.parse_args()
    for name in args.only:
        if is_ready(args.folder, name):
            continue
        try:
            make(args.folder, name)
        except subprocess.CalledProcessError as error:
            print(
                f"peers: error: {name} cannot be installed: {error}\n"
                "  `make bench PEERS=` measures without these environments and says so",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
