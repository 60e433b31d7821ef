"""Rules on the sets of questions."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.problem import Problem, did_you_mean
from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.config.shipped import made_by
from megatron_tempo.config.tree import MISSING
from megatron_tempo.files import why_unreadable

SUFFIXES = (".jsonl", ".parquet")


def check(config: Config) -> Iterator[Problem]:
    """The two sets of training."""
    labelled, unlabelled = config.data.labelled, config.data.unlabelled
    for name in config.data.held_out:
        if name not in config.evaluation.sets:
            fix = did_you_mean(name, config.evaluation.sets)
            yield Problem("data.held_out", config.data.held_out, f"{name} is not in evaluation.sets", fix)
    if labelled is not None:
        yield from check_file("data.labelled", labelled)
        yield from check_answers("data.labelled", labelled)
    if unlabelled is not None:
        yield from check_file("data.unlabelled", unlabelled)
        yield from _no_answers(unlabelled)
    if labelled is None or unlabelled is None or MISSING in (labelled.path, unlabelled.path):
        return
    if os.path.realpath(labelled.path) == os.path.realpath(unlabelled.path):
        wrong = "is the labelled set's file too: its answers would be known"
        yield Problem("data.unlabelled.path", unlabelled.path, wrong, "give two files without common questions")


def check_file(field: str, dataset: DatasetConfig) -> Iterator[Problem]:
    path = Path(dataset.path)
    name = f"{field}.path"
    if dataset.path == MISSING or dataset.reader is not None:
        return
    if path.suffix not in SUFFIXES:
        yield Problem(name, dataset.path, f"must end in {' or '.join(SUFFIXES)}", "convert it to JSONL or Parquet")
    elif (reason := why_unreadable(path)) == "does not exist":
        where = "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"
        yield Problem(name, dataset.path, reason, f"give an existing file{where}{made_by(path)}")
    elif reason is not None:
        yield Problem(name, dataset.path, reason, "give one JSONL or Parquet file that can be read")


def check_columns(field: str, dataset: DatasetConfig) -> Iterator[Problem]:
    """The named columns must be in the first row of a JSONL file. The loader checks the other rows."""
    present = _first_columns(Path(dataset.path)) if dataset.path != MISSING and dataset.reader is None else None
    if present is None:
        return
    for name in ("prompt_field", "answer_field", "verifier_field", "id_field"):
        column = getattr(dataset, name)
        if column is not None and column not in present:
            wrong = f"{dataset.path} has no such column in its first row"
            yield Problem(f"{field}.{name}", column, wrong, did_you_mean(column, sorted(present)[:10]))


def _first_columns(path: Path) -> list[str] | None:
    """The keys of the first JSON object of a file; None if that cannot be read."""
    if path.suffix != ".jsonl" or why_unreadable(path) is not None:
        return None
    try:
        with path.open("rb") as lines:
            first = next((line for line in iter(lambda: lines.readline(_LONGEST), b"") if line.strip()), b"")
        row = json.loads(first.removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError, RecursionError):
        return None
    return list(row) if isinstance(row, dict) else None


_LONGEST = 1 << 22  # bytes of the first row that are read


def check_answers(field: str, dataset: DatasetConfig) -> Iterator[Problem]:
    """A set whose responses are verified needs answers and a verifier."""
    if dataset.answer_field is None:
        wrong = "the set's responses are verified, so its answers are needed"
        yield Problem(f"{field}.answer_field", None, wrong, f"{field}.answer_field=the column that holds them")
    if dataset.verifier is None and dataset.verifier_field is None:
        names = ", ".join(Verifier.__members__)
        wrong = "nothing says who compares responses with answers"
        yield Problem(f"{field}.verifier", None, wrong, f"{field}.verifier=one of {names}")


def _no_answers(dataset: DatasetConfig) -> Iterator[Problem]:
    """A verifier is allowed: it compares responses with one another."""
    for name in ("answer_field", "verifier_field"):
        if (value := getattr(dataset, name)) is not None:
            field = f"data.unlabelled.{name}"
            fix = f"{field}=null; to score these questions, name the same file in evaluation.sets with an answer_field"
            yield Problem(field, value, "an unlabelled set has no answers that training could read", fix)
