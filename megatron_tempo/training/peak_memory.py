"""Peak memory of each phase of a run: planned and measured.

On a GPU it is what torch has allocated there; on a CPU, the growth of the process since just before the models were
built. Both are the phase's peak and the maximum over all ranks.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tempo.config.choices import Layers
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.schema import Config
from megatron_tempo.observability.console import readable
from megatron_tempo.plan.memory import GB, MemoryPhase, memory, places_of, saved_bytes
from megatron_tempo.plan.shapes import shape_of

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Peaks by phase since the last `take`. A phase inside another counts for both.

    `planned`: bytes of a process by phase, as `megatron-tempo plan` computes them.
    """

    def __init__(self, device: torch.device, planned: dict[MemoryPhase, float]) -> None:
        self._device = device
        self._planned = planned
        self._before = _resident()
        self._open: list[str] = []
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._record_peak()
        self._open.append(name)
        try:
            yield
        finally:
            self._record_peak()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """`memory_gb/PHASE`, the largest of all ranks, in 10^9 bytes. Collective; all ranks had the same phases."""
        names = sorted(self._peaks)
        peaks = torch.tensor([self._peaks[name] for name in names], dtype=torch.float64)
        self._peaks.clear()
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        return {f"memory_gb/{name}": peak / GB for name, peak in zip(names, peaks.tolist(), strict=True) if peak}

    def _record_peak(self) -> None:
        """Credit the peak so far to the running phases, and reset it."""
        peak = self._peak()
        for name in self._open:
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)

    def _peak(self) -> float:
        """Bytes at the peak since the last call; 0 if this system does not report it."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return float(peak)
        with suppress(OSError):
            lines = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines())
            (_PROCESS / "clear_refs").write_text("5")  # resets VmHWM, the peak: man 5 proc
            return max(0.0, 1024.0 * int(lines["VmHWM"].split()[0]) - self._before)
        return 0.0

    def plan(self) -> str:
        """The planned peaks, in one line."""
        words = [f"{phase.value} {readable(size / GB, 2)}" for phase, size in self._planned.items()]
        line = f"memory of a process, planned, GB: {', '.join(words)}"
        if self._device.type == "cuda":
            size = torch.cuda.get_device_properties(self._device).total_memory
            if max(self._planned.values()) > size:
                line += f"; warning: the GPU has {size / GB:.1f}. `megatron-tempo plan` tells what fits"
        return line

    def comparison(self, measured: dict[str, float]) -> str:
        """The planned peaks next to those from `take`, in one line."""
        pairs = [(phase, measured.get(f"memory_gb/{phase.value}")) for phase in self._planned]
        words = [
            f"{phase.value} {readable(self._planned[phase] / GB, 2)} / {readable(peak, 2)}"
            for phase, peak in pairs
            if peak
        ]
        return f"memory of a process, planned / peak, GB: {', '.join(words)}"


def planned(config: Config, layers: Layers, world_size: int, device: torch.device) -> dict[MemoryPhase, float]:
    """Bytes of a trainer's process by phase, as `megatron-tempo plan` computes them, for `world_size` processes and the
    layers that were chosen for this machine. On a CPU what checkpoints are copied to is in the same memory."""
    shape, problems = shape_of(config)
    assert shape is not None, problems  # the check has read the same file
    cluster = config.cluster or _machines(world_size, device)
    model, parallel = replace(config.model, layers=layers), replace(config.parallel, world_size=world_size)
    here = replace(config, cluster=cluster, model=model, parallel=parallel)
    needed = memory(here, shape)
    saved = [saved_bytes(here, shape, place) for place in places_of(here, world_size)] if device.type == "cpu" else []
    kept = max(saved, default=0.0)
    return {phase: kept + needed.total(phase) for phase in needed.phases if phase is not MemoryPhase.serve}


def _resident() -> float:
    """Resident bytes of this process; 0 if this system does not report them."""
    with suppress(OSError):
        return float(int((_PROCESS / "statm").read_text().split()[1]) * resource.getpagesize())
    return 0.0


def _machines(world_size: int, device: torch.device) -> ClusterConfig:
    """This run's machines, as the plan describes them."""
    if device.type != "cuda":
        return ClusterConfig(gpus_per_node=world_size, memory_gb=1.0)
    nodes = max(1, world_size // torch.cuda.device_count())
    memory_gb = torch.cuda.get_device_properties(device).total_memory / GB
    return ClusterConfig(nodes=nodes, gpus_per_node=torch.cuda.device_count(), memory_gb=memory_gb)
