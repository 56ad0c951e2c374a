"""Saved toy models, adapters on them, and the record that a run leaves beside its adapter."""

import json
import os

import pytest
import torch

import fastadapter as fa
from fastadapter.cli import main
from tests.support.methods import train_a_little
from tests.training.toy import make_classifier, make_model, make_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A decoder with a chat template."""
    folder = tmp_path_factory.mktemp("decoder")
    make_model().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """An encoder without a head."""
    folder = tmp_path_factory.mktemp("encoder")
    make_classifier("bert").bert.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def save_run(tmp_path):
    """Save an adapter with the record of its run; fields are added to the record."""

    def save(model, base, name="run", config=None, **fields):
        fa.attach(model, config or fa.BottleneckConfig(bottleneck_size=4))
        train_a_little(model)
        folder = tmp_path / name
        fa.save(model, folder)
        record = {"format": 1, "base": {"name": str(base), "revision": None, "gguf_file": None}, "method": "bottleneck",
                  "task": "generation", "finished": True,
                  "labels": None, "template": None, "chat": False, "system_prompt": None, "dtype": "fp32",
                  "training": {"max_length": None, "truncation": "error"}, **fields}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    return save


@pytest.fixture
def run(model_folder, save_run):
    """The folder of a run that trained an adapter for generation."""
    return save_run(make_model(), model_folder)


@pytest.fixture
def fastadapter(capsys):
    """Call the command: exit status, stdout, stderr."""

    def call(*words):
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # what argparse refuses
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def refused(fastadapter):
    """Call the command, which must say one line about what is wrong, and nothing else."""

    def call(*words):
        status, out, err = fastadapter(*words)
        lines = [line for line in err.splitlines() if "error" in line]
        assert status == 2 and not out and len(lines) == 1, err
        assert lines[0].startswith("fastadapter: error: ") and "Traceback" not in err, err
        return lines[0]

    return call


@pytest.fixture
def stdin(monkeypatch):
    """Pipe text into the command."""

    def pipe(text):
        reader, writer = os.pipe()
        os.write(writer, text if isinstance(text, bytes) else text.encode())
        os.close(writer)
        monkeypatch.setattr("sys.stdin", os.fdopen(reader))

    return pipe


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
