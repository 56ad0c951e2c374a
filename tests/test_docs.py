"""The pages of docs/: Python blocks run as they are pasted, links lead somewhere, names of options exist."""

import dataclasses
import re
from pathlib import Path

import pytest

import fastadapter as fa
from tests.support.readme import blocks

ROOT = Path(__file__).parents[1]
TOP = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
FROM_PEFT = ROOT / "docs" / "from-peft.md"
LOSS = ROOT / "docs" / "loss.md"


@pytest.mark.parametrize("page", [*PAGES, FROM_PEFT, LOSS], ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python", page)
    assert found
    for block in found:
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize("page", TOP)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page != "index.md" and f"({page})" not in index] == []


@pytest.mark.parametrize("library", ["fa", "peft"])
def test_options_that_are_translated_exist(library):
    """In our own configurations, and in those of the PEFT that is installed."""
    module = fa if library == "fa" else pytest.importorskip("peft")
    calls = re.findall(rf"`{library}\.(\w+Config)\((.*?)\)`", FROM_PEFT.read_text(encoding="utf-8"))
    assert len(calls) >= 3
    for name, arguments in calls:
        fields = {field.name for field in dataclasses.fields(getattr(module, name))}
        assert set(re.findall(r"(\w+)=", arguments)) <= fields, name
    for function in re.findall(r"`fa\.(\w+)", FROM_PEFT.read_text(encoding="utf-8")):
        assert hasattr(fa, function), function
