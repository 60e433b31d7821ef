"""A graded verifier for the quickstart's questions: the closer the result is to the target, the higher the score.

    data.labelled.verifier=import:countdown_verifier:verifier

Question "5 1 3 3 > 24 :", response "5 * 1 = 5 + 3 = 8 * 3 = 24 y $": operators are applied from left to right.
"""

from __future__ import annotations

import re
from operator import add, mul, sub

OPERATORS = {"+": add, "-": sub, "*": mul}
QUESTION = re.compile(r"(\d+(?: \d+)+) > (\d+) :")
STEP = re.compile(r" ([-+*]) (\d+) = (\d+)")


class CountdownVerifier:
    """`graded = True` allows scores between 0 and 1. Without it, only 0 and 1 are accepted."""

    graded = True

    def score(self, prompt: str, response: str, answer: str) -> float:
        """1 for the target, 1/2 for a miss by one, 1/3 for a miss by two, and so on; 0 for wrong arithmetic.

        `answer` is the answer in the data set. Here it is one of several correct ones, so it is not used.
        """
        result = self.answer_of(prompt, response)
        return 0.0 if result is None else 1 / (1 + abs(result - question(prompt)[1]))

    def check(self, prompt: str, answer: str) -> None:
        """Optional. Called for each question before training; a ValueError rejects the question or its answer."""
        question(prompt)

    def answer_of(self, prompt: str, response: str) -> int | None:
        """Optional; TTRL and EMPO need it. The answer in a response: two responses agree if this is equal.

        None if the response has no answer.
        """
        numbers, _ = question(prompt)
        steps = STEP.findall(response)
        if not response.startswith(f"{numbers[0]} ") or [int(number) for _, number, _ in steps] != numbers[1:]:
            return None
        result = numbers[0]
        for operator, number, stated in steps:
            result = OPERATORS[operator](result, int(number))
            if result != int(stated):
                return None
        return result


def question(prompt: str) -> tuple[list[int], int]:
    """The numbers and the target."""
    match = QUESTION.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is not a question such as '5 1 3 3 > 24 :'")
    return [int(number) for number in match[1].split()], int(match[2])


verifier = CountdownVerifier()
