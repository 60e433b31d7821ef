"""Which prompt groups agree, which of them give way to others, and what a batch is made of afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_tempo.config.method_settings import Method, Prompts
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig, settings_of
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.methods.learner import agreeing_groups
from megatron_tempo.rollout.batches import Collected
from megatron_tempo.rollout.collected_groups import joined_groups, picked_groups
from megatron_tempo.rollout.group_answers import Asking, GroupAnswers
from megatron_tempo.rollout.group_buffer import GroupBuffer
from megatron_tempo.training.refill import Refill
from megatron_tempo.training.stage_groups import HALVES, Drawn, StageGroups, groups_needed
from megatron_tempo.types import Batch, Completion, LabelledPrompt, UnlabelledPrompt

SAMPLES = 2


def completion(token: int, *, stopped: bool = True) -> Completion:
    """A response of as many tokens as its number says, by as many versions."""
    runs = tuple((version, 1) for version in range(token))
    reason = "stop" if stopped else "length"
    return Completion(torch.full((token,), token, dtype=torch.int32), torch.full((token,), -0.5), reason, runs)


def collected_of(verdicts: list[list[float]], *, first: int = 0, cut: tuple[int, ...] = ()) -> Collected:
    """Labelled groups with these verdicts; their classes are the same numbers. `cut`: truncated rows.

    Response i of all has i + 1 + `first` tokens, and group i the prompt p(i + first).
    """
    flat = [verdict for group in verdicts for verdict in group]
    ones = [completion(i + 1 + first, stopped=i not in cut) for i in range(len(flat))]
    group = torch.tensor([i for i, of in enumerate(verdicts) for _ in of])
    runs = [[row, version, count] for row, one in enumerate(ones) for version, count in one.versions]
    empty = torch.zeros(0, dtype=torch.int32)
    columns = Batch(
        prompt_ids=tuple(f"p{i + first}" for i in group.tolist()),
        group=group,
        prompt_tokens=empty,
        prompt_lengths=torch.ones(len(flat), dtype=torch.int64),
        response_tokens=empty,
        response_lengths=torch.tensor([len(one.token_ids) for one in ones]),
        engine_logprobs=torch.zeros(0),
        stopped=torch.tensor([one.finish_reason == "stop" for one in ones]),
        versions=torch.tensor(runs),
        correct=torch.tensor(flat),
        answer_class=torch.tensor(flat).long(),
        held=torch.zeros(0, dtype=torch.int64),
    )
    prompts = [LabelledPrompt(f"p{i + first}", "q", (i,), "a", "math") for i in range(len(verdicts))]
    # Each second response is on this rank.
    mine = {row: one for row, one in enumerate(ones) if row % 2 == 0}
    return Collected(prompts, columns, torch.arange(len(flat)) % 2, mine)


def stage_of(method: Method, **changes: object) -> StageConfig:
    stage = StageConfig(settings_of(method), labelled_prompts=4, unlabelled_prompts=4, refill_limit=7)
    for name, value in changes.items():
        setattr(stage, name, value)
    return stage


def test_groups_agree_by_verdicts_by_hand() -> None:
    columns = collected_of([[1, 0], [1, 1], [0, 0], [0.5, 0.5], [0.5, 1]]).columns
    for method in (Method.grpo, Method.ppo):
        assert agreeing_groups(columns, stage_of(method), 5).tolist() == [False, True, True, True, False]


def test_groups_agree_by_classes_by_hand() -> None:
    """-1 is no answer: two responses without one have nothing to tell apart."""
    columns = replace(collected_of([[1, 1]] * 4).columns, answer_class=torch.tensor([0, 0, 0, 1, -1, -1, 0, -1]))
    for method in (Method.ttrl, Method.ttrl_guard, Method.scrl, Method.empo):
        assert agreeing_groups(columns, stage_of(method), 4).tolist() == [True, False, True, False]


def test_masked_responses_are_not_compared() -> None:
    columns = collected_of([[1, 0], [1, 0], [1, 0], [0, 0]], cut=(1, 4, 5)).columns
    masked = stage_of(Method.grpo, truncated_responses=TruncatedResponses.masked)
    assert agreeing_groups(columns, masked, 4).tolist() == [True, False, True, True], "a group without rows agrees"
    assert agreeing_groups(columns, stage_of(Method.grpo), 4).tolist() == [False, False, False, True]


def test_groups_that_agree_are_replaced_up_to_the_limit() -> None:
    refill = Refill.of(stage_of(Method.grpo), 0)
    assert refill is not None
    assert refill.half is Prompts.labelled
    first = collected_of([[1, 0], [1, 1], [0, 0], [0, 0]])
    assert refill.unwanted(first, 0, 4) == [1, 2, 3]
    second = collected_of([[1, 1], [1, 0], [1, 1]], first=4)
    assert refill.unwanted(second, 0, 3) == [], "seven were asked"
    assert refill.metrics() == {
        "refill/asked": 7.0,
        "refill/dropped": 3.0,
        "refill/agreeing": 2.0,
        "refill/limit_reached": 1.0,
        "reward/labelled_asked": pytest.approx(8 / 14),
    }
    assert refill.dropped == ["p1", "p2", "p3"]


def test_near_the_limit_only_some_are_replaced() -> None:
    refill = Refill.of(stage_of(Method.grpo, refill_limit=5), 0)
    assert refill is not None
    assert refill.unwanted(collected_of([[1, 1], [1, 0], [0, 0], [1, 1]]), 0, 4) == [0]
    assert refill.unwanted(collected_of([[1, 0]], first=4), 0, 1) == []
    metrics = refill.metrics()
    assert (metrics["refill/asked"], metrics["refill/dropped"], metrics["refill/agreeing"]) == (5.0, 1.0, 2.0)
    assert metrics["refill/limit_reached"] == 1.0


def test_the_other_half_stays() -> None:
    """Unlabelled groups come after labelled ones."""
    refill = Refill.of(stage_of(Method.ttrl), 0)
    assert refill is not None
    collected = collected_of([[0, 0], [0, 0], [0, 1], [1, 1]])
    assert refill.unwanted(collected, 2, 4) == [3]
    assert "reward/labelled_asked" not in refill.metrics()


def test_who_has_no_refill() -> None:
    assert Refill.of(stage_of(Method.grpo, refill_limit=None), 0) is None
    assert Refill.of(stage_of(Method.tempo), 0) is None
    stage = stage_of(Method.ppo)
    stage.critic.warmup_iterations = 2
    assert [Refill.of(stage, iteration) is None for iteration in range(3)] == [True, True, False]


def assert_equal(actual: Collected, expected: Collected) -> None:
    assert list(actual.prompts) == list(expected.prompts)
    assert actual.sources.tolist() == expected.sources.tolist()
    assert actual.completions.keys() == expected.completions.keys()
    for row, one in actual.completions.items():
        assert one.token_ids.tolist() == expected.completions[row].token_ids.tolist()
    a, b = actual.columns, expected.columns
    assert a.prompt_ids == b.prompt_ids
    for name in ("group", "prompt_lengths", "response_lengths", "stopped", "versions", "correct", "answer_class"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist(), name


def test_picked_groups_by_hand() -> None:
    picked = picked_groups(collected_of([[1, 0], [1, 1], [0, 0]], cut=(5,)), [2, 0])
    columns = picked.columns
    assert [prompt.id for prompt in picked.prompts] == ["p2", "p0"]
    assert columns.group.tolist() == [0, 0, 1, 1]
    assert columns.response_lengths.tolist() == [5, 6, 1, 2]
    assert columns.stopped.tolist() == [True, False, True, True]
    assert columns.correct is not None
    assert columns.correct.tolist() == [0, 0, 1, 0]
    assert columns.versions.tolist()[:2] == [[0, 0, 1], [0, 1, 1]]
    assert columns.versions.tolist()[-3:] == [[2, 0, 1], [3, 0, 1], [3, 1, 1]]
    assert {row: len(one.token_ids) for row, one in picked.completions.items()} == {0: 5, 2: 1}
    assert picked.sources.tolist() == [0, 1, 0, 1]


def test_groups_are_joined_with_their_verdicts() -> None:
    whole = collected_of([[1, 0], [1, 1], [0, 0]])
    parts = picked_groups(whole, [0]), picked_groups(whole, [1, 2])
    assert_equal(joined_groups(*parts), whole)
    assert_equal(joined_groups(picked_groups(whole, []), whole), whole)
    assert_equal(joined_groups(whole, picked_groups(whole, [])), whole)


def test_what_is_joined_can_be_taken_apart_by_halves() -> None:
    labelled, other = collected_of([[1, 0], [1, 1]]), collected_of([[0, 0]], first=9)
    other = replace(other, prompts=[UnlabelledPrompt("p9", "q", (0,))])
    joined = joined_groups(labelled, other)
    first, second = joined.take(0, 2, verdicts=True), joined.take(2, 3, classes=True)
    assert first.columns.correct is not None
    assert first.columns.correct.tolist() == [1, 0, 1, 1]
    assert second.columns.correct is None
    assert second.columns.answer_class is not None
    assert second.columns.answer_class.tolist() == [0, 0]
    assert {row: len(one.token_ids) for row, one in second.completions.items()} == {0: 10}


# A stage's groups, with an engine whose answers arrive out of order


class Answers(GroupAnswers):
    """What was asked last is answered first. Both responses are right where the prompt's number is in `agree`."""

    def __init__(self, agree: set[int]) -> None:
        self.agree, self.open, self.asked = agree, dict[int, Asking](), list[str]()
        self.groups: StageGroups | None = None

    def ask(self, askings: Sequence[Asking]) -> None:
        self.asked += [asking.prompt.id for asking in askings]
        self.open |= {asking.key: asking for asking in askings}

    def read(self, enough: Callable[[], bool]) -> None:
        assert self.groups is not None
        while not enough():
            key = max(self.open)
            del self.open[key]
            self.groups.finished(key, None, 3)

    def forget(self, keys: Collection[int]) -> None:
        assert not keys, "an iteration waits for groups that it is the last one for"

    def collect(self, keys: Sequence[int], prompts: Sequence[Any]) -> Collected:
        verdicts = [[1.0, 1.0 if int(prompt.id[1:]) in self.agree else 0.0] for prompt in prompts]
        made = collected_of(verdicts)
        columns = replace(made.columns, prompt_ids=tuple(prompt.id for prompt in prompts for _ in range(SAMPLES)))
        return replace(made, prompts=prompts, columns=columns)


