"""Transformer Engine's layers and FP8 recipes on a GPU: what they compute, how they train, how long a step takes.

make test-gpu ARGS='tests/gpu/test_fp8.py -s'     # -s shows the times
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.choices import Layers, Precision
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.rules.precision import check_machine
from megatron_tempo.config.schema import Config
from megatron_tempo.config.updates import CriticUpdateConfig, OptimizerConfig
from megatron_tempo.models.machine import machine_of
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

STEPS, WARM = 50, 10  # steps of training; those of them that are not timed
ROWS = 1024  # 15K tokens or so, in four micro-batches
# In every step a recipe's loss is as near to bf16's as this share of the first loss, which is the same for all. With
# e4m3 and e5m2 emulated on a CPU, a scale a tensor, the largest distance was 0.013.
DISTANCE = 0.05
# bf16's logits may be as far from fp32's as those of our own layers, and half as much again.
SLACK = 1.5


def config_of(model: Path, precision: Precision, layers: Layers) -> Config:
    config = Config()
    config.model.path, config.model.layers = str(model), layers
    config.run.precision, config.parallel.micro_batch_tokens = precision, 4096
    return config


def refused(precision: Precision, layers: Layers) -> str:
    """Why this machine cannot; nothing if it can."""
    machine = machine_of(torch.device("cuda", 0))
    return "; ".join(map(str, check_machine(config_of(Path(), precision, layers), machine)))


def training(model: Path, precision: Precision) -> tuple[list[float], float]:
    """The losses of a critic's steps on one batch, and the median seconds of a step."""
    batch = ragged_batch(ROWS)
    assert batch.correct is not None
    update = CriticUpdateConfig(OptimizerConfig(lr=1e-4))
    losses, seconds = [], []
    with open_context(config_of(model, precision, Layers.transformer_engine)) as context:
        critic = build_critic(context)
        for _ in range(STEPS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            losses.append(critic.update(batch, batch.correct, update, [torch.arange(ROWS)])["critic/loss"])
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return losses, median(seconds[WARM:])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder, layers=8, hidden=1024, head_dim=256, ffn=4096, std=0.02)


@pytest.fixture(scope="module")
def bf16(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float]:
    if wrong := refused(Precision.bf16, Layers.transformer_engine):
        pytest.skip(wrong)
    (result,) = run_ranks(training, 1, tmp_path_factory.mktemp("bf16"), model, Precision.bf16)
    return result


@pytest.mark.parametrize("precision", RECIPES, ids=lambda precision: precision.name)
def test_a_recipe_trains_as_bf16_does(
    model: Path,
    bf16: tuple[list[float], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: Precision,
) -> None:
    if wrong := refused(precision, Layers.transformer_engine):
        pytest.skip(wrong)
    ((losses, seconds),) = run_ranks(training, 1, tmp_path, model, precision)
    expected, without = bf16
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True)) / expected[0]
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}, {precision.name}: {seconds * 1e3:.1f} ms a step, bf16 "
            f"{without * 1e3:.1f} ms; last loss {losses[-1]:.4f}, bf16 {expected[-1]:.4f}; at most {apart:.1%} of the "
            f"first loss apart"
        )
    assert expected[-1] < 0.7 * expected[0], "bf16 learns"
    assert 0 < apart < DISTANCE, "no distance at all would be bf16"


def logprobs(model: Path, precision: Precision, layers: Layers) -> Tensor:
    with open_context(config_of(model, precision, layers)) as context:
        return build_actor(context).logprobs(ragged_batch(64))


@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_its_layers_are_as_near_to_fp32_as_ours(tmp_path: Path, family: str) -> None:
    """With norms before and behind, windows and YaRN."""
    if wrong := refused(Precision.bf16, Layers.transformer_engine):
        pytest.skip(wrong)
    model = write_model(tmp_path / "model", family=family, hidden=256, head_dim=64, ffn=512, std=0.05)
    cases = {
        "exact": (Precision.fp32, Layers.local),
        "ours": (Precision.bf16, Layers.local),
        "theirs": (Precision.bf16, Layers.transformer_engine),
    }
    results = {name: run_ranks(logprobs, 1, tmp_path / name, model, *case)[0] for name, case in cases.items()}
    ours, theirs = ((results[name] - results["exact"]).norm() for name in ("ours", "theirs"))
    assert 0 < theirs < SLACK * ours
