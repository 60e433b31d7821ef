"""The plan, next to the peaks of torch's real allocator in the whole program, run without a GPU (docs/planning.md)."""

from __future__ import annotations

import pytest

from megatron_tempo.cli import build
from megatron_tempo.config.choices import Published
from megatron_tempo.config.rules import Purpose
from megatron_tempo.plan.memory import GB, MemoryPhase, place_memory
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.shapes import PUBLISHED

TOLERANCE = 0.05
PHASES = ("sync", "values", "critic", "logprobs", "actor", "checkpoint")
# Qwen3-8B, 2K + 16K tokens, one model at a time, on four GPUs. By name: overrides, the pipeline stage of the process,
# and the peak of each phase in GB; None where it was not measured with the program as it is.
LOCAL = "model.layers=local"
PIPELINE = "parallel.tensor=1 parallel.pipeline=2 parallel.sequence=false"
MEASURED: dict[str, tuple[str, int, tuple[float | None, ...]]] = {
    "tensor 4": (LOCAL, 0, (39.26, 37.12, 42.38, 39.92, 45.80, 37.62)),
    "tensor 2, data 2": (f"{LOCAL} parallel.tensor=2", 0, (51.23, 48.13, 53.46, 51.87, 57.82, 49.77)),
    "first of two stages": (f"{LOCAL} {PIPELINE}", 0, (50.46, 53.30, 60.77, 53.30, 60.77, 49.61)),
    "last of two stages": (f"{LOCAL} {PIPELINE}", 1, (51.06, 45.98, 50.72, 53.45, 58.27, 50.07)),
    "tensor 2, context 2": (
        f"{LOCAL} parallel.tensor=2 parallel.context=2",
        0,
        (51.16, 47.33, 53.39, 51.07, 57.75, None),
    ),
    "the critic's tensor 2": (f"{LOCAL} parallel.critic.tensor=2", 0, (39.41, 48.28, 53.61, 40.08, 45.95, None)),
    "Transformer Engine": ("model.layers=transformer_engine", 0, (39.14, 36.97, 37.31, 39.77, 40.32, 37.50)),
    "recompute=attention": (
        f"{LOCAL} parallel.recompute=attention",
        0,
        (38.2, 36.9, 64.1, 39.7, 68.0, 37.1),
    ),
    "fp8_blockwise": ("run.precision=fp8_blockwise", 0, (46.09, 43.84, 44.20, 44.98, 47.27, 42.71)),
    "fp8_tensorwise": ("run.precision=fp8_tensorwise", 0, (46.09, 43.91, 44.21, 46.71, 47.27, 44.45)),
    "fp8_delayed": ("run.precision=fp8_delayed", 0, (46.09, 43.91, 44.23, 46.71, 47.27, 44.45)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_plan_is_near_what_the_allocator_gave(name: str) -> None:
    words, stage, peaks = MEASURED[name]
    base = ["experiment=qwen3_8b_aime", "cluster=h100x8", "rollout.placement=disaggregated"]
    config = build([*base, *words.split()], purpose=Purpose.plan)
    planned = place_memory(config, PUBLISHED[Published.qwen3_8b], dict.fromkeys(Role, stage))
    for phase, peak in zip(PHASES, peaks, strict=True):
        if peak is not None:
            assert sum(planned[MemoryPhase[phase]].values()) / GB == pytest.approx(peak, rel=TOLERANCE), phase
