"""How often the majority's answer to a question changes, over several iterations and a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.stages import StageConfig, settings_of
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.methods.learner import Visits, majorities
from megatron_tempo.rewards.responses import View
from megatron_tempo.training.vote_history import VoteHistory, ballots
from megatron_tempo.types import Batch, UnlabelledPrompt

END = 99
PROMPTS = [UnlabelledPrompt(f"u:{i}", f"question {i}", (i,)) for i in range(2)]


class Digits:
    """Answers are equal if their last digits are. Keeps what it was asked."""

    threads, end_tokens = 2, None

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []

    def view(self, verifier: str) -> View:
        return View.answer

    def classes(self, verifier: str, prompt: str, responses: Sequence[str]) -> list[int | None]:
        self.asked.append((verifier, prompt, tuple(responses)))
        ends = [response[-1] for response in responses]
        return [ends.index(end) for end in ends]


class Spelling:
    def decode(self, token_ids: Any, /) -> str:
        return " ".join(str(int(token)) for token in token_ids)


def history(verifiers: Digits) -> VoteHistory:
    return VoteHistory(verifiers, Spelling())  # type: ignore[arg-type]


def stage(**changes: Any) -> StageConfig:
    return StageConfig(settings_of(Method.ttrl), **changes)


def columns(classes: list[list[int]], stopped: list[bool] | None = None) -> Batch:
    """Responses of two tokens each, to one prompt a list."""
    rows = sum(map(len, classes))
    group = torch.tensor([i for i, of in enumerate(classes) for _ in of])
    return Batch(
        prompt_ids=tuple(PROMPTS[i].id for i in group.tolist()),
        group=group,
        prompt_tokens=torch.zeros(0, dtype=torch.int32),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        response_tokens=torch.zeros(0, dtype=torch.int32),
        response_lengths=torch.full((rows,), 2),
        engine_logprobs=torch.zeros(0),
        stopped=torch.tensor([True] * rows if stopped is None else stopped),
        versions=torch.zeros(0, 3, dtype=torch.int64),
        answer_class=torch.tensor([c for of in classes for c in of]),
        held=torch.zeros(0, dtype=torch.int64),
    )


def iteration(votes: VoteHistory, batch: Batch, answers: list[int], of: StageConfig) -> list[Visits]:
    """An iteration whose responses are a number and an end token, in windows of three rows."""
    found = ballots(PROMPTS, batch, of, "digits")
    watch = votes.watch(found, batch)
    assert watch is not None
    for start in range(0, len(batch), 3):
        rows = range(start, min(start + 3, len(batch)))
        tokens = torch.tensor([token for row in rows for token in (answers[row], END)], dtype=torch.int32)
        watch(rows, tokens, torch.zeros(len(tokens)))
    return votes.add(found, PROMPTS, "digits")


def test_the_majority_of_each_group() -> None:
    """Of 1 0 0 2 the second and third row have a 0, and the third is shorter. The last group has no answer."""
    batch = replace(columns([[1, 0, 0, 2], [-1, -1]]), response_lengths=torch.tensor([1, 3, 2, 1, 1, 1]))
    assert majorities(batch, stage()) == {0: (2, 0.5), 1: (None, 0.0)}
    masking = stage(truncated_responses=TruncatedResponses.masked)
    cut = columns([[1, 0, 0, 2], [-1, -1]], [True, False, False, True, False, False])
    assert majorities(cut, masking) == {0: (0, 0.5)}, "the group of which all are masked has no vote"


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("resumed", [False, True])
def test_flips_over_three_iterations(resumed: bool) -> None:
    """Question 0 gets 7, then 17, which is equal, then 8. Question 1 gets no answer, then 3; then all is masked."""
    verifiers = Digits()
    votes, masking = history(verifiers), stage(truncated_responses=TruncatedResponses.masked)
    first = iteration(votes, columns([[0, 1, 1], [-1, -1, -1]]), [5, 7, 7, 1, 1, 1], masking)
    assert first == [Visits((pytest.approx(2 / 3),), ()), Visits((0.0,), ())]
    assert votes.metrics() == {}, "no question was visited before"
    assert verifiers.asked == []
    iteration(votes, columns([[0, 0, 1], [0, 0, 0]]), [17, 27, 5, 3, 3, 3], masking)
    assert verifiers.asked == [("digits", "question 0", ("7", "17"))], "without the end token"
    assert votes.metrics() == {"vote/flip_rate": 0.5, "vote/revisited": 2.0}
    assert votes.metrics() == {}, "of one iteration only"
    if resumed:
        saved = json.loads(json.dumps(votes.state()))
        votes = history(verifiers)
        votes.restore(saved)
    cut = [True, True, True, False, False, False]
    visits = iteration(votes, columns([[0, 0, 0], [0, 0, 0]], cut), [8, 8, 8, 4, 4, 4], masking)
    assert votes.metrics() == {"vote/flip_rate": 1.0, "vote/revisited": 1.0}
    assert visits[0].flips == (False, True)
    assert visits[0].shares == pytest.approx((2 / 3, 2 / 3, 1.0))
    assert visits[1] == Visits((0.0, 1.0), (True,))
    assert verifiers.asked[-1] == ("digits", "question 0", ("17", "8"))


@pytest.mark.usefixtures("single")
def test_equal_texts_are_not_compared_and_no_answer_is_an_answer() -> None:
    verifiers = Digits()
    votes = history(verifiers)
    for classes in ([[0], [-1]], [[0], [-1]], [[-1], [0]]):
        iteration(votes, columns(classes), [7, 7], stage())
    assert verifiers.asked == []
    assert votes.visits["u:0"].flips == votes.visits["u:1"].flips == (False, True)


@pytest.mark.usefixtures("single")
def test_a_stage_that_compares_no_answers_has_no_watch() -> None:
    votes = history(Digits())
    assert votes.watch([], columns([[0]])) is None
    assert votes.metrics() == {}
    votes.restore(None)
    assert votes.state() == {}
