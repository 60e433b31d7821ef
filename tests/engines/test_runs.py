"""Whole runs on real servers: ahead of the trainer by a batch, and when the last server is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel, OutOfBounds
from megatron_tempo.config.method_settings import GrpoSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.observability.records import read_evaluations, read_metrics
from megatron_tempo.training.jobs import train
from megatron_tempo.training.rollout_requests import RolloutRequests
from tests.engines.servers import group_of, use_servers
from tests.support.matrix import matrix
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def config_for(kind: EngineKind, tmp_path: Path) -> Config:
    config = config_of(write_project(tmp_path / "project"), tmp_path / "run")
    use_servers(config, kind)
    config.stage2.iterations, config.evaluation.every, config.rollout.dump = 4, 2, True
    return config


def trained(config: Config) -> str:
    """What the run says when it stops early."""
    try:
        train(config)
    except EngineError as error:
        return str(error)
    return ""


def asked(run: Path) -> list[list[str]]:
    """The prompts of each iteration."""
    files = sorted((run / "rollouts").iterdir())
    return [[json.loads(line)["prompt_id"] for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(
    ("kind", "max_staleness"), matrix([(EngineKind.sglang, 1), (EngineKind.vllm, 4)], [(EngineKind.vllm, 4)])
)
def test_the_next_batches_are_generated_while_this_one_trains(
    tmp_path: Path, kind: EngineKind, max_staleness: int
) -> None:
    config = config_for(kind, tmp_path)
    config.rollout.max_staleness = max_staleness
    config.stage2.actor.correction = CorrectionConfig(CorrectionLevel.token, high=2.0)
    assert run_ranks(trained, 2, tmp_path / "ranks", config, timeout=500) == ["", ""]
    lines = list(read_metrics(tmp_path / "run"))
    assert lines[0]["engine/staleness_max"] == 0.0
    assert 1.0 <= max(line["engine/staleness_max"] for line in lines) <= max_staleness
    assert [line["buffer/dropped"] for line in lines] == [0] * len(lines)
    for number, file in enumerate(sorted((tmp_path / "run/rollouts").iterdir())):
        for line in map(json.loads, file.read_text().splitlines()):
            versions = [version for version, _ in line["versions"]]
            assert set(versions) <= set(range(max(number - max_staleness, 0), number + 1))
            assert versions == sorted(versions)
            assert sum(count for _, count in line["versions"]) == len(line["response_tokens"])
    # The same prompts as a run that waits for each batch, those that are answered first earlier.
    plain = config_of(tmp_path / "project", tmp_path / "plain")
    plain.stage2.iterations, plain.rollout.dump = 4, True
    assert run_ranks(trained, 2, tmp_path / "ranks", plain) == ["", ""]
    ours, theirs = asked(tmp_path / "run"), asked(tmp_path / "plain")
    assert [len(prompts) for prompts in ours] == [len(prompts) for prompts in theirs]
    assert Counter(name for of in ours for name in of) == Counter(name for of in theirs for name in of)


@pytest.mark.parametrize(("kind", "max_staleness"), [(EngineKind.vllm, 0), (EngineKind.sglang, 2)])
def test_groups_that_agree_give_way_to_other_prompts(tmp_path: Path, kind: EngineKind, max_staleness: int) -> None:
    config = config_for(kind, tmp_path)
    stage = config.stage2
    stage.settings, stage.iterations, stage.refill_limit, stage.responses_per_prompt = GrpoSettings(), 3, 6, 3
    stage.labelled_prompts, stage.unlabelled_prompts, stage.actor.mini_batch_prompts = 3, 0, 3
    config.evaluation.every, config.rollout.max_staleness = 0, max_staleness
    stage.actor.correction = CorrectionConfig(CorrectionLevel.geometric, OutOfBounds.mask, low=0.5, high=2.0)
    assert run_ranks(trained, 1, tmp_path / "ranks", config, timeout=500) == [""]
    lines = list(read_metrics(tmp_path / "run"))
    assert sum(line["refill/dropped"] for line in lines) > 0
    for line, file in zip(lines, sorted((tmp_path / "run/rollouts").iterdir()), strict=True):
        verdicts = [each["correct"] for each in map(json.loads, file.read_text().splitlines())]
        groups = [set(verdicts[i : i + 3]) for i in range(0, 9, 3)]
        assert line["refill/agreeing"] == sum(len(group) == 1 for group in groups)
        assert line["refill/asked"] == 3 + line["refill/dropped"] <= 6
        assert line["refill/asked"] == 6 or not line["refill/agreeing"]
        assert line["engine/staleness_max"] <= max_staleness
        # How far stale rollouts are from the policy depends on how many updates the machine's load lets pass.
        if line["engine/staleness_max"] == 0:
            assert 0.9 < line["correction/ess"] <= 1.0
            assert line["engine/kl_k3"] < 0.01


def losing_its_server(config: Config, iteration: int) -> tuple[str, float]:
    """The run whose server dies in the generation of an iteration: what it says, and how long after."""
    died: list[float] = []
    request = RolloutRequests.request

    def requesting(self: RolloutRequests, stage_name: str, stage: object, number: int) -> None:
        request(self, stage_name, stage, number)  # type: ignore[arg-type]
        if number == iteration and not died:
            died.append(time.monotonic())
            os.killpg(group_of(self.engine, 0), signal.SIGKILL)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RolloutRequests, "request", requesting)
        message = trained(config)
    return message, time.monotonic() - died[0]


def test_a_run_that_loses_its_last_server_stops_with_a_checkpoint(tmp_path: Path) -> None:
    config = config_for(EngineKind.sglang, tmp_path)
    config.rollout.servers.restarts = 0
    config.checkpoint.every = 0
    ((message, seconds),) = run_ranks(losing_its_server, 1, tmp_path / "ranks", config, 2, timeout=500)
    assert "server is left; rerun the same command to resume from" in message
    assert "step_00000002" in message
    assert seconds < 90  # a checkpoint included, on a busy machine
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert run_ranks(trained, 1, tmp_path / "ranks", config, timeout=500) == [""]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_evaluations(tmp_path / "run")] == [0, 2, 4]
    plain = config_of(tmp_path / "project", tmp_path / "plain")
    plain.stage2.iterations, plain.rollout.dump = 4, True
    assert run_ranks(trained, 1, tmp_path / "ranks", plain) == [""]
    assert asked(tmp_path / "run") == asked(tmp_path / "plain"), "the same questions as without the loss"
