"""The JSONL files of a run: one flat record per line. The run appends to them; the report reads them.

metrics.jsonl      one line per iteration: time (unix), stage, method, iteration (from 1 in the stage), step (from 1 in
                   the run), seconds, idle_share (the share of them in which neither a model nor the engine worked),
                   numbers by name: reward/labelled, actor/loss, critic/grad_norm, time/generate, ...
evaluations.jsonl  one line per set and point: time, stage, iteration, step, set, avg, avg_se, avg_k, pass and pass_se
                   by k, questions, response_length, truncated, seen (how many questions were trained on; null if
                   unknown), calibration, point (before, between, after, during; of the eval command: alone), right
                   (correct responses of each question, in the order of their keys), questions_hash (equal where the
                   questions are the same)
samples.jsonl      one line per response: point, stage, step, set, prompt, tokens, values (one more than tokens),
                   correct, answer, verifier
starts.jsonl       one line per start of the job, at the step it continued from (see observability.start)
responses.jsonl    of the eval command, one line per response: set, id and question (the question's key), sample (from
                   0), text (as the verifier read it), correct, tokens, finish (stop, length)
warnings.jsonl     one line per fault that the run continued after, such as a restarted server: time, text

`data/seen.py` writes seen.jsonl next to them. NaN and infinity are written as null.
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
from megatron_tempo.files import json_type, read_bytes, replace_file

Record = dict[str, Any]

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
RESPONSES = "responses.jsonl"
WARNINGS = "warnings.jsonl"
STARTS = "starts.jsonl"


# The form of a value: its types; a list of values of one form; a dict of values of one form, `{str: form}`; or a record
# with these entries at least, but for those whose name begins with "?": earlier versions did not write them.
_NUMBER, _TEXT, _WHOLE = (int, float, type(None)), (str, type(None)), int
_SCORES = {str: _NUMBER}
_CALIBRATION = {
    **dict.fromkeys(("auroc", "?auroc_within_questions", "brier", "ece"), _NUMBER),
    "bins": [dict.fromkeys(("mean_value", "fraction_right", "count"), (int, float))],
}
# By a file's name: the required entries of its records, and their forms.
_REQUIRED: dict[str, dict[str, Any]] = {
    METRICS: {"stage": str, "step": _WHOLE},
    EVALUATIONS: {"set": str, "step": _WHOLE, "point": str},
    SAMPLES: {"set": str, "step": _WHOLE, "point": str, "prompt": str, "tokens": [str]},
    RESPONSES: {"set": str, "id": str, "question": str, "correct": (int, float)},
    WARNINGS: {"text": str},
    "seen.jsonl": {"step": _WHOLE, "labels": bool, "question": str},
}
# Entries that are also required to show the records, but not to resume a run.
_SHOWN: dict[str, dict[str, Any]] = {
    METRICS: {"method": str, "iteration": _WHOLE, "time": (int, float), "seconds": (int, float)},
    EVALUATIONS: {
        **dict.fromkeys(("time", "seconds"), (int, float)),
        **dict.fromkeys(("avg", "avg_se", "avg_k"), _NUMBER),
        **dict.fromkeys(("pass", "pass_se"), _SCORES),
    },
    SAMPLES: {"correct": (int, float), "values": ([_NUMBER], None), "answer": object},
    WARNINGS: {"time": (int, float)},
}
# Optional entries of a record, and their forms.
_FORMS: dict[str, Any] = {
    **dict.fromkeys(("step", "iteration", "processes"), _WHOLE),
    **dict.fromkeys(("time", "seconds", "idle_share", "tokens_per_second", "questions", "truncated"), _NUMBER),
    **dict.fromkeys(("stage", "method", "verifier", "command", "folder", "commit", "hardware", "host"), _TEXT),
    "seen": ({"with_answers": _WHOLE, "without_answers": _WHOLE}, None),
    "calibration": ({"last": _CALIBRATION, "by_prefix": {str: _CALIBRATION}}, None),
    "right": ([_WHOLE], None),
    "questions_hash": _TEXT,
    "versions": {str: object},
    "gpus": [str],
    "extensions": {str: str},
}
_LARGEST = 1e300  # of a number: sums, and what Python's floats hold
_LARGEST_WHOLE = 2**53  # whole numbers above it are no counts, and no floats hold them


def read_metrics(run_dir: Path) -> list[Record]:
    return read(run_dir / METRICS)


def read_evaluations(run_dir: Path) -> list[Record]:
    return read(run_dir / EVALUATIONS)


def read_samples(run_dir: Path) -> list[Record]:
    return _read_spare(run_dir / SAMPLES)


def read_warnings(run_dir: Path) -> list[Record]:
    return _read_spare(run_dir / WARNINGS)


def read_starts(run_dir: Path) -> list[Record]:
    return read(run_dir / STARTS)


def _read_spare(path: Path) -> list[Record]:
    """As `read`, of a file that a run can do without: empty, too, behind a link to a file that does not exist."""
    return [] if path.is_symlink() and not path.exists() else read(path)


def read(path: Path, *, whole: bool = True) -> list[Record]:
    """The records of a file; an empty list if there is no file.

    A last line without a newline was cut short while it was written, and is skipped. InputError names any other bad
    line, also one whose record has another form than the file's, and a file that cannot be read.
    """
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a JSON record ({error}); delete this line") from error
        if (wrong := _wrong(path.name, record, whole=whole)) is not None:
            raise InputError(f"{path}:{number}: {wrong}; delete this line")
        records.append(record)
    return records


def _wrong(file: str, record: Any, *, whole: bool) -> str | None:
    """What is wrong with the form of a record. `whole`: it has what is shown of it, too."""
    if not isinstance(record, dict):
        return f"a JSON {json_type(record)}, not a record"
    required = {} if "unknown" in record else _REQUIRED.get(file, {})  # seen.jsonl: what came before is unknown
    shown = _SHOWN.get(file, {})
    for name, value in record.items():
        form = (
            required.get(name) or shown.get(name) or (_NUMBER if "/" in name and file == METRICS else _FORMS.get(name))
        )
        if form is not None and (wrong := _unlike(form, value, name)):
            return f"the record's {wrong}"
    absent = [name for name in (*required, *(shown if whole else ())) if name not in record]
    if absent:
        return f"the record has no {absent[0]}"
    return _uneven(file, record) if whole else None


def _uneven(file: str, record: Record) -> str | None:
    """Which list has another length than the rest of the record says; None if there is none."""
    if file == SAMPLES and record["values"] is not None and len(record["values"]) != len(record["tokens"]) + 1:
        return f"the record has {len(record['values'])} values of {len(record['tokens'])} tokens, not one more"
    right, questions = record.get("right"), record.get("questions")
    if file == EVALUATIONS and right is not None and questions is not None and len(right) != questions:
        return f"the record's right has {len(right)} numbers, and there are {questions} questions"
    return None


def _unlike(form: Any, value: Any, name: str) -> str | None:
    """Where a value is not of the form, and what is there; None if it is of the form."""
    forms = form if isinstance(form, tuple) else (form,)
    for one in forms:
        if isinstance(one, dict) and isinstance(value, dict):
            wanted = dict.fromkeys(value, one[str]) if str in one else _present(one, value)
            if absent := [key for key in wanted if key not in value]:
                return f"{name} has no {absent[0]}"
            parts = (_unlike(part, value[key], f"{name}.{key}") for key, part in wanted.items())
            return next(filter(None, parts), None)
        if isinstance(one, list) and isinstance(value, list):
            return next(filter(None, (_unlike(one[0], part, f"{name}[{i}]") for i, part in enumerate(value))), None)
        if isinstance(one, type) and isinstance(value, one) and not (one is int and isinstance(value, bool)):
            largest = _LARGEST_WHOLE if isinstance(value, int) else _LARGEST
            too_large = isinstance(value, int | float) and not abs(value) <= largest  # NaN too
            return f"{name} is no number that a run has" if too_large else None
    if None in forms and value is None:
        return None
    return f"{name} is a JSON {json_type(value)}, which it cannot be"


def _present(form: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """A record's form, with the optional entries that the value has."""
    named = {key.removeprefix("?"): part for key, part in form.items()}
    return {name: part for name, part in named.items() if name in form or name in value}


