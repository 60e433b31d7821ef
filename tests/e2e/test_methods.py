"""Whole runs of the methods without a critic: two iterations each, resumed in between, without a trace of a critic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.method_settings import NEEDS, Method, ScrlSettings, TtrlSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.observability.records import read_evaluations, read_metrics, read_samples
from megatron_tempo.training.jobs import train
from tests.support.matrix import matrix
from tests.support.project import config_of, refusal, stopping_at, write_project
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def config_for(project: Path, out: Path, method: Method, iterations: int = 2) -> Config:
    config = config_of(project, out)
    stage = config.stage2
    stage.method, stage.iterations = method, iterations
    if method is Method.grpo:
        stage.unlabelled_prompts = 0
    else:
        stage.labelled_prompts = 0
        assert config.data.unlabelled is not None
        config.data.unlabelled = replace(config.data.unlabelled, verifier=Verifier.countdown)
    if method is Method.ttrl:
        stage.settings = TtrlSettings(vote_responses=6)
    if method is Method.scrl:
        stage.settings = ScrlSettings(vote_responses=6, negative_share=0.2)
    config.checkpoint.every = 1
    config.metrics.report = True
    config.rollout.dump = True
    config.evaluation.votes = True
    return config


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "hf_step_00000002/actor/model-00001.safetensors")


# What a method's iteration records of its rewards, and the range of it
REWARDS = {
    Method.ttrl: ("reward/unlabelled", 1.0),
    Method.ttrl_guard: ("reward/unlabelled", 1.0),
    Method.empo: ("reward/unlabelled", 1.0),
    Method.scrl: ("reward/unlabelled", 1.0),
    Method.grpo: ("reward/labelled", 1.0),
    Method.intuitor: ("reward/self_certainty", 20.0),
    Method.entropy_min: ("actor/loss", 10.0),
}


@pytest.mark.parametrize("method", matrix(REWARDS, [Method.grpo, Method.ttrl_guard, Method.intuitor]))
def test_a_run_without_a_critic(project: Path, tmp_path: Path, method: Method) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    run_ranks(train, 1, tmp_path / "whole", config_for(project, out, method))
    lines = read_metrics(out)
    assert [(line["method"], line["step"]) for line in lines] == [(method.name, 1), (method.name, 2)]
    assert all(line["actor/grad_norm"] > 0 for line in lines)
    reward, most = REWARDS[method]
    assert all(0 < line[reward] < most for line in lines)
    if method is Method.entropy_min:
        assert all(line["actor/loss"] == pytest.approx(line["actor/entropy"]) for line in lines)
    assert not any(name.startswith("critic/") or name == "time/values" for line in lines for name in line)
    # Nothing of a critic: not in evaluations and samples, nor in checkpoints and exports.
    evaluations = read_evaluations(out)
    assert [line["point"] for line in evaluations] == ["before", "after"]
    assert all(line["calibration"] is None for line in evaluations)
    assert all(0 <= line["vote"]["label_accuracy"] <= line["vote"]["reward_accuracy"] <= 1 for line in evaluations)
    if NEEDS[method].classes:  # the votes so far, for the Flip Rate
        votes = json.loads((out / "checkpoints/step_00000002/run.json").read_text())["votes"]
        seen = [json.loads(line)["id"] for line in (out / "seen.jsonl").read_text().splitlines()]
        assert set(votes) == set(seen)
        assert all(len(one["shares"]) == 2 and len(one["flips"]) == 1 for one in votes.values())
        flips = [one["flips"][0] for one in votes.values()]
        assert lines[1]["vote/flip_rate"] == sum(flips) / 8
        assert (lines[1]["vote/revisited"], "vote/flip_rate" in lines[0]) == (8.0, False)
    assert all(sample["values"] is None for sample in read_samples(out))
    assert sorted(path.name for path in (out / "checkpoints/step_00000002").iterdir()) == [
        "MANIFEST.json", "actor", "run.json"
    ]  # fmt: skip
    assert [path.name for path in (out / "hf_step_00000002").iterdir()] == ["actor"]
    assert (out / "report.html").stat().st_size > 0
    start = load_file(project / "model/model.safetensors")
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights(out).items())
    # Stopped behind its first iteration and started again it ends as it did, to the bit.
    config = config_for(project, again, method)
    run_ranks(stopping_at, 1, tmp_path / "first", 1, config)
    assert len(read_metrics(again)) == 1
    run_ranks(train, 1, tmp_path / "second", config)
    ended = weights(again)
    assert all(torch.equal(tensor, ended[name]) for name, tensor in weights(out).items())
    rates = [[line.get("vote/flip_rate") for line in read_metrics(folder)] for folder in (out, again)]
    assert rates[0] == rates[1], "the votes are in the checkpoint"


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "rollouts/stage2-000001.jsonl").read_text().splitlines()]


def test_ttrl_learns_on_two_ranks_as_on_one_and_from_a_record(project: Path, tmp_path: Path) -> None:
    """And its record has a class for every response, of six a prompt that vote."""
    one, two, replayed = (tmp_path / name for name in ("one", "two", "replayed"))
    run_ranks(train, 1, tmp_path / "ranks1", config_for(project, one, Method.ttrl, 1))
    run_ranks(train, 2, tmp_path / "ranks2", config_for(project, two, Method.ttrl, 1))
    metrics = records(one)
    assert len(metrics) == 8 * 6
    assert {-1, 0, 1} <= {line["answer_class"] for line in metrics}
    assert [line["answer_class"] for line in metrics] == [line["answer_class"] for line in records(two)]
    votes = [json.loads((out / "checkpoints/step_00000001/run.json").read_text())["votes"] for out in (one, two)]
    assert votes[0] == votes[1]
    assert any(of["answer"] for of in votes[0].values())
    config = config_for(project, replayed, Method.ttrl, 1)
    config.rollout.dump, config.rollout.replay = False, str(one / "rollouts")
    run_ranks(train, 1, tmp_path / "ranks3", config)
    names = ("actor/loss", "actor/grad_norm", "vote/agreement", "vote/answered", "reward/unlabelled")
    (first,), (second,), (third,) = (read_metrics(out) for out in (one, two, replayed))
    for name in names:
        assert second[name] == pytest.approx(first[name], rel=1e-3), name
        assert third[name] == first[name], name


def test_a_run_that_wants_a_critic_later_is_refused(project: Path, tmp_path: Path) -> None:
    config = config_for(project, tmp_path / "run", Method.ppo, 0)
    config.stage1.method, config.stage1.iterations = Method.grpo, 1
    run_ranks(train, 1, tmp_path / "first", config)
    config.stage2.iterations = 2
    (output,) = run_ranks(refusal, 1, tmp_path / "second", config)
    assert output is not None
    assert "step_00000001 has no critic" in output


def test_after_a_stage_with_a_critic_it_stays_as_it_was(project: Path, tmp_path: Path) -> None:
    config = config_for(project, tmp_path / "run", Method.empo, 1)
    config.stage1.iterations = 1
    run_ranks(train, 1, tmp_path / "ranks", config)
    first, second = read_metrics(tmp_path / "run")
    assert first["critic/grad_norm"] > 0
    assert "critic/grad_norm" not in second
    steps = json.loads((tmp_path / "run/checkpoints/step_00000002/run.json").read_text())["optimizer_steps"]
    assert steps == {"actor": 4, "critic": 2}
    assert all(line["calibration"] for line in read_evaluations(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run/hf_step_00000002").iterdir()) == ["actor", "critic"]
