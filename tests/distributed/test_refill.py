"""Runs that throw away prompt groups whose responses agree, with the embedded engine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel
from megatron_tempo.config.method_settings import GrpoSettings, TtrlSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.data.sets import QuestionKeys, prompt_streams
from megatron_tempo.data.tokenizer import load_tokenizer
from megatron_tempo.observability.records import read, read_metrics
from megatron_tempo.training.jobs import train
from megatron_tempo.training.setup import build_verifiers
from megatron_tempo.training.trainer import Trainer
from tests.support.dumps import rollouts
from tests.support.project import ROOT, config_of, write_project
from tests.support.ranks import run_ranks

ITERATIONS, PROMPTS, SAMPLES, LIMIT = 4, 3, 3, 6


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many questions as a run may ask, so that none comes twice."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    for name in ("labelled", "unlabelled"):
        lines = (ROOT / f"examples/quickstart/{name}.jsonl").read_text().splitlines()[: ITERATIONS * LIMIT + 12]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config_for(project: Path, run: Path, *, classes: bool = False, max_staleness: int = 0) -> Config:
    """Four iterations of GRPO or TTRL, three prompts each, without evaluations."""
    config = config_of(project, run)
    stage = config.stage2
    stage.settings = TtrlSettings() if classes else GrpoSettings()
    stage.iterations, stage.responses_per_prompt, stage.refill_limit = ITERATIONS, SAMPLES, LIMIT
    stage.labelled_prompts, stage.unlabelled_prompts = (0, PROMPTS) if classes else (PROMPTS, 0)
    stage.actor.mini_batch_prompts = PROMPTS
    if classes:
        assert config.data.unlabelled is not None
        config.data.unlabelled.verifier = Verifier.countdown
    if max_staleness:
        config.rollout.max_staleness = max_staleness
        stage.actor.correction = CorrectionConfig(CorrectionLevel.token, high=2.0)
    config.rollout.dump = True
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    config.checkpoint.every, config.checkpoint.export_hf = 2, False
    return config


def groups(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [lines[i : i + SAMPLES] for i in range(0, len(lines), SAMPLES)]


def drawn(project: Path, tmp_path: Path, count: int) -> list[str]:
    """The first prompts of the labelled stream."""
    config = config_for(project, tmp_path / "plain")
    tokenizer = load_tokenizer(Path(config.model.path))
    with build_verifiers(config) as verifiers:
        labelled, _ = prompt_streams(config, tokenizer, verifiers, QuestionKeys.read(config, warn=False))
    assert labelled is not None
    return [prompt.id for _ in range(count) for prompt in labelled.take(1)]


def assert_refilled(run: Path, ids: list[str]) -> None:
    """What each iteration is trained on, against the order in which the stream gives its prompts, without gaps."""
    at, dropped, reached = 0, 0, 0
    for lines, record in zip(rollouts(run), read_metrics(run), strict=True):
        verdicts = [{line["correct"] for line in group} for group in groups(lines)]
        asked = int(record["refill/asked"])
        assert len(verdicts) == PROMPTS <= asked <= LIMIT
        assert asked == PROMPTS + record["refill/dropped"]
        agreeing = sum(len(each) == 1 for each in verdicts)
        assert record["refill/agreeing"] == agreeing
        assert record["refill/limit_reached"] == float(agreeing > 0)
        assert not agreeing or asked == LIMIT
        names = [group[0]["prompt_id"] for group in groups(lines)]
        assert [name for name in ids[at : at + asked] if name in names] == names
        trained = [line["correct"] for line in lines]
        assert record["reward/labelled"] == pytest.approx(sum(trained) / len(trained))
        dropped, reached = dropped + int(record["refill/dropped"]), reached + bool(agreeing)
        at += asked
    assert dropped > 0, "some groups agree"
    assert reached < ITERATIONS, "not all of them are at the limit"
    seen = {record["id"] for record in read(run / "seen.jsonl")}
    assert seen == set(ids[:at]), "also those that were thrown away"


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(train, 1, folder / "ranks", config_for(project, folder / "run"))
    return folder / "run"


def test_groups_that_agree_give_way_to_the_next_prompts(project: Path, whole: Path, tmp_path: Path) -> None:
    """On one rank and on two."""
    run = tmp_path / "two"
    run_ranks(train, 2, tmp_path / "ranks", config_for(project, run))
    ids = drawn(project, tmp_path, ITERATIONS * LIMIT)
    assert_refilled(whole, ids)
    assert_refilled(run, ids)
    first, second = rollouts(whole)[0], rollouts(run)[0]
    assert [(line["prompt_id"], line["response_tokens"]) for line in first] == [
        (line["prompt_id"], line["response_tokens"]) for line in second
    ]


def killed(config: Config) -> None:
    """The run whose process dies in the third iteration."""
    rollouts_of = Trainer.rollouts

    def dying(self: Trainer, stage_name: str, stage: Any, number: int) -> Any:
        rollouts = rollouts_of(self, stage_name, stage, number)
        if number == 2:
            self.state.wait_for_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)
        return rollouts

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "rollouts", dying)
        train(config)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_that_is_killed_draws_the_same_prompts_again(
    project: Path, whole: Path, tmp_path: Path, max_staleness: int
) -> None:
    run = tmp_path / "run"
    config = config_for(project, run, max_staleness=max_staleness)
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(killed, 1, tmp_path / "ranks", config)
    run_ranks(train, 1, tmp_path / "ranks", config)
    if max_staleness:  # asked again, by the current weights: other groups may agree
        ids = drawn(project, tmp_path, ITERATIONS * LIMIT)
        asked = sum(int(record["refill/asked"]) for record in read_metrics(run))
        assert {record["id"] for record in read(run / "seen.jsonl")} == set(ids[:asked])
        assert max(record["engine/staleness_max"] for record in read_metrics(run)) <= max_staleness
        return
    assert rollouts(run) == rollouts(whole)
    assert_refilled(run, drawn(project, tmp_path, ITERATIONS * LIMIT))


def test_answers_are_compared_where_there_are_no_verdicts(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_for(project, run, classes=True)
    config.rollout.temperature = 0.5  # so that answers agree
    run_ranks(train, 1, tmp_path / "ranks", config)
    records = list(read_metrics(run))
    assert all(PROMPTS <= record["refill/asked"] <= LIMIT for record in records)
    assert sum(record["refill/dropped"] for record in records) > 0
    for record, lines in zip(records, rollouts(run), strict=True):
        assert len(groups(lines)) == PROMPTS
        assert "reward/labelled_asked" not in record
