"""Records which questions a model was trained on: seen.jsonl, in a run's folder and in its Hugging Face exports.

One line per question and kind, written when it is first trained on: step (from 1 in the run; 0: an earlier run, whose
export this one started from), labels (whether its answer was used), id, question (its key, see data.dataset). A line
{"step": N, "unknown": WHY} says that the file is incomplete: it was lost or changed before step N.

Checkpoints and exports contain the number and the hash of the lines (`Seen.summary`). If a file is missing or does not
match them, it is unknown which questions were trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_tempo.config.trained_with import read_trained_with
from megatron_tempo.observability.records import Record, drop, extend, read

SEEN = "seen.jsonl"


class Seen:
    """The questions that a run has trained on. Only the writer's rank keeps them; on other ranks it does nothing."""

    def __init__(
        self, run_dir: Path, labelled: Mapping[str, str], unlabelled: Mapping[str, str], is_writer: bool
    ) -> None:
        """`labelled`, `unlabelled`: the keys of the training sets' questions, by id."""
        self.path = run_dir / SEEN
        self._keys = {True: labelled, False: unlabelled}
        self._is_writer = is_writer
        self._known: set[tuple[bool, str]] = set()
        self._lines: list[str] = []  # a hash of each line, in order
        self._is_whole = True

    def resume(self, step: int, model: Path, saved: Mapping[str, Any] | None = None) -> str | None:
        """Forget lines after `step`, and load what the run's initial model was trained on.

        `saved`: the summary in the checkpoint; None if there is no checkpoint or it is of an earlier version. Returns
        a warning if the file does not match the checkpoint, or if the initial model's record is missing.
        """
        if not self._is_writer:
            return None
        drop(self.path, lambda record: record["step"] > step)
        records = read(self.path)
        self._is_whole = not any("unknown" in record for record in records)
        self._known = {(record["labels"], record["question"]) for record in records if "question" in record}
        self._lines = [_line_hash(record) for record in records]
        missing = saved is None and step > 0 and not self.path.exists()
        if missing or (saved is not None and saved != self.summary()):
            return self._lose(step, f"{self.path} is not the file of the checkpoint: lost, or changed since")
        earlier = read_seen(model)
        if earlier is None and is_export(model) and step == 0:
            return self._lose(0, f"{model} is an export whose {SEEN} is missing or changed")
        self._write({**record, "step": 0} for record in earlier or ())
        return None

    def add(self, step: int, labelled: Iterable[str], unlabelled: Iterable[str]) -> None:
        """Add the ids of the questions that iteration `step` trained on. Each question is written once."""
        if self._is_writer:
            self._write(
                {"step": step, "labels": labels, "id": name, "question": self._keys[labels][name]}
                for labels, names in ((True, labelled), (False, unlabelled))
                for name in names
            )

    def count(self, questions: Iterable[str]) -> dict[str, int] | None:
        """As `count`, for what the run has trained on so far; None if that is unknown."""
        return count(self._known, questions) if self._is_whole else None

    def summary(self) -> dict[str, Any]:
        """The number of lines and their hash, for `resume`, exports and conversions."""
        return _summary(self._lines)

    def _lose(self, step: int, why: str) -> str | None:
        if not self._is_whole:  # already noted
            return None
        self._is_whole = False
        self._append([{"step": step, "unknown": why}])
        return f"{why}; which questions the model was trained on is unknown from here on"

    def _write(self, records: Iterable[Record]) -> None:
        new = []
        for record in records:
            fact = (record["labels"], record["question"])
            if fact not in self._known:
                self._known.add(fact)
                new.append(record)
        self._append(new)

    def _append(self, records: list[Record]) -> None:
        extend(self.path, records)
        self._lines += [_line_hash(record) for record in records]


def _line_hash(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _summary(lines: list[str]) -> dict[str, Any]:
    return {"count": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}


def is_export(model: Path) -> bool:
    """Whether this Hugging Face folder is a run's export that records what it was trained on."""
    return bool(read_trained_with(model).get("seen"))


def read_seen(model: Path) -> list[Record] | None:
    """What the model in a Hugging Face folder was trained on.

    None if that is unknown: the file is missing, does not match the export, or says that it is incomplete.
    """
    if not (model / SEEN).is_file():
        return None
    records = read(model / SEEN)
    summary = read_trained_with(model).get("seen")
    fits = summary is None or summary == _summary([_line_hash(record) for record in records])
    return records if fits and not any("unknown" in record for record in records) else None


def carry(step: Path, folder: Path) -> dict[str, Any] | None:
    """Write into a Hugging Face folder what the model of RUN/checkpoints/step_N was trained on, if the run exists.

    Nothing is written if the run's file does not match the checkpoint. Returns the checkpoint's summary, if it has one.
    """
    (folder / SEEN).unlink(missing_ok=True)  # of an interrupted conversion
    number, path = step.name.removeprefix("step_"), step.resolve().parents[1] / SEEN
    summary = _summary_of(step)
    if number.isdecimal() and path.exists():
        records = [record for record in read(path) if record["step"] <= int(number)]
        if summary is None or summary == _summary([_line_hash(record) for record in records]):
            extend(folder / SEEN, records)
    return summary


def _summary_of(step: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((step / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    summary: dict[str, Any] | None = state.get("seen") if isinstance(state, dict) else None
    return summary


def seen_of(model: Path, questions: Iterable[str]) -> dict[str, int] | None:
    """`count` for the model in a Hugging Face folder. None if the folder does not say."""
    records = read_seen(model)
    return None if records is None else count({(r["labels"], r["question"]) for r in records}, questions)


def count(known: set[tuple[bool, str]], questions: Iterable[str]) -> dict[str, int]:
    """How many of the questions, given by their keys, were trained on with their answers, and how many only without.

    >>> count({(True, "a"), (False, "a"), (False, "b")}, ["a", "b", "c"])
    {'with_answers': 1, 'without_answers': 1}
    """
    questions = list(questions)
    with_answers = [key for key in questions if (True, key) in known]
    without = [key for key in questions if (False, key) in known and (True, key) not in known]
    return {"with_answers": len(with_answers), "without_answers": len(without)}
