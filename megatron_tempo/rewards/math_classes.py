"""Decides which responses to a question have equal mathematical answers.

Each answer is read first: a number or a term has values at a few points. Only answers with close values are compared by
`math_equal.matches`. Answers without such values are compared with all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megatron_tempo.rewards.units import agree

STRIKES = 2  # an answer is not compared any more after this many consecutive comparisons that take too long
NEAR = 1e-4  # relative or absolute difference up to which two values are compared further

Points = list[list[float]] | None
By = Literal["any", "face", "value"]


class Compares(Protocol):
    """The part of `math_pool.Worker` that is used."""

    def equal(self, one: list[Any], other: list[Any], by: By) -> bool | None: ...


@dataclass
class _Class:
    first: dict[str, Any]
    texts: set[str]
    kind: str
    unit: str
    form: str  # "set" or "tuple"; "" if no answer shows it
    joined_kind: str = ""  # of those that joined an answer without a mark
    size: int = 1
    strikes: int = 0  # comparisons in a row that took too long


@dataclass
class Classes:
    """The classes of one question's answers, each of which `math_worker` has read (None: no answer).

    Answers without a mark come first (a unit, a per cent or degree sign, a base, the brackets of a set or tuple), then
    the marks in the order of their frequency. So `30%` joins 30 if that is among the answers, else 0.3, and the classes
    do not depend on the order of the responses. An answer joins the first class, the largest tried first, whose first
    answer equals it. One that cannot be compared in time, twice `seconds` for all its comparisons, is its own class.
    """

    worker: Compares
    seconds: float
    classes: list[_Class] = field(default_factory=list)

    def numbers(self, read: Sequence[dict[str, Any] | None]) -> list[int | None]:
        """Equal numbers for equal answers, from 0 in the order of first appearance."""
        marks = Counter(_marks(answer) for answer in read if answer is not None)
        places = [place for place, answer in enumerate(read) if answer is not None]
        class_of: dict[int, _Class] = {}
        for place in sorted(places, key=lambda p: _order(read[p], marks, p)):
            answer = read[place]
            assert answer is not None
            class_of[place] = self._join(answer)
        order: dict[int, int] = {}
        return [order.setdefault(id(class_of[p]), len(order)) if p in class_of else None for p in range(len(read))]

    def _join(self, answer: dict[str, Any]) -> _Class:
        joined, strikes = self._equal(answer)
        text = str(answer["statement"])
        if joined is None:
            joined = _Class(answer, {text}, answer["kind"], answer["unit"], answer["form"], strikes=strikes)
            self.classes.append(joined)
            return joined
        joined.texts.add(text)
        joined.unit = joined.unit or answer["unit"]
        joined.form = joined.form or answer["form"]
        joined.joined_kind = joined.joined_kind or answer["kind"]
        joined.size += 1
        return joined

    def _equal(self, answer: dict[str, Any]) -> tuple[_Class | None, int]:
        """The class of an answer, if any, and the answer's consecutive comparisons that took too long."""
        text, strikes = str(answer["statement"]), 0
        for one in self.classes:
            if text in one.texts:
                return one, 0
        deadline = time.monotonic() + 2 * self.seconds
        for one, by in self._candidates(answer):
            if time.monotonic() > deadline:
                break
            equal = self.worker.equal(one.first["statement"], answer["statement"], by)
            if equal:
                return one, 0
            if equal is None:
                one.strikes, strikes = one.strikes + 1, strikes + 1
            else:
                one.strikes, strikes = 0, 0
        return None, strikes

    def _candidates(self, answer: dict[str, Any]) -> Iterator[tuple[_Class, By]]:
        classes = sorted(self.classes, key=lambda one: -one.size)
        classes = [one for one in classes if one.strikes < STRIKES and agree(one.unit, answer["unit"])]
        classes = [one for one in classes if "" in (one.form, answer["form"]) or one.form == answer["form"]]
        for one in classes:
            if one.kind == answer["kind"] and _near(one.first["face"], answer["face"]):
                yield one, "any"
        for by, points in (("face", answer["face"]), ("value", answer["value"])) if answer["kind"] else ():
            for one in classes:
                if not one.kind and one.joined_kind in ("", answer["kind"]) and _near(one.first["value"], points):
                    yield one, by  # type: ignore[misc]


def _marks(answer: dict[str, Any]) -> str:
    return " ".join(filter(None, (answer["kind"], answer["unit"], answer["form"])))


def _order(answer: dict[str, Any] | None, marks: Counter[str], place: int) -> tuple[bool, int, str, int]:
    assert answer is not None
    mark = _marks(answer)
    return bool(mark), -marks[mark], mark, place


def _near(one: Points, other: Points) -> bool:
    """Whether two answers may be equal, by their values at each point."""
    if one is None or other is None:
        return True
    return not any(
        abs(complex(*mine) - complex(*others)) > NEAR * max(1.0, abs(complex(*mine)))
        for mine, others in zip(one, other, strict=True)
    )
