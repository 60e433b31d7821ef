"""torch profiler traces of chosen iterations, and NVTX ranges on a GPU.

A trace is DIR/profile/step_N/rank_R.json.gz, for chrome://tracing or Perfetto. It contains the run's phases by name. On
a GPU the phases are NVTX ranges in every iteration, for Nsight.
"""

from __future__ import annotations

import gzip
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_tempo.files import atomic_write

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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._export(trace, folder / f"rank_{self._rank}.json.gz")
        except OSError as error:
            log.warning("the trace in %s cannot be written (%s): the run continues without it", folder, error)

    def _export(self, trace: profile, path: Path) -> None:
        """Write the trace, compressed. torch itself compresses by a file's ending, which a temporary file lacks."""
        with tempfile.TemporaryDirectory() as scratch, atomic_write(path, fsync=False) as file:
            plain = Path(scratch) / "trace.json"
            trace.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(file, "wb") as target:
                shutil.copyfileobj(source, target)

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
