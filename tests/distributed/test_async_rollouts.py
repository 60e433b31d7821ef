"""Runs that generate ahead, with the embedded engine: how old tokens are, and which prompts an iteration gets."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel
from megatron_tempo.config.schema import Config
from megatron_tempo.data.sets import QuestionKeys, prompt_streams
from megatron_tempo.data.tokenizer import load_tokenizer
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.training.jobs import train
from megatron_tempo.training.setup import build_verifiers
from megatron_tempo.training.trainer import Trainer
from tests.support.dumps import rollouts
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

ITERATIONS = 6


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def config_for(project: Path, run: Path, max_staleness: int, *, partial: bool = False) -> Config:
    """Six iterations of TEMPO, the first of which is the critic's warm-up, without evaluations."""
    config = config_of(project, run)
    config.stage2.iterations, config.stage2.critic.warmup_iterations = ITERATIONS, 1
    config.stage2.labelled_prompts, config.stage2.unlabelled_prompts = 2, 3
    config.stage2.responses_per_prompt = 2
    config.rollout.max_staleness, config.rollout.partial_rollouts = max_staleness, partial
    config.stage2.actor.correction = CorrectionConfig(CorrectionLevel.token, high=2.0)
    config.rollout.dump = True
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    config.checkpoint.every, config.checkpoint.export_hf = 0, False
    return config


def prompts(run: Path) -> list[list[str]]:
    return [[line["prompt_id"] for line in lines] for lines in rollouts(run)]


def generated(run: Path) -> list[list[tuple[Any, ...]]]:
    """What the engine gave, without log-probabilities, which depend on how rows are batched."""
    return [
        [(line["prompt_id"], line["response_tokens"], line["versions"], line["stopped"]) for line in lines]
        for lines in rollouts(run)
    ]


def staleness(run: Path) -> list[int]:
    return [int(line["engine/staleness_max"]) for line in read_metrics(run)]


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_groups_are_generated_ahead_with_the_weights_of_then(project: Path, tmp_path: Path, max_staleness: int) -> None:
    run = tmp_path / "run"
    run_ranks(train, 2, tmp_path / "ranks", config_for(project, run, max_staleness))
    assert staleness(run) == [min(step, max_staleness) for step in range(ITERATIONS)]
    for step, lines in enumerate(rollouts(run)):
        assert {version for line in lines for version, _ in line["versions"]} == {max(0, step - max_staleness)}
    assert prompts(run) == expected(project, tmp_path)


def test_unfinished_responses_go_on_with_newer_weights(project: Path, tmp_path: Path) -> None:
    """On one rank and on two."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run, ranks in ((one, 1), (two, 2)):
        config = config_for(project, run, 2, partial=True)
        config.rollout.temperature = 3.0  # lengths from 1 to 18
        run_ranks(train, ranks, tmp_path / "ranks", config)
    assert prompts(one) == prompts(two)
    assert generated(one)[:2] == generated(two)[:2], "until the ranks' sums round the actor's update differently"
    lines = [line for of in rollouts(one) for line in of]
    assert max(staleness(one)) <= 2
    mixed = [line for line in lines if len(line["versions"]) > 1]
    assert mixed, "some responses have tokens of several versions"
    for line in lines:
        assert sum(count for _, count in line["versions"]) == len(line["response_tokens"]) == len(line["logprobs"])
        assert all(earlier[0] < later[0] for earlier, later in pairwise(line["versions"]))
    records = list(read_metrics(one))
    assert all(record["buffer/unfinished"] > 0 for record in records[:2])
    assert records[-1]["buffer/unfinished"] == records[-1]["buffer/ready"] == 0
    used = Counter(line["prompt_id"] for line in lines)
    assert sum(used.values()) == 2 * (2 * ITERATIONS + 3 * (ITERATIONS - 1))


def killed(config: Config, iteration: int) -> None:
    """The run whose process dies in an iteration, when its rollouts are there and its last checkpoint is on disk."""
    rollouts_of = Trainer.rollouts

    def dying(self: Trainer, stage_name: str, stage: Any, number: int) -> Any:
        rollouts = rollouts_of(self, stage_name, stage, number)
        if number == iteration:
            self.state.wait_for_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)
        return rollouts

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "rollouts", dying)
        train(config)


@pytest.mark.parametrize("partial", [False, True])
def test_a_run_that_is_killed_with_a_full_buffer_loses_no_prompt(project: Path, tmp_path: Path, partial: bool) -> None:
    run = tmp_path / "run"
    config = config_for(project, run, 2, partial=partial)
    config.checkpoint.every = 2
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(killed, 1, tmp_path / "ranks", config, 3)
    state = json.loads((run / "checkpoints/step_00000002/run.json").read_text())
    ahead = state["asked_ahead"]["groups"]
    assert (len(ahead["labelled"]["drawn"]), len(ahead["unlabelled"]["drawn"])) == (4, 6)
    before = prompts(run)[:2]
    run_ranks(train, 1, tmp_path / "ranks", config)
    after = prompts(run)
    assert after[:2] == before
    assert max(staleness(run)) <= 2
    # The prompts of a run that is not killed, in another order if the oldest complete groups go first.
    whole = expected(project, tmp_path)
    assert len(after) == len(whole) == ITERATIONS
    if partial:
        assert Counter(name for of in after for name in of) == Counter(name for of in whole for name in of)
    else:
        assert after == whole


def expected(project: Path, tmp_path: Path) -> list[list[str]]:
    """The prompts of each iteration in the order in which the streams give them, with two responses each."""
    config = config_for(project, tmp_path / "plain", 0)
    tokenizer = load_tokenizer(Path(config.model.path))
    with build_verifiers(config) as verifiers:
        labelled, unlabelled = prompt_streams(config, tokenizer, verifiers, QuestionKeys.read(config, warn=False))
    assert labelled is not None
    assert unlabelled is not None
    drawn = []
    for iteration in range(ITERATIONS):
        of = [*labelled.take(2), *(unlabelled.take(3) if iteration else [])]
        drawn.append([prompt.id for prompt in of for _ in range(2)])
    return drawn
