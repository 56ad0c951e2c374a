"""``fastadapter doctor`` says what is there, too old or absent, and runs with torch alone."""

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from fastadapter.cli import doctor
from fastadapter.ops.backends import backends, extension_error


def rows() -> dict[str, tuple[str, str]]:
    return {name: (status, detail) for name, status, detail in doctor.report()}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


def test_rows_of_this_machine():
    found = rows()
    assert found["torch"][0] == "ok" and torch.__version__ in found["torch"][1]
    assert found["Python"][0] == "ok"
    assert torch.backends.cpu.get_cpu_capability() in found["CPU capability"][1]
    assert found["threads"][1].startswith(f"{torch.get_num_threads()} of ")
    assert {status for status, _ in found.values()} <= {"ok", "missing", "note"}


def test_every_backend_has_its_row():
    found = rows()
    for entry in backends():
        status, detail = found[f"{entry['op']} on {entry['device']}"]
        assert detail == f"{entry['backend']}: {entry['reason']}"
        assert status == ("note" if entry["backend"] == "reference" else "ok")


@pytest.mark.parametrize(
    "error, info, status, expected",
    [
        (None, {"extension": True, "reason": "", "torch": "2.13.0"}, "ok", "built for torch 2.13.0"),
        (
            "absent",
            {"extension": False, "reason": "no compiler", "torch": None},
            "missing",
            "not built: no compiler",
        ),
        (
            "does not load",
            {"extension": True, "reason": "", "torch": "2.10.0"},
            "missing",
            "built for torch 2.10.0",
        ),
        ("absent", None, "missing", "absent"),
    ],
    ids=["loaded", "not-built", "other-torch", "never-installed"],
)
def test_extension(monkeypatch, tmp_path, error, info, status, expected):
    # fastadapter.ops.backends is also the name of a function, so the module is taken from where modules are kept.
    monkeypatch.setattr(sys.modules[extension_error.__module__], "extension_error", lambda: error)
    monkeypatch.setattr(doctor._source_tree, "PACKAGE", tmp_path)
    if info is not None:
        (tmp_path / "_build_info.json").write_text(json.dumps(info))
    name, found, detail = doctor._extension()
    assert (name, found) == ("C++ extension", status) and expected in detail


def test_old_and_absent_packages(monkeypatch):
    versions = {"transformers": "4.57.1", "accelerate": "1.10.0", "safetensors": "0.10.0rc1"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {name: doctor._package(name, minimum, purpose)[1:] for name, minimum, purpose in doctor.OPTIONAL}
    assert found["transformers"][0] == "missing" and "4.57.1 is too old, >= 5.3" in found["transformers"][1]
    assert found["accelerate"] == ("ok", "1.10.0")
    assert found["safetensors"] == ("ok", "0.10.0rc1")
    assert found["gguf"][0] == "missing" and '"fastadapter[hf]"' in found["gguf"][1]
    assert '"fastadapter[bench]"' in found["peft"][1]


def test_capability_cap_is_pointed_out(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    status, detail = rows()["CPU capability"]
    assert status == "note" and "ATEN_CPU_CAPABILITY=default" in detail


def test_exit_status_and_table(monkeypatch, capsys):
    assert doctor.run(arguments()) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(doctor.report())
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert doctor.run(arguments()) == 1
    assert "2.9.1" in capsys.readouterr().out


def test_json(capsys):
    assert doctor.run(arguments("--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["status"], row["detail"]) for row in printed["rows"]] == doctor.report()
    assert printed["backends"] == backends()


def test_runs_with_torch_alone():
    """A fresh process in which every optional package is out of reach."""
    optional = [name for name, _, _ in doctor.OPTIONAL] + ["triton"]
    code = (
        "import importlib.util, sys\n"
        f"blocked = {optional!r}\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in blocked else find_spec(name, *rest)\n"
        "for name in blocked: sys.modules[name] = None\n"
        "from fastadapter.cli import doctor\n"
        "print(doctor.format_table(doctor.report()))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert 'pip install "fastadapter[triton]"' in result.stdout
