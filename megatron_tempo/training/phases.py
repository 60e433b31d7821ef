"""The phases of a run: how long each takes, its peak memory, and its name in traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.profiler import Profiler
from megatron_tempo.runtime import progress_marker
from megatron_tempo.training.peak_memory import PeakMemory


@dataclass(frozen=True, slots=True)
class PhaseTimer:
    """Measures phases for the run's metrics, its memory peaks and its traces."""

    metrics: Metrics
    peaks: PeakMemory
    profiler: Profiler

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Measure the code inside as phase `name`, `step` iterations into the run."""
        with (
            progress_marker.phase(name, step),
            self.metrics.phase(name),
            self.peaks.phase(name),
            self.profiler.phase(name),
        ):
            yield
