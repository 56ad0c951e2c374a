"""What goes wrong is said in one line where somebody can mend it; what cannot be expected keeps its traceback."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fastadapter import CheckpointError, cli
from fastadapter.cli import explain, faults
from fastadapter.cli.loading import quiet
from fastadapter.training import UserError


def ours():
    raise ValueError("prefix_len must be at least 1,\ngot 0")


def a_librarys():
    torch.nn.Linear(2, 2).to("no device")


def int_of_a_word():
    return int("many")


# In the package's own name, as a raise there would be.
here = {"__name__": "fastadapter.methods.toy"}
exec(
    compile("def ours():\n    raise ValueError('prefix_len must be at least 1,\\ngot 0')", "toy.py", "exec"),
    here,
)
exec(compile("def by_python():\n    int('many')", "toy.py", "exec"), here)


def caught(function, *args):
    try:
        function(*args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "error, message",
    [
        (UserError("--x must be 1"), "--x must be 1"),
        (CheckpointError("a.safetensors: it is empty"), "a.safetensors: it is empty"),
        (CheckpointError("a.json: cannot be written (os error 28)"), "a.json: cannot be written (os error 28)"),
        (PermissionError(errno.EACCES, "no", "/a"), "/a: Permission denied"),
        (OSError(errno.ENOSPC, "no"), "the disk: No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk: No space left on device"),
        (MemoryError(), "this machine's memory is not enough; a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More"),
         "the GPU's memory is not enough (2.00 GiB more"),
        (RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
         "this machine's memory is not enough; a smaller"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn.svm"),
         'this needs scikit-learn, which is not installed: pip install "fastadapter[hf]"'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_expected_faults_are_one_line(capsys, error, message):
    assert faults.tell(error) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastadapter: error: {message}") and printed.err.count("\n") == 1


def test_a_raise_of_ours_is_expected(capsys):
    assert faults.tell(caught(here["ours"])) == 2
    assert capsys.readouterr().err == "fastadapter: error: prefix_len must be at least 1, got 0\n"


@pytest.mark.parametrize(
    "error",
    [
        caught(ours),  # raised outside of the package
        caught(here["by_python"]),  # in the package, but not by a raise there
        caught(a_librarys),
        caught(int_of_a_word),
        caught(json.loads, "{"),
        KeyError("hidden_size"),
        ImportError("cannot import name 'x'", name="fastadapter.ops"),
        ModuleNotFoundError("No module named 'nowhere'", name="nowhere"),
        OSError("Can't load the model"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_exceptions_keep_their_traceback(capsys, error):
    """A library's words do not pass under our name."""
    assert faults.tell(error) == 1
    printed = capsys.readouterr().err
    assert type(error).__name__ in printed and str(error) in printed
    assert "fastadapter: error:" not in printed and printed.splitlines()[-1].startswith(
        "fastadapter: this should not"
    )


def test_warnings_of_ours_are_one_line(monkeypatch, capsys):
    def warn(args):
        for text in ("fastadapter: another base", "a library's"):
            print(warnings.formatwarning(UserWarning(text), UserWarning, "file.py", 3), end="")

    before = warnings.formatwarning
    monkeypatch.setattr(explain, "run", warn)
    assert cli.main(["explain"]) == 0 and warnings.formatwarning is before
    assert capsys.readouterr().out == "fastadapter: another base\nfile.py:3: UserWarning: a library's\n"


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_interruptions(monkeypatch, capfd, error, status):
    def stop(args):
        raise error

    monkeypatch.setattr(explain, "run", stop)
    saved = os.dup(1)
    try:
        assert cli.main(["explain"]) == status
    finally:
        os.dup2(saved, 1)
    assert capfd.readouterr().err == ("fastadapter: interrupted\n" if status == 130 else "")


