"""The reference of the KL term in a run of both stages: `model.path`, or the policy with which stage 2 starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.schema import Config
from megatron_tempo.config.updates import KlReference
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.training.jobs import train
from tests.support.project import config_of, refusal, stopping_at, write_project
from tests.support.ranks import run_ranks

WEIGHTS = "actor/model-00001.safetensors"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def config_for(project: Path, out: Path, reference: KlReference = KlReference.start) -> Config:
    """Two iterations of GRPO in each stage, with one optimizer step each."""
    config = config_of(project, out)
    for stage in config.stages().values():
        stage.method, stage.iterations, stage.unlabelled_prompts = Method.grpo, 2, 0
        stage.actor.mini_batch_prompts = 8
    config.stage2.actor.kl_coef, config.stage2.actor.kl_reference = 0.5, reference
    config.checkpoint.every = 1
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    return config


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def kls(out: Path) -> list[float]:
    return [line["actor/reference_kl"] for line in read_metrics(out)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_two_is_held_to_the_policy_with_which_it_starts(project: Path, tmp_path: Path, ranks: int) -> None:
    """A model has no divergence from itself. The policy that is kept is what a run of stage 1 alone exports."""
    whole, first = config_for(project, tmp_path / "whole"), config_for(project, tmp_path / "first")
    first.stage2.iterations = 0
    for config in (whole, first):
        config.parallel.tensor = ranks
        run_ranks(train, ranks, tmp_path / f"ranks_{Path(config.run.dir).name}", config)
    _, _, third, fourth = kls(tmp_path / "whole")
    assert third == pytest.approx(0, abs=1e-9)
    assert fourth > 1e-6
    assert same(tmp_path / "whole/reference" / WEIGHTS, tmp_path / "first/hf_step_00000002" / WEIGHTS)
    assert not (tmp_path / "first/reference").exists(), "there is no stage 2"


def test_the_default_is_model_path(project: Path, tmp_path: Path) -> None:
    run_ranks(train, 1, tmp_path / "ranks", config_for(project, tmp_path / "run", KlReference.model))
    assert kls(tmp_path / "run")[2] > 1e-6
    assert not (tmp_path / "run/reference").exists()


def test_without_stage_one_both_are_the_same(project: Path, tmp_path: Path) -> None:
    for reference in KlReference:
        config = config_for(project, tmp_path / reference.name, reference)
        config.stage1.iterations = 0
        run_ranks(train, 1, tmp_path / f"ranks_{reference.name}", config)
    assert kls(tmp_path / "start") == kls(tmp_path / "model")
    assert not (tmp_path / "start/reference").exists()


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_has_the_same_reference(project: Path, tmp_path: Path, step: int) -> None:
    """Stopped when stage 2 has begun, before or after its first iteration, it ends as a run that is not stopped."""
    run_ranks(train, 1, tmp_path / "ranks", config_for(project, tmp_path / "whole"))
    stopped = config_for(project, tmp_path / "stopped")
    run_ranks(stopping_at, 1, tmp_path / "first", step, stopped)
    kept = tmp_path / "stopped/reference" / WEIGHTS
    assert same(kept, tmp_path / "whole/reference" / WEIGHTS)
    if step == 2:
        kept.write_bytes(b"left by an earlier start, of other weights")
    run_ranks(train, 1, tmp_path / "second", stopped)
    assert same(kept, tmp_path / "whole/reference" / WEIGHTS)
    assert same(tmp_path / "stopped/hf_step_00000004" / WEIGHTS, tmp_path / "whole/hf_step_00000004" / WEIGHTS)
    assert kls(tmp_path / "stopped") == kls(tmp_path / "whole")


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_without_its_reference_is_not_resumed(project: Path, tmp_path: Path, gone: bool) -> None:
    config = config_for(project, tmp_path / "run")
    run_ranks(stopping_at, 1, tmp_path / "first", 3, config)
    kept = tmp_path / "run/reference"
    if gone:
        kept.rename(tmp_path / "elsewhere")
    else:
        kept.joinpath(WEIGHTS).write_bytes((project / "model/model.safetensors").read_bytes())
    (message,) = run_ranks(refusal, 1, tmp_path / "second", config)
    assert message is not None
    assert "run.dir/reference: weights changed (or are gone; the KL term holds the policy to them)" in message
    assert "bring the old ones back, or start a new run with another run.dir" in message
    if gone:
        (tmp_path / "elsewhere").rename(kept)
        run_ranks(train, 1, tmp_path / "third", config)
        assert len(kls(tmp_path / "run")) == 4
