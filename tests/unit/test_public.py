"""Public data sets in each of their forms, and what is wrong with some."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tempo.data.public import read_public
from megatron_tempo.data.rows import DataError, answer_text
from megatron_tempo.errors import InputError

ROWS = [{"problem": 'What is "1+1"?\nSay, in digits.', "answer": "025"}, {"problem": "Was ist 2×3?", "answer": "6"}]


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")


CSV = '\ufeffproblem,answer\n"What is ""1+1""?\nSay, in digits.",025\nWas ist 2×3?,6\n'
FORMS: dict[str, Callable[[Path], Any]] = {
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "canary.json": lambda path: path.write_text(json.dumps({"canary": "never train on this", "examples": ROWS})),
    "lines.jsonl": lambda path: write_jsonl(path, ROWS),
    "table.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "table.csv": lambda path: path.write_bytes(CSV.encode()),
    "table.arrow": lambda path: write_arrow(path, ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_each_form(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name)
    rows = list(read_public(tmp_path / name, None))
    assert [row.fields for row in rows] == ROWS
    stem = name.partition(".")[0]
    assert [row.place for row in rows] == [f"{stem}:0", f"{stem}:1"]


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "x"}], "reward_model": {"ground_truth": "34", "style": "rule"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "dapo.parquet")
    assert [row_read.fields for row_read in read_public(tmp_path / "dapo.parquet", None)] == [row]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """Files in the order in which state.json names them, not in that of their names."""
    write_arrow(tmp_path / "data-00001-of-00002.arrow", ROWS[:1])
    write_arrow(tmp_path / "data-00000-of-00002.arrow", ROWS[1:])
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [row.fields for row in read_public(tmp_path, "data/test-*")] == ROWS


def test_splits_that_datasets_saved(tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", ROWS if split == "test" else [])
        (tmp_path / split / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    for folder, pattern in [(tmp_path, "test/*"), (tmp_path / "test", None)]:
        assert [row.fields for row in read_public(folder, pattern)] == ROWS
    with pytest.raises(DataError, match=r"holds test/data-0.*\.arrow, train/data-0.*\.arrow; say"):
        list(read_public(tmp_path, None))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of a repository with two splits, one of them in two shards, beside what is no data."""
    for folder in ("data", ".cache"):
        (tmp_path / folder).mkdir()
    for name, rows in {"train-00000-of-00002": ROWS[:1], "train-00001-of-00002": ROWS[1:], "test": ROWS}.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{name}.parquet")
    (tmp_path / ".cache" / "train.json").write_text("[]")
    (tmp_path / "README.md").write_text("# Questions")
    return tmp_path


def test_a_copy_of_a_repository(repository: Path) -> None:
    for folder, pattern in [(repository, "data/train-*"), (repository / "data", "data/train-*")]:
        assert [row.fields for row in read_public(folder, pattern)] == ROWS
    with pytest.raises(DataError, match=r"holds data/test\.parquet, data/train-0.*say which with --files"):
        list(read_public(repository, None))
    (repository / "data" / "test.parquet").unlink()
    assert [row.fields for row in read_public(repository, "other/*")] == ROWS  # the shards of one split


BAD: dict[str, tuple[str, str]] = {
    "table.txt": ("x", "the name ends in '.txt'; known are .json, .jsonl"),
    "broken.json": ("[{", "not a readable .json file"),
    "two.json": ('{"a": [], "b": []}', "an object with 2 lists of rows"),
    "text.json": ('"x"', "neither a list of rows nor"),
    "numbers.json": ("[1]", "row 0 is a JSON number, not an object"),
    "broken.jsonl": ('{"a": 1}\n\n{"a": 2', "line 3: "),
    "broken.parquet": ("x", "not a readable .parquet file"),
    "broken.arrow": ("x", "not a readable .arrow file"),
    "scalar.jsonl": ('{"a": 1}\n3\n', "line 2 is a JSON number, not an object"),
    "deep.jsonl": ("[" * 200_000, "line 1: "),
    "short.csv": ("a,b\n1,2\n3\n", "line 3: 1 columns, and the head has 2"),
    "long.csv": ('a,b\n"1\n1",2\n1,2,3\n', "line 4: 3 columns, and the head has 2"),
    "quote.csv": ('a,b\n1,2\n"1,2\n', "line 3: unexpected end of data"),
    "bytes.csv": ("a,b\n1,2\n\udcff,2\n", "line 3 is no UTF-8; save the file as UTF-8"),
    "twice.csv": ("a,b,a\n1,2,3\n", "line 1: the head names the column 'a' twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        list(read_public(tmp_path / name, None))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "repository" / "data.jsonl").mkdir(parents=True)
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name, words in {
        "pipe.jsonl": "is a named pipe, not a file",
        "repository": "is a folder, not a file",
        "loop.csv": "cannot be read: Too many levels of symbolic links",
        "x" * 300 + ".csv": "cannot be read: File name too long",
        "a\0b.csv": "is no name of a file",
    }.items():
        with pytest.raises(DataError, match=words):
            list(read_public(tmp_path / name, None))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("[]", "state.json holds a JSON array, not an object"),
        ("{", "state.json ends too early"),
        ("{}", "names no _data_files"),
        ('{"_data_files": [3]}', "names no _data_files"),
        ('{"_data_files": [{"filename": "a.bin"}]}', "names a.bin; known are files in"),
    ],
)
def test_a_saved_folder_with_a_broken_state_is_told(tmp_path: Path, state: str, words: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(InputError, match=words):
        list(read_public(tmp_path, None))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_public(tmp_path / "none", None))
    with pytest.raises(DataError, match="holds no data files"):
        list(read_public(tmp_path, None))


def test_a_long_field_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "x" * 2**18 + "\n")
    (row,) = read_public(tmp_path / "a.csv", None)
    assert len(row.fields["a"]) == 2**18


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("123456789012345678.5", "123456789012345678.5"),
        ("0." + 40 * "9", "0." + 40 * "9"),
        ("3.50", "3.50"),
        ("1e-30", "0." + 29 * "0" + "1"),
        ("-25E2", "-2500"),
    ],
)
def test_numbers_keep_their_digits(tmp_path: Path, name: str, number: str, text: str) -> None:
    row = f'{{"answer": {number}}}'
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    (read,) = read_public(tmp_path / name, None)
    assert answer_text(read.fields["answer"]) == text


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"answer": 1, "answer": 2}', 'the name "answer" is there twice; keep one'),
        (b'{"answer": 1e999999999}', "the number 1e999999999 is beyond 1e+-400"),
        (b'{"answer": 1e99999999999999999999}', "the number 1e999999999999999999... is beyond 1e+-400"),
        ('{"answer": 1}'.encode("utf-16"), "line 1 is no UTF-8; save the file as UTF-8"),
    ],
)
def test_what_json_would_read_otherwise_is_told(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_public(tmp_path / name, None))
    assert words in str(error.value)
