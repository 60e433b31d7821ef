"""torch profiler traces of chosen iterations, and NVTX ranges on a GPU.

A trace is DIR/profile/step_N/rank_R.json.gz, for chrome://tracing or Perfetto. It contains the run's phases by name. On
a GPU the phases are NVTX ranges in every iteration, for Nsight.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)


class Profiler:
    """Traces the iterations `steps`, which count from 1 over both stages."""

    def __init__(self, steps: Sequence[int], folder: Path, device: torch.device, rank: int) -> None:
        self._steps, self._folder, self._rank = frozenset(steps), folder, rank
        self._cuda = device.type == "cuda"
        self._tracing = False

    def chosen(self, step: int) -> bool:
        return step in self._steps

    @contextmanager
    def iteration(self, step: int) -> Iterator[None]:
        """Trace the code inside if the iteration is one of `steps`."""
        if not self.chosen(step):
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        with profile(activities=activities) as trace:
            self._tracing = True
            try:
                yield
                if self._cuda:
                    torch.cuda.synchronize()  # queued work belongs to this iteration
            finally:
                self._tracing = False
        folder = self._folder / f"step_{step}"
        partial = folder / f"partial_rank_{self._rank}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(partial))
            os.replace(partial, folder / f"rank_{self._rank}.json.gz")
        except OSError as error:
            log.warning("the trace in %s cannot be written (%s): the run continues without it", folder, error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the code inside, in the trace and for Nsight."""
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
        try:
            if self._tracing:
                with record_function(name):
                    yield
            else:
                yield
        finally:
            if self._cuda:
                torch.cuda.nvtx.range_pop()
