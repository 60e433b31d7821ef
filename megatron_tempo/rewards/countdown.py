"""The verifier of the quickstart's task: countdown, left to right.

A question gives whole numbers and a target, `2 4 5 6 > 13 :`. The response applies one operator (+, - or *) at a time
to the running result, from left to right, then says whether it thinks it has reached the target, and ends:
`2 * 4 = 8 + 5 = 13 - 6 = 7 n $`. Every result lies in 0..49, for which the vocabulary has one token each.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tempo.errors import InputError

OPERATORS = "+-*"
LARGEST = 49
CHECKS = ("y", "n")  # the response's own verdict on its result
END = "$"


def apply(left: int, operator: str, right: int) -> int | None:
    """`left operator right`; None if it is outside 0..49."""
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return result if 0 <= result <= LARGEST else None


def results(numbers: Sequence[int], operators: Sequence[str]) -> list[int] | None:
    """The running results, one per operator; None if one is outside 0..49.

    >>> results((2, 4, 5, 6), "*+-")
    [8, 13, 7]
    """
    running: list[int] = []
    value = numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        following = apply(value, operator, number)
        if following is None:
            return None
        running.append(value := following)
    return running


def render(numbers: Sequence[int], operators: Sequence[str], running: Sequence[int], check: str) -> str:
    """The response that writes these operators and running results.

    >>> render((2, 4, 5, 6), "*+-", (8, 13, 7), "n")
    '2 * 4 = 8 + 5 = 13 - 6 = 7 n $'
    """
    steps = [f"{o} {n} = {r}" for o, n, r in zip(operators, numbers[1:], running, strict=True)]
    return " ".join([str(numbers[0]), *steps, check, END])


def parse_prompt(prompt: str) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a question. Raises InputError if `prompt` is not a question.

    >>> parse_prompt("2 4 5 6 > 13 :")
    ((2, 4, 5, 6), 13)
    """
    words = prompt.split(" ")
    numbers, rest = words[:-3], words[-3:]
    values = [word for word in (*numbers, *rest[1:2]) if word.isascii() and word.isdigit() and len(word) <= 2]
    if len(numbers) < 2 or len(values) != len(numbers) + 1 or (rest[0], rest[2]) != (">", ":"):
        raise InputError(f"prompt {prompt[:80]!r} is no countdown question; write it like '2 4 5 6 > 13 :'")
    return tuple(map(int, numbers)), int(rest[1])


def reached(prompt: str, response: str) -> int | None:
    """The number that `response` reaches by correct arithmetic on the numbers of `prompt`: its answer, right or not.

    None if the response is not, word for word, the computation of its own operators. Its y or n is not judged.
    Responses with the same answer get the same verdict.

    >>> reached("2 4 5 6 > 13 :", "2 * 4 = 8 + 5 = 13 - 6 = 7 n $")
    7
    """
    numbers, _ = parse_prompt(prompt)
    if len(response) > 16 * len(numbers):
        return None
    words = response.split(" ")
    operators, check = words[1:-2:4], words[-2:-1]
    if len(operators) != len(numbers) - 1 or not set(operators) <= set(OPERATORS) or check[0] not in CHECKS:
        return None
    running = results(numbers, operators)
    if running is None or response != render(numbers, operators, running, check[0]):
        return None
    return running[-1]


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 for a response that reaches the target of `prompt` by correct arithmetic on the given numbers, else 0.0.

    `response`: the decoded text with its end token, words separated by one blank. Its y or n is not judged. `answer`:
    the operators of one solution (`*+-`). It is not used: other operators that reach the target are right as well.
    The cost is linear in the prompt's length, whatever the response. InputError if `prompt` is not a question.
    """
    _, target = parse_prompt(prompt)
    return float(reached(prompt, response) == target)
