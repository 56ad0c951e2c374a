"""A source distribution, a wheel built from it, and that wheel in a fresh environment: what a user gets, and where.

Slow: the extension is compiled once. Nothing is downloaded; what the package stands on is that of the tests.
"""

import json
import shutil

import pytest

from tests.support import builds, readme

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not builds.HAS_COMPILER, reason="needs a C++ compiler"),
]
WHERE = (
    "import json, fastadapter, fastadapter.kernels.gated_prefix, fastadapter.benchmarks.rows as rows\n"
    "from fastadapter.ops.backends import extension_error\n"
    "print(json.dumps([fastadapter.__file__, fastadapter.kernels.__file__, rows.__file__, extension_error()]))\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The wheel, a checkout that was never built in place, and an interpreter with the wheel installed."""
    folder = tmp_path_factory.mktemp("install")
    checkout = builds.copy_sources(folder / "checkout")
    _, (archive,) = builds.build("sdist", builds.copy_sources(folder / "sources"))
    shutil.unpack_archive(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    _, (wheel,) = builds.build("wheel", unpacked, {"FASTADAPTER_BUILD": "1"})
    return wheel, checkout, builds.install(wheel, folder / "environment")


def where(interpreter, folder):
    return json.loads(builds.python("-c", WHERE, cwd=folder, interpreter=interpreter).stdout)


def test_one_wheel_for_every_python_and_readmes_example_runs_with_it(made, tmp_path):
    wheel, _, interpreter = made
    assert "-cp310-abi3-" in wheel.name
    readme.write_stand_ins(tmp_path)
    for number, block in enumerate(readme.blocks("python")):
        (tmp_path / f"{number}.py").write_text(block)
        builds.python(f"{number}.py", cwd=tmp_path, interpreter=interpreter)
    line = builds.python("-m", "fastadapter.cli", "--version", cwd=tmp_path, interpreter=interpreter).stdout
    assert line.startswith("fastadapter ") and "C++ extension loaded" in line
    script = builds.python(
        interpreter.parent / "fastadapter", "--version", cwd=tmp_path, interpreter=interpreter
    )
    assert script.stdout == line


def test_a_folder_with_kernels_and_benchmarks_of_the_users_own(made, tmp_path):
    _, _, interpreter = made
    for name in ("kernels", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    *files, error = where(interpreter, tmp_path)
    assert error is None
    assert all(file.startswith(str(interpreter.parents[1])) for file in files)
    command = ("-m", "fastadapter.cli", "bench", "run", "--help")
    assert "--only" in builds.python(*command, cwd=tmp_path, interpreter=interpreter).stdout


def test_the_checkout_itself(made):
    """Python finds its sources first; they take the installed extension as long as csrc/ is the same."""
    _, checkout, interpreter = made
    *files, error = where(interpreter, checkout)
    assert error is None
    assert files == [
        str(checkout / name)
        for name in ("fastadapter/__init__.py", "kernels/__init__.py", "benchmarks/rows.py")
    ]
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "fastadapter.cli", "--version")
    assert "C++ extension loaded" in builds.python(*launch, cwd=checkout, interpreter=interpreter).stdout
    told = builds.python("-m", "fastadapter.cli", "doctor", cwd=checkout, interpreter=interpreter).stdout
    assert "from the installed copy in" in told and "a checkout" in told

    source = checkout / "csrc" / "rows.h"
    source.write_text(source.read_text() + "\n// changed\n")
    assert "was built from others: pip install . again" in where(interpreter, checkout)[-1]
