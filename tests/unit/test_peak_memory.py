"""Peaks of memory by phase, measured on this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from megatron_tempo.cli import build
from megatron_tempo.config.choices import Layers
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import parallel_groups
from megatron_tempo.plan.memory import MemoryPhase
from megatron_tempo.training.peak_memory import PeakMemory, planned

MEGABYTES = 200


@pytest.fixture
def peaks() -> Iterator[PeakMemory]:
    install_cpu_backend()
    with parallel_groups(ParallelConfig(), torch.device("cpu"), 0):
        yield PeakMemory(torch.device("cpu"), {MemoryPhase.actor: 3e9, MemoryPhase.sync: 1.5e6})


def use_memory() -> None:
    torch.ones(MEGABYTES << 18)  # float32: large enough to go back to the system at once


def test_a_peak_is_its_phases_alone_and_those_around_it(peaks: PeakMemory) -> None:
    with peaks.phase("before"):
        pass
    with peaks.phase("outer"), peaks.phase("inner"):
        use_memory()
    with peaks.phase("after"):
        pass
    sizes = {name.removeprefix("memory_gb/"): size for name, size in peaks.take().items()}
    least = MEGABYTES * 2**20 / 1e9
    assert sizes["inner"] == sizes["outer"] >= 0.99 * least
    assert sizes["outer"] < least + 0.1
    assert all(sizes.get(name, 0.0) < 0.1 for name in ("before", "after"))
    assert peaks.take() == {}


def test_what_is_planned_stands_beside_it(peaks: PeakMemory) -> None:
    assert peaks.plan() == "memory of a process, planned, GB: actor 3, sync 0.0015"
    line = peaks.comparison({"memory_gb/actor": 2.51, "memory_gb/evaluate": 7.0})
    assert line == "memory of a process, planned / peak, GB: actor 3 / 2.5"


def test_on_a_cpu_the_copies_for_checkpoints_are_in_the_same_memory() -> None:
    """Weights, main weights and two moments of two models: 4 + 12 bytes a parameter."""
    config = build(["experiment=quickstart"])
    on_cpu = planned(config, Layers.local, 1, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_tempo.training.peak_memory.saved_bytes", lambda *_: 0.0)
        without = planned(config, Layers.local, 1, torch.device("cpu"))
    weights = sum(tensor.numel() for tensor in load_file(config.model.path + "/model.safetensors").values())
    for phase, size in on_cpu.items():
        assert size - without[phase] == pytest.approx(2 * 16 * weights, rel=0.05)
