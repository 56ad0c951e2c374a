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
from fastadapter import _source_tree
from tests.support.gated_prefix import needs_extension

ROOT = Path(fastadapter.__file__).parent
# Each layer may import itself and those to its right.
LAYERS = [
    "cli",
    "benchmarks",
    "compare",
    "planning",
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
# What they measure is the command line itself, or they load models and reviews as it does.
ABOVE = {
    "benchmarks/gpu_commands.py": "cli",
    "benchmarks/recipe_data.py": "cli",
    "benchmarks/recipe_worker.py": "cli",
}


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


def test_a_checkout_finds_its_kernels_and_benchmarks_without_an_editable_install():
    """As after a plain ``pip install .``: Python in the checkout's folder, and no finder that knows where they lie."""
    program = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        f"sys.path.insert(0, {str(ROOT.parent)!r})\n"
        "import fastadapter, fastadapter.kernels as kernels, fastadapter.benchmarks as benchmarks\n"
        "print(kernels.__file__, benchmarks.__file__)\n"
    )
    found = run_python(program).split()
    assert found == [str(ROOT.parent / name / "__init__.py") for name in ("kernels", "benchmarks")]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout that was never built in place, and the folder where a copy would be installed."""
    for name in ("checkout/kernels/__init__.py", "checkout/fastadapter/__init__.py", "checkout/csrc/a.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("//\n")
    monkeypatch.setattr(_source_tree, "PACKAGE", tmp_path / "checkout" / "fastadapter")
    installed = tmp_path / "site" / "fastadapter"
    installed.mkdir(parents=True)
    return tmp_path / "checkout", installed


def test_which_extension_a_checkout_loads(checkout):
    """Its own; else that of an installed copy with the same csrc/; else none, and why."""
    root, installed = checkout
    own, info = root / "fastadapter", installed / "_build_info.json"

    def found():
        return _source_tree.extension_folder([str(root), str(installed.parent)])

    assert _source_tree.checkout() == root
    assert "no copy is installed: pip install . builds it" in found()[1]
    info.write_text(json.dumps({"extension": False, "reason": "no compiler"}))
    assert found()[0] == installed and "was installed without it" in found()[1]
    info.write_text(json.dumps({"extension": True, "sources": _source_tree.source_digest(root)}))
    assert found() == (installed, "")
    (root / "csrc" / "b.cpp").write_text("")
    assert "was built from others: pip install . again" in found()[1]
    (own / "_build_info.json").write_text(json.dumps({"extension": False}))
    assert found() == (own, "the package was installed without it (see `fastadapter doctor`)")
    (own / "_C.abi3.so").write_bytes(b"")
    assert found() == (own, "")
    (own / "kernels").mkdir()
    assert _source_tree.checkout() is None


def test_version_says_what_is_there(capsys, monkeypatch):
    from fastadapter.cli import doctor, main
    from fastadapter.ops.backends import extension_error

    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    line = capsys.readouterr().out
    assert line.startswith(f"fastadapter {fastadapter.__version__} (Python ") and line.count("\n") == 1
    monkeypatch.setattr(sys.modules[extension_error.__module__], "extension_error", lambda: "no compiler")
    assert doctor.version_line().endswith("no C++ extension: no compiler)")


@pytest.mark.parametrize("command", ["demo", "finetune", "compare", "generate", "explain", "bench", "doctor"])
def test_every_command_has_help(command, capsys):
    from fastadapter.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and "usage: fastadapter" in capsys.readouterr().out


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
}  # fmt: skip


def test_every_tensor_is_made_on_a_device_that_is_named():
    """Under ``torch.set_default_device("cuda")`` others would be made there, beside a generator of the CPU."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if (
                of_torch
                and node.func.attr in FACTORIES
                and not {"device", None} & {k.arg for k in node.keywords}
            ):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found
