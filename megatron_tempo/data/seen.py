"""Which questions a model was trained on: seen.jsonl, of a run, and in the Hugging Face folders that it exports.

One line a question and kind, written when it is first trained on: step (from 1 in the run; 0: an earlier run, whose
export this one began with), labels (whether its answer was used), id, question (its key, see data.dataset).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_tempo.observability.records import Record, drop, extend, read

SEEN = "seen.jsonl"


class Seen:
    """What a run has trained on. Kept by its writer: on other ranks it does nothing and knows nothing."""

    def __init__(
        self, run_dir: Path, labelled: Mapping[str, str], unlabelled: Mapping[str, str], is_writer: bool
    ) -> None:
        """`labelled` and `unlabelled` are the keys of the training sets by id."""
        self.path = run_dir / SEEN
        self._keys = {True: labelled, False: unlabelled}
        self._is_writer = is_writer
        self._known: set[tuple[bool, str]] = set()

    def resume(self, step: int, model: Path) -> None:
        """Forget what came after `step`; know what the model that the run began with was trained on."""
        if not self._is_writer:
            return
        drop(self.path, lambda record: record["step"] > step)
        self._known = {(record["labels"], record["question"]) for record in read(self.path)}
        self._write({**record, "step": 0} for record in read_seen(model) or ())

    def add(self, step: int, labelled: Iterable[str], unlabelled: Iterable[str]) -> None:
        """The ids of the questions that iteration `step` trained on; repeated ones are written once."""
        if self._is_writer:
            self._write(
                {"step": step, "labels": labels, "id": name, "question": self._keys[labels][name]}
                for labels, names in ((True, labelled), (False, unlabelled))
                for name in names
            )

    def count(self, questions: Iterable[str]) -> dict[str, int]:
        """As `count`, of what the run has trained on so far."""
        return count(self._known, questions)

    def _write(self, records: Iterable[Record]) -> None:
        new = []
        for record in records:
            fact = (record["labels"], record["question"])
            if fact not in self._known:
                self._known.add(fact)
                new.append(record)
        extend(self.path, new)


def read_seen(model: Path) -> list[Record] | None:
    """What the model in a Hugging Face folder was trained on. None where the folder does not say."""
    return read(model / SEEN) if (model / SEEN).exists() else None


def carry(step: Path, folder: Path) -> None:
    """Write into a Hugging Face folder what the model of RUN/checkpoints/step_N was trained on, if the run is there."""
    number, path = step.name.removeprefix("step_"), step.resolve().parents[1] / SEEN
    if number.isdecimal() and path.exists():
        (folder / SEEN).unlink(missing_ok=True)  # of a conversion that was cut short
        extend(folder / SEEN, (record for record in read(path) if record["step"] <= int(number)))


def seen_of(model: Path, questions: Iterable[str]) -> dict[str, int] | None:
    """`count` for the model in a Hugging Face folder. None where the folder does not say."""
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
