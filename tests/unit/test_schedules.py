"""tools/bench_schedules.py: servers and schedules by hand, laws that always hold, the table of the documentation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tempo.cli import build
from megatron_tempo.config.choices import StaleGroups
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.rules import Purpose
from megatron_tempo.plan.decoding import DecodeCosts
from megatron_tempo.plan.memory import MemoryPhase, memory
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.times import times
from megatron_tempo.rehearsal.lengths import Lengths
from tests.support.tools import TOOLS, load_tool

LABELLED, UNLABELLED = Prompts.labelled, Prompts.unlabelled
# A step takes a second, whatever is in the cache; prompts take none.
FLAT = DecodeCosts(weights=1.0, full=0.0, windowed=0.0, row=0.0, window=None)


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def part(name: str) -> Any:
    return importlib.import_module(f"schedule_parts.{name}")


def server(costs: DecodeCosts = FLAT, capacity: float = 1e9, lengths: Sequence[int] = (), prompt: int = 0) -> Any:
    one = part("server").Server(costs, capacity)
    for row in part("server").Group.of(0, True, prompt, list(lengths)).rows:
        one.submit(row)
    return one


def ends(one: Any) -> list[tuple[float, int]]:
    """Seconds at which rows end, and their lengths, until the server has none."""
    clock, found = 0.0, []
    while (step := one.next_event()) < math.inf:
        clock += step
        found += [(clock, row.length) for row in one.advance(step)]
    return found


# A server


def test_rows_end_at_their_length_and_the_server_is_idle_afterwards() -> None:
    one = server(lengths=[3, 5])
    assert ends(one) == [(3.0, 3), (5.0, 5)]
    one.advance(2.0)
    one.settle()
    assert (one.busy, one.idle, one.moving) == (5.0, 2.0, 0.0)


def test_a_step_costs_what_is_in_the_cache() -> None:
    """A prompt of 10, 4 tokens: steps of 1 + 0.5 (10 + x) seconds, the integral over x from 0 to 4: 4 + 20 + 4."""
    one = server(DecodeCosts(1.0, 0.5, 0.0, 0.0, None), lengths=[4], prompt=10)
    assert ends(one) == [(pytest.approx(28.0), 4)]


def test_a_step_takes_at_least_its_arithmetic_and_a_prompt_is_computed_once_for_its_group() -> None:
    """Two rows of 4 tokens, 3 s of arithmetic each, on a prompt of 2: 6 s of prefill. Steps cost 6 s until the cache,
    1 s for each of 4 + 2 x tokens, takes longer, which is from x = 1 on: 6 + 6 + the integral of that from 1 to 4."""
    one = server(DecodeCosts(0.0, 1.0, 0.0, 3.0, None), lengths=[4, 4], prompt=2)
    assert ends(one) == [(pytest.approx(6 + 6 + 12 + 15), 4)] * 2


def test_tokens_beyond_the_window_are_not_read_in_windowed_layers() -> None:
    """A window of 6 and a prompt of 4: the integral of 4 + x up to x = 2, then 6 for each of 3 more."""
    one = server(DecodeCosts(0.0, 0.0, 1.0, 0.0, 6), lengths=[5], prompt=4)
    assert ends(one) == [(pytest.approx(10 + 18), 5)]


@pytest.mark.parametrize("costs", [FLAT, DecodeCosts(1.0, 0.5, 0.0, 2.5, None), DecodeCosts(0.0, 0.1, 0.2, 1.0, 9)])
def test_a_pause_delays_all_rows_and_where_time_is_cut_does_not_matter(costs: DecodeCosts) -> None:
    whole, cut = (server(costs, lengths=[3, 5, 9], prompt=4) for _ in range(2))
    expected, clock, found = ends(whole), 0.0, []
    cut.pause(2.0)
    while (step := cut.next_event()) < math.inf:
        step = min(step, 0.37)
        clock += step
        found += [(clock - 2.0, row.length) for row in cut.advance(step)]
    assert found == [(pytest.approx(at), length) for at, length in expected]
    assert cut.busy == pytest.approx(whole.busy)
    assert cut.moving == 2.0


def test_rows_wait_for_room_and_the_newest_gives_its_room_back() -> None:
    """Room for 10 tokens and rows of 6: both run until they have 5. The newer one leaves with 5 tokens, the older ends
    after another step, the newer is computed again and needs one step more."""
    one = server(capacity=10, lengths=[6, 6])
    assert ends(one) == [(pytest.approx(6.0), 6), (pytest.approx(7.0), 6)]
    assert one.again == 5.0
    one = server(capacity=10, lengths=[6, 6])
    one.headroom = 10.0  # the second one waits
    assert ends(one) == [(6.0, 6), (12.0, 6)]
    assert one.again == 0.0


def test_tokens_carry_the_version_that_made_them_over_a_sync_and_a_stop() -> None:
    one = server(lengths=[9])
    one.advance(2.0)
    one.renew(1)
    one.advance(3.0)
    (row,) = one.stop()
    one.renew(4)
    assert one.next_event() == math.inf
    one.submit(row)
    assert ends(one) == [(4.0, 9)]
    assert row.runs == [(0, 2.0), (1, 3.0), (4, 4.0)]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    capacity=st.integers(40, 200),
    headroom=st.integers(0, 20),
    window=st.none() | st.integers(1, 50),
    cuts=st.lists(st.floats(0.1, 40), max_size=6),
)
def test_a_server_makes_every_token_once_and_its_seconds_add_up(
    lengths: list[int], capacity: int, headroom: int, window: int | None, cuts: list[float]
) -> None:
    one = server(DecodeCosts(0.5, 0.01, 0.02, 0.1, window), capacity, lengths, prompt=7)
    one.headroom = float(headroom)
    rows, clock = list(one.waiting), 0.0
    for number, seconds in enumerate(cuts, start=1):
        left = seconds
        while left > 0:
            step = min(left, one.next_event())
            one.advance(step)
            left -= step
        clock += seconds
        one.pause(0.25)
        one.renew(number)
    while (step := one.next_event()) < math.inf:
        assert one._cached <= capacity + 1e-6
        one.advance(step)
        clock += step
    one.settle()
    assert [sum(tokens for _, tokens in row.runs) for row in rows] == pytest.approx(lengths)
    assert all(older < newer for row in rows for (older, _), (newer, _) in pairwise(row.runs))
    assert one.busy + one.idle + one.moving == pytest.approx(clock)


# Schedules: two servers, three prompts an iteration, one response each

LENGTHS = {0: (2, 2, 6), 1: (4, 2, 2), 2: (2, 2, 2), 3: (2, 8, 2)}  # of the prompts of iterations 0, 1, 2, 3


def simulated(iterations: int = 4, **changes: Any) -> list[Any]:
    """Training takes 3 s and a sync 1 s, on as many GPUs as there are servers: 2, of one request each."""

    def draw(number: int, half: Prompts, times: int) -> Any:
        lengths = LENGTHS[number // 3 % 4]
        return part("server").Group.of(number, half is LABELLED, 0, [lengths[number % 3]])

    schedule = part("schedule")
    engine = schedule.Engine(FLAT, servers=2, tensor=1, capacity=1e9, concurrency=changes.pop("concurrency", 8))
    base = {"trainers": 2, "groups": {LABELLED: 3}, "draw": draw, "train": lambda _: 3.0, "sync": 1.0}
    simulation = schedule.Simulation(schedule.Schedule(engine, **(base | changes)), iterations)
    return list(simulation.run())


def test_taking_turns() -> None:
    """The longest response decides: 6, 4, 2 and 8 s of generation, 4 s of the rest."""
    found = simulated()
    assert [one.seconds for one in found] == [10.0, 8.0, 6.0, 12.0]
    assert [one.generating for one in found] == [6.0, 4.0, 2.0, 8.0]
    assert [one.trainer.idle for one in found] == [12.0, 8.0, 4.0, 16.0]
    # Servers: of 2 x 6 s, rows (2, 6) keep one busy for 6 s and (2) the other for 2; then 3 s of training.
    assert found[0].engine.busy == 8.0
    assert found[0].engine.idle == 4.0 + 6.0
    assert found[0].engine.moving == 2.0
    assert all(one.staleness.keys() == {0} for one in found)


def test_colocated_servers_leave_no_gpu_to_wait_for_the_trainer() -> None:
    found = simulated(colocated=True, turns=0.5)
    assert [one.seconds for one in found] == [10.5, 8.5, 6.5, 12.5]
    assert found[0].engine.idle == 4.0, "one server has no row while the other one ends the longest"
    assert [one.trainer.idle for one in found] == [0.0] * 4
    assert [one.gpu_seconds for one in found] == [2 * one.seconds for one in found]


def test_one_iteration_ahead_overlaps() -> None:
    """Both servers run all six prompts of the first two iterations at once. After 2 s four are there: train. A training
    of 3 s and a sync of 1 s later, at 6 s, the response of 6 has 5 tokens: it was made by version 0, so iteration 1 has
    to wait for it, 1 s. Those of iteration 2 are asked at 6 s and are all there at 11 s. Of those of iteration 3, asked
    at 11 s, the one of 8 tokens has 3 when training ends at 14 s, and the sync at 15 s: 5 s more."""
    found = simulated(max_staleness=1)
    assert [one.generating for one in found] == [2.0, 1.0, 0.0, 5.0]
    assert [one.trainer.idle for one in found] == [4.0, 2.0, 0.0, 10.0]
    # Iteration 1 has the 6 (5 tokens of version 0, one of version 1) and a 4 and a 2 of version 0; then always one.
    assert found[1].staleness == {0: 1.0, 1: 11.0}
    assert found[2].staleness == {1: 6.0}
    assert found[3].staleness == {0: 5.0, 1: 7.0}


def test_what_ends_first_is_trained_on_first() -> None:
    """In order, the first iteration waits for its own longest response; otherwise for any three that are complete."""
    order = simulated(max_staleness=1, runs_on=False)
    any_three = simulated(max_staleness=1)
    assert (order[0].generating, any_three[0].generating) == (6.0, 2.0)
    assert sum(one.seconds for one in any_three) <= sum(one.seconds for one in order)


def test_partial_rollouts_shorten_the_wait_for_the_longest_response_of_colocated_servers() -> None:
    """A batch of 3 of the 6 that are asked. Responses of 2 tokens are there after 2 s; the 6 of iteration 0 has 2 then,
    is computed again later, and is due in iteration 1: 4 s. Meanwhile those of iteration 2 are made. So it does not
    generate, and those of iteration 3 are made in iteration 3."""
    whole, some = (simulated(colocated=True, max_staleness=k) for k in (0, 1))
    assert [one.generating for one in whole] == [6.0, 4.0, 2.0, 8.0]
    assert [one.generating for one in some] == [2.0, 4.0, 0.0, 8.0]
    assert some[1].again == 2.0 + 2.0, "the 6 and the 4 of iteration 1 had 2 tokens each"
    assert some[1].staleness == {0: 4.0 + 2.0, 1: 6.0}
    assert all(one.gpu_seconds == pytest.approx(2 * one.seconds) for one in (*whole, *some))


def test_what_no_server_has_begun_is_as_new_as_the_weights() -> None:
    """15 prompts are asked for at once, and two servers have a request each: after an iteration most of them wait."""
    schedule = part("schedule")
    engine = schedule.Engine(FLAT, servers=2, tensor=1, capacity=1e9, concurrency=1)

    def draw(number: int, half: Prompts, times: int) -> Any:
        return part("server").Group.of(number, half is LABELLED, 0, [2])

    simulation = schedule.Simulation(
        schedule.Schedule(engine, 2, {LABELLED: 3}, draw, lambda _: 1.0, max_staleness=4), iterations=9
    )
    for version in (0, 1):
        simulation.iterate()
        waiting = [simulation._asked[group] for group in simulation._pending]
        assert len(waiting) > 2
        assert {entry.oldest for entry in waiting} == {version}


@pytest.mark.parametrize("stale_groups", [StaleGroups.drop, StaleGroups.ask_again])
def test_a_group_that_would_be_too_old_is_thrown_away(stale_groups: StaleGroups) -> None:
    """The first prompt's response never ends in time: 40 tokens, and less when it is asked again."""

    def draw(number: int, half: Prompts, times: int) -> Any:
        return part("server").Group.of(number, half is LABELLED, 0, [40 if number == 0 and times == 0 else 2])

    found = simulated(8, draw=draw, max_staleness=1, stale_groups=stale_groups)
    assert sum(one.thrown_away for one in found) == sum(one.thrown_away for one in found[:3]) > 0
    assert max(k for one in found for k in one.staleness) <= 1
    assert sum(one.generating for one in found) < 40
    waited = simulated(8, draw=draw, max_staleness=1)
    assert sum(one.thrown_away for one in waited) == 0
    assert sum(one.generating for one in waited) > 20


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=24),
    k=st.integers(0, 3),
    colocated=st.booleans(),
    stale_groups=st.sampled_from(StaleGroups),
    halves=st.sampled_from([{LABELLED: 3}, {UNLABELLED: 2}, {LABELLED: 2, UNLABELLED: 1}]),
    servers=st.integers(1, 3),
    sync=st.floats(0, 3),
)
def test_every_gpu_second_is_busy_idle_or_moving_and_no_token_is_too_old(
    lengths: list[int],
    k: int,
    colocated: bool,
    stale_groups: StaleGroups,
    halves: dict[Prompts, int],
    servers: int,
    sync: float,
) -> None:
    def draw(number: int, half: Prompts, times: int) -> Any:
        rows = [lengths[(number * 2 + row + times) % len(lengths)] for row in range(2)]
        return part("server").Group.of(number, half is LABELLED, 3, rows)

    def train(batch: dict[Prompts, list[Any]]) -> float:
        return 0.01 * sum(row.length for groups in batch.values() for group in groups for row in group.rows)

    schedule, costs = part("schedule"), DecodeCosts(0.1, 0.001, 0.0, 0.02, None)
    engine = schedule.Engine(costs, servers=servers, tensor=2, capacity=90.0, concurrency=2, headroom=2.0)
    gpus = 2 * servers + 1
    ways = {"colocated": colocated, "max_staleness": k, "stale_groups": stale_groups}
    simulation = schedule.Simulation(
        schedule.Schedule(engine, gpus, halves, draw, train, turns=0.5, sync=sync, **ways), iterations=7
    )
    for record in simulation.run():
        whole = record.seconds * (gpus if colocated else gpus + 2 * servers)
        assert record.gpu_seconds == pytest.approx(whole)
        assert min(record.engine.idle, record.trainer.idle, record.engine.busy) >= -1e-9
        assert sum(record.staleness.values()) == pytest.approx(record.tokens)
        assert max(record.staleness) <= k
    assert simulation.version == 7
    assert not any(simulation.buffer.groups(half) for half in halves), "nothing is asked for beyond the last iteration"


