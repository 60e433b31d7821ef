"""The gate of log-probabilities after syncs and restarts, and on an iteration's own rollouts."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch

from megatron_tempo.config.choices import OnDrift, Placement
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import DriftError, EngineError
from megatron_tempo.training.parity import OWN_TOKENS, START_TOKENS, SYNC_TOKENS, of_version
from tests.support.gates import GateOf, rows_of
from tests.support.logged import logged


def config_of(on_drift: OnDrift = OnDrift.stop, every: int = 1) -> Config:
    config = Config()
    config.rollout.on_drift, config.rollout.parity_every = on_drift, every
    return config


def test_one_garbled_server_of_many_is_found_and_named() -> None:
    """A mean over all servers would be 3 / 100 nats, within the tolerance."""
    gaps = {server: [0.0] for server in range(100)} | {37: [3.0]}
    with pytest.raises(DriftError, match=r"^the engine's .* are 3 nats .* over 8 tokens of server 37, but"):
        GateOf(config_of(), gaps).gate.after_sync(1)


@pytest.mark.parametrize("gap", [nan, inf])
def test_a_gap_that_is_no_number_is_a_drift(gap: float) -> None:
    with pytest.raises(DriftError, match=rf"{gap} nats.*of server 1"):
        GateOf(config_of(), {0: [0.0], 1: [gap], 2: [0.2]}).gate.after_sync(1)


def test_it_asks_after_every_nth_sync() -> None:
    """Garbled from the second sync on, which is found at the third."""
    of = GateOf(config_of(every=3), {0: [0.0, 0.3]})
    of.gate.at_start(0)
    of.gate.after_sync(1)
    of.gate.after_sync(2)
    assert of.asked == [(START_TOKENS, False)]
    with pytest.raises(DriftError):
        of.gate.after_sync(3)
    assert of.asked[1:] == [(SYNC_TOKENS, False)]


def test_never_is_only_at_starts_and_restarts() -> None:
    of = GateOf(config_of(every=0), {0: [0.0]})
    of.gate.at_start(0)
    for step in range(1, 9):
        of.gate.after_sync(step)
    assert len(of.asked) == 1
    of.engine.gate()
    assert of.asked[1:] == [(START_TOKENS, True)]


def test_a_restarted_server_is_asked_before_it_answers() -> None:
    of = GateOf(config_of(), {0: [0.0, 0.0, 0.3]})
    of.gate.at_start(0)
    of.engine.gate()
    with pytest.raises(DriftError, match="of server 0"):
        of.engine.gate()


def test_no_answer_proves_nothing() -> None:
    of = GateOf(config_of(), {})
    with pytest.raises(EngineError, match="no server answered"):
        of.gate.at_start(0)
    of.gate._of_restarted()  # it is restarted once more


def test_a_resync_that_helps_is_counted_and_one_that_does_not_stops_the_run() -> None:
    of = GateOf(config_of(OnDrift.resync), {0: [0.0], 1: [0.3, 0.0, 0.3, nan]})
    with logged(logging.WARNING) as messages:
        of.gate.after_sync(1)
    assert (of.syncs, of.gate.take_resyncs(), of.gate.take_resyncs()) == (1, 1, 0)
    assert "of server 1" in messages[0]
    assert messages[0].endswith("all weights are sent again")
    with pytest.raises(DriftError, match=r"are nan nats .* of server 1"):
        of.gate.after_sync(2)
    assert of.syncs == 2


@pytest.mark.parametrize("replays", [True, False])
def test_with_recorded_experts_the_gap_is_measured_both_ways(replays: bool) -> None:
    """The engine is 0.02 nats from the actor that replays, and 0.3 from the one whose routers choose."""
    of = GateOf(config_of(), {0: [0.02]})
    of.has_experts = True
    of.gate.at_start(0)
    assert of.gate.take_gaps() == {}, "nothing is replayed or compared"
    of.actor.own, of.actor.model.replay = -0.32, SimpleNamespace(replays=replays)
    drift = r"are 0\.3 nats .* the gap is 0\.02; set model\.router_replay=on"
    with nullcontext() if replays else pytest.raises(DriftError, match=drift):
        of.gate.after_sync(1)
    gaps = of.gate.take_gaps()
    assert gaps == pytest.approx({"engine/parity_gap_replayed": 0.02, "engine/parity_gap_own_routing": 0.3})
    assert of.gate.take_gaps() == {}


def test_a_drift_that_other_experts_do_not_explain_names_its_cause() -> None:
    of = GateOf(config_of(), {0: [0.2]})
    of.has_experts, of.actor.own, of.actor.model.replay = True, -0.5, SimpleNamespace(replays=False)
    with pytest.raises(DriftError, match="every tensor is as it should be"):
        of.gate.after_sync(1)


def test_only_tokens_of_the_version_count() -> None:
    batch = rows_of([[(3, 2), (4, 1)], [(4, 2)], [(3, 1)]], [0.0, 0.0, 0.0])
    assert of_version(batch, 4).tolist() == [False, False, True, True, True, False]
    assert of_version(batch, 5).tolist() == [False] * 6


def own(gate: GateOf, gap: float, *, older: float = 0.0, tokens: int = OWN_TOKENS, step: int = 4) -> bool:
    """Whether the actor may be trained on a row of the version of `step` and one of older weights."""
    batch = rows_of([[(step - 1, OWN_TOKENS)], [(step, tokens)]], [older, gap])
    return gate.gate.accepts(batch, torch.zeros(len(batch.response_tokens)), step)


def test_an_iteration_with_rollouts_of_drifted_weights_stops_the_run() -> None:
    of = GateOf(config_of(), {0: [0.0]})
    assert own(of, 0.04)
    assert own(of, 0.04, older=5.0), "older weights have other log-probabilities"
    assert own(of, 5.0, tokens=OWN_TOKENS - 1), "too few for a mean"
    with pytest.raises(DriftError, match=rf"0\.06 nats .* over {OWN_TOKENS} tokens of iteration 5"):
        own(of, 0.06)
    with pytest.raises(DriftError):
        own(of, nan)
    of.config.rollout.replay = "folder"
    assert own(of, 5.0), "replayed rollouts are those of another run"


def test_with_resync_they_are_dropped_and_so_is_what_was_generated_before_the_next_sync() -> None:
    of = GateOf(config_of(OnDrift.resync, every=0), {0: [0.0]})
    with logged(logging.WARNING) as messages:
        assert not own(of, 0.3)
    assert "the actor is not trained on these rollouts" in messages[0]
    of.gate.after_sync(5)  # which sends all weights; the gate asks although it is never due
    assert of.asked == [(SYNC_TOKENS, False)]
    assert of.gate.take_resyncs() == 1
    with logged(logging.WARNING):
        assert not own(of, 0.0, step=5), "half of it is of version 4"
    assert own(of, 0.0, step=6)
    of.gaps = {0: [0.3]}
    with logged(logging.WARNING):
        assert not own(of, 0.3, step=7)
    with pytest.raises(DriftError):
        of.gate.after_sync(8)
    assert of.syncs == 0


def test_a_colocated_engine_that_generates_ahead_is_asked_before_it_sleeps() -> None:
    """Its rollouts have no token of the weights that the actor has now."""
    of = GateOf(config_of(OnDrift.resync, every=2), {0: [0.0, 0.0, 0.3, 0.0, 0.3]})
    config = of.config.rollout
    config.placement, config.max_staleness = Placement.colocated, 1
    of.gate.at_start(0)
    for step in range(4):
        of.engine.asleep = False
        of.gate.before_sleep(step)  # the second time it is due, the server has drifted
        of.engine.asleep = True
        of.gate.after_sync(step + 1)
    assert of.asked[1:] == [(SYNC_TOKENS, False)] * 3
    assert (of.syncs, of.gate.take_resyncs()) == (1, 1)
    with logged(logging.WARNING):
        assert not own(of, 0.0, step=4), "half of it was generated in the turn before, by drifted weights"
    assert own(of, 0.0, step=5)
    of.engine.asleep = False
    of.gate.before_sleep(4)
    config.on_drift = OnDrift.stop
    with pytest.raises(DriftError):
        of.gate.before_sleep(5)


def test_a_colocated_engine_is_judged_by_its_rollouts_alone() -> None:
    """It sleeps after a sync, and while it generates the actor has no memory."""
    of = GateOf(config_of(OnDrift.resync), {0: [0.0]})
    of.config.rollout.placement, of.engine.asleep = Placement.colocated, True
    of.gate.at_start(0)
    assert of.engine.gate is None
    of.gate.after_sync(1)
    assert len(of.asked) == 1
    with logged(logging.WARNING):
        assert not own(of, 0.3, older=0.0, step=1)
    of.gate.after_sync(2)
    assert len(of.asked) == 1
    with pytest.raises(DriftError, match="of iteration 4"):
        own(of, 0.3, older=0.0, step=3)
