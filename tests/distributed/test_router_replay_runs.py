"""Runs of a mixture of experts: experts through partial rollouts, files, replays of files and other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel
from megatron_tempo.config.method_settings import GrpoSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.rollout.dump import experts_path
from megatron_tempo.training.jobs import train
from tests.support.dumps import rollouts
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks
from tests.support.tiny import PER_TOKEN, write_model

LAYERS, ITERATIONS, PROMPTS, SAMPLES = 2, 3, 2, 2


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    write_model(folder / "moe", family="qwen3_moe", layers=LAYERS)
    return folder


def config_for(project: Path, run: Path) -> Config:
    """Three iterations of GRPO, with rollouts on disk and a parity check after each sync."""
    config = config_of(project, run)
    config.model.path = str(project / "moe")
    stage = config.stage2
    stage.settings = GrpoSettings()
    stage.iterations, stage.responses_per_prompt = ITERATIONS, SAMPLES
    stage.labelled_prompts, stage.unlabelled_prompts = PROMPTS, 0
    stage.actor.mini_batch_prompts = PROMPTS
    config.rollout.dump, config.rollout.parity_every, config.rollout.max_response_tokens = True, 1, 60
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    config.checkpoint.every, config.checkpoint.export_hf = 100, False
    return config


def metrics_of(folder: Path, config: Config) -> list[dict[str, Any]]:
    """The lines of a run's iterations, in which all recorded experts were replayed."""
    lines = [line for line in read_metrics(folder) if "actor/loss" in line]
    assert len(lines) == ITERATIONS
    for line in lines:
        assert 0.9 < line["engine/routing_agreement"] <= 1.0
        if config.rollout.replay is None:
            assert line["engine/parity_gap_replayed"] < 1e-4
    return lines


def assert_recorded(folder: Path) -> None:
    """The file of experts has one byte for each expert of each token, of the rollouts of all ranks."""
    for path, rows in zip(sorted((folder / "rollouts").glob("*.jsonl")), rollouts(folder), strict=True):
        tokens = sum(len(row["prompt_tokens"]) + len(row["response_tokens"]) for row in rows)
        assert experts_path(path).stat().st_size == tokens * LAYERS * PER_TOKEN


def test_a_run_trains_on_the_same_experts_from_its_rollouts_on_disk(project: Path, tmp_path: Path) -> None:
    """Generated on two ranks, and replayed on one."""
    first, again = config_for(project, tmp_path / "first"), config_for(project, tmp_path / "again")
    run_ranks(train, 2, tmp_path / "a", first)
    assert_recorded(tmp_path / "first")
    again.rollout.replay = str(tmp_path / "first/rollouts")
    run_ranks(train, 1, tmp_path / "b", again)
    pairs = zip(metrics_of(tmp_path / "again", again), metrics_of(tmp_path / "first", first), strict=True)
    for mine, wanted in pairs:
        assert mine["actor/loss"] == pytest.approx(wanted["actor/loss"], abs=1e-5)
        assert mine["engine/routing_agreement"] == pytest.approx(wanted["engine/routing_agreement"], abs=1e-3)


def test_responses_that_continue_over_a_sync_keep_their_experts(project: Path, tmp_path: Path) -> None:
    config = config_for(project, tmp_path / "run")
    config.rollout.max_staleness, config.rollout.partial_rollouts = 1, True
    config.rollout.stop = ["7"]  # some responses are short
    config.stage2.actor.correction = CorrectionConfig(CorrectionLevel.token, high=2.0)
    run_ranks(train, 1, tmp_path / "ranks", config)
    metrics_of(tmp_path / "run", config)
    assert_recorded(tmp_path / "run")
    rows = [row for of in rollouts(tmp_path / "run") for row in of]
    assert any(len(row["versions"]) > 1 for row in rows)
    for row, experts in zip(rows, experts_of(tmp_path / "run"), strict=True):
        assert (experts[:-1] != 255).all(), "of each token but the last"
        assert (experts[-1] == 255).all(), row["prompt_id"]


def experts_of(folder: Path) -> list[NDArray[Any]]:
    """The experts of each line, in order."""
    found = []
    for path, rows in zip(sorted((folder / "rollouts").glob("*.jsonl")), rollouts(folder), strict=True):
        raw = np.fromfile(experts_path(path), np.uint8)
        for place in (row["experts"] for row in rows):
            end = place["offset"] + int(np.prod(place["shape"]))
            found.append(raw[place["offset"] : end].reshape(place["shape"]))
    return found
