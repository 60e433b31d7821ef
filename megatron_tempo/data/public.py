"""Reads the rows of a public data set as published: a file, files, or a Hugging Face folder.

A file is JSON (a list of objects, or an object with one such list, as BIG-Bench Hard has it), JSONL, Parquet, CSV or
Arrow. A folder is the output of `save_to_disk` of `datasets`, or a copy of a repository, with a pattern that selects
files. All columns are read. Columns of CSV stay text: `025` is not 25.
"""

from __future__ import annotations

import csv
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tempo.data.rows import BATCH_ROWS, BOM, DataError, parse_json
from megatron_tempo.errors import InputError
from megatron_tempo.files import json_type, read_json, why_unreadable

ABOUT = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # files of `datasets` that are not data
_NO_UTF8 = "is no UTF-8; save the file as UTF-8"
CSV_FIELD_CHARS = 2**27  # Python's default limit of 128 KiB is too small for some solutions

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PublicRow:
    """One row: `task` is its file's name without the extension, `number` its index in the file, from 0.

    >>> PublicRow(task="word_sorting", number=3, fields={"input": "...", "target": "..."})
    """

    task: str
    number: int
    fields: Fields

    @property
    def place(self) -> str:
        return f"{self.task}:{self.number}"


def read_public(path: Path, pattern: str | None) -> Iterator[PublicRow]:
    """All rows of `path` in order. Raises DataError if a file is missing, unreadable, or of an unknown kind."""
    for file in find_files(path, pattern):
        if (reason := why_unreadable(file)) is not None:
            raise DataError(file, [reason])
        read = READERS[file.suffix]
        try:
            for number, fields in enumerate(read(file)):
                if not isinstance(fields, dict):
                    raise DataError(file, [f"row {number} is a JSON {json_type(fields)}, not an object"])
                yield PublicRow(file.stem, number, fields)
        except (pa.ArrowException, OSError, csv.Error, ValueError, RecursionError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise DataError(file, [f"not a readable {file.suffix} file: {error}"]) from error


def find_files(path: Path, pattern: str | None) -> list[Path]:
    """The data files of `path`. If a folder has several: those that match `pattern`, or the shards of one split."""
    if not _is_folder(path):
        if (reason := why_unreadable(path)) is not None:
            raise DataError(path, [reason])
        if path.suffix not in READERS:
            raise DataError(path, [f"the name ends in {path.suffix!r}; known are {', '.join(READERS)}"])
        return [path]
    if (path / "state.json").exists():
        return _saved_files(path)
    paths = sorted(file for file in path.rglob("*") if _is_data(file, path))
    names = [file.relative_to(path).as_posix() for file in paths]
    # The pattern is relative to the repository. The folder may be the repository, or the one in it with the files.
    for part in (pattern, pattern and pattern.rpartition("/")[2]):
        if part and (fitting := _fitting(path, part, paths)):
            return fitting
    if len({re.sub(r"-\d{5}-of-\d{5}", "", name) for name in names}) == 1:
        return paths
    wrong = f"holds {', '.join(names[:10])}{' and more' if len(names) > 10 else ''}" if names else "holds no data files"
    raise DataError(path, [f"{wrong}; say which with --files PATTERN, such as --files 'data/test-*'"])


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _fitting(folder: Path, pattern: str, paths: list[Path]) -> list[Path]:
    try:
        return sorted(file for file in folder.glob(pattern) if file in paths)
    except (ValueError, NotImplementedError) as error:  # an absolute pattern, or one like a**
        raise DataError(folder, [f"--files {pattern!r} is no pattern: {error}"]) from error


def _saved_files(folder: Path) -> list[Path]:
    """The files of `save_to_disk`, by its state.json."""
    state = read_json(folder / "state.json", dict)
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        wrong = "names no _data_files: it is not what save_to_disk writes"
        raise DataError(folder / "state.json", [wrong]) from error
    if unknown := [file.name for file in files if file.suffix not in READERS]:
        raise DataError(folder / "state.json", [f"names {unknown[0]}; known are files in {', '.join(READERS)}"])
    return files


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix in READERS and not hidden and file.name not in ABOUT


def _read_json(path: Path) -> Iterator[Fields]:
    try:
        value = parse_json(path.read_bytes().removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(path, [f"line {_undecodable_line(path)} {_NO_UTF8}"]) from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) != 1:
            raise DataError(path, [f"an object with {len(lists)} lists of rows in it; one is wanted"])
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(path, ["neither a list of rows nor an object that holds one"])
    yield from value


def _read_jsonl(path: Path) -> Iterator[Fields]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if content := (line.removeprefix(BOM) if number == 1 else line).strip():
                try:
                    value = parse_json(content.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(path, [f"line {number} {_NO_UTF8}"]) from error
                except (ValueError, RecursionError) as error:
                    raise DataError(path, [f"line {number}: {error}"]) from error
                if not isinstance(value, dict):
                    raise DataError(path, [f"line {number} is a JSON {json_type(value)}, not an object"])
                yield value


def _read_parquet(path: Path) -> Iterator[Fields]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            batch.validate(full=True)  # to_pylist trusts the file's offsets
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[Fields]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            batch.validate(full=True)  # to_pylist trusts the file's offsets
            yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[Fields]:
    before = csv.field_size_limit(CSV_FIELD_CHARS)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            head = next(rows, [])
            if repeated := [name for name, count in Counter(head).items() if count > 1]:
                raise DataError(path, [f"line 1: the head names the column {repeated[0]!r} twice; rename one"])
            line = rows.line_num + 1
            for cells in rows:
                if cells and len(cells) != len(head):
                    wrong = f"{len(cells)} columns, and the head has {len(head)}: {str(cells)[:60]}"
                    raise DataError(path, [f"line {line}: {wrong}; quote fields that contain commas or quotes"])
                if cells:
                    yield dict(zip(head, cells, strict=True))
                line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(path, [f"line {line}: {error}"]) from error
    except UnicodeDecodeError as error:
        raise DataError(path, [f"line {_undecodable_line(path)} {_NO_UTF8}"]) from error
    finally:
        csv.field_size_limit(before)


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


READERS: dict[str, Callable[[Path], Iterator[Fields]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
