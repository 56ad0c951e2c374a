"""The records of docs/data.md are read as they stand there, and its templates are the ones in use."""

import re
from pathlib import Path

from fastadapter.training import read_examples
from fastadapter.training.data import INSTRUCTION_TEMPLATE

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_example_is_read(tmp_path):
    files = dict(re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL))
    kinds = {}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        kinds[name] = read_examples(tmp_path / name)
    assert set(kinds) == {"pairs.jsonl", "reviews.csv", "chats.json", "shared.jsonl", "instructions.tsv"}
    assert kinds["pairs.jsonl"][0].completion == " Paris" and kinds["reviews.csv"][1].label == "negative"
    assert len(kinds["chats.json"][0].messages) == 5 and len(kinds["shared.jsonl"][0].messages) == 2
    with_input, without = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
    filled = with_input.replace("{instruction}", "Name the capital.").replace("{input}", "France")
    assert kinds["instructions.tsv"][0].prompt == filled
    assert without == INSTRUCTION_TEMPLATE
    assert kinds["instructions.tsv"][1].prompt == without.format(text="Say hello.")
