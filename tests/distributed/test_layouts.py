"""One whole TEMPO iteration gives the same models under every layout and token budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tempo.config.choices import Recompute
from megatron_tempo.config.schema import Config, CriticLayoutConfig
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.training.jobs import train
from tests.support.group_reads import refuse_group_reads
from tests.support.matrix import matrix
from tests.support.project import RANDOM, config_of, from_nothing, write_project
from tests.support.ranks import run_ranks
from tests.support.weights import tensors

# name: processes, and the layout; 300 packed tokens of a micro-batch where it says nothing
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "small-budget": (1, {"micro_batch_tokens": 60}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sequence": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2-pp2-sequence-small-budget": (4, {"tensor": 2, "pipeline": 2, "sequence": True, "micro_batch_tokens": 60}),
    "dp2-pp2": (4, {"pipeline": 2, "ddp_bucket_size": 1}),  # a bucket for each parameter
    "dp4": (4, {}),
    "dp2-tp2-critic-dp4": (4, {"tensor": 2, "critic": CriticLayoutConfig(tensor=1)}),
    "critic-pp2-actor-tp2": (2, {"tensor": 2, "critic": CriticLayoutConfig(tensor=1, pipeline=2)}),
    "critic-tp2-cp2-actor-pp2-dp2-offload": (
        4,
        {
            "pipeline": 2,
            "critic": CriticLayoutConfig(tensor=2, pipeline=1, context=2, sequence=True),
            "offload": True,
            "ddp_bucket_size": 300,
        },
    ),
    "critic-dp2-actor-cp2-offload": (2, {"context": 2, "critic": CriticLayoutConfig(context=1), "offload": True}),
    "cp2-dp2-small-budget": (
        4,
        {"context": 2, "micro_batch_tokens": 60, "recompute": Recompute.layers, "ddp_bucket_size": 1},
    ),
    "dp2-no-overlap": (2, {"overlap_grad_reduce": False, "overlap_param_gather": False}),
}


# Of models with four layers.
UNEVEN: dict[str, tuple[int, dict[str, Any]]] = {
    "pp3": (3, {"pipeline": 3}),  # 1, 2, 1
    "pp2-first-3-critic-first-1": (
        2,
        {
            "pipeline": 2,
            "num_layers_in_first_pipeline_stage": 3,
            "critic": CriticLayoutConfig(num_layers_in_first_pipeline_stage=1),
        },
    ),
    # One micro-batch a step, and one of padding, because each stage needs one.
    "pp2-virtual-2-large-budget": (2, {"pipeline": 2, "virtual_pipeline": 2, "micro_batch_tokens": 3000}),
    "dp2-pp2-virtual-2-critic-virtual-1-offload": (
        4,
        {
            "pipeline": 2,
            "virtual_pipeline": 2,
            "critic": CriticLayoutConfig(virtual_pipeline=1),
            "offload": True,
            "micro_batch_tokens": 60,
            "ddp_bucket_size": 1000,  # several buckets in each chunk
        },
    ),
    "tp2-pp2-virtual-2-sequence-small-budget": (
        4,
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True, "micro_batch_tokens": 60},
    ),
    "tp2-pp2-last-3-sequence": (
        4,
        {"tensor": 2, "pipeline": 2, "sequence": True, "num_layers_in_last_pipeline_stage": 3},
    ),
}


# Of a mixture of experts.
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2-small-budget": (2, {"expert": 2, "micro_batch_tokens": 60}),
    "tp2-ep4-sequence-critic-tp1-ep2": (
        4,
        {
            "tensor": 2,
            "sequence": True,
            "expert": 4,
            "expert_tensor": 1,
            "critic": CriticLayoutConfig(tensor=1, sequence=False, expert=2),
        },
    ),
    "ep2-pp2-offload": (4, {"pipeline": 2, "expert": 2, "offload": True, "ddp_bucket_size": 1000}),
}


KINDS = ("untied", *RANDOM)
# What an iteration's line says that must not depend on the layout
FIGURES = ("actor/", "critic/", "advantage/", "reward/", "engine/", "response_length/", "truncated")


def project_config(project: Path, run: Path) -> Config:
    config = config_of(project, run)
    return from_nothing(config) if project.name in RANDOM else config


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("projects")
    return {kind: write_project(out / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def one_process(projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs that the others are held against; their rollouts are the others' too."""
    out = tmp_path_factory.mktemp("one")
    for kind, project in projects.items():
        config = project_config(project, out / kind / "run")
        config.rollout.dump = True
        run_ranks(train, 1, out / kind / "ranks", config)
    return {kind: out / kind / "run" for kind in projects}


