"""A verifier that reads an answer from a response and compares it with the right one, in this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from megatron_tempo.rewards.scorer import Item


class ReadingScorer:
    """`read(prompt, response)`: the response's answer in a canonical form, the same for equal answers; or None.

    `gold(prompt, answer)`: that form of the right answer; raises InputError if there is none. The time of both is at
    most linear in the texts.
    """

    def __init__(self, read: Callable[[str, str], Hashable | None], gold: Callable[[str, str], Hashable]) -> None:
        self._read = read
        self._gold = gold

    def check(self, prompt: str, answer: str) -> None:
        self._gold(prompt, answer)

    def score(self, items: Sequence[Item]) -> list[float]:
        return [float(self._read(i.prompt, i.response) == self._gold(i.prompt, i.answer)) for i in items]

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        return numbered(self._read(prompt, response) for response in responses)

    def close(self) -> None:
        pass


def numbered(answers: Iterable[Hashable | None]) -> list[int | None]:
    """Equal answers get equal numbers, from 0 in order of appearance; None if there is no answer."""
    numbers: dict[Hashable, int] = {}
    return [None if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]
