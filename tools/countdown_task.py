"""Questions of the quickstart's countdown task, and the traces on which its base model is pretrained."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tempo.rewards.countdown import LARGEST, OPERATORS, apply, render, results

NUMBERS = 4  # per question
SOLVED, MISLED = 0.45, 0.30  # shares of traces that follow a solution, and the misconception; the others are random
SLIP, SLIP_SIZE = 0.025, 3  # probability that a result is wrong, and the maximum error
CHECK_WRONG = 0.10  # probability that the trace's final check (y or n) is wrong


@dataclass(frozen=True, slots=True)
class Question:
    """A question. `solutions`: all operator strings that reach the target.

    >>> Question(numbers=(2, 4, 5, 6), target=13, solutions=("+*-",)).prompt
    '2 4 5 6 > 13 :'
    """

    numbers: tuple[int, ...]
    target: int
    solutions: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} > {self.target} :"

    @property
    def misleading(self) -> bool:
        """Whether the question has only one solution, and the misconception does not find it."""
        return len(self.solutions) == 1 and misconception(self.numbers, self.target) not in self.solutions


def every_question() -> list[Question]:
    """All solvable questions, in a fixed order."""
    solutions: dict[tuple[tuple[int, ...], int], list[str]] = {}
    strings = ["".join(operators) for operators in itertools.product(OPERATORS, repeat=NUMBERS - 1)]
    for numbers in itertools.product(range(1, 10), repeat=NUMBERS):
        for operators in strings:
            running = results(numbers, operators)
            if running is not None:
                solutions.setdefault((numbers, running[-1]), []).append(operators)
    return [Question(numbers, target, tuple(expressions)) for (numbers, target), expressions in solutions.items()]


def misconception(numbers: tuple[int, ...], target: int) -> str | None:
    """The operators that the greedy rule chooses. None if a result is outside 0..49."""
    value, operators = numbers[0], ""
    for number in numbers[1:]:
        operator = greedy_operator(value, number, target)
        following = apply(value, operator, number)
        if following is None:
            return None
        value, operators = following, operators + operator
    return operators


def greedy_operator(value: int, number: int, target: int) -> str:
    """Subtract if the value has reached the target; else multiply if the product is at most the target; else add."""
    if value >= target:
        return "-"
    return "*" if value * number <= target else "+"


def trace(question: Question, rng: random.Random, misled: float = MISLED) -> str:
    """A response for pretraining: follows a solution, the misconception or chance, with occasional errors.

    `misled`: the probability that it follows the misconception.
    """
    kind = rng.random()
    plan = rng.choice(question.solutions)
    value, operators, running, right = question.numbers[0], "", [], True
    for step, number in enumerate(question.numbers[1:]):
        allowed = [operator for operator in OPERATORS if apply(value, operator, number) is not None]
        if kind < SOLVED:
            chosen = plan[step]
        elif kind < SOLVED + misled:
            chosen = greedy_operator(value, number, question.target)
        else:
            chosen = rng.choice(allowed)
        operator = chosen if chosen in allowed else rng.choice(allowed)
        following = apply(value, operator, number)
        assert following is not None
        slipped = following
        if rng.random() < SLIP:
            slipped = min(LARGEST, max(0, following + rng.choice((-1, 1)) * rng.randint(1, SLIP_SIZE)))
        right = right and slipped == following
        value, operators = slipped, operators + operator
        running.append(value)
    claimed = (right and value == question.target) != (rng.random() < CHECK_WRONG)
    return render(question.numbers, operators, running, "y" if claimed else "n")


def traces(questions: list[Question], seed: int, misled: float = MISLED) -> Iterator[str]:
    """An endless stream of prompts with their traces; `misled` as in `trace`."""
    rng = random.Random(seed)
    while True:
        question = rng.choice(questions)
        yield f"{question.prompt} {trace(question, rng, misled)}"


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint sets of questions."""

    labelled: list[Question]
    unlabelled: list[Question]
    heldout: list[Question]
    pretraining: list[Question]


def split(seed: int, labelled: int, unlabelled: int, heldout: int) -> Split:
    """Divide all questions. Unlabelled and held-out questions are misleading ones; the others are of every kind."""
    rng = random.Random(seed)
    questions = every_question()
    misleading = rng.sample([question for question in questions if question.misleading], unlabelled + heldout)
    taken = set(misleading)
    others = [question for question in questions if question not in taken]
    rng.shuffle(others)
    return Split(
        labelled=others[:labelled],
        unlabelled=misleading[:unlabelled],
        heldout=misleading[unlabelled:],
        pretraining=others[labelled:],
    )
