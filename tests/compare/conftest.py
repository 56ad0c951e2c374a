"""A toy comparison: models and data, the jobs done in this process, and the command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastadapter.cli import main
from fastadapter.cli.loading import load_classifier, load_model
from fastadapter.compare import processes, worker
from fastadapter.training import TrainingInterrupted
from tests.training.toy import make_classifier, make_examples, make_model, make_tokenizer


@pytest.fixture(autouse=True)
def one_thread(default_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind, part in (("bert", "bert"), ("llama", "model")):
        found[kind] = tmp_path_factory.mktemp(kind)
        getattr(make_classifier(kind), part).save_pretrained(found[kind])
        make_tokenizer().save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language-model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": e.prompt.replace("\n", " "), "label": e.label} for e in make_examples(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def calls(monkeypatch):
    """Do the jobs in this process; the folders of those that were done."""
    done = []

    def here(words, threads):
        folder = Path(words[-1])
        code = 0
        try:
            worker.execute(worker.read_job(folder / "job.json"), folder, load_classifier, load_model)
            done.append(f"{folder.parent.name}/{folder.name.removeprefix('seed-')}")
        except TrainingInterrupted as stop:
            code = stop.exit_code
        return SimpleNamespace(returncode=code, poll=lambda: code, terminate=lambda: None)

    monkeypatch.setattr(processes, "start", here)
    return done


@pytest.fixture
def compare(folders, data, tmp_path):
    def run(*methods, kind="bert", **options):
        options = {"model": folders[kind], "data": data, "eval_count": 10, "num_train_epochs": 2, "batch_size": 4,
                   "output_dir": tmp_path / "out", "threads": 1, "seeds": "0 1", **options}  # fmt: skip
        words = ["--methods", *methods] if methods else []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else str(value).split(" "))]
        return main(["compare", *words])

    return run
