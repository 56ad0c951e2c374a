"""The file gate: atomic writes, and what a hostile, foreign or damaged file does to the reader (nothing)."""

import json
import os
import stat
import struct
import threading

import pytest
import torch

from fastadapter.checkpoints import CheckpointError, files
from fastadapter.checkpoints.files import read_tensors, write_tensors

TENSORS = {
    "a.prompt": torch.arange(6.0).view(2, 3),
    "a.gate": torch.tensor([0.5]),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def path(tmp_path):
    return write_tensors(tmp_path / "file.safetensors", TENSORS, {"note": "x"})


def parts(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rebuild(path, header, payload, raw=None):
    raw = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)


def test_round_trip(path):
    tensors, metadata = read_tensors(path)
    assert metadata == {"note": "x"}
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)


def test_a_header_length_is_no_magic_number(tmp_path):
    """Regression: the first byte of a good file is the low byte of a length, and can be a pickle's 0x80."""

    def header_bytes(note):
        path = write_tensors(tmp_path / "file.safetensors", TENSORS, {"note": note})
        return path, struct.unpack("<Q", path.read_bytes()[:8])[0]

    _, size = header_bytes("")
    path, size = header_bytes("x" * ((0x80 - size) % 256))
    assert size % 256 == 0x80
    read_tensors(path)


def test_folder_and_missing_parents(tmp_path):
    """A folder gets adapter.safetensors; missing folders are made."""
    written = write_tensors(tmp_path / "deep" / "folder", TENSORS, {})
    assert written == tmp_path / "deep" / "folder" / "adapter.safetensors"
    assert read_tensors(tmp_path / "deep" / "folder")[0].keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (b"just some text, longer than eight bytes", "truncated, or another kind"),
        (b"<!doctype html><title>Not found</title>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"\x80\x02}q\x00." + bytes(40), "pickle"),
        (b"GGUF" + bytes(40), "GGUF"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated, or another kind"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, message):
    target = tmp_path / "adapter.safetensors"
    target.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"adapter.safetensors: .*{message}"):
        read_tensors(target)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensors(tmp_path / "nothing.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"not a regular file|Is a directory"):
        read_tensors(tmp_path / "folder.safetensors")


def test_named_pipe_does_not_hang(tmp_path):
    """Opening a pipe waits for a writer unless asked not to."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    outcome = []

    def read():
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_tensors(tmp_path / "pipe.safetensors")
        outcome.append("refused")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert outcome == ["refused"]


HEADERS = [
    ("array", b"[]", "another kind of file"),
    ("not utf-8", b'{"a":"\xff"}', "."),
    ("deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("NaN", b'{"a": NaN}', "holds NaN"),
    (
        "doubled key",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "names a field twice",
    ),
    ("metadata not strings", b'{"__metadata__":{"a":1}}', "not a map of strings"),
    ("extra field", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', "not described by"),
    ("rank", b'{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}', "at most 8 sizes"),
    ("negative size", b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "at most 8 sizes"),
    (
        "huge size",
        b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
        "at most 8 sizes",
    ),
    (
        "path as name",
        b'{"../../etc/passwd":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "has the name",
    ),
    (
        "long name",
        b'{"' + b"a" * 1000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "has the name",
    ),
    (
        "overlap",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        ".",
    ),
    ("unknown dtype", b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}', "."),
    ("shape and bytes differ", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "."),
]


@pytest.mark.parametrize(
    ("raw", "message"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS]
)
def test_malformed_headers(tmp_path, raw, message):
    target = tmp_path / "bad.safetensors"
    rebuild(target, None, bytes(4), raw)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(target)


def test_too_many_tensors_are_refused_before_parsing(tmp_path):
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(entry % i for i in range(70_000)) + b"}"
    rebuild(tmp_path / "many.safetensors", None, b"", raw)
    with pytest.raises(CheckpointError, match="more than 65536 tensors"):
        read_tensors(tmp_path / "many.safetensors")


def test_truncated_at_every_kind_of_place(path):
    data = path.read_bytes()
    for length in (4, 8, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_tensors(path)
    path.write_bytes(data + b"trailing")
    with pytest.raises(CheckpointError):
        read_tensors(path)


def test_every_flipped_payload_byte_is_noticed(path):
    """The digest covers tensors and metadata."""
    header, payload = parts(path)
    for position in range(len(payload)):
        changed = bytearray(payload)
        changed[position] ^= 1
        rebuild(path, header, bytes(changed))
        with pytest.raises(CheckpointError, match="do not match its digest"):
            read_tensors(path)
    header["__metadata__"]["note"] = "y"
    rebuild(path, header, payload)
    with pytest.raises(CheckpointError, match="do not match its digest"):
        read_tensors(path)
    del header["__metadata__"]["digest"]
    rebuild(path, header, payload)
    with pytest.raises(CheckpointError, match="no content digest"):
        read_tensors(path)


def test_check_comes_before_the_payload(path, monkeypatch):
    """A refused schema is refused without the payload being parsed."""
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("payload was read"))
    seen = {}

    def check(header, metadata):
        seen.update(header)
        raise ValueError("not the one")

    with pytest.raises(CheckpointError, match="not the one"):
        read_tensors(path, check)
    assert seen["a.prompt"] == ("F32", (2, 3))


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(path, monkeypatch, failing):
    """No space, an I/O error or a failed rename: the old file is whole, no temporary is left, the error names it."""
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if failing == "write":
        real = os.fdopen

        class Full:
            def __init__(self, *args):
                self.file = real(*args)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def fileno(self):
                return self.file.fileno()

            write = staticmethod(fail)

        monkeypatch.setattr(files.os, "fdopen", Full)
    else:
        monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(CheckpointError, match=r"file.safetensors: cannot be written: No space left"):
        write_tensors(path, {"other": torch.ones(3)}, {})
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "adapter.safetensors", TENSORS, {})


def test_mode_is_kept_and_links_are_followed(path, tmp_path):
    path.chmod(0o640)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    write_tensors(link, {"other": torch.ones(3)}, {})
    assert link.is_symlink() and list(read_tensors(path)[0]) == ["other"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_saving_over_a_loaded_file_leaves_the_tensors(path):
    """Loaded tensors are copies, not a view of the file."""
    tensors, _ = read_tensors(path)
    write_tensors(path, {"a.prompt": torch.zeros(2, 3)}, {})
    assert torch.equal(tensors["a.prompt"], TENSORS["a.prompt"])