def groups_of(agree: set[int], max_staleness: int, limit: int) -> tuple[StageGroups, Answers]:
    """A stage of four iterations with three labelled prompts each, which run on while the run trains."""
    config = Config(stage2=stage_of(Method.grpo, iterations=4, labelled_prompts=3, refill_limit=limit))
    prompts = [LabelledPrompt(f"q{i}", "", (i,), "", "math") for i in range(200)]
    streams: dict[Prompts, PromptStream[Any]] = {Prompts.labelled: PromptStream(prompts, 0, "labelled")}
    needed = {half: groups_needed(config.stage2, half) for half in HALVES}
    buffer: GroupBuffer[Drawn] = GroupBuffer(max_staleness)
    groups, answers = StageGroups(config, streams, "stage2", config.stage2, needed, 0, buffer), Answers(agree)
    groups.answers, answers.groups = answers, groups
    return groups, answers


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("limit", [4, 7, 100])
def test_an_iteration_is_refilled_from_groups_that_are_answered_in_any_order(
    single: None, max_staleness: int, limit: int
) -> None:
    """Every prompt that is drawn is trained on, thrown away or still in the buffer, and none is twice."""
    agree = set(range(0, 200, 2)) | set(range(0, 200, 5))
    groups, answers = groups_of(agree, max_staleness, limit)
    trained, dropped = list[str](), list[str]()
    for iteration in range(4):
        groups.request(iteration)
        collected, labelled = groups.collect(iteration)
        of_now = [prompt.id for prompt in collected.prompts]
        assert len(of_now) == labelled == 3
        assert [group.item.prompt.id for group in groups.training] == of_now
        assert [group.number for group in groups.training] == sorted(group.number for group in groups.training)
        assert collected.columns.prompt_ids == tuple(name for name in of_now for _ in range(SAMPLES))
        assert groups.refill is not None
        metrics = groups.refill.metrics()
        agreeing = [name for name in of_now if int(name[1:]) in agree]
        assert metrics["refill/agreeing"] == len(agreeing)
        assert metrics["refill/asked"] == 3 + len(groups.refill.dropped) <= limit
        assert not agreeing or metrics["refill/asked"] == limit
        assert collected.columns.correct is not None
        assert collected.columns.correct.tolist() == [
            verdict for name in of_now for verdict in (1.0, 1.0 if name in agreeing else 0.0)
        ]
        trained, dropped = trained + of_now, dropped + groups.refill.dropped
        saved = groups.state()["labelled"]
        ahead = [group.item.prompt.id for group in groups.buffer.groups(Prompts.labelled)]
        assert len(saved["drawn"]) == len(ahead) + 3, "what an engine's failure now would have to ask again"
        assert sorted([*trained, *dropped, *ahead]) == sorted(answers.asked)
        assert len(set(answers.asked)) == len(answers.asked)
        assert len(ahead) == 3 * min(max_staleness, 3 - iteration)
        groups.discard()
    assert dropped
    assert len(trained) == 12
