"""A run goes on from its checkpoint in another layout, as if it had never changed."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from megatron_tempo.config.choices import Layers
from megatron_tempo.config.schema import Config
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.training.jobs import train
from tests.support.fork_server import FORK_SERVER, TE_FORK_SERVER, ForkServer
from tests.support.matrix import matrix
from tests.support.project import RANDOM, config_of, from_nothing, write_project
from tests.support.ranks import run_ranks
from tests.support.weights import tensors

ITERATIONS = 3  # the first of them the critic's warm-up: the actor's optimizer has then no state yet
ONE, TP2 = (1, 1, 1, 1), (2, 1, 1, 2)
# name: (tensor, pipeline, context, processes, perhaps layers of the first stage, virtual stages) until the checkpoint,
# then of the rest
CHANGES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]] = {
    "tp2-pp2 to one process": ("untied", (2, 2, 1, 4), (1, 1, 1, 1), 2),
    "one process to tp2-pp2": ("untied", (1, 1, 1, 1), (2, 2, 1, 4), 2),
    "dp2 to tp2, in the warm-up": ("untied", (1, 1, 1, 2), (2, 1, 1, 2), 1),
    "cp2-pp2 to dp2": ("untied", (1, 2, 2, 4), (1, 1, 1, 2), 2),
    # Where the pipeline parts a tied embedding's two ends, it has a gradient bucket of its own.
    "tied, pp2 to pp2": ("tied", (1, 2, 1, 2), (1, 2, 1, 2), 2),
    "tied, stages of 1, 2 and 1 layers to 3 and 1": ("tied", (1, 3, 1, 3), (1, 2, 1, 2, 3), 2),
    "tied, virtual stages to stages of 3 and 1 layers": ("tied", (1, 2, 1, 2, 2, 2), (1, 2, 1, 2, 3), 2),
    "olmo3, one process to virtual stages": ("olmo3", (1, 1, 1, 1), (2, 2, 1, 4, 2, 2), 2),
    "tied, dp2-pp2 to one process": ("tied", (1, 2, 1, 4), (1, 1, 1, 1), 2),
    # Its norms over all heads are cut over the tensor ranks.
    "olmo3, tp2-pp2 to one process": ("olmo3", (2, 2, 1, 4), (1, 1, 1, 1), 2),
    "olmo3, one process to tp2": ("olmo3", (1, 1, 1, 1), (2, 1, 1, 2), 2),
}
FEW = [
    "tp2-pp2 to one process",
    "dp2 to tp2, in the warm-up",
    "cp2-pp2 to dp2",
    "tied, virtual stages to stages of 3 and 1 layers",
    "olmo3, one process to virtual stages",
]


def run_config(project: Path, run: Path, iterations: int) -> Config:
    config = config_of(project, run)
    if project.name in RANDOM:
        from_nothing(config)
    config.stage2.iterations = iterations
    config.stage2.critic.warmup_iterations = 1
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    return config


def launch(config: Config, layout: tuple[int, ...], out: Path, server: ForkServer = FORK_SERVER) -> None:
    """`server`: with Transformer Engine's stand-in, its layers and its optimizer are used."""
    config.parallel.tensor, config.parallel.pipeline, config.parallel.context, world, *more = layout
    config.parallel.num_layers_in_first_pipeline_stage = more[0] if more else None
    config.parallel.virtual_pipeline = more[1] if len(more) > 1 else 1
    config.model.layers = Layers.transformer_engine if server is TE_FORK_SERVER else Layers.local
    run_ranks(train, world, out, config, server=server)


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("projects")
    return {kind: write_project(out / kind, kind) for kind in ("untied", *RANDOM)}


@pytest.fixture(scope="module")
def unchanged(projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("unchanged")
    for kind, project in projects.items():
        config = run_config(project, out / kind / "run", ITERATIONS)
        config.rollout.dump = True
        launch(config, (1, 1, 1, 1), out / kind / "ranks")
    return {kind: out / kind / "run" for kind in projects}


def trained_alone(config: Config) -> list[str]:
    """The processes that a run with checkpoints has left behind."""
    train(config)
    return [" ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)]


def test_checkpoints_leave_no_process_behind(projects: dict[str, Path], tmp_path: Path) -> None:
    """A trainer that is killed could not end it."""
    config = run_config(projects["untied"], tmp_path / "run", 2)
    config.checkpoint.every = 1
    assert run_ranks(trained_alone, 1, tmp_path / "ranks", config)[0] == []


@pytest.mark.parametrize("name", matrix(CHANGES, FEW))
def test_resumed_in_another_layout(
    projects: dict[str, Path], unchanged: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind, first, then, until = CHANGES[name]
    run = tmp_path / "run"
    for layout, iterations in ((first, until), (then, ITERATIONS)):
        config = run_config(projects[kind], run, iterations)
        config.rollout.replay = str(unchanged[kind] / "rollouts")
        launch(config, layout, tmp_path / f"ranks{iterations}")
    assert_resumed(unchanged[kind], run, until, tmp_path)


# Who trains until the checkpoint, and who then: optimizers change with the layers.
HANDS = {
    "transformer engine": ("untied", (TP2, TE_FORK_SERVER), (ONE, TE_FORK_SERVER), 2),
    "transformer engine, in the warm-up": ("untied", (ONE, TE_FORK_SERVER), (ONE, TE_FORK_SERVER), 1),
    "local to transformer engine": ("olmo3", (ONE, FORK_SERVER), (TP2, TE_FORK_SERVER), 2),
    "transformer engine to local": ("untied", (TP2, TE_FORK_SERVER), (ONE, FORK_SERVER), 2),
}


@pytest.mark.parametrize("name", matrix(HANDS, ["transformer engine", "local to transformer engine"]))
def test_resumed_with_other_layers(
    projects: dict[str, Path], unchanged: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind, first, then, until = HANDS[name]
    run = tmp_path / "run"
    for (layout, server), iterations in ((first, until), (then, ITERATIONS)):
        config = run_config(projects[kind], run, iterations)
        config.rollout.replay = str(unchanged[kind] / "rollouts")
        launch(config, layout, tmp_path / f"ranks{iterations}", server)
        names = ("Transformer Engine 2.11.0", "Transformer Engine's FusedAdam")
        layers, optimizer = names if server is TE_FORK_SERVER else ("Megatron-Core and torch", "torch.optim.AdamW")
        log = (tmp_path / f"ranks{iterations}/rank0.log").read_text()
        assert f"device: CPU; layers: {layers}, fp32; fused: " in log
        assert f"; optimizer: {optimizer}\n" in log
    assert_resumed(unchanged[kind], run, until, tmp_path)


def assert_resumed(unchanged: Path, run: Path, until: int, tmp_path: Path) -> None:
    log = (tmp_path / f"ranks{ITERATIONS}/rank0.log").read_text()
    assert f"resumed from {run / 'checkpoints' / f'step_{until:08d}'}" in log
    folder = f"hf_step_{ITERATIONS:08d}"
    for model in ("actor", "critic"):
        expected, actual = (
            {name: tensor for bucket in tensors(path / folder / model) for name, tensor in bucket}
            for path in (unchanged, run)
        )
        for key in expected:
            difference = torch.linalg.vector_norm(actual[key] - expected[key])
            assert difference <= 1e-4 * torch.linalg.vector_norm(expected[key]), f"{model} {key}"
    for one, other in zip(read_metrics(unchanged), read_metrics(run), strict=True):
        for norm in [name for name in one if name.endswith("grad_norm")]:
            assert other[norm] == pytest.approx(one[norm], rel=1e-3)