# The planner's costs


def test_with_full_length_and_room_for_all_the_simulator_agrees_with_the_planner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same costs, two ways: the planner multiplies waves of rows by the step of their mean length."""
    scenario, tool = part("scenario"), load_tool("bench_schedules", monkeypatch)
    words = ["experiment=qwen3_8b_aime", "cluster=h200x64", "rollout.max_prompt_tokens=256",
             "rollout.max_response_tokens=1024", "rollout.servers.concurrency=999"]  # fmt: skip
    one = tool.schedule(words, Lengths(), 0.0)
    found = scenario.simulate(one, 2, 1)
    config = build(words, purpose=Purpose.plan)
    shape, _ = shape_of(config)
    assert shape is not None
    seconds = times(config, shape, memory(config, shape))
    assert found.generating == pytest.approx(seconds[MemoryPhase.generate], rel=0.15)  # prompts are shorter here
    train = found.seconds - found.generating
    assert train == pytest.approx(sum(seconds.values()) - seconds[MemoryPhase.generate], rel=0.15)
    waiting = (1 - one.sync / found.seconds) / 2
    assert found.idle == pytest.approx(waiting, abs=0.01), "half of the GPUs wait at any moment, but for the syncs"


def test_the_documentation_has_what_the_tool_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of its tables; all of them take minutes."""
    tool = load_tool("bench_schedules", monkeypatch)
    name, one = next(iter(tool.variants(tool.schedule(["experiment=qwen3_14b_aime", "cluster=h100x8"]))))
    cells = tool.cells(tool.result(one))
    line = f"| qwen3_14b_aime | h100x8 | {name} | {cells[0]} |"
    assert line in (TOOLS.parent / "docs" / "benchmarks.md").read_text(), f"tools/bench_schedules.py: {line}"


def test_a_configuration_of_ones_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("bench_schedules", monkeypatch)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["bench_schedules", *words])
        status = tool.main()
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    small = ["experiment=qwen3_8b_day", "stage2.labelled_prompts=16", "stage2.unlabelled_prompts=16"]
    status, out = run(*small, "cluster=h100x8", "--lengths", "lognormal:1000,0.5")
    assert status == 0
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == [
        "| colocated", *(f"| colocated, partial rollouts, {k}" for k in (1, 2, 4))]  # fmt: skip
    for words, told in (
        (["experiment=quickstart", "cluster=h100x8"], "rollout.engine: only servers on the cluster's GPUs"),
        (small, "cluster=null: it is not set"),
        ([*small, "cluster=h100x8", "--lengths", "long"], "--lengths=long: give longest"),
    ):
        status, out = run(*words)
        assert status == 2
        assert told in out
