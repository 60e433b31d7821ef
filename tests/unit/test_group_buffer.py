"""Which prompt groups an iteration gets, how old they are, and how far ahead is asked."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from megatron_tempo.config.choices import StaleGroups
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.rollout.group_buffer import Group, GroupBuffer, needs_within

LABELLED, UNLABELLED = Prompts.labelled, Prompts.unlabelled


def numbers(groups: list[Group[str]]) -> list[int]:
    return [group.number for group in groups]


def filled(max_staleness: int, count: int, stale: StaleGroups = StaleGroups.wait) -> GroupBuffer[str]:
    buffer: GroupBuffer[str] = GroupBuffer(max_staleness, stale)
    buffer.add(LABELLED, (f"p{i}" for i in range(count)), 0)
    return buffer


def finish(buffer: GroupBuffer[str], *finished: int, oldest: int = 0) -> None:
    for group in buffer.groups(LABELLED):
        if group.number in finished:
            buffer.finish(group, oldest, 10)


@pytest.mark.parametrize(("max_staleness", "room"), [(0, 3), (1, 6), (4, 13)])
def test_as_much_is_asked_for_as_the_next_iterations_need(max_staleness: int, room: int) -> None:
    """3 groups an iteration, of which the stage has 5, the last one of a single group."""
    needed = {LABELLED: [3, 3, 3, 3, 1]}
    buffer: GroupBuffer[str] = GroupBuffer(max_staleness)
    needs = needs_within(0, 5, max_staleness, needed)
    assert buffer.room(LABELLED, needs) == room
    assert buffer.room(UNLABELLED, needs) == 0
    buffer.add(LABELLED, "abc"[: buffer.room(LABELLED, needs)], 0)
    assert buffer.room(LABELLED, needs) == room - 3


def test_the_last_iterations_ask_for_nothing_that_is_never_used() -> None:
    buffer = filled(4, 2)
    assert buffer.room(LABELLED, needs_within(4, 5, 4, {LABELLED: [2] * 5})) == 0


def test_the_oldest_complete_groups_are_chosen() -> None:
    buffer = filled(4, 5)
    needs = {LABELLED: [2, 2, 2, 2, 2]}
    finish(buffer, 4)
    assert buffer.chosen(0, needs) is None
    finish(buffer, 3, 1)
    chosen = buffer.chosen(0, needs)
    assert chosen is not None
    assert numbers(chosen[LABELLED]) == [1, 3]
    assert chosen[UNLABELLED] == []
    buffer.take(chosen[LABELLED])
    assert numbers(buffer.groups(LABELLED)) == [0, 2, 4]
    assert (buffer.completed(LABELLED), buffer.unfinished(LABELLED)) == (1, 2)


def test_tokens_of_older_weights_go_first() -> None:
    buffer = filled(4, 3)
    finish(buffer, 0, oldest=1)
    finish(buffer, 2, oldest=0)
    chosen = buffer.chosen(1, {LABELLED: [1, 1]})
    assert chosen is not None
    assert numbers(chosen[LABELLED]) == [2]


def test_without_unfinished_groups_that_go_on_the_order_is_that_of_asking() -> None:
    buffer = filled(1, 4)
    buffer.runs_on = False
    finish(buffer, 1, 2, 3)
    assert buffer.chosen(0, {LABELLED: [2, 2]}) is None
    finish(buffer, 0)
    chosen = buffer.chosen(0, {LABELLED: [2, 2]})
    assert chosen is not None
    assert numbers(chosen[LABELLED]) == [0, 1]


def test_both_halves_are_waited_for_and_keep_their_own_order() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(1)
    first = buffer.add(LABELLED, "ab", 0)
    second = buffer.add(UNLABELLED, "cd", 0)
    needs = {LABELLED: [1, 1], UNLABELLED: [1, 1]}
    buffer.finish(first[0], 0, 5)
    assert buffer.chosen(0, needs) is None
    buffer.finish(second[1], 0, 5)
    chosen = buffer.chosen(0, needs)
    assert chosen is not None
    assert (numbers(chosen[LABELLED]), numbers(chosen[UNLABELLED])) == ([0], [1])


def test_an_iteration_waits_for_the_groups_that_it_is_the_last_one_for() -> None:
    """One update is allowed, and group 0 was asked for before the last one."""
    buffer = filled(1, 2)
    needs = {LABELLED: [1, 1]}
    finish(buffer, 1)
    chosen = buffer.chosen(0, needs)
    assert chosen is not None
    buffer.take(chosen[LABELLED])
    buffer.finish(buffer.add(LABELLED, "x", 1)[0], 1, 5)
    assert buffer.chosen(1, needs) is None
    assert buffer.stale(1, needs) == []
    finish(buffer, 0)
    chosen = buffer.chosen(1, needs)
    assert chosen is not None
    assert numbers(chosen[LABELLED]) == [0]


def test_a_half_that_is_not_needed_for_some_iterations_is_due_earlier() -> None:
    """Needed now and in three iterations, which is one too many for what was asked for at version 0."""
    buffer = filled(4, 2)
    finish(buffer, 1)
    assert buffer.chosen(1, {LABELLED: [1, 0, 1]}) is not None  # 3 - 0 <= 4
    assert buffer.chosen(2, {LABELLED: [1, 0, 0, 1]}) is None  # 5 - 0 > 4


@pytest.mark.parametrize("stale", [StaleGroups.ask_again, StaleGroups.drop])
def test_groups_beyond_the_bound_are_asked_again_or_dropped(stale: StaleGroups) -> None:
    buffer = filled(1, 3, stale)
    finish(buffer, 1, 2)
    needs = {LABELLED: [1, 1]}
    chosen = buffer.chosen(0, needs)
    assert chosen is not None
    buffer.take(chosen[LABELLED])
    assert buffer.stale(1, needs) == []
    beyond = buffer.stale(2, needs)
    assert numbers(beyond) == [0, 2]
    again = buffer.expire(beyond, 2)
    counts = buffer.counts.take()
    assert counts.tokens_thrown_away == 10  # of the complete one
    if stale is StaleGroups.drop:
        assert (again, counts.dropped, counts.asked_again) == ([], 2, 0)
        assert buffer.groups(LABELLED) == []
    else:
        assert (numbers(again), counts.dropped, counts.asked_again) == ([0, 2], 0, 2)
        assert [(group.oldest, group.times, group.complete) for group in again] == [(2, 1, False)] * 2
    assert buffer.completed(LABELLED) == 0
    assert buffer.counts.take().asked_again == 0


def test_refused_groups_leave_room_for_others() -> None:
    buffer = filled(0, 2)
    finish(buffer, 0, 1)
    needs = {LABELLED: [2]}
    buffer.refuse(buffer.groups(LABELLED)[:1])
    assert buffer.chosen(0, needs) is None
    assert buffer.room(LABELLED, needs) == 1
    assert numbers(buffer.add(LABELLED, "x", 0)) == [2]
    assert (buffer.counts.refused, buffer.counts.tokens_thrown_away) == (1, 10)


def test_a_resumed_buffer_asks_for_all_of_its_groups() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(4)
    assert numbers(buffer.restore(LABELLED, {7: "h", 3: "d"}, 9, version=6)) == [3, 7]
    assert [group.oldest for group in buffer.groups(LABELLED)] == [6, 6]
    assert numbers(buffer.add(LABELLED, "x", 6)) == [9]


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("stale", list(StaleGroups))
@pytest.mark.parametrize("runs_on", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_group_is_used_once_within_the_bound(
    max_staleness: int, stale: StaleGroups, runs_on: bool, seed: int
) -> None:
    """A stage whose halves are needed at different iterations, answered in an order drawn at random."""
    draw = random.Random(seed)
    needed = {LABELLED: [2, 2, 0, 2, 0, 0, 2, 0, 1], UNLABELLED: [0, 0, 3, 3, 3, 3, 3, 3, 3]}
    iterations = len(needed[LABELLED])
    buffer: GroupBuffer[int] = GroupBuffer(max_staleness, stale, runs_on=runs_on)
    drawn, used, lost = Counter[Prompts](), Counter[tuple[Prompts, int]](), 0
    for version in range(iterations):
        needs = needs_within(version, iterations, max_staleness, needed)
        for group in buffer.expire(buffer.stale(version, needs), version):
            assert group.oldest == version
        for half in Prompts:
            room = buffer.room(half, needs)
            buffer.add(half, range(drawn[half], drawn[half] + room), version)
            drawn[half] += room
        while (chosen := buffer.chosen(version, needs)) is None:
            waiting = [group for half in Prompts for group in buffer.groups(half) if not group.complete]
            group = draw.choice(waiting)
            buffer.finish(group, draw.randint(group.oldest, version), 1)
        for half, groups in chosen.items():
            assert len(groups) == needed[half][version]
            assert all(version - group.oldest <= max_staleness for group in groups)
            used.update((half, group.item) for group in groups)
            buffer.take(groups)
        counts = buffer.counts.take()
        assert counts.asked_again == counts.dropped == 0 or (runs_on and stale is not StaleGroups.wait)
        lost += counts.dropped
    assert all(not buffer.groups(half) for half in Prompts)
    assert set(used.values()) == {1}
    assert lost + len(used) == sum(drawn.values())
    if stale is not StaleGroups.drop:
        assert (lost, len(used)) == (0, sum(map(sum, needed.values())))


def test_with_staleness_0_an_iteration_has_the_groups_that_it_asked_for() -> None:
    needed = {LABELLED: [2, 2, 2]}
    buffer: GroupBuffer[int] = GroupBuffer(0)
    for version in range(3):
        needs = needs_within(version, 3, 0, needed)
        asked = buffer.add(LABELLED, range(buffer.room(LABELLED, needs)), version)
        assert numbers(asked) == [2 * version, 2 * version + 1]
        for group in reversed(asked):
            buffer.finish(group, version, 1)
        chosen = buffer.chosen(version, needs)
        assert chosen is not None
        assert chosen[LABELLED] == asked
        buffer.take(asked)
