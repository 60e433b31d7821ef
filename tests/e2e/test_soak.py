"""Three hundred iterations: a process holds no more at their end than after their beginning, and takes no longer."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_tempo.config.schema import Config
from megatron_tempo.observability.records import read_evaluations, read_metrics
from megatron_tempo.training.jobs import train
from megatron_tempo.training.run_state import RunState
from tests.support.growth import SETTLES_LATE, Trace, growth, windows
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

FIRST, SECOND = 30, 270  # iterations of the stages: what is compared is all of the second
RANKS = 2


def config_for(project: Path, run: Path) -> Config:
    """Small batches that stay alike: the rates are next to nothing. A checkpoint and an evaluation every 10."""
    config = config_of(project, run)
    for stage in config.stages().values():
        stage.labelled_prompts, stage.critic.warmup_iterations = 2, 1
        stage.actor.mini_batch_prompts = stage.critic.mini_batch_prompts = 2
        stage.actor.optimizer.lr = stage.critic.optimizer.lr = 1e-7
    config.stage2.unlabelled_prompts = 2
    config.stage1.iterations, config.stage2.iterations = FIRST, SECOND
    config.checkpoint.every = config.evaluation.every = 10
    config.checkpoint.keep = 2
    config.rollout.dump = config.metrics.tensorboard = config.metrics.report = True
    return config


def soaked(config: Config) -> dict[str, list[float]]:
    """Train; what this process held at the end of each iteration, without a save that is on its way."""
    trace, due = Trace(), RunState.checkpoint_if_due

    def sampled(run: RunState) -> None:
        due(run)
        run.checkpoints.wait()
        trace.sample()

    with patch.object(RunState, "checkpoint_if_due", sampled):
        train(config)
    return trace.series


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak(tmp_path: Path) -> None:
    run = tmp_path / "run"
    series = run_ranks(
        soaked, RANKS, tmp_path / "ranks", config_for(write_project(tmp_path / "project"), run), timeout=840
    )
    shown = [
        {name: [round(x, 4) for x in windows(numbers, late=name in SETTLES_LATE)] for name, numbers in one.items()}
        for one in series
    ]
    print(json.dumps(shown, indent=1))  # pytest -s: what docs/monitoring.md quotes
    assert len(read_metrics(run)) == len(series[0]["files"]) == FIRST + SECOND
    assert len(read_evaluations(run)) == 2 + FIRST // 10 + SECOND // 10 - 1
    assert len(list((run / "rollouts").iterdir())) == FIRST + SECOND
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert [growth(one) for one in series] == [[]] * RANKS
