"""Truncated responses that the actor is not trained on, in layouts in which a rank holds some of the rows.

With the advantages, the E-step and the entropy bonus that depend on rows of other ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel, OutOfBounds
from megatron_tempo.config.method_settings import TempoSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.training.jobs import train
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

LIMIT = 14  # tokens; most responses have 15


def config_for(project: Path, run: Path) -> Config:
    config = config_of(project, run)
    config.rollout.max_response_tokens, config.rollout.temperature = LIMIT, 3.0
    config.stage2.truncated_responses = TruncatedResponses.masked
    config.stage2.settings = TempoSettings(
        actor_on_labelled=True, gae_lambda=0.8, pass_at_k=2, estep_when_ece_above=0.0
    )
    config.stage2.actor.entropy_coef, config.stage2.actor.entropy_target = 0.01, 20.0
    config.stage2.critic.targets = CriticTargets.plus_minus_one  # values of 0 are then one half, and need an E-step
    config.stage2.actor.correction = CorrectionConfig(CorrectionLevel.sequence, OutOfBounds.mask, 0.5, 2.0)
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    config.checkpoint.export_hf = False
    return config


def test_masked_responses_are_left_out_in_each_layout(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    config = config_for(project, tmp_path / "one")
    config.rollout.dump = True
    run_ranks(train, 1, tmp_path / "ranks", config)
    (one,) = read_metrics(tmp_path / "one")
    (file,) = (tmp_path / "one/rollouts").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    stopped = [line["stopped"] for line in lines]
    assert 0 < sum(stopped) < len(lines)
    assert all(len(line["response_tokens"]) == LIMIT for line in lines if not line["stopped"])
    assert one["actor/rows"] == sum(stopped)
    assert one["truncated"] == pytest.approx(1 - sum(stopped) / len(lines))
    assert one["critic/rows"] == len(lines) / 2, "all labelled ones"
    assert one["critic/esteps"] == 1.0
    assert 0 < one["critic/ece_before_estep"] < 1
    assert 0 < one["actor/entropy_coef"] < 0.01
    for layout in ({}, {"tensor": 2}):
        config = config_for(project, tmp_path / f"two{len(layout)}")
        config.rollout.replay = str(tmp_path / "one/rollouts")
        for name, value in layout.items():
            setattr(config.parallel, name, value)
        run_ranks(train, 2, tmp_path / "ranks", config)
        (two,) = read_metrics(Path(config.run.dir))
        names = [name for name in one if name.startswith(("actor/", "advantage/", "reward/", "correction/", "critic/"))]
        assert len(names) > 20
        wanted = {name: one[name] for name in names}
        assert {name: two[name] for name in names} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
