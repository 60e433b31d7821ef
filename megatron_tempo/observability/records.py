"""The JSONL files of a run: one flat record a line, appended while it runs, read back by the report.

metrics.jsonl      one line an iteration: time (unix), stage, method, iteration (from 1 in the stage), step (from 1 in
                   the run), seconds, numbers by name: reward/labelled, actor/loss, critic/grad_norm, time/generate, ...
evaluations.jsonl  one line a set and point: time, stage, iteration, step, set, avg, avg_se, avg_k, pass and pass_se by
                   k, questions, response_length, truncated, seen (how many questions were trained on; null where nobody
                   knows), calibration, point (before, between, after, during; of the eval command: alone)
samples.jsonl      one line a response: point, stage, step, set, prompt, tokens, values (one more than tokens), correct,
                   answer
responses.jsonl    of the eval command, one line a response: set, id and question (the question's key), sample (from 0),
                   text (as the verifier read it), correct, tokens, finish (stop, length)
warnings.jsonl     one line a fault that the run went on after, such as a server that was started anew: time, text

Beside them `data/seen.py` keeps seen.jsonl. A number that is NaN or infinite stands as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_tempo.errors import InputError

Record = dict[str, Any]

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
RESPONSES = "responses.jsonl"
WARNINGS = "warnings.jsonl"


def read_metrics(run_dir: Path) -> list[Record]:
    return read(run_dir / METRICS)


def read_evaluations(run_dir: Path) -> list[Record]:
    return read(run_dir / EVALUATIONS)


def read_samples(run_dir: Path) -> list[Record]:
    return read(run_dir / SAMPLES)


def read_warnings(run_dir: Path) -> list[Record]:
    return read(run_dir / WARNINGS)


def read(path: Path) -> list[Record]:
    """The records of a file, none where there is no file.

    A last line without its newline is a write that was cut short, and is left out. ValueError names any other bad line.
    """
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a JSON record ({error}); delete this line to go on") from error
    return records


def append(path: Path, record: Record) -> None:
    """Adds a line. OSError names the path where it cannot be written; ValueError for NaN (see `finite`)."""
    extend(path, [record])


def extend(path: Path, records: Iterable[Record]) -> None:
    """Adds lines, all or none. Errors as those of `append`."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    if not lines:
        return
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(lines.encode())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)  # a disk that fills up takes the beginning, to which the next line would be joined
        raise OSError(error.errno, f"cannot write a record: {error.strerror}", str(path)) from error


def drop(path: Path, unwanted: Callable[[Record], bool]) -> None:
    """Takes the unwanted records, and a last line that was cut short, from the file, all or nothing.

    Where that is its end, the disk need have no room.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    kept = [line for line, record in zip(before.split(b"\n")[:-1], read(path), strict=True) if not unwanted(record)]
    content = b"".join(line + b"\n" for line in kept)
    if content == before:
        return
    if before.startswith(content):
        os.truncate(path, len(content))
        return
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def write_whole(path: Path, text: str) -> Path:
    """Writes a file in place of an earlier one, all or nothing. Returns its path."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    return path


def finite(record: Record) -> tuple[Record, list[str]]:
    """The record in JSON's types, and the names of the entries in which a number was not finite and became null.

    Scalars of numpy and torch, and whatever else has `item()`, become Python's.
    """
    plain, bad = {}, []
    for name, value in record.items():
        plain[name], ok = _finite(value)
        if not ok:
            bad.append(name)
    return plain, bad


def _finite(value: Any) -> tuple[Any, bool]:
    if isinstance(value, dict):
        items = {str(key): _finite(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, all(ok for _, ok in items.values())
    if isinstance(value, list | tuple):
        parts = [_finite(item) for item in value]
        return [item for item, _ in parts], all(ok for _, ok in parts)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None, False
    return value, True


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
