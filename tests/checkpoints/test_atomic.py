"""Temporaries of writers that died are swept; those of living writers, and files that are none, never are."""

import errno
import os
import signal
import time

import pytest

from fastadapter.checkpoints import atomic
from fastadapter.checkpoints.atomic import CheckpointError, sweep, try_lock, write_atomically

NAME = ".adapter.safetensors.0123456789abcdef.tmp"


def old(path, content=b"x", seconds=3600.0):
    path.write_bytes(content)
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_killed_writer_leaves_a_temporary_that_the_next_one_sweeps(tmp_path):
    """The process is killed between its last write and the renaming."""
    target = tmp_path / "adapter.safetensors"
    target.write_bytes(b"old")
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(target, b"new")
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (left,) = (each for each in tmp_path.iterdir() if each != target)
    assert sweep(tmp_path) == [] and left.exists()  # it is young: its writer might be about to lock it
    old(left)
    write_atomically(target, b"newer")
    assert [each.name for each in tmp_path.iterdir()] == [target.name] and target.read_bytes() == b"newer"


def test_a_living_writer_keeps_its_temporary_however_old(tmp_path):
    path = old(tmp_path / NAME)
    with open(path, "r+b") as file:
        assert try_lock(file.fileno())
        assert sweep(tmp_path) == []
        write_atomically(tmp_path / "adapter.safetensors", b"new")
        assert path.exists()
    assert sweep(tmp_path) == [path]


def test_the_writer_holds_the_lock_until_the_renaming(tmp_path, monkeypatch):
    seen = []

    def replace(source, target):
        with open(source, "r+b") as file:
            seen.append(try_lock(file.fileno()))
        os.rename(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    write_atomically(tmp_path / "a", b"1")
    assert seen == [False]


def test_only_temporaries_of_ours_are_swept(tmp_path):
    others = ["adapter.safetensors", ".adapter.safetensors.tmp", ".hidden", NAME[1:], ".fastadapter-run.lock"]
    for name in others:
        old(tmp_path / name)
    (tmp_path / ".b.0123456789abcdef.tmp").mkdir()
    old(tmp_path / ".fastadapter-ab_12xyz")  # a proof that the folder can be written to
    other = old(tmp_path / ".b.ffffffffffffffff.tmp")
    write_atomically(tmp_path / "adapter.safetensors", b"new")
    assert other.exists()  # of another target
    assert {each.name for each in sweep(tmp_path)} == {other.name, ".fastadapter-ab_12xyz"}
    assert {each.name for each in tmp_path.iterdir()} == {*others, ".b.0123456789abcdef.tmp"}
    assert sweep(tmp_path / "none") == []


def test_nothing_is_swept_where_files_cannot_be_locked(tmp_path, monkeypatch):
    path = old(tmp_path / NAME)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert sweep(tmp_path) == [] and path.exists()
    write_atomically(tmp_path / "adapter.safetensors", b"new")  # and writing goes on
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, code):
    target = tmp_path / "adapter.safetensors"
    target.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "open", fail)
    with pytest.raises(CheckpointError, match=f"{target}: cannot be written: {os.strerror(code)}"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
