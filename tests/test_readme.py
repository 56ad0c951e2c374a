"""Every command and every Python block of README runs, in README's order and in one folder.

By default with small models under README's names, in this process. ``-m slow`` does literally what a reader of a fresh
checkout does, with the real models; what a make target does that would take hours, a GPU, or these tests again, is only
asked for (``make -n``).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastadapter.cli import compare as compare_command
from fastadapter.cli import main
from fastadapter.compare import METHODS_TO_COMPARE
from tests.support import builds, readme

# What the commands import, as the package index names it.
NEEDED = {"transformers", "accelerate", "safetensors", "gguf", "tqdm", "matplotlib", "scikit-learn"}
LAUNCH = ["torchrun", "--nproc-per-node", "2", "-m", "fastadapter.cli"]
# Of the make targets: what the slow test gives `make demo` so that it ends in minutes.
DEMO = "--train 64 --test 16 --num-train-epochs 1"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what README's commands find in a checkout."""
    readme.write_stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_command.assets, "fetch_demo_reviews", lambda: Path("reviews.jsonl"))
    monkeypatch.setattr(
        compare_command.assets, "split_reviews", lambda path, train, test, seed: readme.reviews(train, test)
    )
    return tmp_path


def test_the_install_line_brings_what_the_commands_need():
    pip = [words for words in readme.commands() if words[0] == "pip"]
    assert pip == [["pip", "install", "torch"], ["pip", "install", ".[hf]"]]
    assert NEEDED <= readme.requirements("hf")


def test_every_command_runs(reader, monkeypatch, capsys):
    compared = []

    def compare(comparison, methods, seeds, **options):
        """Training in every way is the business of tests/compare; here: what the command asks for."""
        compared.append([method.name for method in methods])
        figures = {"accuracy": 0.8, "trainable_parameters": 5, "model_parameters": 100, "seconds_per_epoch": 1.0,
                   "seconds": 2.0, "peak_memory_bytes": 1, "file_bytes": 1, "learning_rate": 0.1, "device": "cpu",
                   "threads": 1, "date": "2026-01-01",
                   "machine": {"cpu": "toy", "cores": 2, "torch": "2", "transformers": "5"}}  # fmt: skip
        return [{"method": method.name, "seed": seed, **figures} for method in methods for seed in seeds]

    monkeypatch.setattr(compare_command, "compare", compare)
    ran = set()
    for words in readme.commands():
        if words[0] == "pip":
            continue  # the test above
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=readme.ROOT, check=True, capture_output=True)
            continue
        if words[: len(LAUNCH)] == LAUNCH:  # two processes: tests/training/test_distributed.py
            words = ["fastadapter", *words[len(LAUNCH) :]]
        assert words[0] == "fastadapter", f"no test knows how to run {words[0]}"
        try:
            status = main(words[1:])
        except SystemExit as stopped:
            status = stopped.code
        assert status == 0, f"{' '.join(words)}\n{capsys.readouterr().err}"
        ran.add(words[1])
    assert {"finetune", "generate", "explain", "compare", "doctor", "--version"} <= ran
    assert compared == [list(METHODS_TO_COMPARE)]
    for folder in ("mine", "classes", "two"):
        assert (reader / "outputs" / folder / "adapter.safetensors").is_file()


def test_every_python_block_runs(reader):
    found = readme.blocks("python")
    assert len(found) >= 2
    for block in found:
        exec(compile(block, "README.md", "exec"), {})
    assert (reader / "outputs" / "python" / "adapter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not builds.HAS_COMPILER, reason="needs a C++ compiler")
def test_from_top_to_bottom_literally(tmp_path):
    """A fresh checkout and environment; torch and the other packages are those of the tests, so that pip finds them.

    Needs the package index, or a cache, for setuptools, the models and the reviews.
    """
    clone = tmp_path / "clone"
    listing = subprocess.run(["git", "ls-files"], cwd=readme.ROOT, capture_output=True, text=True, check=True)
    for name in listing.stdout.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(readme.ROOT / name, clone / name)
    python = builds.environment(tmp_path / "environment", pip=True)
    # What installing torch would have put there.
    torchrun = python.parent / "torchrun"
    torchrun.write_text(f"#!{python}\nfrom torch.distributed.run import main\n\nmain()\n")
    torchrun.chmod(0o755)
    shell = {
        **{
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FASTADAPTER_B"))
        },
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "VENV": str(python.parents[1]),
        "ARGS": DEMO,
        "OMP_NUM_THREADS": "1",
    }
    for block in readme.blocks("sh"):
        lines = [
            line.replace("make ", "make -n ", 1) if line.startswith("make ") and "demo" not in line else line
            for line in block.splitlines()
        ]
        script = "set -e\n" + "\n".join(lines)
        done = subprocess.run(["bash", "-c", script], cwd=clone, env=shell, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    # No hub is asked: a model of that name lies in the folder.
    readme.write_stand_ins(clone)
    for name in ("smollm2", "minilm"):
        shutil.rmtree(clone / name)
    for number, block in enumerate(readme.blocks("python")):
        (clone / f"block{number}.py").write_text(block)
        done = subprocess.run(
            [python, f"block{number}.py"], cwd=clone, env=shell, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
