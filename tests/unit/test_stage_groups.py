"""Which prompts of a stage are asked, asked again, dropped, and asked by a run that is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from megatron_tempo.config.choices import StaleGroups
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.schema import Config
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.rollout.group_answers import Asking, GroupAnswers
from megatron_tempo.rollout.group_buffer import GroupBuffer
from megatron_tempo.training.stage_groups import HALVES, Drawn, StageGroups, groups_needed
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt, seed_of

ITERATIONS = 4


class Answers(GroupAnswers):
    """Each prompt is answered when it is waited for, in order, but those of `slow`."""

    def __init__(self) -> None:
        self.asked: list[Asking] = []
        self.open: dict[int, Asking] = {}
        self.forgotten: list[int] = []
        self.slow: set[str] = set()

    def ask(self, askings: Sequence[Asking]) -> None:
        self.asked += askings
        self.open |= {asking.key: asking for asking in askings}

    def read(self, enough: Callable[[], bool]) -> None:
        for key, asking in list(self.open.items()):
            if enough():
                return
            if asking.prompt.id not in self.slow:
                del self.open[key]
                self.finished(key, None, 3)

    def finished(self, key: int, oldest: int | None, tokens: int) -> None:
        raise NotImplementedError

    def collect(self, keys: Sequence[int], prompts: Sequence[Any]) -> Any:
        return [prompt.id for prompt in prompts]

    def forget(self, keys: Collection[int]) -> None:
        self.forgotten += keys
        for key in keys:
            self.open.pop(key, None)


def groups_of(max_staleness: int, stale: StaleGroups = StaleGroups.wait) -> tuple[StageGroups, Answers]:
    """A stage of two labelled and three unlabelled prompts an iteration, the first of which is the critic's alone."""
    config = Config()
    stage = config.stage2
    stage.iterations, stage.labelled_prompts, stage.unlabelled_prompts = ITERATIONS, 2, 3
    stage.critic.warmup_iterations = 1
    config.stage1.iterations = 10
    labelled = [LabelledPrompt(f"l{i}", "", (i,), "", "math") for i in range(20)]
    unlabelled = [UnlabelledPrompt(f"u{i}", "", (i,)) for i in range(20)]
    streams: dict[Prompts, PromptStream[Any]] = {
        Prompts.labelled: PromptStream(labelled, 0, "labelled"),
        Prompts.unlabelled: PromptStream(unlabelled, 0, "unlabelled"),
    }
    needed = {half: groups_needed(stage, half) for half in HALVES}
    buffer: GroupBuffer[Drawn] = GroupBuffer(max_staleness, stale)
    groups = StageGroups(config, streams, "stage2", stage, needed, 10, buffer)
    answers = Answers()
    answers.finished = groups.finished  # type: ignore[method-assign]
    groups.answers = answers
    return groups, answers


def iterate(groups: StageGroups, iteration: int) -> list[str]:
    groups.request(iteration)
    prompts, _ = groups.collect(iteration)
    groups.discard()
    return prompts  # type: ignore[return-value]  # of the stand-in


def in_order() -> tuple[list[str], list[str]]:
    """The ids of the prompts as the streams give them."""
    groups, _ = groups_of(0)
    streams = groups.streams
    return [p.id for p in streams[Prompts.labelled].take(20)], [p.id for p in streams[Prompts.unlabelled].take(20)]


def test_seeds_are_those_of_the_prompts_place_in_its_iteration(single: None) -> None:
    labelled, unlabelled = in_order()
    for max_staleness in (0, 2):
        groups, answers = groups_of(max_staleness)
        used = [iterate(groups, iteration) for iteration in range(ITERATIONS)]
        assert used == [
            labelled[:2],
            *([*labelled[2 * i : 2 * i + 2], *unlabelled[3 * i - 3 : 3 * i]] for i in (1, 2, 3)),
        ]
        wanted = [(iteration, place) for iteration in range(ITERATIONS) for place in range(5 if iteration else 2)]
        assert [asking.iteration for asking in answers.asked] == [iteration for iteration, _ in wanted]
        seeds = [seed_of(0, "stage2", iteration, "rollout", place) for iteration, place in wanted]
        assert [asking.request.seed for asking in answers.asked] == seeds
        assert not any(groups.buffer.groups(half) for half in HALVES)


