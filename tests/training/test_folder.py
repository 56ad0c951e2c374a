"""The folder of a run is one run's, tells what the run was, and is not begun anew where its state is gone."""

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time

import pytest
import torch

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints.about import read_about
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.training import TrainingConfig, TrainingInterrupted, UserError, finetune, run_record, tasks
from fastadapter.training.lock import LOCK_FILE, FolderLock, require_unlocked
from fastadapter.training.run_record import read_run, write_run
from tests.training.toy import STATE, make_adapted, make_examples, make_model, make_tokenizer, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_record_tells_what_was_asked_and_what_came_of_it(finished):
    record = read_run(finished)
    _, metadata = read_tensors(finished)
    base = json.loads(metadata["base"])
    assert record["format"] == 1 and record["finished"] and record["method"] == "llama-adapter"
    assert record["adapter_config"]["prefix_len"] == 3 and record["task"] == "generation"
    assert record["base"]["model_type"] == "llama"
    for key in ("fingerprint", "weights_digest"):
        assert record["base"][key] == base[key] and len(base[key]) == 64
    assert record["dtype"] == "fp32" and record["versions"]["torch"] == torch.__version__
    assert record["data"]["train_records"] == 22 and record["data"]["eval_records"] == 10
    assert record["training"]["num_train_epochs"] == 2 and record["training"]["num_processes"] == 1
    assert (
        len(record["epochs"]) == 2
        and record["eval"]["accuracy_after"] == record["epochs"][1]["eval_accuracy"]
    )
    assert read_about(metadata)["task"] == "generation"
    assert not (finished / LOCK_FILE).exists()


def test_the_record_of_an_interrupted_run_is_not_finished_and_its_digests_are_those_of_the_data(
    finished, tmp_path, monkeypatch
):
    plain, calls = tasks.supervised_loss, []

    def stopping(model, batch):
        calls.append(1)
        if len(calls) == 15:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    monkeypatch.setattr(tasks, "supervised_loss", stopping)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path)
    record, whole = read_run(tmp_path), read_run(finished)
    assert not record["finished"] and len(record["epochs"]) == 1 and not (tmp_path / "README.md").exists()
    assert record["data"] == whole["data"] and not (tmp_path / LOCK_FILE).exists()
    monkeypatch.undo()
    run(tmp_path, resume=True)
    assert read_run(tmp_path)["finished"] and (tmp_path / "README.md").exists()
    for file in ("adapter.safetensors", "best/adapter.safetensors"):  # same weights, same bytes
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()


def test_a_second_run_is_refused_while_the_first_holds_the_folder(copied):
    lock = FolderLock(copied)
    lock.acquire()
    before = sorted(os.listdir(copied))
    for call in (lambda: run(copied, resume=True), lambda: require_unlocked(copied)):
        with pytest.raises(UserError, match=rf"is in use by another run \(process {os.getpid()} on .*\)"):
            call()
    assert sorted(os.listdir(copied)) == before
    lock.release()
    require_unlocked(copied)
    run(copied, resume=True)


def test_a_crash_leaves_no_lock(tmp_path):
    pid = os.fork()
    if pid == 0:
        FolderLock(tmp_path).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK_FILE).exists()
    require_unlocked(tmp_path)
    run(tmp_path, num_train_epochs=1)
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_on_a_file_that_its_holder_removed_guards_nothing(tmp_path, monkeypatch):
    """The first run ends between the second one's opening of the file and its locking it."""
    from fastadapter.training import lock as module

    first, second, plain = FolderLock(tmp_path), FolderLock(tmp_path), module.try_lock
    first.acquire()
    calls = []

    def ending(descriptor):
        calls.append(1)
        if len(calls) == 1:
            first.release()
        return plain(descriptor)

    monkeypatch.setattr(module, "try_lock", ending)
    second.acquire()
    monkeypatch.undo()
    assert len(calls) == 2
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path).acquire()
    second.release()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"):
        run(tmp_path, num_train_epochs=1)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: Read-only file system"):
        run(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("fastadapter.training.lock.os.open", read_only)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: Read-only file system"):
        FolderLock(tmp_path).acquire()


def test_a_run_sweeps_what_dead_ones_left(copied):
    left = [
        copied / ".adapter.safetensors.0123456789abcdef.tmp",
        copied / "best" / ".adapter.safetensors.0123456789abcdef.tmp",
        copied / "last" / ".training_state.safetensors.0123456789abcdef.tmp",
        copied / ".fastadapter-abcd1234",
    ]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 3600,) * 2)
    run(copied, resume=True)
    assert not [path for path in left if path.exists()]


@pytest.mark.parametrize("kept", ["run.json", "adapter.safetensors", "best/adapter.safetensors"])
def test_a_state_that_is_gone_is_an_error(copied, kept):
    content = (copied / kept).read_bytes()
    shutil.rmtree(copied)
    (copied / kept).parent.mkdir(parents=True)
    (copied / kept).write_bytes(content)
    with pytest.raises(
        UserError, match=r"but no .*training_state\.safetensors to resume from: its state is gone"
    ):
        run(copied, resume=True)
    with pytest.raises(UserError, match=f"holds a run .{kept}"):
        run(copied)


