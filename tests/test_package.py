"""The package as a whole: what an import costs, which way imports point, and that the documentation runs."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastadapter
from tests.support.gated_prefix import needs_extension

ROOT = Path(fastadapter.__file__).parent
# Each layer may import itself and those to its right.
LAYERS = [
    "cli",
    "benchmarks",
    "compare",
    "training",
    "checkpoints",
    "integrations",
    "methods",
    "nn",
    "ops",
    "kernels",
    "reference",
]
# Modules at the top of the package stand on everything up to here.
TOP = {"explain": "integrations", "verify": "integrations", "warmup": "ops"}
# What it measures is the command line itself.
ABOVE = {"benchmarks/gpu_commands.py": "cli"}


def run_python(program, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout


def test_import_needs_torch_alone():
    """In a fresh process, importing the package after torch imports nothing that is optional."""
    program = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        "import fastadapter\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    roots = {name.partition(".")[0] for name in json.loads(run_python(program))}
    assert "fastadapter" in roots
    assert not roots & {
        "triton",
        "transformers",
        "accelerate",
        "peft",
        "safetensors",
        "gguf",
        "tqdm",
        "matplotlib",
    }


def test_import_without_the_optional_packages():
    """With them made unimportable, ops, modules and doctor work, and attach names what is missing."""
    run_python(
        "import sys\n"
        "for name in ('triton', 'transformers', 'accelerate', 'peft', 'safetensors', 'gguf', 'tqdm', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "import torch, fastadapter as fa\n"
        "x = torch.randn(1, 2, 3, 8)\n"
        "out = fa.ops.gated_prefix(x, x, x[:, :, :2], x[:, :, :2], torch.ones(1, 2))\n"
        "assert out.shape == x.shape\n"
        "from fastadapter.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "try:\n"
        "    fa.attach(torch.nn.Linear(2, 2), fa.LlamaAdapterConfig())\n"
        "except ImportError as error:\n"
        "    assert 'transformers' in str(error)\n"
        "else:\n"
        "    raise SystemExit('attach did not ask for transformers')\n"
    )


@needs_extension
def test_without_the_extension_the_reference_runs():
    """A pure Python install says so and gives the same numbers."""
    program = (
        "import torch, fastadapter as fa\n"
        "torch.manual_seed(0)\n"
        "x, y = torch.randn(2, 4, 5, 8), torch.randn(1, 2, 3, 8)\n"
        "out = fa.ops.gated_prefix(x, x, y, y, torch.ones(1, 4))\n"
        "print(fa.ops.backends()[0]['backend'], out.double().sum().item())\n"
    )
    with_extension = run_python(program).split()
    without = run_python(program, FASTADAPTER_DISABLE_EXTENSION="1").split()
    assert (with_extension[0], without[0]) == ("cpp", "reference")
    assert float(with_extension[1]) == pytest.approx(float(without[1]), abs=1e-4)


def layer_of(module):
    parts = module.split(".")
    if parts[0] != "fastadapter" or len(parts) == 1:
        return None
    return TOP.get(parts[1], parts[1] if parts[1] in LAYERS else None)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    """From the command line down to the reference, never back."""
    outside = (ROOT.parent / "benchmarks", ROOT.parent / "kernels")
    for path in [*ROOT.rglob("*.py"), *(path for folder in outside for path in folder.rglob("*.py"))]:
        relative = path.relative_to(ROOT if path.is_relative_to(ROOT) else ROOT.parent)
        own = TOP.get(relative.stem, relative.parts[0]) if len(relative.parts) == 1 else relative.parts[0]
        own = ABOVE.get(str(relative), own)
        if own not in LAYERS:
            continue  # fastadapter/__init__.py gathers everything
        for name in imports_of(path):
            layer = layer_of(name)
            assert layer is None or LAYERS.index(layer) >= LAYERS.index(own), f"{path} imports {name}"


def test_kernels_and_reference_stand_alone():
    """They import torch and triton only, and never each other."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in [*(ROOT / "reference").glob("*.py"), *(ROOT.parent / "kernels").glob("*.py")]:
        own = f"fastadapter.{path.parent.name}"
        for name in imports_of(path):
            assert name.partition(".")[0] in allowed or name.startswith(own), f"{path}: {name}"


MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages([str(ROOT)], "fastadapter.")
    if not name.endswith(("._C", ".__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    import torch

    failures, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert failures == 0


def test_public_names_are_documented():
    """Everything in ``fastadapter.__all__`` exists and says what it is."""
    for name in fastadapter.__all__:
        assert (getattr(fastadapter, name).__doc__ or "").strip(), name


def test_version_has_one_source():
    text = (ROOT.parent / "pyproject.toml").read_text()
    assert re.search(r'version = \{ attr = "fastadapter.__version__" \}', text)


@pytest.mark.parametrize("command", ["demo", "finetune", "compare", "generate", "explain", "bench", "doctor"])
def test_every_command_has_help(command, capsys):
    from fastadapter.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and "usage: fastadapter" in capsys.readouterr().out