def append(path: Path, record: Record) -> None:
    """Adds a line. Raises OSError with the path if it cannot be written, ValueError for NaN (see `finite`)."""
    extend(path, [record])


def extend(path: Path, records: Iterable[Record]) -> None:
    """Adds lines, all or none. Raises the same errors as `append`."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    if not lines:
        return
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(lines.encode())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)  # a full disk may have taken a part, and the next line would be joined to it
        raise OSError(error.errno, f"cannot write a record: {error.strerror}", str(path)) from error


def drop(path: Path, unwanted: Callable[[Record], bool]) -> None:
    """Removes the unwanted records, and a last line that was cut short, from the file, all or nothing.

    If they are at its end, this needs no free disk space.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    records = read(path, whole=False)
    kept = [line for line, record in zip(before.split(b"\n")[:-1], records, strict=True) if not unwanted(record)]
    content = b"".join(line + b"\n" for line in kept)
    if content == before:
        return
    if before.startswith(content):
        os.truncate(path, len(content))
        return
    replace_file(path, content, fsync=True)


def finite(record: Record) -> tuple[Record, list[str]]:
    """The record with JSON types, and the names of the entries in which NaN or infinity became null.

    Scalars of numpy and torch, and other objects with `item()`, become Python numbers.
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
    return read_bytes(path).split(b"\n")[:-1] if path.exists() or path.is_symlink() else []
