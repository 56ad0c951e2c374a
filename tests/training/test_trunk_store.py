"""The files of trunk caches: what is there is whole and of this trunk and these rows, or it is not used."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastadapter as fa
from fastadapter.checkpoints import CheckpointError
from fastadapter.cli import main
from fastadapter.training import TrunkCache, UserError
from fastadapter.training.trunk import identity, store, worth
from fastadapter.training.trunk.start import NoTrunk
from fastadapter.training.trunk.store import Shard, Store, claim, entries, make_room
from tests.training import trunk_runs
from tests.training.toy import adapter_bits, make_examples
from tests.training.trunk_runs import make, run

ONE = {"num_train_epochs": 1, "max_steps": 3}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_SEQUENCES", 8)


def shards_of(root):
    return sorted(root.rglob("*.safetensors"))


def test_a_changed_record_is_computed_and_nothing_else(tmp_path, small_shards):
    examples = make_examples(60)
    first = run(tmp_path / "a", tmp_path / "cache", examples=examples, **ONE)
    changed = [*examples[:30], make_examples(1, seed=9)[0], *examples[31:]]
    second = run(tmp_path / "b", tmp_path / "cache", examples=changed, **ONE)
    assert 0 < second.trunk_cache["computed_tokens"] < first.trunk_cache["tokens"] / 3
    assert second.losses == run(tmp_path / "c", tmp_path / "new", examples=changed, **ONE).losses


def test_another_base_and_other_versions_are_not_taken_for_the_cached(tmp_path, monkeypatch):
    folders = {run(tmp_path / "a", tmp_path / "cache", **ONE).trunk_cache["trunk"]}

    def once_more(name, change=lambda model: None, **options):
        model = make()
        change(model)
        torch.manual_seed(1)
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3, layers=options.pop("layers", 2)))
        done = run(tmp_path / name, tmp_path / "cache", model=model, **ONE)
        folders.add(done.trunk_cache["trunk"])
        return done.trunk_cache["computed_tokens"] > 0

    @torch.no_grad()
    def one_bit(model):
        model.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 5] ^= 1

    @torch.no_grad()
    def above(model):
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 1
        model.lm_head.weight[0] += 1

    assert not once_more("same") and not once_more("above", above)
    assert once_more("bit", one_bit)
    assert once_more("configuration", lambda model: setattr(model.config, "rms_norm_eps", 1e-5))
    assert once_more("attention", lambda model: model.set_attn_implementation("eager"))
    assert once_more("block", layers=1)
    versions = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: {**versions, "transformers": "9.9"})
    assert once_more("versions")
    assert len(folders) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign", "folder"])
def test_a_damaged_or_foreign_shard_is_named_and_computed_anew(tmp_path, capsys, damage):
    first = run(tmp_path / "a", tmp_path / "cache", **ONE)
    shard = shards_of(tmp_path / "cache")[0]
    data = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        shard.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "foreign":  # of the same rows behind another block
        model = fa.attach(make(), fa.LlamaAdapterConfig(prefix_len=3, layers=1))
        run(tmp_path / "b", tmp_path / "other", model=model, **ONE)
        sizes = {path.stat().st_size: path for path in shards_of(tmp_path / "other")}
        shutil.copy(sizes[len(data)], shard)
    else:
        shard.unlink()
        shard.mkdir()
    capsys.readouterr()
    if damage == "folder":  # not ours to remove
        with pytest.raises(CheckpointError, match=f"{shard.name}: .*[Dd]irectory"):
            run(tmp_path / "c", tmp_path / "cache", **ONE)
        return
    again = run(tmp_path / "c", tmp_path / "cache", progress=True, **ONE)
    assert f"{shard.name}: " in (told := capsys.readouterr().err) and "computed anew" in told
    assert again.losses == first.losses and shard.read_bytes() == data


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_full_disk_ends_what_was_asked_for_and_nothing_else(
    tmp_path, monkeypatch, capsys, small_shards, when
):
    whole = run(tmp_path / "a", False, **ONE)
    write, calls = store.write_tensors, []

    def full(path, *content):
        calls.append(1)
        if when == "at once" or len(calls) == 3:
            raise CheckpointError(f"{path}: cannot be written: No space left on device")
        return write(path, *content)

    monkeypatch.setattr(store, "write_tensors", full)
    monkeypatch.setitem(worth._LEAST, "cpu", 0)
    with pytest.raises(CheckpointError, match="No space left"):
        run(tmp_path / "b", tmp_path / "cache", **ONE)
    calls.clear()
    auto = TrunkCache(tmp_path / "new", required=False, runs=9)
    done = run(tmp_path / "c", auto, progress=True, **ONE)
    assert "trunk cache: none, " in (told := capsys.readouterr().err) and "No space left" in told
    assert done.losses == whole.losses and adapter_bits(tmp_path / "a") == adapter_bits(tmp_path / "c")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written"):
        run(tmp_path / "a", tmp_path / "file" / "cache", **ONE)


def test_a_full_cache_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    """A folder that others have filled and that is only read."""
    first = run(tmp_path / "a", tmp_path / "cache", **ONE)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for name in ("claim", "make_room", "write_tensors"):
        monkeypatch.setattr(store, name, refuse)
    monkeypatch.setattr(store.os, "utime", refuse)
    assert run(tmp_path / "b", tmp_path / "cache", **ONE).losses == first.losses


def test_the_budget_and_what_goes_first(tmp_path, monkeypatch, capsys):
    with pytest.raises(
        UserError, match="trunk_cache: its states take 1 MiB, and all of them together may take"
    ):
        run(tmp_path / "a", TrunkCache(tmp_path / "cache", max_bytes=1000), **ONE)
    assert not (tmp_path / "cache").exists()
    first = run(tmp_path / "b", tmp_path / "cache", **ONE)
    mine = tmp_path / "cache" / "notes.txt"
    mine.write_text("kept")
    old = shards_of(tmp_path / "cache")
    for shard in old:
        os.utime(shard, (1, 1))
    model = fa.attach(make(), fa.LlamaAdapterConfig(prefix_len=3, layers=1))
    cache = TrunkCache(tmp_path / "cache", max_bytes=int(1.5 * first.trunk_cache["bytes"]))
    capsys.readouterr()
    second = run(tmp_path / "c", cache, model=model, progress=True, **ONE)
    assert "removed 1 MiB that was not used for longest" in capsys.readouterr().err
    assert mine.exists() and not all(shard.exists() for shard in old)
    assert all(path.parent.name != second.trunk_cache["trunk"] for path in old)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="more than half of the 1 MiB free"):
        run(tmp_path / "d", tmp_path / "elsewhere", **ONE)


def test_room_is_made_by_last_use_and_of_our_files_alone(tmp_path):
    folder = tmp_path / ("a" * 24)
    folder.mkdir()
    for number in range(4):
        shard = folder / f"{number:032x}.safetensors"
        shard.write_bytes(bytes(1000))
        os.utime(shard, (100 - number, 100 - number))
    (folder / "adapter.safetensors").write_bytes(bytes(1000))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{0:032x}.safetensors").write_bytes(bytes(1000))
    assert len(entries(tmp_path)) == 4
    kept = [folder / f"{3:032x}.safetensors"]  # used longest ago, but in use here
    assert make_room(tmp_path, 1500, 4000, kept) == 2000
    assert [entry.path.name for entry in entries(tmp_path)] == [
        f"{3:032x}.safetensors",
        f"{0:032x}.safetensors",
    ]
    with pytest.raises(NoTrunk, match="all of them together may take"):
        make_room(tmp_path, 3500, 4000, kept)
    assert len(entries(tmp_path)) == 2 and len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_a_shard_that_another_process_is_at_is_waited_for_and_taken(tmp_path):
    """Two builders: each computes what nobody else does."""
    room = Store(tmp_path, "0" * 64, 4, torch.float32)
    shards = [Shard(room.folder / f"{number:032x}.safetensors", ((number, 1),)) for number in range(4)]
    computed = []

    def compute(shard):
        computed.append(shard)
        return torch.full((2, 4), float(shards.index(shard)))

    found = []
    with claim(shards[1].path) as mine:
        assert mine
        builder = threading.Thread(
            target=lambda: found.extend(room.fill(shards, compute, print, lambda tokens: None, first=1))
        )
        builder.start()
        while len(computed) < 3:
            pass
        room.write(shards[1], compute(shards[1]))
    builder.join()
    assert len(computed) == 4 and [float(each[0, 0]) for each in found] == [0, 1, 2, 3]
    assert not list(tmp_path.rglob("*.lock"))


def test_killed_while_it_is_computed_loses_the_current_shard_alone(tmp_path, small_shards):
    command = [sys.executable, "-m", trunk_runs.__name__, str(tmp_path / "a"), str(tmp_path / "cache")]
    root = Path(trunk_runs.__file__).parents[2]
    child = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "shard\n"
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "shard\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    left = {path: path.read_bytes() for path in shards_of(tmp_path / "cache")}
    assert len(left) == 2
    done = run(tmp_path / "a", tmp_path / "cache", resume=True)
    assert {path: path.read_bytes() for path in left} == left
    assert 0 < done.trunk_cache["computed_tokens"] < done.trunk_cache["tokens"]
    assert done.losses == run(tmp_path / "b", tmp_path / "new").losses


def test_the_command_lists_and_clears(tmp_path, capsys):
    done = run(tmp_path / "a", tmp_path / "cache", **ONE)
    name = done.trunk_cache["trunk"]
    where = ["--trunk-cache-dir", str(tmp_path / "cache")]
    assert main(["cache", *where]) == 0
    assert (
        f"{name}       1 MiB" in (told := capsys.readouterr().out) and "LlamaModel, 2 blocks, float32" in told
    )
    assert main(["cache", "--clear", "zz", *where]) == 2
    assert "no trunk in" in capsys.readouterr().err
    assert main(["cache", "--clear", name[:6], "--json", *where]) == 0
    assert name in capsys.readouterr().out and not (tmp_path / "cache" / name).exists()
    assert main(["cache", *where]) == 0 and "0 MiB in all" in capsys.readouterr().out
