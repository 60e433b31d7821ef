"""A user's verifier (`config.extensions.load_verifier`) as a `Scorer`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from megatron_tempo.config.extensions import Extension, LoadedVerifier, call_failed, load_verifier, wrong_result
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.reading import numbered
from megatron_tempo.rewards.scorer import Item


class ImportedScorer:
    """Calls the user's functions and checks what they return. An error names the extension."""

    def __init__(self, extension: Extension) -> None:
        self._extension = extension

    @property
    def _verifier(self) -> LoadedVerifier:
        """The verifier, loaded at first use: a job may name verifiers that it does not use."""
        return load_verifier(self._extension)

    def check(self, prompt: str, answer: str) -> None:
        if self._verifier.check is not None:
            self._call(self._verifier.check, prompt, answer)

    def score(self, items: Sequence[Item]) -> list[float]:
        return [self._score(item) for item in items]

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        return numbered(self._answer(prompt, response) for response in responses)

    def close(self) -> None:
        pass

    def _score(self, item: Item) -> float:
        score = self._call(self._verifier.score, item.prompt, item.response, item.answer)
        graded = self._verifier.graded
        # A NumPy or torch number has none of these types: float(...) in the extension converts it.
        is_number = isinstance(score, int | float)
        if not (is_number and (0 <= score <= 1 if graded else score in (0, 1))):
            ungraded = "0 or 1 (a number between them requires the attribute graded = True)"
            raise wrong_result(self._extension, score, "a number from 0 to 1" if graded else ungraded)
        return float(score)

    def _answer(self, prompt: str, response: str) -> Hashable | None:
        assert self._verifier.answer_of is not None, "the config's rules ask for it"
        answer = self._call(self._verifier.answer_of, prompt, response)
        if not isinstance(answer, Hashable):
            raise wrong_result(self._extension, answer, "a hashable value, such as text or a number, or None")
        return answer

    def _call(self, function: Callable[..., Any], *arguments: str) -> Any:
        try:
            return function(*arguments)
        except InputError:
            raise
        except ValueError as error:
            if function is self._verifier.check:  # the user's way to reject an answer
                raise
            raise call_failed(self._extension, error) from error
        except Exception as error:
            raise call_failed(self._extension, error) from error
