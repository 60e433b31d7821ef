"""A run goes on from its checkpoint in another layout, as if it had never changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tempo.config.schema import Config
from megatron_tempo.records import read_metrics
from megatron_tempo.train import train
from megatron_tempo.weights.folder import tensors
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

ITERATIONS = 3  # the first of them the critic's warm-up: the actor's optimizer has then no state yet
# name: (tensor, pipeline, processes) of the iterations until the checkpoint, then of the rest
CHANGES = {
    "tp2-pp2 to one process": ((2, 2, 4), (1, 1, 1), 2),
    "one process to tp2-pp2": ((1, 1, 1), (2, 2, 4), 2),
    "dp2 to tp2, in the warm-up": ((1, 1, 2), (2, 1, 2), 1),
}


def run_config(project: Path, run: Path, iterations: int) -> Config:
    config = config_of(project, run)
    config.stage2.iterations = iterations
    config.stage2.critic.warmup_iterations = 1
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    return config


def launch(config: Config, layout: tuple[int, int, int], out: Path) -> None:
    config.parallel.tensor, config.parallel.pipeline, world = layout
    run_ranks(train, world, out, config)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def unchanged(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unchanged")
    config = run_config(project, out / "run", ITERATIONS)
    config.rollout.dump = True
    launch(config, (1, 1, 1), out / "ranks")
    return out / "run"


@pytest.mark.parametrize("name", CHANGES)
def test_resumed_in_another_layout(project: Path, unchanged: Path, tmp_path: Path, name: str) -> None:
    first, then, until = CHANGES[name]
    run = tmp_path / "run"
    for layout, iterations in ((first, until), (then, ITERATIONS)):
        config = run_config(project, run, iterations)
        config.rollout.replay = str(unchanged / "rollouts")
        launch(config, layout, tmp_path / f"ranks{iterations}")
    assert (
        f"resumed from {run / 'checkpoints' / f'step_{until:08d}'}"
        in (tmp_path / f"ranks{ITERATIONS}/rank0.log").read_text()
    )
    folder = f"hf_step_{ITERATIONS:08d}"
    for model in ("actor", "critic"):
        expected, found = (
            {name: tensor for bucket in tensors(path / folder / model) for name, tensor in bucket}
            for path in (unchanged, run)
        )
        for key in expected:
            difference = torch.linalg.vector_norm(found[key] - expected[key])
            assert difference <= 1e-4 * torch.linalg.vector_norm(expected[key]), f"{model} {key}"
    for one, other in zip(read_metrics(unchanged), read_metrics(run), strict=True):
        assert one["critic/grad_norm"] == pytest.approx(other["critic/grad_norm"], rel=1e-3)
