"""Runs in processes of their own: some at a time, stopped together, and no different for it."""

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from fastadapter.cli import compare as command
from fastadapter.compare import processes, worker
from fastadapter.training import TrainingInterrupted


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_runs_are_processes_of_their_own(compare, tmp_path, capfd):
    """The real thing: a process per run, two at a time, its memory measured apart, a failure named."""
    assert compare("last-layers", seeds="0 1", jobs=2) == 0
    runs = results(tmp_path / "out")["runs"]
    for run in runs:
        assert 50 << 20 < run["peak_memory_bytes"] < worker.peak_process_bytes() + (1 << 30)
        assert run["jobs"] == 2 and run["threads"] == 1
    assert ", 1 of " in (tmp_path / "out" / "comparison.md").read_text()
    assert "cores each of 2 runs at a time, PyTorch" in (tmp_path / "out" / "comparison.md").read_text()
    assert "[2/2, 00:00:0" in capfd.readouterr().err
    (tmp_path / "out" / "runs" / "last-layers" / "seed-0" / "result.json").unlink()
    (tmp_path / "out" / "data" / "test.jsonl").write_text("")
    folder = tmp_path / "out" / "runs" / "last-layers" / "seed-0"
    run = processes.Run("last-layers", 0, folder, {"threads": 1})
    with pytest.raises(ValueError, match="last-layers, seed 0: its process ended with status 2"):
        processes.run_all([run], [sys.executable, "-m", "fastadapter.cli.compare_job"], 1, print)
    assert "test.jsonl: holds no records" in capfd.readouterr().err


def shell(tmp_path, *words):
    """Runs that do ``words`` of the shell each, in a folder of their own."""
    made = []
    for number, text in enumerate(words):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "script").write_text(text)
        made.append(processes.Run("features", number, folder, {"threads": 2}))
    command = ["sh", "-c", '. "$0/script"']
    return made, command


@pytest.mark.parametrize("code, number", [(143, 15), (130, 2)])
def test_a_child_that_was_interrupted_interrupts(tmp_path, code, number):
    made, command = shell(tmp_path, f"exit {code}", "true")
    with pytest.raises(TrainingInterrupted, match="stopped in features, seed 0; the same command") as stop:
        processes.run_all(made, command, 1, lambda run: pytest.fail("another run began"))
    assert stop.value.exit_code == 128 + number


def test_a_signal_reaches_every_child(tmp_path, monkeypatch):
    """SIGTERM to the command alone, as from a scheduler: all that run are stopped and save, no other begins."""
    save = 'trap "touch $0/saved; exit 143" TERM; touch $0/began; while true; do sleep 0.05; done'
    made, command = shell(tmp_path, save, save, save)
    sleep = processes.time.sleep

    def wait(seconds):
        sleep(seconds)
        if all((run.folder / "began").exists() for run in made[:2]) and not (tmp_path / "told").exists():
            (tmp_path / "told").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(processes.time, "sleep", wait)
    with pytest.raises(
        TrainingInterrupted, match="stopped in features, seed 0; features, seed 1; the"
    ) as stop:
        processes.run_all(made, command, 2, print)
    assert stop.value.exit_code == 143
    assert [(run.folder / "saved").exists() for run in made] == [True, True, False]
    assert not (made[2].folder / "began").exists()


def test_a_failure_stops_the_runs_beside_it(tmp_path):
    save = 'trap "touch $0/saved; exit 143" TERM; touch $0/began; while true; do sleep 0.05; done'
    fail = "while [ ! -e $0/../0/began ]; do sleep 0.05; done; exit 3"
    made, command = shell(tmp_path, save, fail, "touch $0/began")
    with pytest.raises(ValueError, match="features, seed 1: its process ended with status 3"):
        processes.run_all(made, command, 2, print)
    assert (made[0].folder / "saved").exists() and not (made[2].folder / "began").exists()


def test_an_error_of_the_report_leaves_no_process_behind(tmp_path):
    made, command = shell(tmp_path, "true", "echo $$ > $0/new; mv $0/new $0/pid; exec sleep 60")

    def ended(run):
        while not (made[1].folder / "pid").exists():
            pass
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        processes.run_all(made, command, 2, ended)
    with pytest.raises(ProcessLookupError):
        os.kill(int((made[1].folder / "pid").read_text()), 0)


def test_runs_at_a_time_change_no_result_and_share_the_threads(tmp_path, compare, calls, monkeypatch):
    """In the order of the table whatever ends first; all but times and the number of jobs is equal."""
    asked = []
    plain = processes.start
    monkeypatch.setattr(
        processes, "start", lambda command, threads: asked.append(threads) or plain(command, threads)
    )
    methods = ("features", "last-layers", "soft-prompt")
    assert compare(*methods, output_dir=tmp_path / "one", jobs=1) == 0
    assert compare(*methods, output_dir=tmp_path / "two", jobs=2) == 0
    assert set(asked) == {1}
    for one, two in zip(*(results(tmp_path / name)["runs"] for name in ("one", "two")), strict=True):
        for key in ("method", "seed", "accuracy", "losses", "trainable_parameters"):
            assert one[key] == two[key]
    asked.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert compare("last-layers", output_dir=tmp_path / "shared", threads=None, jobs=2) == 0
    assert asked == [2, 2]


def test_small_models_are_run_beside_one_another(tmp_path, monkeypatch):
    """Where threads and memory are there, on a CPU, and the model is known to be small."""
    psutil = pytest.importorskip("psutil")
    memory = SimpleNamespace(available=13 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"small")
    assert command._jobs(str(tmp_path), "cpu", None) == 3
    assert command._jobs(str(tmp_path), "cpu", 2) == 2
    assert command._jobs(str(tmp_path), "cuda", None) == 1
    assert command._jobs("org/name", "cpu", None) == 1
    memory.available = 2**30
    assert command._jobs(str(tmp_path), "cpu", None) == 1
    memory.available = 13 * 2**30
    os.truncate(weights, 2**30)
    assert command._jobs(str(tmp_path), "cpu", None) == 1
