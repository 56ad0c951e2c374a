"""The mistakes that scripts/mutate.py plants can be planted: their places move with the sources."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def mutations():
    spec = importlib.util.spec_from_file_location(
        "mutations",
        ROOT / "scripts/mutations/__init__.py",
        submodule_search_locations=[str(ROOT / "scripts/mutations")],
    )
    module = sys.modules.setdefault("mutations", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module.MUTATIONS


@pytest.mark.parametrize("mutation", mutations(), ids=lambda mutation: mutation.name)
def test_a_mutation_has_its_place(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert (ROOT / mutation.tests.split()[0]).exists()
