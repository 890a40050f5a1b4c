"Kinds of files, folders that save_to_disk has written, and splits: what is asked for is read, or refused."
import csv
import gzip
import json
import shutil

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from rlhf_reward import loading
from rlhf_reward.data_files import has_splits
from rlhf_reward.loading import load_rows

ROWS = [
    {"prompt": f"p{number}, \"é\"\n", "chosen": "a\tb", "rejected": [{"role": "assistant", "content": "b"}]}
    for number in range(3)
]
PLAIN = [{"prompt": f"p{number} ", "chosen": "a", "rejected": "b"} for number in range(3)]


def write(path, rows):
    "Write rows as the suffix of the file says."
    is_table = {".tsv", ".csv"} & set(path.suffixes)
    text = path.with_name("text")
    if is_table:
        with text.open("w", newline="") as file:
            delimiter = "\t" if ".tsv" in path.suffixes else ","
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            for row in rows:
                is_text = {name: isinstance(value, str) for name, value in row.items()}
                writer.writerow({name: row[name] if is_text[name] else json.dumps(row[name]) for name in row})
    elif ".json" in path.suffixes:
        text.write_text(json.dumps(rows, indent=1))
    else:
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(text.read_bytes())
        text.unlink()
    else:
        text.rename(path)


KINDS = ["ndjson", "tsv", "jsonl.zst", "ndjson.zst", "json.zst", "csv.zst", "tsv.zst"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_in_every_kind_of_text(kind, streaming, tmp_path):
    write(tmp_path / f"rows.{kind}", ROWS)
    assert list(load_rows(str(tmp_path / f"rows.{kind}"), streaming=streaming)) == ROWS
    assert list(load_rows(str(tmp_path), streaming=streaming)) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_files_are_streams_or_files(streaming, tmp_path):
    table = Dataset.from_list(PLAIN).data.table
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert list(load_rows(str(tmp_path / f"{name}.arrow"), streaming=streaming)) == PLAIN
    (tmp_path / "bad.arrow").write_bytes(b"not arrow")
    with pytest.raises(ValueError, match="bad.arrow' cannot be read"):
        list(load_rows(str(tmp_path / "bad.arrow"), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_zst_is_named(streaming, tmp_path):
    write(tmp_path / "rows.jsonl.zst", PLAIN * 999)
    whole = (tmp_path / "rows.jsonl.zst").read_bytes()
    for damaged in (whole[:-20], b"{}" + whole, whole[:40] + b"\0\0\0\0" + whole[44:]):
        (tmp_path / "rows.jsonl.zst").write_bytes(damaged)
        with pytest.raises(ValueError, match="rows.jsonl.zst' cannot be read"):
            list(load_rows(str(tmp_path / "rows.jsonl.zst"), streaming=streaming))
    (tmp_path / "rows.parquet.zst").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file of another kind; expected .* and text with .zst"):
        load_rows(str(tmp_path / "rows.parquet.zst"))


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_data_sets_are_read_with_their_types(streaming, tmp_path):
    features = Features({**dict.fromkeys(("prompt", "response_a", "response_b"), Value("string"))})
    features["winner"] = ClassLabel(names=["model_a", "model_b"])
    rows = [{"prompt": f"p{number}", "response_a": "a", "response_b": "b", "winner": number % 2} for number in range(4)]
    saved = Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    found = load_rows(str(tmp_path / "one"), streaming=streaming)
    assert list(found) == rows and found.features == features
    DatasetDict({"train": saved, "test_prefs": saved.select([3])}).save_to_disk(tmp_path / "several")
    assert list(load_rows(str(tmp_path / "several"), streaming=streaming)) == rows
    assert list(load_rows(str(tmp_path / "several"), "test_prefs", streaming=streaming)) == rows[3:]
    assert list(load_rows(str(tmp_path), data_dir="one", streaming=streaming)) == rows
    assert sorted(path.name for path in (tmp_path / "one").iterdir())[:2] == [
        f"data-0000{number}-of-00002.arrow" for number in range(2)
    ]
    assert not list((tmp_path / "one").glob("cache*")) # nothing is written next to the rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json"])
def test_utf_16_is_named(name, encoding, streaming, tmp_path):
    write(tmp_path / name, PLAIN)
    text = "\ufeff" * (encoding == "utf-16-be") + (tmp_path / name).read_text()
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=f"{name}' cannot be read: it is UTF-16 text; expected UTF-8"):
        list(load_rows(str(tmp_path / name), on_bad_row="skip", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_rows(streaming, tmp_path):
    "A part without rows, such as of a filter, is no fault where another has some; `datasets` fails at it."
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    full = Dataset.from_list([row])
    empty = full.select([])
    (tmp_path / "parts").mkdir()
    empty.to_parquet(tmp_path / "parts/train-0.parquet")
    for name in ("empty.parquet", "empty.parquet.gz"):
        opened = gzip.open(tmp_path / name, "wb") if name.endswith(".gz") else open(tmp_path / name, "wb")
        with opened:
            opened.write((tmp_path / "parts/train-0.parquet").read_bytes())
    empty.save_to_disk(tmp_path / "saved")
    for name in ("parts", "empty.parquet", "empty.parquet.gz", "saved"):
        with pytest.raises(ValueError, match="has no rows; expected rows of preference"):
            load_rows(str(tmp_path / name), streaming=streaming)
    full.to_parquet(tmp_path / "parts/train-1.parquet")
    assert list(load_rows(str(tmp_path / "parts"), streaming=streaming)) == [row]


def test_damaged_saved_data_sets_are_named(tmp_path):
    Dataset.from_list(PLAIN).save_to_disk(tmp_path / "one", num_shards=2)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="00001-of-00002.arrow' does not exist; expected the whole folder"):
        load_rows(str(tmp_path / "one"))
    for text in ("{", "[]", '{"_data_files": 3}', '{"_data_files": [3]}', '{"_data_files": [{}]}'):
        (tmp_path / "other" / "state.json").write_text(text)
        with pytest.raises(ValueError, match="state.json' cannot be read"):
            load_rows(str(tmp_path / "other"))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_file_or_folder_does_not_have_is_refused(streaming, tmp_path):
    write(tmp_path / "train.jsonl", PLAIN)
    file = str(tmp_path / "train.jsonl")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=f"is a single file, and split is '{split}'; expected no split"):
            load_rows(file, split, streaming=streaming)
    with pytest.raises(ValueError, match="is a single file, and data_dir is 'a'"):
        load_rows(file, data_dir="a", streaming=streaming)
    for name in (file, str(tmp_path)):
        for argument in ("config", "revision"):
            with pytest.raises(ValueError, match=f"{argument} is 'v1'; expected {argument} with a data set on the hub"):
                load_rows(name, **{argument: "v1"}, streaming=streaming)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist; expected a folder"):
        load_rows(str(tmp_path), data_dir="nowhere", streaming=streaming)
    Dataset.from_list(PLAIN).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="is one set of rows, .* split is 'test'; expected no split"):
        load_rows(str(tmp_path / "one"), "test", streaming=streaming)
    DatasetDict({"a": Dataset.from_list(PLAIN)}).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match=r"has the splits \['a'\]; expected one of them, not 'train'"):
        load_rows(str(tmp_path / "several"), streaming=streaming)
    assert [has_splits(str(tmp_path / name)) for name in ("train.jsonl", "one", "several", "")] == [0, 0, 1, 1]
    assert has_splits("org/name") and not has_splits("missing.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_a_data_set_on_the_hub_are_passed_on(streaming, monkeypatch):
    asked = {}

    def load_dataset(path, data_files=None, **options):
        asked.update(options, path=path)
        rows = Dataset.from_list(PLAIN)
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    found = load_rows("a/b", "train_prefs", config="c", revision="v1", data_dir="d", streaming=streaming)
    assert list(found) == PLAIN
    expected = {"path": "a/b", "split": "train_prefs", "name": "c", "revision": "v1", "data_dir": "d"}
    assert asked == {**expected, "streaming": streaming}
    asked.clear()
    load_rows("a/b", streaming=streaming)
    assert asked == {"path": "a/b", "split": "train", "streaming": streaming}

    def no_connection(path, **options):
        raise ConnectionError("Couldn't reach it.\nOffline.")

    monkeypatch.setattr(loading, "load_dataset", no_connection)
    problem = "'a/b' is no file or folder in .*; expected .*by HF_HUB_OFFLINE=1: unset .* Couldn't reach it. Offline.$"
    with pytest.raises(ConnectionError, match=problem):
        load_rows("a/b", streaming=streaming)