def test_other_versions_are_said_in_one_line(copied, capsys):
    tensors, metadata = read_tensors(copied / STATE)
    run(copied, resume=True)
    assert "other versions" not in capsys.readouterr().err
    versions = {**json.loads(metadata["versions"]), "torch": "2.0.1"}
    write_tensors(copied / STATE, tensors, {**metadata, "versions": json.dumps(versions)})
    run(copied, resume=True)
    (line,) = (each for each in capsys.readouterr().err.splitlines() if "other versions" in each)
    assert f"torch was '2.0.1', now '{torch.__version__}'" in line and "transformers" not in line
    identity = json.loads(metadata["identity"])
    identity["model"]["config"]["a_field_that_went"] = 1  # releases of transformers remove and add some
    other = {"versions": json.dumps(versions), "identity": json.dumps(identity)}
    write_tensors(copied / STATE, tensors, {**metadata, **other})
    run(copied, resume=True)
    assert "other versions" in capsys.readouterr().err
    del metadata["versions"]  # of a release that wrote none
    write_tensors(copied / STATE, tensors, metadata)
    run(copied, resume=True)
    assert "other versions" not in capsys.readouterr().err


def test_a_changed_model_is_told_field_by_field_and_an_older_state_is_taken(copied, monkeypatch):
    tensors, metadata = read_tensors(copied / STATE)
    identity = json.loads(metadata["identity"])
    changed = json.loads(metadata["identity"])
    changed["model"]["config"]["rms_norm_eps"] = 0.5
    write_tensors(copied / STATE, tensors, {**metadata, "identity": json.dumps(changed)})
    with pytest.raises(UserError, match=r"model\.config\.rms_norm_eps was 0\.5, now 1e-06$"):
        run(copied, resume=True)
    older = json.dumps(identity["model"]["config"], sort_keys=True).encode()
    identity["model"]["config"] = hashlib.sha256(older).hexdigest()
    write_tensors(copied / STATE, tensors, {**metadata, "identity": json.dumps(identity)})
    run(copied, resume=True)


def test_a_full_disk_keeps_the_record_that_was_there(copied, monkeypatch):
    before = (copied / "run.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"run.json: cannot be written: No space left on device"):
        write_run(copied, {**read_run(copied), "finished": False})
    monkeypatch.undo()
    assert (copied / "run.json").read_bytes() == before


def test_numbers_that_are_not_finite_become_null(tmp_path, finished):
    write_run(
        tmp_path, {**read_run(finished), "epochs": [{"loss": float("nan"), "rates": (1.0, float("inf"))}]}
    )
    assert read_run(tmp_path)["epochs"] == [{"loss": None, "rates": [1.0, None]}]


DAMAGED = {
    "half": (lambda text: text[: len(text) // 2], "is no JSON"),
    "empty": (lambda text: "", "is no JSON"),
    "bytes": (lambda text: "\udc80", "is no JSON"),
    "list": (lambda text: "[]", "not a JSON object"),
    "deep": (lambda text: "[" * 100_000, "nested too deeply"),
    "nan": (lambda text: text.replace('"finished": true', '"finished": NaN'), "holds NaN"),
    "later": (lambda text: text.replace('"format": 1', '"format": 2'), "format 2; this release reads 1"),
    "bool": (lambda text: text.replace('"format": 1', '"format": true'), "format True"),
    "field": (lambda text: text.replace('"method"', '"mode"'), "no field 'method'"),
    "type": (
        lambda text: text.replace('"finished": true', '"finished": 1'),
        "'finished' must be bool, got int",
    ),
    "labels": (lambda text: text.replace('"labels": null', '"labels": [1]'), "'labels' must hold strings"),
    "files": (lambda text: text.replace('"files": []', '"files": 3'), "'data.files' must hold strings"),
    "base": (
        lambda text: text.replace('"gguf_file": null', '"gguf_file": 3'),
        "'base.gguf_file' must be str",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_refused_by_name(finished, tmp_path, name):
    change, message = DAMAGED[name]
    text = change((finished / "run.json").read_text())
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'run.json'}: .*{message}"):
        read_run(tmp_path)


def test_no_record_is_none_and_a_folder_in_its_place_is_refused(tmp_path):
    assert read_run(tmp_path) is None and read_run(tmp_path / "nowhere") is None
    (tmp_path / "run.json").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_run(tmp_path)


def test_fields_that_an_older_record_lacks_are_null(tmp_path, finished):
    record = read_run(finished)
    for key in ("chat", "columns", "system_prompt"):
        del record[key]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_run(tmp_path)["columns"] is None


def test_a_detail_nobody_knows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"details: expected some of command, base, .*, got 'mood'"):
        finetune(
            make_adapted(), make_tokenizer(), make_examples(4), output_dir=tmp_path / "a", details={"mood": 1}
        )
    assert not (tmp_path / "a").exists() and "mood" not in run_record.DETAILS


def test_a_run_of_the_models_own_parameters_has_a_record_and_no_card(tmp_path):
    tokenizer, examples = make_tokenizer(), make_examples(4)
    config = TrainingConfig(num_train_epochs=1)
    options = {"output_dir": tmp_path, "trainable": ["lm_head.*"], "progress": False}
    finetune(make_model(), tokenizer, examples, None, config, **options)
    record = read_run(tmp_path)
    assert (
        record["method"] == "parameters" and record["finished"] and record["eval"]["accuracy_after"] is None
    )
    assert not (tmp_path / "README.md").exists() and (tmp_path / "weights.safetensors").exists()


def test_resuming_where_nothing_is_starts_a_run_and_says_so(tmp_path, capsys):
    tokenizer, examples = make_tokenizer(), make_examples(4)
    config = TrainingConfig(num_train_epochs=1)
    for _ in range(2):
        finetune(make_adapted(), tokenizer, examples, None, config, output_dir=tmp_path / "run", resume=True)
    assert capsys.readouterr().err.count("holds nothing to resume: a new run begins") == 1
