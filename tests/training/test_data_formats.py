"""Every format that records are read from, as it should be and broken in more than five ways each.

The same records come out of every format; every complaint names the file and the line or record.
"""

import csv
import gzip
import json
import sys
import tracemalloc

import pytest

from fastadapter.training import UserError, read_examples
from fastadapter.training.data import read_records

RECORDS = [
    {"text": 'A "delight",\nreally.', "label": "good", "stars": 5},
    {"text": "Ångström 🎬", "label": "bad", "stars": 1},
    {"text": "  padded  ", "label": "good", "stars": 4},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label", "stars"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)
    return path.read_bytes()


def parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table(columns), path, **options)
    return path


def examples_of(path, **options):
    return [(e.prompt, e.label) for e in read_examples(path, template="{text}", **options)]


@pytest.mark.parametrize("name", [
    "a.jsonl", "a.ndjson", "a.json", "lines.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.GZ",
    "bom.jsonl", "bom.json", "bom.csv", "crlf.jsonl", "crlf.csv", "bare.jsonl",
])  # fmt: skip
def test_every_format_gives_the_same_records(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, {key: [record[key] for record in RECORDS] for key in RECORDS[0]})
    else:
        kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
        content = {
            "jsonl": LINES.encode(),
            "ndjson": LINES.encode(),
            "json": LINES.encode() if name == "lines.json" else json.dumps(RECORDS, indent=1).encode(),
            "csv": table(tmp_path / "made.csv", ","),
            "tsv": table(tmp_path / "made.tsv", "\t"),
        }[kind]
        if name == "crlf.jsonl":
            content = content.replace(b"\n", b"\r\n")
        if name == "bare.jsonl":
            content = b"\n \n" + content.rstrip(b"\n")
        if name.startswith("bom"):
            content = b"\xef\xbb\xbf" + content
        write(path, gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert examples_of(path) == [(record["text"], record["label"]) for record in RECORDS]


GOOD = '{"prompt": "p", "completion": "c"}'
SURROGATE = '{"prompt": "p \\ud800", "completion": "c"}'
BROKEN = [
    ("a.jsonl", f"{GOOD}\n{SURROGATE}", r"line 2: holds half a surrogate pair \(\\ud800\)"),
    ("a.jsonl", '{"prompt": "p", "completion": "c", "other": ["\\uDFFF"]}', r"line 1: holds half a surrogate"),
    ("a.jsonl", '{"prompt": "p", "completion": NaN}', "line 1: malformed JSON: NaN is no JSON value"),
    ("a.jsonl", '{"prompt": "p", "completion": "c", "x": -Infinity}', "line 1: .*-Infinity is no JSON value"),
    ("a.jsonl", '{"prompt": "p", "completion": "c", "prompt": "q"}', "line 1: .*'prompt' occurs twice"),
    ("a.jsonl", '{"prompt": "p\\u0000", "completion": "c"}', "line 1: field 'prompt' holds a NUL"),
    ("a.jsonl", f"{GOOD}\n" + '{"prompt": "p\0", "completion": "c"}', "line 2: malformed JSON"),
    ("a.jsonl", GOOD.encode("utf-16"), "line 1: not UTF-8 but UTF-16"),
    ("a.jsonl", gzip.compress(GOOD.encode()), "line 1: not UTF-8 but gzip data; .* ends in .gz"),
    ("a.jsonl.gz", GOOD, "a.jsonl.gz: damaged gzip data"),
    ("a.jsonl.gz", gzip.compress((GOOD + "\n").encode() * 99)[:-12], "a.jsonl.gz: damaged gzip data"),
    ("a.jsonl", GOOD.replace('"c"', '["c"]'), "line 1: field 'completion' must be a string, got list"),
    ("a.jsonl", "x" * 300, "line 1: the record has more than 200 bytes"),
    ("a.json", f"[{GOOD},\n{SURROGATE}]", r"line 2 \(record 2\): holds half a surrogate pair"),
    ("a.json", f"[{GOOD},\n {GOOD}", r"a.json line 2: malformed JSON: expected a comma or the end"),
    ("a.json", f"[{GOOD},\n {GOOD[:-1]}", r"line 2 \(record 2\): malformed JSON"),
    ("a.json", f"[{GOOD},]", r"line 1 \(record 2\): malformed JSON"),
    ("a.json", f"[{GOOD}\n{GOOD}]", "line 2: malformed JSON: expected a comma .* behind record 1"),
    ("a.json", f"[{GOOD}]\n{GOOD}", "line 2: malformed JSON: more text behind the list"),
    ("a.json", f"[{GOOD},\n3]", r"line 2 \(record 2\): expected a JSON object, got int"),
    ("a.json", "[\n\n" + GOOD.replace(":", "", 1) + "]", r"line 3 \(record 1\): malformed JSON"),
    ("a.json", '[{"prompt": "p",\n "completion": c}]', r"\(record 1\), line 2: malformed JSON: Expecting value"),
    ("a.json", '{"prompt":\n "p"}', r"line 1: malformed JSON: .*\(a .json file holds a list of records"),
    ("a.json", "[" + "[" * 100_000, "line 1 .record 1.: (JSON is nested too deeply|the record has more than)"),
    ("a.json", f"[{GOOD},\n" + '{"prompt": "' + "x" * 300, r"line 2 \(record 2\): the record has more than 200 bytes"),
    ("a.json", f"[{GOOD},\n".encode() + b'{"prompt": "\xff"}]', "line 2: not UTF-8"),
    ("a.json", "[]", "holds no records"),
    ("a.csv", 'text,label\nx,good\n"y', "line 3: malformed CSV"),
    ("a.csv", 'text,label\nx,good\n"y' + "\nmore" * 100, "line 3: the record has .*; is a quote left open"),
    ("a.csv", "text,label\nx,good\ny,bad,more\n", "line 3: has 3 fields, the header 2"),
    ("a.csv", "text, text\nx,good\n", "line 1: a column name occurs twice: 'text'"),
    ("a.csv", "text,label\nx\0,good\n", "line 2: (field 'text' holds a NUL|malformed CSV)"),
    ("a.csv", b"text,label\n\xe4,good\n", "line 2: not UTF-8"),
    ("a.csv", "text,label\nx,good\n \t,bad\n", "line 3: field 'text' is empty"),
    ("a.csv", "text;label\nx;good\n", "line 2: is no record of .*; its fields are 'text;label'"),
    ("a.tsv", "text\tlabel\nx,y\tgood\n\ny\n", "line 4: has 1 fields, the header 2"),
    ("a.tsv", "text,label\nx,good\n", "line 2: is no record of"),
    ("a.tsv", 'text\tlabel\n"x\tgood\n', "line 2: malformed CSV"),
    ("a.tsv", "text\tlabel\nx\t\n", "line 2: field 'label' is empty"),
    ("a.tsv", "text\tlabel\n" + "x" * 300 + "\tgood\n", "line 2: the record has more than 200 bytes"),
    ("a.parquet", "PAR1", "a.parquet: not a readable parquet file"),
    ("a.parquet", GOOD, "a.parquet: not a readable parquet file"),
    ("a.parquet", "", "a.parquet: not a readable parquet file"),
    ("a.xlsx", GOOD, "a.xlsx: expected a name that ends in .jsonl"),
    ("a.gz", GOOD, "a.gz: expected a name that ends in .jsonl"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, message", BROKEN, ids=[f"{b[0]}-{i}" for i, b in enumerate(BROKEN)])
def test_broken_files_are_named_with_the_line(tmp_path, name, content, message):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        read_examples(path, max_record_bytes=200)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("columns, message", [
    ({"prompt": ["p", None], "completion": ["c", "c"]}, "record 2: field 'prompt' is missing"),
    ({"prompt": ["p"], "completion": [b"c"]}, "record 1: field 'completion' must be a string, got bytes"),
    ({"text": ["a", "b"], "label": [1.5, 2.5]}, "record 1: field 'label' must be a string, an integer or a boolean"),
    ({"prompt": ["p", "q"], "completion": ["c", " "]}, "record 2: field 'completion' is empty"),
    ({"question": ["p"]}, "record 1: is no record of .*; its fields are 'question'"),
    ({"prompt": ["p", "x" * 300], "completion": ["c", "c"]}, "record 2: the record has more than 200 bytes"),
    ({"prompt": [], "completion": []}, "holds no records"),
])  # fmt: skip
def test_broken_parquet_records_are_named(tmp_path, columns, message):
    path = parquet(tmp_path / "a.parquet", columns, use_dictionary=False)
    with pytest.raises(UserError, match=message):
        read_examples(path, max_record_bytes=200)


def test_a_row_group_of_one_giant_is_not_read(tmp_path, monkeypatch):
    path = parquet(
        tmp_path / "a.parquet", {"prompt": ["x" * 200_000], "completion": ["c"]}, use_dictionary=False
    )
    from pyarrow import parquet as files

    monkeypatch.setattr(files.ParquetFile, "iter_batches", None)
    with pytest.raises(UserError, match=r"row group 1 has 200,.* and so a record of more than 200 bytes"):
        read_examples(path, max_record_bytes=200)


def test_a_column_of_times_is_left_alone(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    when = pyarrow.array([1], pyarrow.timestamp("ns"))  # which is no Python value without pandas
    path = parquet(tmp_path / "a.parquet", {"text": ["t"], "label": [True], "when": when})
    assert examples_of(path) == [("t", "true")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_giant_is_refused_before_it_is_in_memory(tmp_path, name):
    """200 MB on one line, of which 16 MiB and a little are read."""
    path = tmp_path / name
    start = {"a.jsonl": '{"prompt": "', "a.json": '[{"prompt": "'}.get(name, "prompt\tcompletion\n")
    with path.open("wb") as file:
        file.write(start.encode() + b"x" * 17 * 2**20)
        file.truncate(200 * 10**6)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="the record has more than 16,777,216 bytes"):
            list(read_records(path))
        assert tracemalloc.get_traced_memory()[1] < 100 * 10**6
    finally:
        tracemalloc.stop()


def test_long_fields_and_many_records_are_read(tmp_path):
    long = "long " * 40_000  # beyond the csv module's own limit
    lines = [json.dumps({"text": f"{n} {long if n == 3 else ''}", "label": n % 3}) for n in range(3000)]
    listed = write(tmp_path / "a.json", "[\n" + ",\n".join(lines) + "]")
    rows = "".join(f'"{n} {long if n == 3 else ""}",{n % 3}\n' for n in range(3000))
    found = examples_of(write(tmp_path / "a.csv", "text,label\n" + rows))
    assert found == examples_of(listed) == examples_of(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(found) == 3000 and len(found[3][0]) > 199_000
    places = [source for source, _ in read_records(listed)]
    assert places[2999] == f"{listed} line 3001 (record 3000)"


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "parts.parquet").mkdir()
    with pytest.raises(UserError, match=r"parts\.parquet: is a folder, not a regular file"):
        read_examples(tmp_path / "parts.parquet")
    with pytest.raises(UserError, match=r"none\.parquet: no such file"):
        read_examples(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="none: no such file or folder"):
        read_examples(tmp_path / "none")
    for limit in (0, 1.5, True):
        with pytest.raises(UserError, match="max_record_bytes must be an int, at least 1"):
            read_examples(tmp_path / "none.jsonl", max_record_bytes=limit)


@pytest.mark.parametrize(
    "module, name", [("pyarrow", "a.parquet"), ("datasets", "folder"), ("datasets", "org/name")]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, module, name):
    for each in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.parquet", "PAR1")
    path = name if "/" in name else tmp_path / name
    with pytest.raises(UserError, match=rf'{name}: .*needs {module}: pip install "fastadapter\[data\]"'):
        read_examples(path)


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """A folder of one data set and one of two splits."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data_sets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["dull", "fine"], "label": [0, 1]}, features)
    rows.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(folder / "two")
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(folder / "unnamed")
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features).save_to_disk(folder / "open")
    (folder / "empty").mkdir()
    return folder


def test_data_sets_are_read_with_the_names_of_their_classes(data_sets):
    assert (
        examples_of(data_sets / "one") == [("dull", "neg"), ("fine", "pos")] == examples_of(data_sets / "two")
    )
    assert examples_of(f"{data_sets / 'two'}:test") == [("fine", "pos")]
    assert [source for source, _ in read_records(data_sets / "one")][1] == f"{data_sets / 'one'} record 2"


@pytest.mark.parametrize("name, message", [
    ("two:none", "has no split 'none'; its splits are train, test"),
    ("unnamed", "has no split 'train'; its splits are a, b"),
    ("one:test", "the data set has no splits"),
    ("open", "open record 2: field 'label' is -1, none of its 2 classes"),
    ("empty", "empty: a folder, but not one that save_to_disk wrote"),
    ("none", "none: no such file or folder"),
])  # fmt: skip
def test_broken_data_sets_are_named(data_sets, name, message):
    with pytest.raises(UserError, match=message):
        read_examples(f"{data_sets}/{name}")


def test_a_data_set_of_the_hub_is_asked_for_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["p"], "completion": ["c"]})
    asked = []

    def load_dataset(name):
        asked.append(name)
        if name != "org/pairs":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\nmore")
        return datasets.DatasetDict({"validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_examples("org/pairs")[0].source == "org/pairs record 1"
    assert read_examples("org/pairs:validation")[0].prompt == "p"
    with pytest.raises(UserError, match=r"^org/none: no file, no folder, and no data set .*doesn't exist$"):
        read_examples("org/none")
    assert asked == ["org/pairs", "org/pairs", "org/none"]
