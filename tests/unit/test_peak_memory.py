"""Peaks of memory by phase, measured on this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import parallel_groups
from megatron_tempo.plan.memory import MemoryPhase
from megatron_tempo.training.peak_memory import PeakMemory

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
