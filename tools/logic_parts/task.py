"""The task's sets of questions, and the endless stream of questions for pretraining."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from logic_parts import booleans, dates
from logic_parts.habits import Habits, Question, Steps

KINDS = {"boolean": booleans.draw, "date": dates.draw}
LEVELS = (1, 2, 3)
# Questions of each kind and level, by set. Expressions of level 1 are few: 368.
COUNTS = {
    "labelled": {("boolean", 1): 96, ("boolean", 2): 336, ("boolean", 3): 336}
    | {("date", level): 512 for level in LEVELS},
    "unlabelled": {(kind, level): 64 for kind in KINDS for level in (2, 3)},
    "heldout": {(kind, level): 64 for kind in KINDS for level in (2, 3)},
}
BALANCED = ("unlabelled", "heldout")  # half of these are misleading


@dataclass(frozen=True, slots=True)
class Row:
    """A question of a set."""

    id: str
    kind: str
    level: int
    question: Question


def make_sets(seed: int) -> dict[str, list[Row]]:
    """All sets. No question is in two of them, or twice in one."""
    rng, taken = random.Random(seed), set[str]()
    sets = {}
    for name, counts in COUNTS.items():
        rows = []
        for (kind, level), count in counts.items():
            for question in _distinct(kind, level, count, rng, taken, balanced=name in BALANCED):
                rows.append(Row(f"{name}:{kind}:{level}:{len(rows)}", kind, level, question))
        rng.shuffle(rows)
        sets[name] = rows
    return sets


def _distinct(
    kind: str, level: int, count: int, rng: random.Random, taken: set[str], *, balanced: bool
) -> Iterator[Question]:
    """Questions that are not in `taken`, which grows. `balanced`: every second one is misleading."""
    for number in range(count):
        while True:
            question = KINDS[kind](level, rng)
            fits = not balanced or question.is_misleading == (number % 2 == 0)
            if fits and question.prompt not in taken:
                break
        taken.add(question.prompt)
        yield question


def pretraining(sets: dict[str, list[Row]], habits: Habits, seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of prompts with responses. No prompt is in one of the sets."""
    taken = {row.question.prompt for rows in sets.values() for row in rows}
    rng = random.Random(f"pretraining {seed}")
    while True:
        question = KINDS[rng.choice(list(KINDS))](rng.choice(LEVELS), rng)
        if question.prompt not in taken:
            yield question.prompt, question.trace(Steps(habits, rng))
