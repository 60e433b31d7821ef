"""The tolerance of the parity check, by the precisions of trainer and engine."""

from __future__ import annotations

import math

import pytest

from megatron_tempo.config.choices import EngineKind, EnginePrecision, Precision
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.training.parity import TOLERANCES
from tests.support.gates import GateOf

FP8 = [precision for precision in Precision if "fp8" in precision.name]


def checked(config: Config, gap: float) -> None:
    """The check of an engine whose log-probabilities are `gap` nats too low."""
    GateOf(config, gaps={-1: [gap]}).gate.at_start(0)


def config_of(trainer: Precision, engine: EnginePrecision | None, tolerance: float | None = None) -> Config:
    config = Config()
    config.run.precision, config.rollout.parity_tolerance = trainer, tolerance
    if engine is not None:
        config.rollout.engine, config.rollout.servers.precision = EngineKind.vllm, engine
    return config


CASES = [(precision, None, 0.05) for precision in (Precision.fp32, Precision.bf16)]
CASES += [(precision, None, 0.1) for precision in FP8]
CASES += [
    (Precision.bf16, EnginePrecision.bf16, 0.05),
    (Precision.fp32, EnginePrecision.bf16, 0.05),
    (Precision.bf16, EnginePrecision.fp8, 0.1),
    (Precision.fp8_blockwise, EnginePrecision.bf16, 0.1),
    (Precision.fp8_blockwise, EnginePrecision.fp8, 0.15),
]


@pytest.mark.parametrize(("trainer", "engine", "tolerance"), CASES)
def test_the_default_follows_from_the_precisions(
    trainer: Precision, engine: EnginePrecision | None, tolerance: float
) -> None:
    config = config_of(trainer, engine)
    checked(config, tolerance * 0.98)
    with pytest.raises(EngineError) as caught:
        checked(config, tolerance * 1.02)
    other = (engine or EnginePrecision[trainer.numbers.name]).name
    wanted = (
        f"rollout.parity_tolerance={tolerance:g} (default for {trainer.name} in the trainer, {other} in the engine)"
    )
    assert wanted in str(caught.value)


@pytest.mark.parametrize("tolerance", [0.01, 0.5])
def test_the_field_overrides_it(tolerance: float) -> None:
    config = config_of(Precision.fp8_blockwise, EnginePrecision.fp8, tolerance)
    checked(config, tolerance * 0.98)
    with pytest.raises(EngineError, match=rf"rollout\.parity_tolerance={tolerance:g}: every tensor"):
        checked(config, tolerance * 1.02)


def test_the_defaults_are_the_published_thresholds() -> None:
    """Of the mean of exp(|difference|) over tokens: 1.05 at equal precision, 1.1 with FP8 (docs/gpu.md).

    By Jensen's inequality its logarithm is not below the mean of |difference|. Two independent roundings add up by
    their squares.
    """
    assert TOLERANCES[0] == pytest.approx(math.log(1.05), rel=0.05)
    assert TOLERANCES[1] == pytest.approx(math.log(1.1), rel=0.05)
    assert TOLERANCES[2] == pytest.approx(math.sqrt(2) * TOLERANCES[1], rel=0.1)