@pytest.mark.parametrize("stale", [StaleGroups.ask_again, StaleGroups.drop])
def test_a_group_that_is_too_slow_is_asked_again_or_dropped(single: None, stale: StaleGroups) -> None:
    """The first unlabelled prompt, asked at iteration 0 for iteration 1, is not answered before iteration 2."""
    labelled, unlabelled = in_order()
    groups, answers = groups_of(1, stale)
    answers.slow = {unlabelled[0]}
    assert iterate(groups, 0) == labelled[:2]
    assert iterate(groups, 1) == [*labelled[2:4], *unlabelled[1:4]]
    (late,) = [asking for asking in answers.asked if asking.prompt.id == unlabelled[0]]
    answers.slow = set()
    third = iterate(groups, 2)
    assert answers.forgotten == [late.key]
    again = [asking for asking in answers.asked if asking.prompt.id == unlabelled[0]][1:]
    metrics = groups.metrics()
    if stale is StaleGroups.ask_again:
        assert third == [*labelled[4:6], unlabelled[0], *unlabelled[4:6]]
        assert [asking.request.seed for asking in again] == [seed_of(0, "stage2", 1, "rollout", 2, "again", 1)]
        assert (metrics["buffer/asked_again"], metrics["buffer/dropped"]) == (1, 0)
    else:
        assert third == [*labelled[4:6], *unlabelled[4:7]]
        assert again == []
        assert (metrics["buffer/asked_again"], metrics["buffer/dropped"]) == (0, 1)
    last = iterate(groups, 3)
    assert len(last) == 5
    assert not any(groups.buffer.groups(half) for half in HALVES)
    if stale is StaleGroups.drop:
        extra = [asking for asking in answers.asked if asking.iteration == ITERATIONS]
        assert [asking.request.seed for asking in extra] == [seed_of(0, "stage2", "more", "unlabelled", 9)]


def test_a_resumed_run_asks_for_what_was_not_used(single: None) -> None:
    """After iteration 1 of four, with two ahead; unlabelled prompt 0 was slow and is used later."""
    labelled, unlabelled = in_order()
    groups, answers = groups_of(2)
    answers.slow = {unlabelled[0]}
    used = [iterate(groups, iteration) for iteration in (0, 1)]
    groups.request(2)
    saved = json.loads(json.dumps(groups.state()))
    states = {half: stream.state() for half, stream in groups.streams.items()}
    seeds = {asking.prompt.id: asking.request.seed for asking in answers.asked}

    resumed, again = groups_of(2)
    for half, stream in resumed.streams.items():
        stream.restore(json.loads(json.dumps(states[half])))
    resumed.restore(saved)
    used += [iterate(resumed, iteration) for iteration in (2, 3)]
    asked = [asking.prompt.id for asking in again.asked]
    assert sorted(asked) == sorted([*labelled[4:8], unlabelled[0], *unlabelled[4:9]])
    assert all(asking.request.seed == seeds[asking.prompt.id] for asking in again.asked)
    names = [name for of in used for name in of]
    assert sorted(names) == sorted([*labelled[:8], *unlabelled[:9]])


def test_the_prompts_of_an_iteration_under_way_are_not_lost(single: None) -> None:
    groups, _ = groups_of(0)
    groups.request(0)
    assert [len(groups.state()[half.value]["drawn"]) for half in HALVES] == [2, 0]
    groups.collect(0)
    assert [len(groups.state()[half.value]["drawn"]) for half in HALVES] == [2, 0]
    groups.discard()
    assert [len(groups.state()[half.value]["drawn"]) for half in HALVES] == [0, 0]
