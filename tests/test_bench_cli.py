"""``fastadapter bench``: the benchmarks are part of the package, and a checkout runs the same files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastadapter
from fastadapter.cli import main

ROOT = Path(fastadapter.__file__).parents[1]


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("what", ["audit", "run", "gpu", "versions", "table", "plot", "report"])
def test_each_benchmark_has_its_own_help(what, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", what, "--help"])
    assert stopped.value.code == 0 and "--" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "nothing"])
    assert stopped.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_command_line_does_not_import_what_is_not_chosen():
    program = (
        "import sys\nfrom fastadapter.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('fastadapter.benchmarks')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_checkout_and_the_package_list_the_same_cases(tmp_path):
    """`python -m benchmarks.audit` from the root, `fastadapter bench audit` from anywhere."""
    pytest.importorskip("triton")
    ours = run("fastadapter.cli", "bench", "audit", "--list", cwd=tmp_path)
    here = run("benchmarks.audit", "--list")
    assert ours.returncode == here.returncode == 0, ours.stderr + here.stderr
    assert ours.stdout == here.stdout and "gated_prefix forward bf16" in ours.stdout


def test_new_rows_go_to_the_current_folder_where_only_a_package_is_installed(tmp_path, monkeypatch):
    from fastadapter.benchmarks import rows

    assert rows.destination("cpu.jsonl") == rows.RESULTS / "cpu.jsonl"
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert rows.destination("cpu.jsonl") == tmp_path / "fastadapter-results" / "cpu.jsonl"


def test_stored_rows_are_installed():
    """Tables can be drawn from a package: the rows come with it."""
    from fastadapter.benchmarks import rows

    for line in (rows.RESULTS / "cpu.jsonl").read_text().splitlines():
        assert json.loads(line)["entry"]


@pytest.mark.parametrize(
    "document", ["README.md", "docs/benchmarks.md", "docs/recipe.md", "docs/comparison.md"]
)
def test_the_tables_are_those_of_the_stored_rows(document):
    assert main(["bench", "table", str(ROOT / document), "--check"]) == 0
