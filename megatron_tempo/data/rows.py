"""Reads the rows of a JSONL or Parquet file, with the location of each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_tempo.config.extensions import Extension, call_failed, load_reader, wrong_result
from megatron_tempo.errors import InputError
from megatron_tempo.files import json_type, repeated_name, why_unreadable

BATCH_ROWS = 1024
REPORTED = 10
BOM = b"\xef\xbb\xbf"
_LARGEST_EXPONENT = 400  # of a number that is written out without an exponent


class DataError(InputError):
    """Problems of a data file. `problems` has an entry for every bad row, the message shows the first ten."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = list(self.problems[:REPORTED])
        if len(self.problems) > REPORTED:
            lines.append(f"... and {len(self.problems) - REPORTED} more")
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) > 1 else "")
        super().__init__("\n  ".join([f"{path}: {count}", *lines]))


class BadRow(ValueError):
    """Why one row cannot be used."""


def answer_text(value: object) -> str:
    """An answer as text. Numbers are written without an exponent: 1e-05 would be read as Euler's number minus five."""
    if isinstance(value, float | Decimal):
        return format(value if isinstance(value, Decimal) else Decimal(repr(value)), "f")
    return str(value)


def parse_json(text: str) -> Any:
    """The JSON of a data file. A number with a fraction or an exponent is a Decimal, because a float would round it.

    Raises ValueError also for a name that an object has twice, and for numbers beyond 1e+-400.
    """
    return json.loads(text, parse_float=_exact, object_pairs_hook=_object)


def _exact(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:  # an exponent of 20 digits
        value = Decimal("Infinity")
    if not value.is_finite() or abs(value.adjusted()) > _LARGEST_EXPONENT:
        raise ValueError(f"the number {text[:20]}{'...' if len(text) > 20 else ''} is beyond 1e+-{_LARGEST_EXPONENT}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_name(pairs)) is not None:
        raise ValueError(f"the name {json.dumps(twice)} is there twice; keep one")
    return dict(pairs)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `number` counts from 0, `fields` has those requested fields that the row has.

    `problem`: why the row cannot be read; its fields are empty then.

    >>> Row(number=2, place="train.jsonl:4", fields={"prompt": "Find 1+1."})
    """

    number: int
    place: str
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_rows(path: Path, names: Sequence[str], reader: Extension | None = None) -> Iterator[Row]:
    """The rows of `path` in order, each with only the fields `names`; by the user's reader if there is one.

    Raises DataError if the file as a whole cannot be read.
    """
    if reader is not None:
        return _read_imported(path, names, reader)
    if (reason := why_unreadable(path)) is not None:
        raise DataError(path, [f"{reason}; check the dataset's `path`"])
    if path.suffix == ".parquet":
        return _read_parquet(path, names)
    if path.suffix == ".jsonl":
        return _read_jsonl(path, names)
    raise DataError(
        path,
        [
            f"the name ends in {path.suffix!r}; use .parquet, or .jsonl with one JSON object a line "
            "(`jq -c '.[]' a.json > a.jsonl` makes one from a JSON array)"
        ],
    )


def _read_imported(path: Path, names: Sequence[str], reader: Extension) -> Iterator[Row]:
    try:
        rows: Any = load_reader(reader)(path)
        if not isinstance(rows, Iterable) or isinstance(rows, str | Mapping):
            raise wrong_result(reader, rows, "the rows: an iterable of dicts")
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise wrong_result(reader, row, f"a dict as row {number}")
            absent = [missing(name, [str(key) for key in row]) for name in names if name not in row]
            fields = {} if absent else {name: row[name] for name in names}
            yield Row(number, f"row {number}", fields, absent[0] if absent else None)
    except InputError:
        raise
    except Exception as error:
        raise call_failed(reader, error) from error


def missing(name: str, present: Sequence[str]) -> str:
    """The message for a field `name` that is not among those present."""
    close = difflib.get_close_matches(name, present, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {sorted(present)[:10]}"
    return f"field {name!r} is missing; {hint}"


def _read_jsonl(path: Path, names: Sequence[str]) -> Iterator[Row]:
    number = 0
    try:
        with path.open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                content = line.removeprefix(BOM).strip() if line_number == 1 else line.strip()
                if not content:
                    continue
                place = f"{path.name}:{line_number}"
                try:
                    yield Row(number, place, _parse_object(content, names))
                except BadRow as error:
                    yield Row(number, place, problem=str(error))
                number += 1
    except OSError as error:
        raise DataError(path, [f"cannot be read: {error.strerror}"]) from error


def _parse_object(content: bytes, names: Sequence[str]) -> dict[str, Any]:
    try:
        value = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start + 1} of the line is no UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"invalid JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # more digits or deeper nesting than Python reads
        raise BadRow(f"unreadable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRow(f"a JSON {json_type(value)}, not an object; write one {{...}} a line")
    for name in names:
        if name not in value:
            raise BadRow(missing(name, list(value)))
    return {name: value[name] for name in names}


def _read_parquet(path: Path, names: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa  # takes half a second, which JSONL files do not need
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            problems = [missing(name, present) for name in names if name not in present]
            if problems:
                raise DataError(path, problems)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(names)):
                for values in batch.to_pylist():
                    yield Row(number, f"{path.name} row {number}", {name: values[name] for name in names})
                    number += 1
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: text that is not UTF-8
        where = f", from row {number} on" if number else ""
        raise DataError(path, [f"not a readable Parquet file{where}: {error}"]) from error