def test_a_reader_that_leaves_ends_the_command(model_folder, tmp_path):
    """`| head -1` as in a shell: no traceback, no complaint at the end of the process."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2\n" * 40)
    command = [sys.executable, "-m", "fastadapter.cli", "generate", "--model", str(model_folder), "--file",
               str(prompts), "--max-new-tokens", "1", "--batch-size", "2", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "completion" in process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait() == 141 and stderr == ""


def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": os.getcwd}))


def _index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')


def _gguf_only(folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")


def _no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_cut, "model.safetensors is damaged or cut short"),
        (_write("model.safetensors", "<html>"), "model.safetensors is damaged or cut short"),
        (_pickled, "cannot be loaded; transformers says: UnpicklingError"),
        (_index, "names part-1.safetensors, which is not there"),
        (_gguf_only, "it has no weights (model.safetensors or pytorch_model.bin); its weights are in GGUF"),
        (_remove("config.json"), "it has no config.json"),
        (_write("config.json", "{"), "config.json is malformed JSON"),
        (_write("config.json", "[]"), "config.json is not a JSON object"),
        (_write("config.json", "{}"), "config.json names no model_type"),
        (_write("config.json", '{"model_type": "llamma"}'), "model_type 'llamma', which transformers"),
        (_no_tokenizer, "it has no tokenizer"),
        (_write("tokenizer.json", "{}"), "its tokenizer cannot be loaded; transformers says"),
    ],
    ids=("cut page pickled index gguf no-config half-config list-config empty-config other-config no-tokenizer "
         "bad-tokenizer").split(),
)  # fmt: skip
def test_a_damaged_model_is_named_in_one_line(model_folder, tmp_path, refused, damage, message):
    broken = copy(model_folder, tmp_path)
    damage(broken)
    line = refused("generate", "--model", broken, "--prompt", "w1")
    assert f"--model {broken}" in line and message in line


def test_paths_of_another_kind(model_folder, run, tmp_path, refused):
    file = model_folder / "config.json"
    for words, message in (
        (("--model", file), "expected a folder or a hub name, got a file"),
        (("--model", tmp_path / "none"), "got a path where nothing is"),
        (("--model", run), "it has no config.json; it holds an adapter, which goes to --adapter"),
        (("--model", model_folder, "--revision", "main"), "is a folder, which has no revisions"),
        (("--model", model_folder, "--gguf-file", "a.gguf"), "it has no file a.gguf"),
        (("--adapter", tmp_path / "none"), "no such file or folder"),
        (("--adapter", model_folder), "a folder without adapter.safetensors"),
        (("--adapter", file), "expected a folder or a .safetensors file"),
        (("--adapter", model_folder / "model.safetensors"), "no content digest"),
    ):
        assert message in refused("generate", *words, "--prompt", "w1")


def test_a_bad_adapter_is_found_before_the_model_is_loaded(model_folder, run, tmp_path, refused, monkeypatch):
    def never(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastadapter.cli.generate.load_base", never)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1", "adapter": null}\n')
    for words, message in (
        (("a b=x",), "--adapters a b=x: name must be 1 to 64 letters"),
        (("a=/nowhere/x",), "--adapter /nowhere/x: no such file or folder"),
    ):
        assert message in refused(
            "generate", "--model", model_folder, "--file", prompts, "--adapters", *words
        )
    file = run / "adapter.safetensors"
    whole = file.read_bytes()
    for data, message in (
        (pickle.dumps([1]), "it is a Python pickle"),
        (whole[:200], "header"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "do not match its digest"),
        (b"", "0 bytes"),
    ):
        file.write_bytes(data)
        assert message in refused("generate", "--adapter", run, "--prompt", "w1")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_read(model_folder, tmp_path, refused):
    broken = copy(model_folder, tmp_path)
    (broken / "config.json").chmod(0)
    assert "config.json: Permission denied" in refused("generate", "--model", broken, "--prompt", "w1")


def test_transformers_is_quiet_in_log_files(model_folder, capfd):
    """No bars and no report of what was loaded where stderr is no terminal; as before afterwards."""
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert (
        cli.main(["generate", "--model", str(model_folder), "--prompt", "w1", "--max-new-tokens", "1"]) == 0
    )
    assert capfd.readouterr().err == ""
