"""The families' tests pass with the oldest release that pyproject.toml promises of everything optional they use.

pip fetches those releases into the cache folder (``$FASTADAPTER_CACHE``), 20 MB, beside what is installed; torch stays.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastadapter.ops import self_check

ROOT = Path(__file__).resolve().parents[1]
PROMISED = ("transformers", "accelerate", "safetensors", "peft")
# What the oldest transformers asks for and the newest does not have.
BESIDE = ("huggingface-hub<2", "tokenizers>=0.22,<=0.23.0", "httpx<1", "httpcore<2")


def minimum(name):
    """The oldest release of a package that pyproject.toml allows, the same wherever it is named."""
    found = set(re.findall(rf'"{name}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    [version] = found
    return version


def releases():
    """A folder with the oldest releases, made by pip where the cache has none."""
    wanted = [f"{name}=={minimum(name)}" for name in PROMISED]
    kept = self_check.cache_dir() / "minimum-versions" / "-".join(wanted)
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--no-input",
        ]
        command += ["--disable-pip-version-check", "--target", f"{fresh}/whole", *wanted, *BESIDE]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            last = (process.stderr.strip() or "it said nothing").splitlines()[-1]
            pytest.skip(f"the oldest releases are not in the cache and pip cannot fetch them: {last}")
        try:
            Path(fresh, "whole").rename(kept)
        except OSError:  # another process was first
            if not kept.exists():
                raise
    return kept


def test_minimum_versions_are_named_once():
    assert all(re.fullmatch(r"\d+\.\d+(\.\d+)?", minimum(name)) for name in PROMISED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["zero_gate", "plain_computation", "checkpointing", "generation", "peft", "data"]
)
def test_families_with_the_oldest_releases(words):
    """In a process of its own; every family that the release has in its attention interface."""
    chosen = {
        "peft": ["tests/integrations/test_peft_parity.py"],
        "data": ["tests/training/test_data_chat.py", "tests/training/test_data_special.py"],
    }.get(words, ["tests/integrations/test_families.py", "-k", words])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "PYTHONPATH": str(releases())}
    code = "import transformers; print(transformers.__version__)"
    version = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert version.stdout.strip().startswith(minimum("transformers")), version.stderr[-2000:]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:]
