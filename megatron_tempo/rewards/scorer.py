"""The interface of verifiers: a `Scorer` of `Item`s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Item:
    """One response to judge. `verifier` is a name of `config.choices.Verifier` or that of an extension.

    >>> Item(verifier="math", prompt="Find 1+1.", response="It is \\\\boxed{2}.", answer="2")
    """

    verifier: str
    prompt: str
    response: str
    answer: str


class Scorer(Protocol):
    """A verifier. Its verdicts are 1.0 (right) and 0.0, in the order of the items; graded ones may lie between."""

    def check(self, prompt: str, answer: str) -> None:
        """Raises ValueError if no response to `prompt` can be judged by `answer`."""

    def score(self, items: Sequence[Item]) -> list[float]: ...

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        """Which responses to `prompt` have equal answers: equal numbers, from 0 in the order of first appearance.

        None if a response has no answer. Answers are equal if they get the same verdict whatever the right answer is.
        Raises ValueError if `prompt` is not a question that can be answered, even without responses.
        """

    def close(self) -> None: ...
