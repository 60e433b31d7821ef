"""What models say of rows is the same wherever the rows are: each rank holds, and computes, only its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tempo.algorithm.outcomes import final_values
from megatron_tempo.config.method_settings import Baseline, Method
from megatron_tempo.config.schema import Config, CriticLayoutConfig, ParallelConfig
from megatron_tempo.config.stages import StageConfig, settings_of
from megatron_tempo.methods.learner import Rollouts
from megatron_tempo.training.context import open_context
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.training.setup import build_actor, build_critic
from tests.support.ranks import run_ranks
from tests.support.tiny import held_by, ragged_batch, write_model

ROWS = 24
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one": (1, ParallelConfig()),
    "dp4": (4, ParallelConfig()),
    "dp2-tp2-critic-dp4": (
        4,
        ParallelConfig(tensor=2, sequence=True, critic=CriticLayoutConfig(tensor=1, sequence=False)),
    ),
    "dp2-pp2-critic-cp2": (4, ParallelConfig(pipeline=2, critic=CriticLayoutConfig(pipeline=1, context=2))),
}


def measured(model: Path, layout: str) -> dict[str, Any]:
    """What this rank holds and reads of PPO's rollouts, on which both models are trained."""
    config = Config()
    config.model.path = str(model)
    config.parallel = replace(LAYOUTS[layout][1], micro_batch_tokens=50)
    stage = StageConfig(settings_of(Method.ppo), labelled_prompts=6, responses_per_prompt=4)
    stage.actor.mini_batch_prompts, stage.critic.mini_batch_prompts = 3, 2
    with open_context(config) as context:
        actor, critic = build_actor(context), build_critic(context)
        if critic.model.layout.is_last_stage:  # a new critic says 0 of everything
            head = critic.model.net.output_layer.weight.data
            head.copy_(torch.linspace(-1, 1, head.numel()).view_as(head))
        whole, rows = ragged_batch(ROWS, per_prompt=4), RowOwners(actor, critic)
        columns = Rollouts(held_by(whole, torch.zeros(0, dtype=torch.int64)), None)
        owned = rows.of_iteration(columns, stage, 0, "seed").labelled
        assert owned is not None
        assert owned.owners is not None
        batch = replace(held_by(whole, rows.held(owned)), owners=owned.owners)
        logprobs, values = actor.logprobs(batch), critic.values(batch)
        counts = batch.held_responses
        positions = torch.stack([torch.zeros_like(whole.response_lengths), whole.response_lengths], dim=1)
        mine = owned.owners.actor == context.layouts.actor.data_rank
        by_row = zip(logprobs.split(counts.tolist()), values.split((counts + 1).tolist()), strict=True)
        return {
            "own": mine.nonzero().flatten().tolist(),
            "read": {row: read for row, read in zip(batch.held.tolist(), by_row, strict=True) if mine[row]},
            "held": len(batch.response_tokens),
            "ends": critic.values_at(batch, positions),
            "final": actor.gather(batch, final_values(values, counts, Baseline.before_token)),
            "gap": actor.gap_to_engine(batch, logprobs),
        }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(measured, 1, tmp_path_factory.mktemp("alone"), model, "one")[0]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_rows_are_read_alike_wherever_they_are(model: Path, alone: dict[str, Any], tmp_path: Path, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    ranks = run_ranks(measured, world, tmp_path / "ranks", model, layout)
    assert alone["own"] == list(range(ROWS))
    replica = parallel.ranks_of_a_replica
    assert sorted(row for rank in ranks for row in rank["own"]) == sorted(list(range(ROWS)) * replica)
    tokens = int(ragged_batch(ROWS, per_prompt=4).response_lengths.sum())
    assert alone["held"] == tokens
    for rank in ranks:
        # Rows of one of the actor's replicas and of one of the critic's: nobody holds all.
        assert rank["held"] < tokens
        for row in rank["own"]:
            for mine, theirs in zip(rank["read"][row], alone["read"][row], strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
                assert bool(theirs.abs().min() > 0), "what nobody has computed would be zero"
        for name in ("ends", "final"):
            assert torch.equal(rank[name], ranks[0][name]), "the same on every rank"
            torch.testing.assert_close(rank[name], alone[name], atol=2e-5, rtol=1e-5)
        assert rank["gap"] == ranks[0]["gap"]
        assert rank["gap"] == pytest.approx(alone["gap"], rel=1e-5)


def test_the_numbers_of_a_process_alone_by_hand(alone: dict[str, Any]) -> None:
    batch = ragged_batch(ROWS, per_prompt=4)
    engine = batch.engine_logprobs.split(batch.response_lengths.tolist())
    gaps = torch.cat([(alone["read"][row][0] - engine[row]).abs() for row in range(ROWS)]).double()
    assert alone["gap"] == pytest.approx((float(gaps.mean()), float(gaps.max())), rel=1e-6)
    for row in range(ROWS):
        values = alone["read"][row][1]
        assert alone["ends"][row].tolist() == [float(values[0]), float(values[-1])]
        assert float(alone["final"][row]) == float(values[-1])
