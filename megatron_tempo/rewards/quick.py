"""The verifiers whose time is at most linear in the text: they run in any process, without workers of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from megatron_tempo.rewards import choice, countdown, grid, text
from megatron_tempo.rewards.reading import ReadingScorer, numbered
from megatron_tempo.rewards.scorer import Item, Scorer


class _InProcess:
    """A verifier of two cheap functions with bounded cost.

    `function`: judges prompt, response and answer. `answer_of`: reads from prompt and response a value that is the same
    for equal answers, None if there is no answer.
    """

    def __init__(
        self, function: Callable[[str, str, str], float], answer_of: Callable[[str, str], Hashable | None]
    ) -> None:
        self._function = function
        self._answer_of = answer_of

    def check(self, prompt: str, answer: str) -> None:
        self._function(prompt, "", answer)

    def score(self, items: Sequence[Item]) -> list[float]:
        return [self._function(item.prompt, item.response, item.answer) for item in items]

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        self._answer_of(prompt, "")  # raises if it is not a question
        return numbered(self._answer_of(prompt, response) for response in responses)

    def close(self) -> None:
        pass


def quick_verifiers() -> dict[str, Scorer]:
    return {
        "countdown": _InProcess(countdown.score, countdown.reached),
        "choice": ReadingScorer(choice.read, choice.gold),
        "text": ReadingScorer(text.read, text.gold),
        "grid": ReadingScorer(grid.read, grid.gold),
    }
