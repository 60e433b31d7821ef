"""Evaluations in which nothing is right: which are the model's doing, and which a verifier's that cannot read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from megatron_tempo.evaluation.evaluator import ScoredResponses
from megatron_tempo.evaluation.unread import diagnose
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.types import LabelledPrompt
from tests.support.completions import batch_of, completion


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers() as verifiers:
        yield verifiers


def warning_of(
    verifiers: Verifiers,
    verifier: str,
    texts: Sequence[str],
    prompt: str = "Find it.",
    answer: str = "B",
    *,
    right: bool = False,
    finish: str = "stop",
) -> tuple[str | None, bool]:
    """What is said of a set of one question with these responses."""
    prompts = [LabelledPrompt("q:0", prompt, (1,), answer, verifier)]
    completions = [[completion((5,), (0.0,), finish) for _ in texts]]
    correct = np.full((1, len(texts)), float(right))
    scored = ScoredResponses(prompts, batch_of(prompts, completions, correct.tolist()), correct)
    return diagnose("mine", scored, texts, verifiers)


def test_a_right_response_ends_the_search(verifiers: Verifiers) -> None:
    assert warning_of(verifiers, "choice", ["none"], right=True) == (None, False)


def test_no_response_can_be_read(verifiers: Verifiers) -> None:
    message, is_meaningless = warning_of(verifiers, "choice", ["I do not know.", "..."])
    assert is_meaningless
    assert message is not None
    assert message.startswith("mine: none of the 2 responses could be read by the verifier choice (the first response")
    assert "evaluation.sets.mine.verifier" in message
    assert "cut off" not in message
    message, _ = warning_of(verifiers, "choice", ["I do not", "..."], finish="length")
    assert "100% of them are cut off: raise evaluation.max_response_tokens" in str(message)


def test_another_verifier_finds_them_right(verifiers: Verifiers) -> None:
    """The quickstart's questions under the default verifier, which reads a number where there is an expression."""
    response = "2 * 4 = 8 + 5 = 13 - 6 = 7 y $"
    message, is_meaningless = warning_of(verifiers, "math", [response, "x"], "2 4 5 6 > 7 :", "*+-")
    assert is_meaningless
    assert message == (
        "mine: none of the 2 responses is right by the verifier math, but 1 of 2 are by countdown: "
        "give evaluation.sets.mine.verifier=countdown"
    )


def test_wrong_answers_are_the_models(verifiers: Verifiers) -> None:
    message, is_meaningless = warning_of(verifiers, "choice", ["Answer: C", "what?"])
    assert not is_meaningless
    assert message is not None
    assert message.startswith("warning: mine: none of the 2 responses is right by the verifier choice; the first")