def weights(run: Path, model: str) -> dict[str, torch.Tensor]:
    return {name: tensor for bucket in tensors(run / "hf_step_00000001" / model) for name, tensor in bucket}


def train_by_own_groups(config: Config) -> None:
    """A run in which Megatron and this project take all groups from the layout of their model."""
    refuse_group_reads()
    train(config)


def in_layout(config: Config, name: str) -> int:
    world, layout = (LAYOUTS | UNEVEN | EXPERTS)[name]
    config.parallel = replace(config.parallel, **{"micro_batch_tokens": 300, **layout})
    return world


CASES = [("untied", name) for name in LAYOUTS] + [("tied", "tp2"), ("tied", "pp2"), ("tied", "dp2-pp2")]
CASES += [("tied", "critic-tp2-cp2-actor-pp2-dp2-offload")]
CASES += [("tied", "pp3"), ("tied", "pp2-first-3-critic-first-1"), ("olmo3", "tp2-pp2-last-3-sequence")]
CASES += [
    ("tied", "pp2-virtual-2-large-budget"),
    ("tied", "dp2-pp2-virtual-2-critic-virtual-1-offload"),
    ("olmo3", "tp2-pp2-virtual-2-sequence-small-budget"),
]
CASES += [("mixture", name) for name in ("tp2-sequence", "dp2-pp2", *EXPERTS)]
CASES += [("olmo3", "tp2"), ("olmo3", "tp2-sequence"), ("olmo3", "tp2-pp2-sequence-small-budget")]


FEW = [("untied", name) for name in ("small-budget", "dp2", "tp2-pp2-sequence-small-budget", "cp2-dp2-small-budget")]
FEW += [("untied", name) for name in ("dp2-tp2-critic-dp4", "dp2-no-overlap", "critic-pp2-actor-tp2")]
FEW += [("tied", name) for name in ("pp3", "pp2-virtual-2-large-budget", "critic-tp2-cp2-actor-pp2-dp2-offload")]
FEW += [("tied", "dp2-pp2-virtual-2-critic-virtual-1-offload"), ("olmo3", "tp2-pp2-last-3-sequence")]
FEW += [("mixture", name) for name in ("tp2-ep4-sequence-critic-tp1-ep2", "ep2-pp2-offload")]


@pytest.mark.parametrize(("kind", "name"), matrix(CASES, FEW))
def test_an_iteration_does_not_depend_on_the_layout(
    projects: dict[str, Path], one_process: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    project, reference = projects[kind], one_process[kind]
    config = project_config(project, tmp_path / "run")
    config.rollout.replay = str(reference / "rollouts")
    world = in_layout(config, name)
    run_ranks(train_by_own_groups, world, tmp_path / "ranks", config)

    before = {name: tensor for bucket in tensors(project / "model") for name, tensor in bucket}
    for model in ("actor", "critic"):
        expected, actual = weights(reference, model), weights(tmp_path / "run", model)
        assert expected.keys() == actual.keys()
        for key in expected:
            assert (actual[key] - expected[key]).norm() <= 1e-5 * expected[key].norm(), f"{model} {key}"
            if key in before and ".experts." not in key:  # no token of a loss may have chosen an expert
                assert not torch.equal(actual[key], before[key]), f"{model} {key} was not trained"
    (one,), (other,) = read_metrics(reference), read_metrics(tmp_path / "run")
    for norm in ("actor/grad_norm", "critic/grad_norm"):
        assert one[norm] > 0
        assert other[norm] == pytest.approx(one[norm], rel=1e-5)
    # By the same weights, log-probabilities differ from the engine's by rounding alone, in each layout another.
    assert max(run[f"engine/logprob_gap_{which}"] for run in (one, other) for which in ("mean", "max")) < 1e-4
    assert max(abs(run[f"engine/kl_{which}"]) for run in (one, other) for which in ("k1", "k3")) < 1e-4
    rounding = ("engine/logprob_gap_", "engine/kl_")
    figures = [name for name in one if name.startswith(FIGURES) and not name.startswith(rounding)]
    assert len(figures) > 20
    assert {name: other[name] for name in figures} == pytest.approx(
        {name: one[name] for name in figures}, rel=1e-4, abs=1e-6
    )
    assert other["padding"] < 0.05
    assert {"memory_gb/critic", "memory_gb/values", "memory_gb/logprobs", "memory_gb/actor"} <= other.keys()
