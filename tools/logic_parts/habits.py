"""How often the traces of a base model's pretraining go wrong, and in which way."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Habits:
    """`slip`: the probability that a step's result is wrong. `misled`: the share of traces with the misconception."""

    slip: float
    misled: float


# Two base models. "plain": its errors are random, so its most frequent answer is usually right. "misled": most of its
# traces follow a misconception, so its most frequent answer is wrong wherever the misconception matters.
BASES = {"plain": Habits(slip=0.2, misled=0.0), "misled": Habits(slip=0.06, misled=0.6)}


class Steps:
    """The random choices of one trace."""

    def __init__(self, habits: Habits, rng: random.Random) -> None:
        self._slip, self._rng = habits.slip, rng
        self.misled = rng.random() < habits.misled

    def boolean(self, value: bool) -> bool:
        return value != (self._rng.random() < self._slip)

    def number(self, value: int, lowest: int, highest: int) -> int:
        """The value, or another one within bounds that differs by 1 to 3."""
        if self._rng.random() >= self._slip:
            return value
        near = [value + d for d in (-3, -2, -1, 1, 2, 3) if lowest <= value + d <= highest]
        return self._rng.choice(near)


class Question(Protocol):
    """A question with its answer."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def is_misleading(self) -> bool:
        """Whether the misconception gives a wrong answer."""
        ...

    def trace(self, steps: Steps) -> str:
        """A response: reasoning, which may go wrong, and `the answer is ...`."""
        ...
